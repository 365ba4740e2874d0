"""Repositories on the hub, served here by a small server that answers like it: fetched once, pinned, usable offline."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

# One process for the whole story: huggingface_hub reads its settings when it is imported.
ASK = """
import json, sys
from jaxlm.errors import JaxlmError
from jaxlm.interop import load_hf
from jaxlm.loading import load_model, read_shape

for line in sys.stdin:
    repo, revision, what = json.loads(line)
    try:
        if what == "shape":
            print(json.dumps({"vocab_size": read_shape(repo).vocab_size}), flush=True)
            continue
        if what == "model":
            load_model(repo)  # which has no tokenizer
        cfg, params, tokenizer = load_hf(repo, revision=revision)
        answer = {"vocab_size": cfg.vocab_size, "first": float(params["embed"]["tokens"][0, 0])}
    except JaxlmError as error:
        answer = {"exit_code": error.exit_code, "text": str(error)}
    print(json.dumps(answer), flush=True)
"""
COMMITS = {"main": "a" * 40, "v1": "b" * 40}


class Hub:
    """Two commits of owner/model; `gone` is no repository, `gated` one that asks for access."""

    def __init__(self, commits: dict[str, Path]) -> None:
        self.commits = commits
        self.fetched: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            # HTTP/1.0: no connection outlives its answer, so a server that has stopped is silent.
            def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def do_GET(self) -> None:
                parts = self.path.partition("?")[0].strip("/").split("/")
                if parts[0] == "api" and parts[2:4] != ["owner", "model"]:
                    if parts[3] == "gated":
                        return self.reply(403, X_Error_Code="GatedRepo")
                    return self.reply(404, X_Error_Code="RepoNotFound")
                if parts[0] == "api":
                    commit = COMMITS.get(parts[5], parts[5])
                    if commit not in hub.commits:
                        return self.reply(404, X_Error_Code="RevisionNotFound")
                    files = sorted(hub.commits[commit].iterdir())
                    if parts[4] == "tree":
                        entries = [
                            {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": hub.oid(f)} for f in files
                        ]
                        return self.reply(200, json.dumps(entries).encode(), Content_Type="application/json")
                    about = {"id": "owner/model", "sha": commit, "siblings": [{"rfilename": f.name} for f in files]}
                    return self.reply(200, json.dumps(about).encode(), Content_Type="application/json")
                _, _, _, commit, name = parts
                file = hub.commits[commit] / name
                if self.command == "GET":
                    hub.fetched.append(name)
                return self.reply(200, file.read_bytes(), ETag=f'"{hub.oid(file)}"', X_Repo_Commit=commit)

            do_HEAD = do_GET

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def oid(self, file: Path) -> str:
        return hashlib.sha1(file.read_bytes()).hexdigest()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def hub(write_hf, tensors_of, expected, tmp_path) -> Iterator[Hub]:
    config, weights = expected["qwen3"]["config"], tensors_of("qwen3")
    older = {name: 2 * weight for name, weight in weights.items()}
    commits = {
        COMMITS["main"]: write_hf(tmp_path / "main", config, weights, shards=2),
        COMMITS["v1"]: write_hf(tmp_path / "v1", config, older),
    }
    for directory in commits.values():
        (directory / "pytorch_model.bin").write_bytes(b"a pickle, of no use here")
    served = Hub(commits)
    yield served
    served.stop()


@pytest.fixture
def ask(hub, tmp_path) -> Iterator[Callable[..., dict[str, Any]]]:
    settings = {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))} | settings
    child = subprocess.Popen(
        [sys.executable, "-c", ASK], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def question(repo: str, revision: str | None = None, what: str = "weights") -> dict[str, Any]:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(json.dumps([repo, revision, what]) + "\n")
        child.stdin.flush()
        return json.loads(child.stdout.readline())

    yield question
    child.communicate(timeout=60)


def test_a_repository_is_fetched_once_pinned_and_there_without_a_network(hub, ask, tensors_of):
    first = float(tensors_of("qwen3")["model.embed_tokens.weight"][0, 0])
    assert ask("owner/model", what="shape") == {"vocab_size": 61}
    assert hub.fetched == ["config.json"]  # nobody asks for the weights
    assert ask("owner/model") == {"vocab_size": 61, "first": first}
    assert "pytorch_model.bin" not in hub.fetched
    assert len([name for name in hub.fetched if name.endswith(".safetensors")]) == 2
    assert ask("owner/model", "v1")["first"] == 2 * first
    assert ask("owner/model@v1", what="shape") == {"vocab_size": 61}
    answer = ask("owner/model@v1", what="model")
    assert answer["text"].startswith("owner/model@v1: there is no tokenizer with these weights")
    fetched = len(hub.fetched)
    assert ask("owner/model")["first"] == first
    assert len(hub.fetched) == fetched

    for repo, revision, words in (
        ("owner/gone", None, "owner/gone: no such directory or repository"),
        ("owner/model", "v9", "owner/model at v9: no such revision"),
        ("owner/gated", None, "owner/gated: access must be asked for"),
        ("owner//model", None, "owner//model: there is no such directory, and a repository's name is owner/name"),
    ):
        answer = ask(repo, revision)
        assert answer["exit_code"] == 65
        assert words in answer["text"]

    hub.stop()
    assert ask("owner/model")["first"] == first
    assert ask("owner/model", COMMITS["v1"])["first"] == 2 * first
    answer = ask("owner/other")
    assert answer["exit_code"] == 69
    assert answer["text"].startswith("owner/other: cannot be downloaded and is not in the cache")
    assert "\n" not in answer["text"]
