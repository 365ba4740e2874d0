"""Speculative decoding: the tokens of `generate` where it promises them, else the exact distribution of the target."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import ModelConfig
from jaxlm.errors import InputError
from jaxlm.model import apply, init
from jaxlm.sample import Sampling, filter_logits, generate, prepare
from jaxlm.sample.guess import look_up
from jaxlm.sample.speculative import speculate

QUICK_COMPILE = True

# One shape of model, batch and answer for all tests, so that few programs are compiled. Caches must carry token ids,
# and keys that lie one place on, through guesses that are taken back. The longest prompts and their answers fill the
# context, so that guesses reach beyond its end.
V, N_DRAFT, SLOTS, TOP = 6, 2, 128, 2
DRAWS = 2048
CFG = ModelConfig(
    vocab_size=V, n_layers=1, d_model=16, n_heads=2, max_seq_len=32, position="learned", tie_embeddings=False,
    embed_mix=2, key_offset=True,
)  # fmt: skip
OPTIONS = [
    Sampling(temperature=0), Sampling(banned_ids=(3, 4)), Sampling(temperature=0.7, top_p=0.8),
    Sampling(top_k=3, seed=4), Sampling(repetition_penalty=1.5, frequency_penalty=0.5, min_new_tokens=9),
    Sampling(temperature=0, no_repeat_ngram=2),
]  # fmt: skip


@pytest.fixture(scope="module")
def weights():
    """The target's, and a draft model's: neither sure of anything nor flat."""

    @jax.jit
    def make(key):
        params = jax.tree.map(lambda w: w * 14, init(CFG, key))
        params["embed"]["positions"] *= 2 / 7
        return params | {"final_norm": {"scale": jnp.full(CFG.d_model, 1.2)}}

    return [prepare(CFG, make(jax.random.key(seed))) for seed in (2, 1)]


@pytest.fixture(scope="module")
def prompts():
    """Some repeat themselves, so that lookup finds something."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, V, 1 + i % 8).tolist() * 2 for i in range(60)]


def guesser(by, weights):
    return {"lookup": None, "draft": (CFG, weights[1]), "itself": (CFG, weights[0])}[by]


def speculated(weights, prompts, by, **more):
    run = {"max_new_tokens": 16, "slots": SLOTS, "n_draft": N_DRAFT, "top_log_probs": TOP, **more}
    return speculate(CFG, weights[0], prompts, draft=guesser(by, weights), **run)


def generated(weights, prompts, **more):
    return generate(CFG, weights[0], prompts, **{"max_new_tokens": 16, "slots": SLOTS, "top_log_probs": TOP, **more})


class Letters:
    vocab_size = V

    def decode(self, ids):
        return "".join("abcdef"[i] for i in ids)


def assert_same(got, wanted):
    """The same answers, but for the rounding of log-probabilities."""
    for mine, want in zip(got, wanted, strict=True):
        assert (mine.tokens, mine.text, mine.finish_reason) == (want.tokens, want.text, want.finish_reason)
        np.testing.assert_allclose(mine.log_probs, want.log_probs, atol=1e-4)
        np.testing.assert_allclose(mine.top_log_probs, want.top_log_probs, atol=1e-4)  # ids, too


def test_lookup_gives_the_tokens_of_generate_under_any_options(weights, prompts):
    run = {"sampling": OPTIONS * 10, "max_new_tokens": [5 + i % 12 for i in range(60)], "stop_ids": (3,)}
    run["n"] = 2
    wanted = generated(weights, prompts, **run)
    got = speculated(weights, prompts, "lookup", **run)
    assert {g.finish_reason for g in wanted} == {"stop", "length"}
    assert all(len(top) == TOP for top in wanted[0].top_log_probs)
    assert_same(got.generations, wanted)
    assert 0 < got.accepted < got.proposed
    # Every pass gives one token of the target's own, except where an end comes with a guess.
    n = sum(len(g.tokens) for g in got.generations)
    assert n - got.accepted <= got.rounds <= n - got.accepted + len(wanted)


def test_stop_strings_end_answers_as_in_generate(weights, prompts):
    run = {"sampling": OPTIONS * 10, "stop": ("ab", "fcf", "dd"), "tokenizer": Letters()}
    wanted = generated(weights, prompts, **run)
    assert {g.finish_reason for g in wanted} == {"stop", "length", "error"}  # no pair of tokens is left to one
    assert_same(speculated(weights, prompts, "lookup", **run).generations, wanted)
    greedy = run | {"sampling": Sampling(temperature=0)}
    assert_same(speculated(weights, prompts, "draft", **greedy).generations, generated(weights, prompts, **greedy))


def test_a_draft_model_leaves_greedy_answers_as_they_are(weights, prompts):
    greedy = [Sampling(temperature=0), Sampling(temperature=0, repetition_penalty=1.3, min_new_tokens=12)] * 30
    want = generated(weights, prompts, sampling=greedy, stop_ids=(3,))
    runs = {by: speculated(weights, prompts, by, sampling=greedy, stop_ids=(3,)) for by in ("draft", "itself")}
    for got in runs.values():
        assert [g.tokens for g in got.generations] == [g.tokens for g in want]
        assert [g.finish_reason for g in got.generations] == [g.finish_reason for g in want]
    # A model that guesses for itself is always right: three tokens a pass, until an end cuts the last guesses off.
    assert runs["itself"].rounds == sum(-(-len(g.tokens) // (N_DRAFT + 1)) for g in want)
    assert runs["itself"].acceptance_rate > 0.7 > runs["draft"].acceptance_rate > 0


def exact(weights, options, prompt, length):
    """The probability of every continuation, by full forward passes; filters have tests of their own."""
    sequences = np.array([[*prompt, *tokens] for tokens in itertools.product(range(V), repeat=length)], np.int32)
    logits = jax.jit(apply)(CFG, weights, sequences)[:, len(prompt) - 1 : -1]
    kept = filter_logits(logits, temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
    chosen = sequences[:, len(prompt) :, None]
    steps = np.take_along_axis(np.asarray(jax.nn.softmax(kept, axis=-1), np.float64), chosen, axis=2)
    return {tuple(s[len(prompt) :].tolist()): p for s, p in zip(sequences, steps.prod(axis=(1, 2)), strict=True)}


@pytest.mark.parametrize("options", [Sampling(), Sampling(temperature=1.2, top_p=0.9), Sampling(top_k=3)])
@pytest.mark.parametrize("by", ["lookup", "draft"])
def test_the_distribution_is_exactly_that_of_the_target(weights, options, by):
    """Pearson's chi-square over all continuations of three tokens; the bound is its 0.999 quantile, roughly (Wilson
    and Hilferty, PNAS 17, 1931). The key is fixed, so the test either always passes or never does."""
    prompt = [2, 3, 2]
    run = speculated(weights, [prompt] * DRAWS, by, sampling=options, max_new_tokens=3, key=jax.random.key(8))
    assert 0.05 < run.acceptance_rate < 0.95  # both what is accepted and what replaces it have a part
    want = exact(weights[0], options, prompt, 3)
    other = exact(weights[1], options, prompt, 3)
    assert sum(abs(want[t] - other[t]) for t in want) > 0.5  # to accept all guesses would be seen
    counts = dict.fromkeys(want, 0)
    for answer in run.generations:
        counts[tuple(answer.tokens)] += 1
    assert sum(counts[t] for t, p in want.items() if p == 0) == 0
    often = [t for t, p in want.items() if DRAWS * p >= 5]
    cells = [(counts[t], DRAWS * want[t]) for t in often]
    rest = DRAWS - sum(mean for _, mean in cells)
    if rest > 1:
        cells.append((DRAWS - sum(counts[t] for t in often), rest))
    chi2, degrees = sum((got - mean) ** 2 / mean for got, mean in cells), len(cells) - 1
    assert degrees > 5
    assert chi2 < degrees * (1 - 2 / (9 * degrees) + 3.09 * (2 / (9 * degrees)) ** 0.5) ** 3


def test_look_up_takes_the_longest_latest_match():
    history = np.full((5, 16), -1, np.int32)
    rows = ([1, 2, 3, 9, 2, 3, 8, 1, 2, 3], [7, 4, 7, 5, 7], [1, 2, 3], [6, 6, 6], [4])
    for i, row in enumerate(rows):
        history[i, : len(row)] = row
    find = jax.jit(look_up, static_argnums=(2, 3))
    want = [
        [9, 2, 3, 8],  # after "1 2 3", though "2 3" came later
        [5, 7, 5, 7],  # after the later 7; the end repeats
        [-1] * 4,
        [6] * 4,
        [-1] * 4,
    ]
    lengths = np.array([len(row) for row in rows], np.int32)
    assert find(history, lengths, 4, 3).tolist() == want
    assert find(history, lengths, 4, 2).tolist()[0] == [8, 1, 2, 3]  # now the later "2 3"


@pytest.mark.parametrize("by", ["lookup", "draft"])
def test_a_nan_ends_its_own_row_only(weights, by):
    def with_nan(params):
        return {**params, "embed": {**params["embed"], "tokens": params["embed"]["tokens"].at[3].set(jnp.nan)}}

    clean = [[1], [0, 4], [2, 2, 2]]
    options = Sampling(banned_ids=(3,))
    want = speculated(weights, clean, by, sampling=options).generations
    got = speculated([with_nan(w) for w in weights], [*clean, [1, 3]], by, sampling=options).generations
    assert got[:3] == want
    assert (got[3].finish_reason, got[3].tokens) == ("error", [])


def test_a_draft_that_knows_nothing_makes_no_guess(weights):
    nothing = [weights[0], jax.tree.map(lambda w: jnp.full_like(w, jnp.nan), weights[1])]
    alone = speculated(nothing, [[1], [0], [2]], "draft")
    assert (alone.proposed, alone.acceptance_rate) == (0, 0.0)
    assert [len(g.tokens) for g in alone.generations] == [16] * 3
    assert (alone.rounds, alone.tokens_per_round) == (48, 1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_draft": 0}, "n_draft: must be at least 1"),
        ({"max_ngram": 0}, "max_ngram: must be at least 1"),
        ({"slots": 0}, "slots: must be at least 1"),
        ({"prompts": [[]]}, "prompt 0: is empty"),
        ({"stop_ids": (99,)}, "stop_ids: 99 is outside"),
        ({"stop": "a"}, "stop strings need a tokenizer"),
        ({"n": 0}, "n: must be at least 1"),
        ({"top_log_probs": 7}, "top_log_probs: must be between 0 and 6"),
        ({"overflow": "slide"}, "overflow: must be refuse or crop, found 'slide'; only generate, stream and serve can"),
        ({"draft": (CFG.replace(vocab_size=9), {})}, "draft: its vocabulary of 9 tokens is not the model's of 6"),
        ({"draft": (CFG.replace(max_seq_len=8), {})}, "draft: its context of 8 tokens is below the 13"),
    ],
)
def test_bad_input_is_one_clear_error(change, message):
    with pytest.raises(InputError, match=message):
        speculate(CFG, {}, **{"prompts": [[1, 2, 3]], "max_new_tokens": 10, **change})
