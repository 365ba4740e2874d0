"""What is wrong in a request has the same stated result in every way of decoding and every batch shape.

A bigram table, so that each next token's logits are a row that the test has written.
"""

from __future__ import annotations

from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import ModelConfig
from jaxlm.errors import InputError
from jaxlm.sample import Request, Sampling, beam_searches, generate, prepare, serve, speculate, stream

QUICK_COMPILE = True

# The model, prompts of one width and answers of one room, so that few programs are compiled: those of test_stream.py.
V, CONTEXT, NEW = 257, 32, 16
CFG = ModelConfig(kind="bigram", vocab_size=V, max_seq_len=CONTEXT)
REAL, NAN, NOTHING = 6, 6, 7  # tokens that may follow; after the two others a logit is NaN, all are -inf
CLEAN = [[1, 2], [3], [4, 5, 0], [2] * 9, [0, 5]]
DRAWN = Sampling(temperature=0.9, seed=3)  # of its own: the answer does not depend on the number of the request


class Letters:
    vocab_size = V

    def decode(self, ids):
        return "".join(chr(97 + i) for i in ids)

    def pieces(self, ids):
        for i in ids:
            yield self.decode([i])


@pytest.fixture(scope="module")
def params():
    table = np.full((V, V), -np.inf, np.float32)
    table[:, :REAL] = np.random.default_rng(0).normal(size=(V, REAL)) * 2
    table[NAN, 3], table[NOTHING] = np.nan, -np.inf  # they come in prompts only
    return prepare(CFG, {"bigram": {"table": jnp.asarray(table)}})


# Each way gives a list of tokens and a reason for every prompt.


def plain(answers):
    return [(answer.tokens, answer.finish_reason) for answer in answers]


def by_generate(params, prompts, slots, sampling, **more):
    return plain(generate(CFG, params, prompts, slots=slots, sampling=sampling, max_new_tokens=NEW, **more))


def by_stream(params, prompts, slots, sampling, **more):
    out = []
    for prompt in prompts:
        pieces = list(stream(CFG, params, prompt, sampling=sampling, max_new_tokens=NEW, **more))
        out.append(([token for piece in pieces for token in piece.tokens], pieces[-1].finish_reason))
    return out


def by_serve(params, prompts, slots, sampling, stop=(), **more):
    stops = (stop,) if isinstance(stop, str) else stop
    requests = [Request(prompt, NEW, sampling, stop=stops) for prompt in prompts]
    done = dict(serve(CFG, params, requests, slots=slots, capacity=CONTEXT, n_new=NEW, **more))
    return plain(done[i] for i in range(len(prompts)))


def by_lookup(params, prompts, slots, sampling, **more):
    run = speculate(CFG, params, prompts, slots=slots, sampling=sampling, max_new_tokens=NEW, n_draft=2, **more)
    return plain(run.generations)


def by_draft(params, prompts, slots, sampling, **more):
    return by_lookup(params, prompts, slots, sampling, draft=(CFG, params), **more)


def by_beams(params, prompts, slots, sampling, **more):
    found = beam_searches(CFG, params, prompts, slots=slots, n_beams=2, max_new_tokens=NEW, **more)
    return plain(best for (best,) in found)


SAMPLERS = [by_generate, by_stream, by_serve, by_lookup, by_draft]
WAYS = [*SAMPLERS, by_beams]


def cases(ways):
    """Each way in a batch of three and alone; those that take long to compile, and share no program, are slow."""
    quick = {(by_generate, 3), (by_generate, 1), (by_stream, 1), (by_serve, 3), (by_beams, 3)}
    for way in ways:
        for slots in (1,) if way is by_stream else (3, 1):
            marks = () if (way, slots) in quick else pytest.mark.slow
            yield pytest.param(way, slots, id=f"{way.__name__}-{slots}", marks=marks)


def names(way):
    return way.__name__


@pytest.fixture(scope="module")
def clean(params):
    """clean(way, slots) -> what the clean prompts give together."""
    return cache(lambda way, slots: way(params, CLEAN, slots, DRAWN))


@pytest.mark.parametrize(("way", "slots"), cases(WAYS))
def test_a_row_without_a_distribution_is_an_error_of_its_own(params, clean, way, slots):
    """Alone, in a batch, and with more requests than slots."""
    want = clean(way, slots)
    assert {reason for _, reason in want} == {"length"}
    assert {len(tokens) for tokens, _ in want} == {NEW}
    if way not in (by_draft, by_beams):  # all others promise the tokens of `generate`
        assert want == clean(by_generate, 3)
    for bad in (NAN, NOTHING):
        assert way(params, [[1, bad]], slots, DRAWN) == [([], "error")]
        among = [CLEAN[0], [1, bad], *CLEAN[1:3], [bad], *CLEAN[3:]]
        got = way(params, among, slots, DRAWN)
        assert [got[1], got[4]] == [([], "error")] * 2
        assert [got[i] for i in (0, 2, 3, 5, 6)] == want


@pytest.mark.parametrize(("way", "slots"), cases(WAYS))
def test_more_requests_than_slots_wait(params, clean, way, slots):
    assert len(CLEAN) > slots
    assert clean(way, slots) == [way(params, [prompt], slots, DRAWN)[0] for prompt in CLEAN]


@pytest.mark.parametrize(("way", "slots"), cases(SAMPLERS))
def test_k_beyond_the_vocabulary_keeps_all(params, clean, way, slots):
    for k in (V, V + 1, 2**31 - 1):
        options = Sampling(temperature=0.9, seed=3, top_k=k)
        assert way(params, CLEAN[:3], slots, options) == clean(way, slots)[:3]


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("way", WAYS, ids=names)
def test_a_wrong_request_is_one_clear_error(params, way, slots):
    long = [1] * (CONTEXT - NEW + 1)
    at = 0 if way is by_stream else 1  # it has but one prompt
    for prompts, more, message in (
        ([[1], []], {}, f"^prompt {at}: is empty; give it at least one token, such as the end-of-text id.$"),
        ([[1], [V]], {}, f"^prompt {at}: id {V} is outside the vocabulary of {V} tokens.$"),
        ([[1], long], {}, f"^prompt {at}: 17 tokens and 16 new ones exceed the model's context of 32; "),
        ([[1]], {"overflow": "wrap"}, "^overflow: must be .*found 'wrap'"),
    ):
        with pytest.raises(InputError, match=message):
            way(params, prompts, slots, DRAWN, **more)
    if way is by_beams:
        return  # it has neither stop strings nor options to sample by
    for stop in ("", ("a", "")):
        with pytest.raises(InputError, match=r"^stop: a stop string is empty; remove it\.$"):
            way(params, [[1]], slots, DRAWN, stop=stop, tokenizer=Letters())
    for option, message in (
        ({"top_p": 1.5}, "^sampling.top_p: must be between 0 and 1, found 1.5.$"),
        ({"top_p": -0.1}, "^sampling.top_p: must be between 0 and 1, found -0.1.$"),
        ({"min_p": 2.0}, "^sampling.min_p: must be between 0 and 1, found 2.0.$"),
        ({"temperature": -1.0}, "^sampling.temperature: must be a finite number of at least 0, found -1.0.$"),
    ):
        with pytest.raises(InputError, match=message):
            way(params, [[1]], slots, Sampling(**option))


@pytest.fixture(scope="module")
def long():
    """A prompt beyond the context, and one that fits, but not with its answer."""
    ids = np.random.default_rng(1).integers(0, REAL, CONTEXT + 5).tolist()
    return ids, ids[: CONTEXT - 1]


@pytest.mark.parametrize(("way", "slots"), cases(WAYS))
def test_a_prompt_beyond_the_context_is_cut_where_asked(params, clean, long, way, slots):
    want = way(params, [ids[-(CONTEXT - NEW) :] for ids in long], slots, DRAWN)
    assert {len(tokens) for tokens, _ in want} == {NEW}
    assert way(params, [*long, *CLEAN], slots, DRAWN, overflow="crop") == [*want, *clean(way, slots)]


@pytest.mark.parametrize("way", [by_lookup, by_draft, by_beams], ids=names)
def test_a_window_slides_only_in_ways_that_say_so(params, long, way):
    message = r"^overflow: must be refuse or crop, found 'slide'; only generate, stream"
    with pytest.raises(InputError, match=message):
        way(params, long[:1], 1, DRAWN, overflow="slide")


@pytest.mark.slow  # tests of `generate`, `stream` and the engine have what sliding windows give
def test_a_window_slides_beside_requests_that_do_not(params, clean, long):
    prompts = [*long, *CLEAN]
    want = by_generate(params, prompts, 3, DRAWN, overflow="slide")
    assert by_serve(params, prompts, 3, DRAWN, overflow="slide") == want
    assert want[2:] == clean(by_generate, 3)
