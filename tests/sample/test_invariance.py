"""A request in other batches. Compiled with all optimizations, which is where XLA treats rows differently."""

from __future__ import annotations

import numpy as np
import pytest

from jaxlm.config import ModelConfig
from jaxlm.sample import Request, Sampling, beam_searches, engine, generate, prepare

V = 60
# D = 256: XLA computes a one-row product differently from a row of several only from D = 128 on.
CFG = ModelConfig(vocab_size=V, n_layers=1, d_model=256, n_heads=4, n_kv_heads=2, max_seq_len=64, tie_embeddings=False)


MINE = Sampling(temperature=0.9, top_p=0.95, typical_p=0.95, no_repeat_ngram=3, seed=5)
OTHERS = (Sampling(0), Sampling(), Sampling(top_k=3, repetition_penalty=1.5))


@pytest.fixture(scope="module")
def params(random_params):
    return prepare(CFG, random_params(CFG, 0.1))


@pytest.fixture(scope="module")
def prompts():
    """The one that is looked at, and its neighbours."""
    rng = np.random.default_rng(1)
    return [rng.integers(0, V, n).tolist() for n in (11, 3, 16, 7, 1, 12, 9)]


def at(params, slot, prompt, neighbours, options, slots=4):
    batch = [*neighbours[:slot], prompt, *neighbours[slot:]]
    sampling = [options] * slot + [MINE] + [options] * (len(neighbours) - slot)
    return generate(CFG, params, batch, sampling=sampling, max_new_tokens=16, slots=slots)[slot]


@pytest.fixture(scope="module")
def alone(params, prompts):
    answer = at(params, 0, prompts[0], [], OTHERS[0])
    assert len(set(answer.tokens)) > 4  # a real draw
    return answer


def test_a_request_is_the_same_alone_in_any_slot_with_any_neighbours(params, prompts, alone):
    prompt, *others = prompts
    for slot, neighbours, options in zip((3, 1, 5), (others[:3], others[2:5], others), OTHERS, strict=True):
        # tokens and the bits of their log-probabilities
        assert at(params, slot, prompt, neighbours, options) == alone


@pytest.mark.slow
def test_another_slot_count_gives_the_same_tokens_but_other_roundings(params, prompts, alone):
    """What the documentation promises of it. That the bits do differ is why the slot count is to be fixed."""
    one = at(params, 0, prompts[0], [], OTHERS[0], slots=1)
    assert one.tokens == alone.tokens
    np.testing.assert_allclose(one.log_probs, alone.log_probs, atol=1e-4)


@pytest.mark.slow  # test_engine.py has it without XLA's optimizations
def test_a_request_in_the_engine_is_the_same_in_any_slot_with_any_neighbours_whenever_it_comes(params, prompts, alone):
    prompt, *others = prompts

    def answer(slot, before):
        """Put into `slot` after so many steps of three others that have the other slots."""
        state = engine.init(CFG, params, slots=4, capacity=48, n_new=16)
        for i, other in enumerate(others[: 3 if before else 0]):
            free = (slot + 1 + i) % 4
            state = engine.insert(CFG, params, state, free, Request(other, 16, OTHERS[i]), index=i)
        state = engine.step(CFG, params, state, before)
        state = engine.insert(CFG, params, state, slot, Request(prompt, 16, MINE), index=9)
        while not state.rows.finished[slot]:
            state = engine.step(CFG, params, state, 16)
        return engine.harvest(state, slot)

    by_itself = answer(0, 0)
    assert by_itself.tokens == alone.tokens
    assert [answer(slot, before) for slot, before in ((3, 2), (1, 7), (2, 1))] == [by_itself] * 3


@pytest.mark.slow
def test_beams_are_the_same_beside_any_others(params, prompts):
    prompt, *others = prompts

    def best(slot, neighbours):
        batch = [*neighbours[:slot], prompt, *neighbours[slot:]]
        return beam_searches(CFG, params, batch, n_beams=3, n_best=3, max_new_tokens=16, slots=4)[slot]

    alone = best(0, [])
    assert len(alone) == 3
    assert [best(3, others[:3]), best(1, others[2:5]), best(5, others)] == [alone] * 3
