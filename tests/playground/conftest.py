"""Tiny models with fresh weights, and a real browser where there is one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxlm import init, tokenizers
from jaxlm.config import ModelConfig
from jaxlm.loading import Loaded
from jaxlm.presets import preset
from jaxlm.sample import prepare

LETTERS = "abcdefghijklmnopqrstuvwxyz ."


def loaded(cfg: ModelConfig, tokenizer: Any, seed: int, template: str | None = None) -> Loaded:
    # Four times the usual scale: fresh weights of the usual one hold all tokens equally likely.
    params = jax.tree.map(lambda x: 4 * x, init(cfg, jax.random.key(seed)))
    return Loaded(cfg, prepare(cfg, params), tokenizer, (tokenizer.eot_id,), template)


@pytest.fixture(scope="session")
def model() -> Loaded:
    """A tiny transformer on letters, with everything that makes a cache hard: mixed embeddings and shifted keys."""
    tokenizer = tokenizers.char(LETTERS, eot=True)
    cfg = preset(
        "nano", vocab_size=tokenizer.vocab_size, n_layers=1, d_model=32, n_heads=2, max_seq_len=96, embed_mix=2,
        zero_init_head=False, zero_init_out=False,
    )  # fmt: skip
    return loaded(cfg, tokenizer, 1, template="{prompt}.")


@pytest.fixture(scope="session")
def table() -> Loaded:
    """A bigram table on the same letters."""
    tokenizer = tokenizers.char(LETTERS, eot=True)
    found = loaded(preset("bigram", vocab_size=tokenizer.vocab_size, max_seq_len=96), tokenizer, 2)
    size = tokenizer.vocab_size
    return found._replace(params={"bigram": {"table": 2 * jax.random.normal(jax.random.key(3), (size, size))}})


class Page:
    """A page of a headless Chromium, driven through the DevTools protocol."""

    def __init__(self, address: str) -> None:
        from websockets.sync.client import connect

        self._socket = connect(address, max_size=None)
        self._number = 0
        self.requests: list[str] = []
        for domain in ("Page", "Runtime", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        """Sends a command and waits for its result; requests that the page makes meanwhile are noted."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            said = json.loads(self._socket.recv(timeout=30))
            if said.get("method") == "Network.requestWillBeSent":
                self.requests.append(said["params"]["request"]["url"])
            if said.get("id") == self._number:
                assert "error" not in said, said
                return said["result"]

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def wait(self, script: str, seconds: float = 60) -> float:
        """Waits until an expression is true; returns the seconds that it took."""
        start = time.monotonic()
        while not self.run(script):
            waited = time.monotonic() - start
            assert waited < seconds, f"waited {waited:.0f} s for {script}; {self.run('document.body.innerText')}"
            time.sleep(0.02)
        return time.monotonic() - start

    def point(self, selector: str, *, click: bool = False) -> None:
        """Moves the mouse onto an element, and clicks on it."""
        x, y = self.run(
            f"(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView({{block: 'center'}});"
            "const r = e.getClientRects()[0]; return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mouseMoved", *(("mousePressed", "mouseReleased") if click else ())):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left" if click else "none", clickCount=1)

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(scope="session")
def browser() -> Iterator[Callable[[], Page]]:
    """browser() opens a new empty page."""
    httpx = pytest.importorskip("httpx")
    pytest.importorskip("websockets", reason="the browser is driven through websockets")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("there is no Chromium here: apt-get install chromium")
    # Its sockets lie in TMPDIR, and outlive it where it is ended; their addresses must be shorter than pytest's paths.
    profile = Path(tempfile.mkdtemp(prefix="browser-"))
    quiet = ("no-first-run", "disable-background-networking", "disable-component-update", "disable-sync", "disable-gpu")
    process = subprocess.Popen(
        [program, "--headless=new", "--no-sandbox", "--remote-debugging-port=0", f"--user-data-dir={profile}",
         "--window-size=1200,900", *(f"--{name}" for name in quiet), "about:blank"],
        env={**os.environ, "TMPDIR": str(profile)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    pages: list[Page] = []
    try:
        port = _port(profile / "DevToolsActivePort", process)

        def open_page() -> Page:
            made = httpx.put(f"http://127.0.0.1:{port}/json/new?about:blank", timeout=30).json()
            pages.append(Page(made["webSocketDebuggerUrl"]))
            return pages[-1]

        yield open_page
    finally:
        for page in pages:
            page.close()
        process.terminate()
        process.wait(20)
        shutil.rmtree(profile, ignore_errors=True)


def _port(file: Path, process: subprocess.Popen[bytes]) -> int:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if file.is_file() and (lines := file.read_text().splitlines()):
            return int(lines[0])
        time.sleep(0.1)
    pytest.skip(f"Chromium did not start (exit code {process.poll()})")
