from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator

import pytest

from jaxlm.errors import InputError

pytest.importorskip("starlette", reason="the page needs the playground extra")

import httpx
import jax
from starlette.testclient import TestClient

from jaxlm.playground import Settings, answer, answers, server
from jaxlm.playground.explain import Token

QUICK_COMPILE = True
GREEDY = {"strategy": "greedy", "max_new_tokens": 6}


@pytest.fixture(scope="module")
def client(model, table) -> TestClient:
    return TestClient(server.app({"small": model, "table": table}), base_url=f"http://{server.HOST}")


def ask(client: TestClient, **changes) -> list[dict]:
    body = {"prompt": "ab", "models": ["small"], "settings": GREEDY} | changes
    response = client.post("/api/answer", json=body)
    return [response.status_code, *map(json.loads, response.text.splitlines())]


def test_the_page_brings_all_that_it_uses(client):
    for path, name in server.FILES.items():
        response = client.get(path)
        assert response.status_code == 200
        assert response.content == (server.PAGE / name).read_bytes()
        assert "default-src 'self'" in response.headers["content-security-policy"]
        # No address of any other host, in whatever form.
        assert re.findall(r"(?:https?:)?//[\w.-]+\.\w+", response.text) == []


def test_the_page_and_its_script_agree_on_the_elements(client):
    page, script = client.get("/").text, client.get("/page.js").text
    for name in re.findall(r"\$\(\"([\w-]+)\"\)", script):
        assert f'id="{name}"' in page, name


def test_models_and_controls_are_told(client):
    told = client.get("/api/models").json()
    assert told["models"] == [{"name": "small", "chat": True}, {"name": "table", "chat": False}]
    assert told["prompt"] == "Once upon a time"
    assert told["controls"]["temperature"]["max"] == 5
    assert set(told["used"]["sampling"]) == {"temperature", "top_k", "top_p", "seed"}


def test_an_answer_comes_as_lines(client, model):
    status, *lines = ask(client)
    assert status == 200
    expected = list(answer(model, "ab", Settings(**GREEDY)))
    assert [line["event"] for line in lines] == ["token"] * (len(expected) - 1) + ["end"]
    for line, event in zip(lines, expected, strict=True):
        if isinstance(event, Token):
            assert line["pane"] == 0
            assert (line["token"], line["text"], line["prob"]) == (event.token, event.text, event.prob)
            assert len(line["rivals"]) == 8
            assert line["rivals"][0]["prob"] == event.rivals[0].prob


def test_a_note_that_lasts_is_told_as_one(client):
    status, note, *_ = ask(client, models=["table"], settings=GREEDY | {"chat": True})
    assert (status, note["pane"], note["event"], note["lasts"]) == (200, 0, "note", True)
    assert "no chat template" in note["text"]


def test_one_model_can_be_asked_twice(client):
    _, *lines = ask(client, models=["table", "table"])
    first, second = ([line["token"] for line in lines if line["pane"] == i and "token" in line] for i in (0, 1))
    assert first
    assert first == second


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"models": ["nobody"]}, "'nobody' is not open; there are small, table"),
        ({"models": []}, "models: choose one model or two, found []"),
        ({"models": ["small"] * 3}, "models: choose one model or two, found"),
        ({"settings": {"temperature": -1}}, "settings.temperature"),
        ({"settings": {"temprature": 1}}, "did you mean temperature"),
        ({"settings": {"strategy": "best"}}, "settings.strategy"),
        ({"prompt": "é"}, "not among the tokenizer's"),
        ({"prompt": "a" * 200}, "shorten one of them"),
        ({"prompt": 5}, "prompt"),
    ],
)
def test_what_is_wrong_is_one_sentence(client, change, sentence):
    status, line = ask(client, **change)
    assert status == 400
    assert sentence in line["error"]


def test_what_fails_is_one_sentence_and_the_server_goes_on(client, monkeypatch, caplog):
    def search(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes.\nmore of it")

    with monkeypatch.context() as patch:
        patch.setattr(answers, "beam_search", search)
        status, note, line = ask(client, settings={"strategy": "beam", "max_new_tokens": 6})
        assert (status, note["event"], list(line)) == (200, "note", ["error"])
        assert "(JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes); if memory" in line["error"]
        assert "more of it" in caplog.text  # with the traceback, for whoever mends it
        patch.setattr(server, "side_by_side", lambda *args, **kwargs: {}["nothing"])
        status, line = ask(client)
        assert (status, line["error"].partition(";")[0]) == (500, "the answer failed (KeyError: 'nothing')")
    assert ask(client)[-1]["event"] == "end"


@pytest.mark.parametrize("body", [b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_body_that_is_no_request(client, body):
    response = client.post("/api/answer", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"].startswith("the request")


def test_other_sites_may_not_ask(client):
    body = {"prompt": "a", "models": ["small"]}
    assert client.post("/api/answer", json=body, headers={"sec-fetch-site": "cross-site"}).status_code == 403
    assert client.post("/api/answer", content=json.dumps(body)).status_code == 415
    # A name that was pointed at this machine to get past the browser's rules.
    assert client.get("/api/models", headers={"host": "evil.example"}).status_code == 400


def test_ports():
    with server.listen(None) as one:
        host, port = one.getsockname()
        assert host == "127.0.0.1"
        with pytest.raises(InputError, match=rf"--port {port}: cannot be listened on"):
            server.listen(port)
    with server.listen(port) as again:
        assert again.getsockname()[1] == port
    for wrong in (0, -1, 65536):
        with pytest.raises(InputError, match="must be between 1 and 65535"):
            server.listen(wrong)


@pytest.fixture
def address(model, table) -> Iterator[str]:
    """A server of its own, on a real socket."""
    uvicorn = pytest.importorskip("uvicorn")
    listener = server.listen(None)
    config = uvicorn.Config(server.app({"small": model, "table": table}), log_level="error", lifespan="off", ws="none")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    running.should_exit = True
    thread.join(10)
    listener.close()


def test_tokens_come_one_by_one_and_end_when_the_reader_goes(address, monkeypatch):
    steps = []
    real = server.side_by_side

    def slowly(*args, **kwargs):
        for event in real(*args, **kwargs):
            steps.append(time.monotonic())
            time.sleep(0.05)
            yield event

    monkeypatch.setattr(server, "side_by_side", slowly)
    body = {"prompt": "a", "models": ["table"], "settings": {"max_new_tokens": 80, "temperature": 3, "top_p": 1}}
    with httpx.stream("POST", f"{address}/api/answer", json=body, timeout=20) as response:
        lines = response.iter_lines()
        assert json.loads(next(lines))["event"] == "token"
        assert len(steps) < 10  # the first came long before the last
    time.sleep(0.5)
    stopped_at = len(steps)
    time.sleep(0.4)
    assert len(steps) <= stopped_at + 1
    assert len(steps) < 60


def test_a_search_ends_when_the_reader_goes(address, monkeypatch):
    """Beam search says nothing until it has ended, so it has to ask."""
    ended = threading.Event()

    def searching(*args, stopped, **kwargs):
        deadline = time.monotonic() + 20
        while not stopped() and time.monotonic() < deadline:
            time.sleep(0.01)
        if stopped():
            ended.set()
        return real(*args, stopped=stopped, **kwargs)

    real = answers.beam_search
    monkeypatch.setattr(answers, "beam_search", searching)
    body = {"prompt": "a", "models": ["small"], "settings": {"strategy": "beam", "max_new_tokens": 80}}
    with httpx.stream("POST", f"{address}/api/answer", json=body, timeout=20) as response:
        lines = response.iter_lines()
        assert json.loads(next(lines))["event"] == "note"
        assert not ended.wait(0.3)
    assert ended.wait(5)
