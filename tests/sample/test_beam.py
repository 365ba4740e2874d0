"""Beam search against brute force, against a plain one in Python over full forward passes, and against transformers."""

from __future__ import annotations

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import ModelConfig
from jaxlm.errors import InputError
from jaxlm.model import apply, init
from jaxlm.sample import beam_loop, prepare
from jaxlm.sample.beam import Hypothesis, beam_search, beam_searches

QUICK_COMPILE = True

PLAIN = ModelConfig(vocab_size=12, n_layers=1, d_model=16, n_heads=2, n_kv_heads=1, max_seq_len=32)
# Decoding must carry token ids and keys that lie one place on through every change of beams.
LOOKING_BACK = PLAIN.replace(n_kv_heads=2, embed_mix=3, key_offset=True, qk_norm=True)
PROMPT = [3, 1, 4]
STOPS = ((0, 11), (2, 6), (9, 4))
SLOTS = 4  # of almost all searches, so that few programs are compiled


class Model:
    """Next-token log-probabilities by full forward passes, and how often which length was asked for."""

    def __init__(self, cfg):
        self.cfg = cfg
        self.params = jax.jit(lambda key: jax.tree.map(lambda w: w * 6, init(cfg, key)))(jax.random.key(3))
        self._full = jax.jit(lambda tokens: jax.nn.log_softmax(apply(cfg, self.params, tokens)))

    def log_probs(self, sequences):
        """[N, V] after each of N sequences of one length."""
        rows = np.zeros((128, 16), np.int32)
        rows[: len(sequences), : len(sequences[0])] = sequences
        return np.asarray(self._full(rows), np.float64)[: len(sequences), len(sequences[0]) - 1]


@pytest.fixture(
    scope="module", params=[pytest.param(PLAIN, marks=pytest.mark.slow), LOOKING_BACK], ids=["plain", "looking_back"]
)
def model(request):
    return Model(request.param)


def exhaustive(model, vocab, length, stop_ids, penalty):
    """Every continuation that ends, with its score: tokens outside `vocab` have no part."""
    found, running = [], {(): 0.0}
    for n in range(1, length + 1):
        rows = model.log_probs([[*PROMPT, *tokens] for tokens in running])
        extended = {
            (*tokens, token): total + row[token]
            for (tokens, total), row in zip(running.items(), rows, strict=True)
            for token in range(vocab)
        }
        ends = {t: total for t, total in extended.items() if t[-1] in stop_ids or n == length}
        found += [(total / n**penalty, list(tokens)) for tokens, total in ends.items()]
        running = {t: total for t, total in extended.items() if t not in ends}
    return sorted(found, reverse=True)


def plain_beams(model, n_beams, length, stop_ids, penalty, early):
    """Beam search with lists and a sort, as the module's text says; candidates are never left out of the ranking."""
    pool, running = [], [(0.0, [])]
    for n in range(1, length + 1):
        rows = model.log_probs([[*PROMPT, *tokens] for _, tokens in running])
        every = sorted(
            ((total + row[token], [*tokens, token]) for (total, tokens), row in zip(running, rows, strict=True)
             for token in range(model.cfg.vocab_size)),
            reverse=True,
        )  # fmt: skip
        pool += [(s / n**penalty, t) for s, t in every[:n_beams] if t[-1] in stop_ids or n == length]
        pool = sorted(pool, reverse=True)[:n_beams]
        running = [(s, t) for s, t in every if t[-1] not in stop_ids][:n_beams]
        if len(pool) == n_beams and early:
            break
    return pool  # without early stopping: never stopped before the limit


class TwoLetters:
    """Only the first four ids are real."""

    vocab_size = 4

    def decode(self, ids):
        return "".join("abcd"[i] for i in ids)


@pytest.mark.parametrize("penalty", [0.0, 1.0, -0.8, 2.5])
def test_with_enough_beams_it_is_brute_force(model, penalty):
    want = exhaustive(model, 4, 3, {2}, penalty)
    got = beam_search(
        model.cfg, model.params, PROMPT, n_beams=64, max_new_tokens=3, length_penalty=penalty, n_best=64,
        stop_ids=[2], tokenizer=TwoLetters(),
    )  # fmt: skip
    assert len(got) == len(want) == 3**3 + 3**2 + 3 + 1  # those that stop after 1, 2 and 3 tokens, those that do not
    np.testing.assert_allclose([h.score for h in got], [score for score, _ in want], atol=1e-4)
    assert [h.tokens for h in got[:8]] == [tokens for _, tokens in want[:8]]
    for h in got:
        assert h.finish_reason == ("stop" if h.tokens[-1] == 2 else "length")
        assert h.text == TwoLetters().decode([t for t in h.tokens if t != 2])
        assert math.isclose(h.score, h.log_prob / len(h.tokens) ** penalty, rel_tol=1e-5)


@pytest.mark.parametrize("stop_ids", STOPS)
@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("penalty", [0.0, 1.0, 3.0, -1.0])
def test_few_beams_are_those_of_a_plain_search(model, stop_ids, early, penalty):
    want = plain_beams(model, 4, 7, set(stop_ids), penalty, early)
    (got,) = beam_searches(
        model.cfg, model.params, [PROMPT], slots=SLOTS, n_beams=4, max_new_tokens=7, length_penalty=penalty,
        early_stopping=early, n_best=4, stop_ids=stop_ids,
    )  # fmt: skip
    assert [h.tokens for h in got] == [tokens for _, tokens in want]
    np.testing.assert_allclose([h.score for h in got], [score for score, _ in want], atol=1e-4)


def test_the_cases_above_tell_the_options_apart(model):
    """Else a search that ignored an option would pass them."""
    found = {
        (stop_ids, early, penalty): [tokens for _, tokens in plain_beams(model, 4, 7, set(stop_ids), penalty, early)]
        for stop_ids, early, penalty in itertools.product(STOPS, (True, False), (0.0, 3.0))
    }
    assert len({str(tokens) for tokens in found.values()}) > 5


def test_one_beam_is_greedy_and_more_find_what_greedy_misses():
    # From 0: 1 is likelier (0.6), but what follows is spread out (1/3 each); after 2 (0.4), 0 is certain.
    table = jnp.log(jnp.array([[0.0, 0.6, 0.4], [1 / 3, 1 / 3, 1 / 3], [1.0, 0.0, 0.0]]))
    cfg = ModelConfig(kind="bigram", vocab_size=3)
    params = {"bigram": {"table": table}}
    (greedy,) = beam_search(cfg, params, [0], n_beams=1, max_new_tokens=2)
    assert greedy.tokens == [1, 0]
    np.testing.assert_allclose(greedy.score, math.log(0.6 / 3) / 2, rtol=1e-6)
    best, *others = beam_search(cfg, params, [0], n_beams=9, max_new_tokens=2, length_penalty=0.0, n_best=9)
    assert best == Hypothesis([2, 0], None, pytest.approx(math.log(0.4)), pytest.approx(math.log(0.4)), "length")
    # Only four of the nine pairs have a probability at all.
    assert [h.tokens for h in others] == [[1, 0], [1, 1], [1, 2]]


RAGGED = [PROMPT, [7], list(range(11)), [5, 5], [0, 1, 2, 3, 4], [11]]


@pytest.mark.parametrize("early", [True, False])
def test_prompts_search_side_by_side_as_if_alone(model, early):
    """More prompts than slots, ragged; some end long before others."""
    options = {"n_beams": 4, "n_best": 4, "max_new_tokens": 7, "stop_ids": STOPS[0], "early_stopping": early}
    params = prepare(model.cfg, model.params)
    together = beam_searches(model.cfg, params, RAGGED, slots=SLOTS, **options)
    assert len({tuple(len(h.tokens) for h in found) for found in together}) > 2
    for prompt, found in zip(RAGGED, together, strict=True):
        assert [found] == beam_searches(model.cfg, params, [prompt], slots=SLOTS, **options)  # bit for bit


@pytest.mark.slow
def test_one_slot_finds_what_four_find(model):
    options = {"n_beams": 4, "n_best": 4, "max_new_tokens": 7, "stop_ids": STOPS[0]}
    together = beam_searches(model.cfg, model.params, RAGGED, slots=SLOTS, **options)
    for prompt, found in zip(RAGGED, together, strict=True):
        alone = beam_search(model.cfg, model.params, prompt, **options)
        assert [h.tokens for h in found] == [h.tokens for h in alone]
        np.testing.assert_allclose([h.score for h in found], [h.score for h in alone], atol=1e-4)


def test_compilations_are_bounded(model, compiled):
    """Neither options nor the lengths that fit in the context of 32, but its two powers of two, 16 and 32."""
    run = partial(beam_searches, model.cfg, prepare(model.cfg, model.params), n_beams=4, slots=SLOTS)
    before = compiled.count("go_on")
    run([PROMPT, [5] * 17], max_new_tokens=5, stop_ids=(1, 2))
    assert compiled.count("go_on") - before <= 2
    before = compiled.count("go_on"), compiled.count("begin")
    assert min(before) >= 1  # by these names
    run([[5]], max_new_tokens=9, stop_ids=(4, 3), length_penalty=2, early_stopping=True, n_best=3)
    run([[n % 12] * n for n in range(1, 28)], max_new_tokens=4, stop_ids=(7, 8))
    assert (compiled.count("go_on"), compiled.count("begin")) == before


def test_a_search_can_be_stopped(model):
    """Asked before the prompt and each block of eight tokens: what had ended by then is what there is."""
    run = partial(beam_search, model.cfg, prepare(model.cfg, model.params), PROMPT, n_beams=3, max_new_tokens=20)
    (whole,) = run()
    asked = []
    assert run(stopped=lambda: bool(asked.append(1))) == [whole]
    assert len(asked) == 1 + 3
    (none,) = run(stopped=lambda: True)
    assert (none.tokens, none.finish_reason) == ([], "error")
    early = run(stopped=iter([False, False, True]).__next__, stop_ids=tuple(range(6)), n_best=3, length_penalty=-1.0)
    assert early
    assert all(len(h.tokens) <= 8 and h.finish_reason == "stop" for h in early)


def test_a_stopped_search_takes_in_no_more_prompts(model, monkeypatch):
    begun = []
    real = beam_loop.begin
    monkeypatch.setattr(beam_loop, "begin", lambda *args, **kwargs: begun.append(1) or real(*args, **kwargs))
    params = prepare(model.cfg, model.params)
    options = {"slots": SLOTS, "n_beams": 4, "max_new_tokens": 7, "stop_ids": STOPS[0]}
    whole = beam_searches(model.cfg, params, RAGGED, **options)
    assert len(begun) == 2
    asked = iter([False, False, True])  # the first four prompts, their one block, the other two prompts
    found = beam_searches(model.cfg, params, RAGGED, **options, stopped=lambda: next(asked))
    assert found[:4] == whole[:4]
    assert found[4:] == [[Hypothesis([], None, -math.inf, -math.inf, "error")]] * 2
    assert len(begun) == 2 + 1


def test_a_nan_drops_its_beam_and_a_prompt_of_nan_is_an_error():
    # As above, but whatever follows 2 is NaN: only what goes through 1 is left.
    table = jnp.log(jnp.array([[0.1, 0.3, 0.6], [0.5, 0.5, 0.0], [jnp.nan, 1.0, 1.0]]))
    cfg = ModelConfig(kind="bigram", vocab_size=3)
    params = {"bigram": {"table": table}}
    got = beam_search(cfg, params, [1], n_beams=9, max_new_tokens=2, n_best=3, length_penalty=0.0)
    assert [h.tokens for h in got] == [[0, 2], [1, 0], [1, 1]]
    (none,) = beam_search(cfg, params, [2], n_beams=9, max_new_tokens=2, n_best=2)
    assert none == Hypothesis([], None, -math.inf, -math.inf, "error")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_beams": 0}, "n_beams: must be at least 1, found 0"),
        ({"n_beams": 2.5}, "n_beams: must be an integer"),
        ({"n_beams": 2**30}, "too many to rank"),
        ({"n_best": 3}, "n_best: must be at most n_beams=2, found 3"),
        ({"length_penalty": math.nan}, "length_penalty: must be a finite number"),
        ({"early_stopping": "never"}, "early_stopping: must be True or False"),
        ({"stop_ids": [12]}, "stop_ids: 12 is outside"),
        ({"prompt": []}, "is empty"),
        ({"prompt": [99]}, "99 is outside the vocabulary"),
        ({"max_new_tokens": 0}, "max_new_tokens: must be at least 1"),
        ({"max_new_tokens": 30}, "exceed the model's context of 32; shorten one of them, or pass overflow='crop'"),
        ({"overflow": "slide"}, "overflow: must be refuse or crop, found 'slide'"),
    ],
)
def test_bad_input_is_one_clear_error(change, message):
    with pytest.raises(InputError, match=message):
        beam_search(PLAIN, {}, **{"prompt": PROMPT, "n_beams": 2, "max_new_tokens": 4, **change})


@pytest.mark.parity
@pytest.mark.parametrize("penalty", [0.0, 1.0, -0.5, 2.0])
@pytest.mark.parametrize("early", [True, False])
def test_transformers_finds_the_same(monkeypatch, penalty, early):
    """transformers' own False estimates with the present length; its "never" bounds like our False."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch = pytest.importorskip(
        "torch", reason="a comparison with a peer; install the extra: pip install -e '.[parity]'"
    )
    transformers = pytest.importorskip("transformers", minversion="5.0", reason="beam search as of transformers 5")
    torch.manual_seed(0)
    peer = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5)
    ).eval()
    got = {name: np.asarray(tensor.detach()) for name, tensor in peer.named_parameters()}

    def layer(i):
        at = {k.removeprefix(f"transformer.h.{i}."): v for k, v in got.items() if k.startswith(f"transformer.h.{i}.")}
        pair = lambda kernel, bias: {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}  # noqa: E731
        norm = lambda name: {"scale": at[f"{name}.weight"], "bias": at[f"{name}.bias"]}  # noqa: E731
        kernels = np.split(at["attn.c_attn.weight"], 3, axis=1)
        biases = np.split(at["attn.c_attn.bias"], 3)
        attn = {name: pair(k, b) for name, k, b in zip("qkv", kernels, biases, strict=True)}
        attn["o"] = pair(at["attn.c_proj.weight"], at["attn.c_proj.bias"])
        up = pair(at["mlp.c_fc.weight"], at["mlp.c_fc.bias"])
        down = pair(at["mlp.c_proj.weight"], at["mlp.c_proj.bias"])
        return {"attn": attn, "mlp": {"up": up, "down": down}, "norm1": norm("ln_1"), "norm2": norm("ln_2")}

    cfg = ModelConfig(
        vocab_size=40, n_layers=2, d_model=16, n_heads=2, max_seq_len=32, norm="layer", norm_bias=True,
        position="learned", mlp="gelu_tanh", attn_bias=True, attn_out_bias=True, mlp_bias=True,
    )  # fmt: skip
    params = {
        "embed": {"tokens": got["transformer.wte.weight"], "positions": got["transformer.wpe.weight"]},
        "blocks": tuple(layer(i) for i in range(2)),
        "final_norm": {"scale": got["transformer.ln_f.weight"], "bias": got["transformer.ln_f.bias"]},
    }
    params = jax.tree.map(jnp.asarray, params)
    for prompt, stop in (([5, 6, 7], 9), ([1], 22), ([30, 2, 2, 8, 11], 17)):
        with torch.no_grad():
            want = peer.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), num_beams=4,
                num_return_sequences=4, max_new_tokens=8, length_penalty=penalty, do_sample=False, pad_token_id=39,
                early_stopping=True if early else "never", eos_token_id=stop, return_dict_in_generate=True,
                output_scores=True,
            )  # fmt: skip
        ours = beam_search(
            cfg, params, prompt, n_beams=4, max_new_tokens=8, length_penalty=penalty, early_stopping=early, n_best=4,
            stop_ids=[stop],
        )  # fmt: skip
        for h, sequence, score in zip(ours, want.sequences, want.sequences_scores, strict=True):
            assert h.tokens == sequence[len(prompt) : len(prompt) + len(h.tokens)].tolist()
            assert h.score == pytest.approx(float(score), abs=2e-4)
