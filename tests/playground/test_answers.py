from __future__ import annotations

import codecs
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import apply, tokenizers
from jaxlm.chat import chat_ids
from jaxlm.errors import InputError
from jaxlm.loading import Loaded, start_ids
from jaxlm.playground import answers, steps
from jaxlm.playground.answers import End, Note, answer, side_by_side
from jaxlm.playground.explain import Token
from jaxlm.playground.settings import EXAMPLES, USED, Settings, controls
from jaxlm.playground.steps import CHUNK, warm
from jaxlm.sample import Sampling, beam_loop, beam_search, generate

QUICK_COMPILE = True
LONG = "the quick brown fox jumps over the lazy dog."  # more than one chunk
GREEDY = Settings(strategy="greedy", max_new_tokens=20)
BEAM = Settings(strategy="beam", beams=3, max_new_tokens=6)


def split(model: Loaded, prompt: str, settings: Settings, **more: Any) -> tuple[list[Token], End]:
    *said, end = answer(model, prompt, settings, **more)
    assert isinstance(end, End)
    return [event for event in said if isinstance(event, Token)], end


SAMPLED = [
    (GREEDY, Sampling(temperature=0)),
    (Settings(temperature=1.0, top_p=1.0, seed=3, max_new_tokens=20), Sampling()),
    (
        Settings(temperature=0.7, top_k=5, top_p=0.9, seed=2**32 - 1, max_new_tokens=20),
        Sampling(temperature=0.7, top_k=5, top_p=0.9),
    ),
]


@pytest.mark.parametrize(("settings", "sampling"), SAMPLED)
def test_an_answer_is_what_generate_gives(model, settings, sampling):
    assert len(LONG) > CHUNK
    ids = start_ids(model.tokenizer, empty=False) + model.tokenizer.encode(LONG)
    (expected,) = generate(
        model.cfg, model.params, [ids], sampling=sampling, max_new_tokens=20, stop_ids=model.stop_ids,
        key=jax.random.key(np.uint32(settings.seed)), tokenizer=model.tokenizer,
    )  # fmt: skip
    tokens, end = split(model, LONG, settings)
    assert [token.token for token in tokens] == expected.tokens
    assert "".join(token.text for token in tokens) + end.rest == expected.text
    np.testing.assert_allclose([-token.surprise for token in tokens], expected.log_probs, atol=2e-4)
    assert (end.tokens, end.reason) == (len(tokens), expected.finish_reason)
    assert end.perplexity == pytest.approx(np.exp(-np.mean(expected.log_probs)), rel=1e-3)
    assert 0 < end.first_s <= end.seconds


@pytest.mark.parametrize("bound", [False, True], ids=["anywhere", "restored"])
def test_no_setting_and_no_length_compiles_again(model, bound):
    if bound:  # to a device, as the parameters of a run are
        model = model._replace(params=jax.device_put(model.params, jax.devices()[0]))
    warm(model)
    sizes = [steps._next._cache_size(), steps._take_in._cache_size()]
    for settings, _ in SAMPLED:
        for prompt in ("", "a", "ab", LONG):
            list(answer(model, prompt, settings))
    assert [steps._next._cache_size(), steps._take_in._cache_size()] == sizes


@pytest.mark.slow
def test_every_token_is_told_with_its_rivals(model):
    tokens, _ = split(model, "abc", Settings(top_k=3, top_p=1.0, temperature=1.0, seed=1, max_new_tokens=8))
    ids = start_ids(model.tokenizer, empty=False) + model.tokenizer.encode("abc")
    whole = jnp.array([[*ids, *(token.token for token in tokens)]])
    # The whole text through the model again, at once and without any cache.
    every = np.asarray(jax.nn.softmax(jax.jit(apply)(model.cfg, model.params, whole)[0]))
    for token, probs in zip(tokens, every[len(ids) - 1 :], strict=False):
        assert token.prob == pytest.approx(probs[token.token], abs=1e-4)
        order = np.argsort(-probs)
        assert [rival.token for rival in token.rivals[:3]] == order[:3].tolist()
        assert token.rank == np.flatnonzero(order == token.token)[0] < 3
        assert token.kept == pytest.approx(probs[token.token] / probs[order[:3]].sum(), abs=1e-3)
        assert [rival.kept == 0 for rival in token.rivals] == [False] * 3 + [True] * 5


def test_greedy_has_nothing_left_but_the_best(model):
    tokens, _ = split(model, "abc", GREEDY)
    assert all(token.rank == 0 and token.kept == 1 for token in tokens)
    assert any(token.prob < 0.9 for token in tokens)


@pytest.mark.slow
def test_beams_are_read_out_token_by_token(model):
    ids = start_ids(model.tokenizer, empty=False) + model.tokenizer.encode("ab")
    (best,) = beam_search(
        model.cfg, model.params, ids, n_beams=3, max_new_tokens=6, stop_ids=model.stop_ids, tokenizer=model.tokenizer
    )
    events = list(answer(model, "ab", BEAM))
    assert isinstance(events[0], Note)
    tokens = [event for event in events if isinstance(event, Token)]
    assert [token.token for token in tokens] == best.tokens
    assert -sum(token.surprise for token in tokens) == pytest.approx(best.log_prob, abs=1e-3)


def test_a_stop_token_ends_the_text_and_is_shown(table):
    eot = table.tokenizer.eot_id
    rows = table.params["bigram"]["table"]
    sure = table._replace(params={"bigram": {"table": rows.at[0].set(0).at[0, eot].set(50.0)}})
    tokens, end = split(sure, "cba", GREEDY)  # "a" is id 0
    assert [(token.token, token.text, token.ends) for token in tokens] == [(eot, "", True)]
    assert (end.reason, end.tokens) == ("stop", 1)


class Bytes:
    """Each id is a byte: those of a rocket, then an "a"; the last id of the table ends the text."""

    values = "🚀a".encode()
    vocab_size, eot_id, unk_id = 29, 28, None

    def encode(self, text: str) -> list[int]:
        return [self.values.index(byte) for byte in text.encode()]

    def decode(self, ids: list[int]) -> str:
        return bytes(self.values[i] for i in ids if i < 5).decode(errors="replace")

    def pieces(self, ids: Iterable[int]) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for i in ids:
            yield decoder.decode(self.values[i : i + 1])
        yield decoder.decode(b"", final=True)


def test_characters_of_several_tokens_come_whole(table):
    follows = {4: 0, 0: 1, 1: 2, 2: 3, 3: 28}
    rows = jnp.zeros((29, 29)).at[jnp.array(list(follows)), jnp.array(list(follows.values()))].set(50.0)
    rocket = table._replace(tokenizer=Bytes(), params={"bigram": {"table": rows}})
    tokens, end = split(rocket, "a", GREEDY)
    assert [token.text for token in tokens] == ["", "", "", "🚀", ""]
    assert end.rest == ""
    # Cut off within the character: what is left of it comes with the end.
    tokens, end = split(rocket, "a", GREEDY.replace(max_new_tokens=2))
    assert ([token.text for token in tokens], end.rest, end.reason) == (["", ""], "\ufffd", "length")


def test_a_question_goes_through_the_models_template(model):
    question = [{"role": "user", "content": "abc"}]
    settings = GREEDY.replace(chat=True)
    assert answers.prompt_ids(model, "abc", settings) == chat_ids(model, question)
    assert answers.prompt_ids(model, "abc", settings) != answers.prompt_ids(model, "abc", GREEDY)


def test_a_question_to_a_model_without_a_template_is_a_text_and_that_is_said(model, table):
    settings = GREEDY.replace(chat=True)
    events = list(side_by_side({"before": table, "after": model}, "abc", settings))
    notes = [(name, event) for name, event in events if isinstance(event, Note)]
    assert [(name, note.lasts) for name, note in notes] == [("before", True)]
    assert "no chat template" in notes[0][1].text
    mine = [event.token for name, event in events if name == "before" and isinstance(event, Token)]
    assert mine == [token.token for token in split(table, "abc", GREEDY)[0]]


def test_what_a_model_does_not_know_of_a_prompt_is_told(table):
    def notes(tokenizer: Any, prompt: str) -> list[str]:
        events = answer(table._replace(tokenizer=tokenizer), prompt, GREEDY.replace(max_new_tokens=1))
        return [event.text for event in events if isinstance(event, Note)]

    words = tokenizers.word("the fox ran " + " ".join("abcdefghijklmnopqrstuvwx"))  # as many as the table has
    assert notes(words, "日本 the Wizard ran") == ["this model does not know 2 of the prompt's 4 pieces"]
    assert notes(words, "the fox") == []
    assert notes(table.tokenizer, "the fox") == []


def test_what_does_not_fit_is_said_before_anything_runs(model):
    with pytest.raises(InputError, match=r"its \d+ tokens and 90 new ones are more than the 96"):
        answer(model, "abcdefgh", GREEDY.replace(max_new_tokens=90))
    without = model._replace(tokenizer=tokenizers.char("abc"))
    with pytest.raises(InputError, match="it is empty"):
        answer(without, "", GREEDY)
    with pytest.raises(InputError, match="is not among the tokenizer's 3 characters"):
        answer(without, "d", GREEDY)


@pytest.mark.parametrize("settings", [GREEDY, GREEDY.replace(strategy="sampling"), BEAM])
def test_logits_that_leave_nothing_to_choose_end_the_answer(model, settings):
    broken = model._replace(params=jax.tree.map(lambda x: x * jnp.nan, model.params))
    tokens, end = split(broken, "ab", settings)
    assert (tokens, end.reason) == ([], "error")


def test_a_person_can_stop_it(table):
    asked = iter([False] * 4 + [True])  # the one chunk of the prompt, then each token
    settings = Settings(max_new_tokens=50, temperature=1.0, top_p=1.0)
    tokens, end = split(table, "a", settings, stopped=lambda: next(asked))
    assert (len(tokens), end.reason) == (3, "stopped")


@pytest.fixture
def work(monkeypatch) -> list[str]:
    """What the device is given to do, in order."""
    done: list[str] = []

    def noted(module: Any, name: str) -> None:
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **kwargs: done.append(name) or real(*args, **kwargs))

    for module, name in ((steps, "_take_in"), (steps, "_next"), (beam_loop, "begin"), (beam_loop, "go_on")):
        noted(module, name)
    return done


@pytest.mark.parametrize(
    ("settings", "allowed", "expected"),
    [
        (GREEDY, 0, []),
        (GREEDY, 1, ["_take_in"]),  # the first of two chunks of one model's prompt
        (GREEDY, 3, ["_take_in", "_take_in", "_next"]),
        (BEAM, 0, []),
        (BEAM, 1, ["begin"]),
        (BEAM, 2, ["begin", "go_on"]),  # all of one model's search: nothing of it is told, and the other has none
    ],
)
def test_once_it_is_stopped_neither_model_does_anything_more(model, work, settings, allowed, expected):
    asked: list[bool] = []
    both = {"one": model, "two": model}
    prompt = LONG if settings is GREEDY else "ab"
    events = list(side_by_side(both, prompt, settings, stopped=lambda: asked.append(True) or len(asked) > allowed))
    assert work == expected
    ends = {name: event.reason for name, event in events if isinstance(event, End)}
    assert ends == {"one": "stopped", "two": "stopped"}


def test_the_time_of_an_answer_is_its_own(model, table):
    """Not that of the model beside it, nor the reader's."""
    alone = split(model, "ab", GREEDY)[1]
    ends = {}
    for name, event in side_by_side({"one": model, "two": table}, "ab", GREEDY):
        time.sleep(0.05)
        ends[name] = event
    for end in (ends["one"], ends["two"]):
        assert 0 < end.first_s <= end.seconds < 0.05 * alone.tokens


def test_a_prompt_to_begin_with(model, table):
    """Words of its own world for a model that knows no others."""
    words = tokenizers.word("Anna lived in the barn.", split="punctuation")
    every = tokenizers.load("gpt2")
    small = model._replace(tokenizer=words)
    assert words.encode(EXAMPLES[0]).count(words.unk_id) == 4
    assert answers.example_prompt([small]) == answers.example_prompt([small, small]) == EXAMPLES[1]
    assert answers.example_prompt([model._replace(tokenizer=every)]) == EXAMPLES[0]
    assert answers.example_prompt([model, table]) == EXAMPLES[0]  # lower-case letters alone, which know neither


def test_two_models_speak_in_turn(model, table):
    events = list(side_by_side({"one": model, "two": table}, "ab", GREEDY))
    assert [name for name, _ in events[:4]] == ["one", "two", "one", "two"]
    for name, found in (("one", model), ("two", table)):
        mine = [event.token for who, event in events if who == name and isinstance(event, Token)]
        assert mine == [token.token for token in split(found, "ab", GREEDY)[0]]


@pytest.mark.parametrize("name", [name for name, control in controls().items() if "min" in control])
def test_controls_have_the_ranges_that_are_checked(name):
    control = controls()[name]
    for edge in ("min", "max"):
        assert getattr(Settings().replace(**{name: control[edge]}), name) == control[edge]
    for beyond in (control["min"] - 1, control["max"] + 1):
        with pytest.raises(InputError, match=name):
            Settings().replace(**{name: beyond})


def test_controls_name_every_setting_and_what_uses_it():
    assert set(controls()) == set(Settings.model_fields)
    assert controls()["strategy"]["choices"] == list(USED) == ["greedy", "sampling", "beam"]
    assert {name for names in USED.values() for name in names} < set(controls())
