from __future__ import annotations

import re
import sys
import time

import jax
import pytest

from jaxlm.errors import InputError

widgets = pytest.importorskip("ipywidgets", reason="the panel needs the playground extra")

from jaxlm.playground import Settings, answer, answers  # noqa: E402
from jaxlm.playground.explain import Token  # noqa: E402
from jaxlm.playground.panel import NONE, Panel  # noqa: E402
from jaxlm.playground.settings import USED  # noqa: E402

QUICK_COMPILE = True


@pytest.fixture
def panel(model, table) -> Panel:
    made = Panel({"small": model, "table": table}, prompt="ab")
    for name, value in {"strategy": "greedy", "max_new_tokens": 5}.items():
        made.settings[name].value = value
    return made


def texts(model, **changes) -> list[str]:
    settings = Settings(strategy="greedy", max_new_tokens=5).replace(**changes)
    return [event.text for event in answer(model, "ab", settings) if isinstance(event, Token)]


def test_it_has_the_controls_of_the_page(panel):
    assert set(panel.settings) == set(Settings.model_fields)
    for name, widget in panel.settings.items():
        assert widget in panel.view.children, name
    assert panel.settings["temperature"].max == 5


def test_it_is_shown_as_the_last_line_of_a_cell(panel):
    bundle = panel._repr_mimebundle_()
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == panel.view.model_id
    assert "run this cell" in bundle["text/plain"]


def test_two_models_side_by_side(panel, model, table):
    panel.generate()
    assert panel.status.value == "done"
    for box, name, found in zip(panel.answers, ("small", "table"), (model, table), strict=True):
        assert name in box.value
        assert box.value.count("<span") == 1 + len(texts(found))  # the prompt, then the tokens
        assert "rank 1" in box.value


def test_the_end_is_told_below_the_answer(panel):
    panel.generate()
    for box in panel.answers:
        assert re.search(
            r"5 tokens, first after [\d.]+ s, then \d+ a second; perplexity .*; ended by length", box.value
        )


def test_what_was_stopped_says_so(panel, monkeypatch):
    panel.settings["max_new_tokens"].value = 60
    monkeypatch.setattr(panel._stopped, "clear", panel._stopped.set)  # the button, as soon as it can be pressed
    panel.generate()
    assert panel.status.value == "stopped"
    assert "ended by stopped" in panel.answers[0].value


def test_a_panel_needs_a_model():
    with pytest.raises(InputError, match="models: expected at least one"):
        Panel({})


def test_one_model_alone(panel):
    panel.second.value = NONE
    panel.generate()
    assert panel.answers[0].value
    assert panel.answers[1].value == ""


def test_settings_reach_the_model(panel, model):
    panel.second.value = NONE
    panel.settings["max_new_tokens"].value = 3
    panel.generate()
    assert panel.answers[0].value.count("<span") == 4
    panel.settings["chat"].value = True
    panel.generate()
    assert panel.answers[0].value.count("<span") == 1 + len(texts(model, max_new_tokens=3, chat=True))


def test_a_model_without_a_template_says_so_to_the_end(panel):
    panel.settings["chat"].value = True
    panel.generate()
    assert panel.status.value.startswith("done; table: no chat template")
    assert "ab\n\n" in panel.answers[0].value
    assert "ab\n\n" not in panel.answers[1].value


@pytest.mark.parametrize("strategy", list(USED))
def test_what_a_strategy_does_not_use_cannot_be_moved(panel, strategy):
    panel.settings["strategy"].value = strategy
    for name in {name for names in USED.values() for name in names}:
        assert panel.settings[name].disabled == (name not in USED[strategy]), name


def test_what_is_wrong_is_told_and_the_panel_goes_on(panel):
    panel.prompt.value = "é"
    panel.generate()
    assert "not among the tokenizer's" in panel.status.value
    assert not panel.go.disabled
    panel.prompt.value = "ab"
    panel.generate()
    assert panel.status.value == "done"


def test_memory_that_runs_out_is_told_and_the_panel_goes_on(panel, monkeypatch):
    def search(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes.\nmore of it")

    monkeypatch.setattr(answers, "beam_search", search)
    panel.settings["strategy"].value = "beam"
    panel.generate()
    assert panel.status.value == (
        "the answer failed (JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes); "
        "if memory ran out, use fewer beams or a shorter answer."
    )
    panel.settings["strategy"].value = "greedy"
    panel.generate()
    assert panel.status.value == "done"


def test_the_buttons(panel, monkeypatch):
    import jaxlm.playground.panel as module

    real = module.side_by_side

    def slowly(*args, **kwargs):
        for event in real(*args, **kwargs):
            time.sleep(0.02)
            yield event

    monkeypatch.setattr(module, "side_by_side", slowly)
    panel.second.value, panel.first.value = NONE, "table"
    for name, value in {"strategy": "sampling", "temperature": 3.0, "top_p": 1.0, "max_new_tokens": 80}.items():
        panel.settings[name].value = value
    panel.go.click()
    deadline = time.monotonic() + 20
    while not panel.answers[0].value and time.monotonic() < deadline:
        time.sleep(0.01)
    assert panel.go.disabled
    panel.stop.click()
    panel._thread.join(10)
    assert not panel._thread.is_alive()
    assert not panel.go.disabled
    assert panel.answers[0].value.count("<span") < 60


def test_without_ipywidgets_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    monkeypatch.delitem(sys.modules, "jaxlm.playground.panel")
    with pytest.raises(InputError, match=r"pip install 'jaxlm\[playground\]'"):
        import jaxlm.playground.panel  # noqa: F401
