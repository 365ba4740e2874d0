"""What is wrong in a request has the same stated result in every way of decoding and every batch shape.

A bigram table, so that each next token's logits are a row that the test has written.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import ModelConfig
from jaxlm.errors import InputError
from jaxlm.sample import Request, Sampling, beam_searches, generate, prepare, sample_token, serve, speculate, stream

QUICK_COMPILE = True

V, CONTEXT, NEW = 8, 16, 4  # one width of prompts, so few programs
CFG = ModelConfig(kind="bigram", vocab_size=V, max_seq_len=CONTEXT)
NAN, NOTHING = 6, 7  # after these tokens a logit is NaN, all are -inf
CLEAN = [[1, 2], [3], [4, 5, 0], [2] * 9, [0, 5]]
DRAWN = Sampling(temperature=0.9, seed=3)  # of its own: the answer does not depend on the number of the request


class Letters:
    vocab_size = V

    def decode(self, ids):
        return "".join("abcdefgh"[i] for i in ids)

    def pieces(self, ids):
        for i in ids:
            yield self.decode([i])


@pytest.fixture(scope="module")
def params():
    table = np.random.default_rng(0).normal(size=(V, V)).astype(np.float32) * 2
    table[:, [NAN, NOTHING]] = -np.inf  # they come in prompts only
    table[NAN, 3], table[NOTHING] = np.nan, -np.inf
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


def names(way):
    return way.__name__


@pytest.mark.parametrize("bad", [NAN, NOTHING], ids=["nan", "all_inf"])
@pytest.mark.parametrize("way", WAYS, ids=names)
def test_a_row_without_a_distribution_is_an_error_of_its_own(params, way, bad):
    """Alone, in a batch, and with more requests than slots."""
    want = way(params, CLEAN, 3, DRAWN)
    assert {reason for _, reason in want} == {"length"}
    assert {len(tokens) for tokens, _ in want} == {NEW}
    for slots in (1, 3):
        assert way(params, [[1, bad]], slots, DRAWN) == [([], "error")]
    among = [CLEAN[0], [1, bad], *CLEAN[1:3], [bad], *CLEAN[3:]]
    got = way(params, among, 3, DRAWN)
    assert [got[1], got[4]] == [([], "error")] * 2
    assert [got[i] for i in (0, 2, 3, 5, 6)] == want


@pytest.mark.parametrize("way", WAYS, ids=names)
def test_more_requests_than_slots_wait(params, way):
    assert way(params, CLEAN, 1, DRAWN) == way(params, CLEAN, 3, DRAWN)


@pytest.mark.parametrize("way", SAMPLERS, ids=names)
def test_k_beyond_the_vocabulary_keeps_all(params, way):
    for slots in (1, 3):
        want = way(params, CLEAN, slots, DRAWN)
        for k in (V, V + 1, 2**31 - 1):
            assert way(params, CLEAN, slots, Sampling(temperature=0.9, seed=3, top_k=k)) == want


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("way", WAYS, ids=names)
def test_a_wrong_request_is_one_clear_error(params, way, slots):
    long = [1] * (CONTEXT - NEW + 1)
    at = 0 if way is by_stream else 1  # it has but one prompt
    for prompts, more, message in (
        ([[1], []], {}, f"^prompt {at}: is empty; give it at least one token, such as the end-of-text id.$"),
        ([[1], [V]], {}, f"^prompt {at}: id {V} is outside the vocabulary of {V} tokens.$"),
        ([[1], long], {}, f"^prompt {at}: 13 tokens and 4 new ones exceed the model's context of 16; "),
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


@pytest.mark.parametrize("way", WAYS, ids=names)
def test_a_prompt_beyond_the_context_is_cut_or_slides_where_asked(params, way):
    long = np.random.default_rng(1).integers(0, 6, CONTEXT + 5).tolist()
    full = long[: CONTEXT - 1]  # fits, but not with the answer
    for slots in (1, 3):
        want = way(params, [long[-(CONTEXT - NEW) :], full[-(CONTEXT - NEW) :], *CLEAN], slots, DRAWN)
        assert way(params, [long, full, *CLEAN], slots, DRAWN, overflow="crop") == want
    if way in (by_generate, by_serve):
        got = way(params, [long, full, *CLEAN], 3, DRAWN, overflow="slide")
        assert got == by_generate(params, [long, full, *CLEAN], 3, DRAWN, overflow="slide")
        assert got[2:] == want[2:]
    elif way is not by_stream:  # tests/sample/test_stream.py has that it slides
        with pytest.raises(
            InputError, match=r"^overflow: must be refuse or crop, found 'slide'; only generate, stream"
        ):
            way(params, [long], 1, DRAWN, overflow="slide")


@pytest.mark.parametrize("shape", [(), (3,)])
def test_the_sampler_alone_has_a_result_for_bad_options_too(shape):
    """As data they cannot be refused: p outside [0, 1] is off or greedy, k > V is off, other nonsense gives -1."""
    logits = jnp.broadcast_to(jnp.array([0.5, 3.0, 2.9, -1.0, 2.8]), (*shape, 5))
    keys = jax.random.split(jax.random.key(1), shape) if shape else jax.random.key(1)

    def draw(logits=logits, **options):
        return np.asarray(sample_token(keys, logits, **options))

    plainly = draw()
    for off in ({"top_p": 1.5}, {"top_k": 6}, {"top_k": -1}, {"min_p": -0.5}):
        assert np.array_equal(draw(**off), plainly)
    for greedy in ({"top_p": -0.5}, {"min_p": 1.5}, {"temperature": 0.0}):
        assert np.array_equal(draw(**greedy), np.full(shape, 1))
    for nothing in ({"temperature": -1.0}, {"temperature": jnp.nan}, {"top_p": jnp.nan}, {"temperature": jnp.inf}):
        assert np.array_equal(draw(**nothing), np.full(shape, -1))
    for bad in (jnp.nan, -jnp.inf):
        assert np.array_equal(
            draw(logits.at[..., 2].set(bad) if np.isnan(bad) else logits * 0 + bad), np.full(shape, -1)
        )
    if shape:  # one bad row
        mixed = logits.at[(0,) * len(shape)].set(jnp.nan)
        assert np.array_equal(draw(mixed).ravel()[1:], plainly.ravel()[1:])
