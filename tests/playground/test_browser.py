"""The page in a real browser. Skipped where there is no Chromium."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="the page needs the playground extra")

import uvicorn

from jaxlm import tokenizers
from jaxlm.loading import Loaded
from jaxlm.playground import Settings, answer, answers, server, warm
from jaxlm.playground.explain import Token

pytestmark = pytest.mark.slow


@contextmanager
def served(models: dict[str, Loaded]) -> Iterator[str]:
    listener = server.listen(None)
    config = uvicorn.Config(server.app(models), log_level="error", lifespan="off", ws="none")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    running.should_exit = True
    thread.join(10)
    listener.close()


@pytest.fixture(scope="module")
def address(model: Loaded, table: Loaded) -> Iterator[str]:
    for one in (model, table):
        warm(one)
    with served({"small": model, "table": table}) as found:
        yield found


@pytest.fixture
def page(browser, address):
    opened = browser()
    opened.call("Page.navigate", url=address)
    opened.wait("document.getElementById('status')?.textContent === 'ready'")
    fill(opened, prompt="ab", max_new_tokens=6)
    return opened


def fill(page, **values: object) -> None:
    for name, value in values.items():
        page.run(
            f"(() => {{ const e = document.getElementById({name!r}); e.value = {json.dumps(value)};"
            "e.dispatchEvent(new Event('input')); })()"
        )


def choose(page, strategy: str) -> None:
    page.point(f"input[value={strategy}]", click=True)


def done(page) -> None:
    page.wait("document.querySelectorAll('.pane').length > 0 && [...document.querySelectorAll('.pane')]"
              ".every(pane => pane.dataset.ended)")  # fmt: skip


def texts(page, pane: int) -> list[str]:
    return page.run(
        f"[...document.querySelectorAll('.pane')[{pane}].querySelectorAll('.token')].map(token => token.told.text)"
    )


def said(model: Loaded, prompt: str, settings: Settings) -> list[str]:
    return [event.text for event in answer(model, prompt, settings) if isinstance(event, Token)]


def test_two_models_answer_side_by_side(page, address, model, table):
    choose(page, "greedy")
    page.point("#go", click=True)
    done(page)
    settings = Settings(strategy="greedy", max_new_tokens=6)
    assert texts(page, 0) == said(model, "ab", settings)
    assert texts(page, 1) == said(table, "ab", settings)
    names = page.run("[...document.querySelectorAll('.pane h2')].map(name => name.textContent)")
    assert names == ["small", "table"]
    assert "tokens, first after" in page.run("document.querySelector('.figures').textContent")
    # The page's own three files and two calls, and no other address.
    page.run("1")
    assert page.requests
    assert all(url.startswith((address, "data:", "about:")) for url in page.requests), page.requests


@pytest.mark.parametrize("how", ["mouse", "keys"])
def test_a_token_shows_its_rivals(page, model, how):
    fill(page, seed=5, temperature=1, top_k=3, top_p=1, **{"model-b": ""})
    page.point("#go", click=True)
    done(page)
    assert page.run("document.getElementById('card').hidden")
    settings = Settings(seed=5, temperature=1, top_k=3, top_p=1, max_new_tokens=6)
    tokens = [event for event in answer(model, "ab", settings) if isinstance(event, Token)]
    if how == "mouse":
        expected = tokens[0]
        page.point(".token")
    else:
        expected = tokens[1]
        page.run("document.querySelector('.token').focus()")
        for kind in ("keyDown", "keyUp"):
            page.call("Input.dispatchKeyEvent", type=kind, key="ArrowRight", code="ArrowRight")
    page.wait("!document.getElementById('card').hidden")
    card = page.run("document.getElementById('card').innerText")
    assert f"id {expected.token} · rank {expected.rank + 1}" in card
    assert f"after settings {100 * expected.kept:.1f} %" in card
    rows = page.run("[...document.querySelectorAll('#card tr')].slice(1).map(row => row.className)")
    assert len(rows) == 8
    assert rows.count("chosen") == 1
    assert rows[3:] == ["dropped"] * 5
    if how == "keys":
        page.call("Input.dispatchKeyEvent", type="keyDown", key="Escape", code="Escape")
    else:
        page.point("h1")
    page.wait("document.getElementById('card').hidden")


def test_beams_and_the_same_settings_again(page, table):
    fill(page, **{"model-a": "table", "model-b": ""})
    choose(page, "beam")
    assert page.run("document.getElementById('temperature').disabled")
    assert not page.run("document.getElementById('beams').disabled")
    page.point("#go", click=True)
    done(page)
    assert texts(page, 0) == said(table, "ab", Settings(strategy="beam", max_new_tokens=6))


def test_a_note_that_lasts_stays_above_its_answer(page):
    page.point("#chat", click=True)
    page.point("#go", click=True)
    done(page)
    notes = page.run("[...document.querySelectorAll('.pane .note')].map(note => note.textContent)")
    assert notes[0] == ""
    assert "no chat template" in notes[1]
    assert page.run("[...document.querySelectorAll('.prompt')].map(one => one.textContent)") == ["ab\n\n", "ab"]


def test_what_is_wrong_is_said_on_the_page(page):
    fill(page, prompt="a" * 90, max_new_tokens=60)
    page.point("#go", click=True)
    page.wait("document.getElementById('status').classList.contains('wrong')")
    assert "shorten one of them" in page.run("document.getElementById('status').textContent")
    fill(page, prompt="ab", max_new_tokens=4)
    page.point("#go", click=True)
    done(page)


def test_an_answer_can_be_stopped(page, monkeypatch):
    real = server.side_by_side

    def slowly(*args, **kwargs):
        for event in real(*args, **kwargs):
            time.sleep(0.1)
            yield event

    monkeypatch.setattr(server, "side_by_side", slowly)
    fill(page, max_new_tokens=60, temperature=3, top_p=1, **{"model-a": "table", "model-b": ""})
    page.point("#go", click=True)
    page.wait("document.querySelectorAll('.token').length > 1")
    page.point("#stop", click=True)
    page.wait("document.getElementById('status').textContent === 'stopped'")
    tokens = page.run("document.querySelectorAll('.token').length")
    assert tokens < 40
    figures = page.run("document.querySelector('.figures').textContent")
    probs = page.run("[...document.querySelectorAll('.token')].map(token => token.told.prob)")
    perplexity = math.exp(-sum(map(math.log, probs)) / tokens)
    assert figures == f"{tokens} tokens; perplexity {perplexity:.3g}; ended by stopped"
    assert not page.run("document.getElementById('go').disabled")


def test_an_answer_that_the_server_ends_is_stopped_and_not_done(page, monkeypatch):
    real = server.side_by_side

    def ends(*args, stopped, **kwargs):
        asked = iter([False] * 2 + [True] * 1000)
        return real(*args, stopped=lambda: next(asked), **kwargs)

    monkeypatch.setattr(server, "side_by_side", ends)
    fill(page, max_new_tokens=60, temperature=3, top_p=1, **{"model-a": "table", "model-b": ""})
    page.point("#go", click=True)
    page.wait("document.getElementById('status').textContent === 'stopped'")
    assert "ended by stopped" in page.run("document.querySelector('.figures').textContent")


def test_without_a_server_the_page_says_so(page):
    page.run("window.fetch = () => Promise.reject(new TypeError('Failed to fetch'))")  # as a browser does then
    page.point("#go", click=True)
    page.wait("document.getElementById('status').classList.contains('wrong')")
    assert "the playground has gone" in page.run("document.getElementById('status').textContent")


def test_numbers_between_the_sliders_steps_can_be_typed(page, model):
    fill(page, temperature=0.33, top_p=0.995, **{"model-b": ""})
    page.point("#go", click=True)
    done(page)
    assert texts(page, 0) == said(model, "ab", Settings(temperature=0.33, top_p=0.995, max_new_tokens=6))


def test_an_empty_number_is_not_sent(page):
    fill(page, temperature="", **{"model-b": ""})
    page.point("#go", click=True)
    time.sleep(0.3)
    assert page.run("document.querySelectorAll('.pane').length") == 0
    assert page.run("document.getElementById('temperature').validity.valueMissing")


def test_an_empty_number_that_cannot_be_edited_is_not_sent(page, model):
    choose(page, "beam")
    fill(page, beams="", **{"model-b": ""})
    choose(page, "greedy")
    page.point("#go", click=True)
    done(page)
    assert texts(page, 0) == said(model, "ab", Settings(strategy="greedy", max_new_tokens=6))


def test_a_search_that_fails_is_told_and_is_under_way_no_more(page, monkeypatch):
    def search(*args, **kwargs):
        raise MemoryError("no more")

    monkeypatch.setattr(answers, "beam_search", search)
    choose(page, "beam")
    page.point("#go", click=True)
    page.wait("document.getElementById('status').classList.contains('wrong')")
    assert "(MemoryError: no more); if memory ran out" in page.run("document.getElementById('status').textContent")
    assert page.run("[...document.querySelectorAll('.pane .note')].map(note => note.textContent)") == ["", ""]


def test_markup_from_a_model_stays_text(page):
    page.run("document.getElementById('prompt').value = '<img src=x onerror=window.broken=1>'")
    fill(page, **{"model-b": ""})
    page.point("#go", click=True)
    page.wait("document.getElementById('status').classList.contains('wrong')")  # not letters of this model
    assert page.run("document.querySelectorAll('#panes img').length") == 0
    assert "<img" in page.run("document.querySelector('.prompt').textContent")


def test_the_first_token_of_a_large_model_comes_soon(browser, capsys):
    """135 million parameters, compiled when the page is opened: the first token within 5 s of opening it."""
    import jax

    from jaxlm import init
    from jaxlm.presets import preset
    from jaxlm.sample import prepare

    cfg = preset("smollm2-135m")
    tokenizer = tokenizers.char("".join(map(chr, range(32, 32 + cfg.vocab_size - 1))), eot=True)
    # Random weights: time does not depend on them.
    model = Loaded(cfg, prepare(cfg, init(cfg, jax.random.key(0))), tokenizer, (tokenizer.eot_id,))
    compiling = warm(model)
    with served({"large": model}) as where:
        page = browser()
        start = time.monotonic()
        page.call("Page.navigate", url=where)
        page.wait("document.getElementById('status')?.textContent === 'ready'")
        page.point("#go", click=True)
        page.wait("document.querySelector('.token') !== null", seconds=60)
        seconds = time.monotonic() - start
        page.wait("document.querySelector('.pane').dataset.ended", seconds=120)
        figures = page.run("document.querySelector('.figures').textContent")
    with capsys.disabled():
        print(f"\n135M model: compiled in {compiling:.1f} s; first token {seconds:.2f} s after opening; {figures}")
    if picture := os.environ.get("JAXLM_SCREENSHOT"):
        import base64

        Path(picture).write_bytes(base64.b64decode(page.call("Page.captureScreenshot")["data"]))
    assert seconds < 5
