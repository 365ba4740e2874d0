"""Generation against the naive loop over full forward passes, and against itself in other batches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import ModelConfig
from jaxlm.errors import InputError
from jaxlm.model import apply, init
from jaxlm.sample import Sampling, generate, prepare
from jaxlm.sample.generate import _requests

V = 60
CFG = ModelConfig(vocab_size=V, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, max_seq_len=64, tie_embeddings=False)
GREEDY = Sampling(temperature=0)


class Letters:
    """Ids 0 .. 25 are the letters; later ids of the model's vocabulary are padding."""

    vocab_size = 26

    def decode(self, ids):
        return "".join(chr(ord("a") + i) for i in ids)


def far_from_uniform(cfg, scale):
    return jax.jit(lambda key: jax.tree.map(lambda w: w * scale, init(cfg, key)))(jax.random.key(0))


@pytest.fixture(scope="module")
def params():
    return far_from_uniform(CFG, 4)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, V, n).tolist() for n in (1, 5, 16, 17, 30)]


def run(params, prompts, **more):
    return generate(CFG, params, prompts, **{"max_new_tokens": 9, "slots": 4, "sampling": GREEDY, **more})


def test_greedy_is_the_naive_loop_and_compilations_are_bounded(params, prompts, compiled):
    before = compiled.count("prefill"), compiled.count("decode")
    out = run(params, prompts)
    # Lengths 1 .. 30 fall into two buckets, 16 and 32.
    assert (compiled.count("prefill") - before[0], compiled.count("decode") - before[1]) == (2, 2)
    full = jax.jit(lambda tokens: apply(CFG, params, tokens))
    for prompt, got in zip(prompts, out, strict=True):
        ids, log_probs = list(prompt), []
        for _ in range(9):
            padded = np.zeros((1, 64), np.int32)
            padded[0, : len(ids)] = ids
            scores = jax.nn.log_softmax(full(padded)[0, len(ids) - 1])
            ids.append(int(scores.argmax()))
            log_probs.append(float(scores.max()))
        assert got.tokens == ids[len(prompt) :]
        np.testing.assert_allclose(got.log_probs, log_probs, atol=2e-5)
        assert got.finish_reason == "length"
        assert got.text is None

    # Other options, lengths and limits: nothing new to compile.
    before = compiled.count("prefill"), compiled.count("decode")
    varied = [Sampling(top_k=i, top_p=0.9, repetition_penalty=1 + i / 9, banned_ids=(i,), seed=i) for i in range(3)]
    run(params, [[1], [2] * 9, [3] * 20], sampling=varied, max_new_tokens=[3, 16, 1], stop_ids=(5, 6))
    run(params, [[1]], tokenizer=Letters(), stop=("some", "text"))
    assert (compiled.count("prefill"), compiled.count("decode")) == before


def test_a_request_is_the_same_alone_in_any_slot_with_any_neighbours():
    # D = 256: XLA computes a one-row product differently from a row of several only from D = 128 on.
    cfg = CFG.replace(d_model=256, n_heads=4)
    params = prepare(cfg, far_from_uniform(cfg, 2))
    rng = np.random.default_rng(1)
    prompt, *others = [rng.integers(0, V, n).tolist() for n in (11, 3, 16, 7, 1, 12, 9)]
    mine = Sampling(temperature=0.9, top_p=0.95, seed=5)

    def at(slot, neighbours, options):
        batch = [*neighbours[:slot], prompt, *neighbours[slot:]]
        sampling = [options] * slot + [mine] + [options] * (len(neighbours) - slot)
        return generate(cfg, params, batch, sampling=sampling, max_new_tokens=16, slots=4)[slot]

    alone = at(0, [], GREEDY)
    assert len(set(alone.tokens)) > 4  # a real draw
    for slot, neighbours, options in (
        (3, others[:3], GREEDY),
        (1, others[2:5], Sampling()),
        (5, others, Sampling(top_k=3, repetition_penalty=1.5)),
    ):
        assert at(slot, neighbours, options) == alone  # tokens and the bits of their log-probabilities


def test_draws_follow_key_request_and_position(params):
    prompt = [1, 2, 3]
    a, b, c = run(params, [prompt] * 3, sampling=Sampling(), max_new_tokens=12)
    assert len({tuple(g.tokens) for g in (a, b, c)}) == 3  # one stream a request
    again = run(params, [prompt] * 2, sampling=Sampling(), max_new_tokens=12, key=jax.random.key(0))
    assert [g.tokens for g in again] == [a.tokens, b.tokens]
    other = run(params, [prompt], sampling=Sampling(), max_new_tokens=12, key=jax.random.key(1))
    assert other[0].tokens != a.tokens
    x, y = run(params, [prompt] * 2, sampling=Sampling(seed=3), max_new_tokens=12)
    assert x.tokens == y.tokens
    # Position, not step: going on from what was drawn draws what would have come.
    rest = run(params, [prompt + x.tokens[:5]], sampling=Sampling(seed=3), max_new_tokens=7)
    assert rest[0].tokens == x.tokens[5:]


def test_stop_ids_limits_and_bans(params, prompts):
    whole = [g.tokens for g in run(params, prompts[:3], max_new_tokens=12)]
    stop = whole[0][4]
    first = whole[0].index(stop)
    stopped, short = run(params, prompts[:2], max_new_tokens=[12, 2], stop_ids=(stop, 59))
    assert stopped.tokens == whole[0][: first + 1]
    assert stopped.finish_reason == "stop"
    assert short.tokens == whole[1][:2]
    later = run(params, prompts[:1], max_new_tokens=12, stop_ids=(stop,), sampling=Sampling(0, min_new_tokens=10))[0]
    assert stop not in later.tokens[:10]
    banned = run(params, prompts[:1], max_new_tokens=12, sampling=Sampling(0, banned_ids=tuple(whole[0])))[0]
    assert not set(banned.tokens) & set(whole[0])
    forced = run(params, prompts[:1], max_new_tokens=12, sampling=Sampling(0, logit_bias={7: 1e4}))[0]
    assert forced.tokens == [7] * 12
    varied = run(params, prompts[:1], max_new_tokens=12, sampling=Sampling(0, presence_penalty=1e4))[0]
    assert len(set(varied.tokens)) == 12


def test_text_stop_strings_and_padding_of_the_vocabulary(params):
    tokenizer = Letters()
    whole = run(params, [[1, 2]], tokenizer=tokenizer, max_new_tokens=14, sampling=Sampling(seed=2))[0]
    assert max(whole.tokens) < 26
    assert whole.text == tokenizer.decode(whole.tokens)
    stop = whole.text[9:12]  # of three tokens, across a look for it
    place = whole.text.index(stop)
    got = run(params, [[1, 2]], tokenizer=tokenizer, max_new_tokens=14, sampling=Sampling(seed=2), stop=("!", stop))[0]
    assert got.text == whole.text[:place]
    assert got.tokens == whole.tokens[: place + 3]
    assert len(got.log_probs) == place + 3
    assert got.finish_reason == "stop"
    ended = run(params, [[1, 2]], tokenizer=tokenizer, sampling=Sampling(seed=2), stop_ids=(whole.tokens[0],))[0]
    assert (ended.text, ended.tokens) == ("", whole.tokens[:1])


def test_a_nan_ends_its_own_row_only(params):
    poisoned = {**params, "embed": {"tokens": params["embed"]["tokens"].at[59].set(jnp.nan)}}
    clean = [[1, 2, 3], [4, 5]]
    want = run(params, clean, sampling=Sampling(seed=1, banned_ids=(59,)))
    got = run(poisoned, [clean[0], [6, 59, 7], clean[1]], sampling=Sampling(seed=1, banned_ids=(59,)))
    assert [got[0], got[2]] == want
    assert got[1].finish_reason == "error"
    assert got[1].tokens == []


def test_crop_keeps_the_end_of_a_long_prompt():
    long = list(range(50)) + list(range(30))
    (cropped,) = _requests(CFG, [long], None, 9, "crop")
    assert cropped.prompt == long[-(64 - 9) :]


def test_prepared_weights_give_the_same_logits_and_prepare_is_idempotent(params):
    cfg, tokens = CFG.replace(compute_dtype="bfloat16"), jnp.arange(20)[None]
    prepared = prepare(cfg, params)
    assert [layer["mlp"]["up"]["kernel"].dtype for layer in prepared["blocks"]] == [jnp.bfloat16] * 2
    assert prepared["blocks"][0]["norm1"]["scale"].dtype == jnp.float32
    again = prepare(cfg, prepared)
    assert jax.tree.structure(again) == jax.tree.structure(prepared)
    assert all(a is b for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(prepared), strict=True))
    full = jax.jit(apply)
    assert np.array_equal(full(cfg, prepared, tokens), full(cfg, params, tokens))


def test_a_bigram_generates():
    cfg = ModelConfig(kind="bigram", vocab_size=5)
    table = jnp.full((5, 5), -9.0).at[jnp.arange(5), (jnp.arange(5) + 1) % 5].set(9.0)
    out = generate(cfg, {"bigram": {"table": table}}, [[0], [1, 3]], sampling=GREEDY, max_new_tokens=4)
    assert [g.tokens for g in out] == [[1, 2, 3, 4], [4, 0, 1, 2]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": [[1], []]}, "prompt 1: is empty"),
        ({"prompts": [[1, V]]}, f"prompt 0: id {V} is outside"),
        ({"prompts": ["text"]}, "prompt 0: expected token ids"),
        ({"prompts": [[1] * 60]}, "exceed the model's context of 64"),
        ({"prompts": [[1]], "max_new_tokens": 64, "overflow": "crop"}, "exceed the model's context"),
        ({"prompts": [[1]], "max_new_tokens": 0}, "max_new_tokens: must be at least 1"),
        ({"prompts": [[1]], "sampling": [GREEDY, GREEDY]}, "sampling: 2 given for 1 prompts"),
        ({"prompts": [[1]], "sampling": Sampling(banned_ids=(V,))}, f"id {V} is outside"),
        ({"prompts": [[1]], "stop_ids": (-1,)}, "stop_ids: -1 is outside"),
        ({"prompts": [[1]], "stop": "x"}, "need a tokenizer"),
        ({"prompts": [[1]], "stop": ("a", ""), "tokenizer": Letters()}, "a stop string is empty"),
        ({"prompts": [[1]], "slots": 0}, "slots: must be at least 1"),
        ({"prompts": [[1]], "key": np.zeros(2, np.uint32)}, "key: expected one typed key"),
    ],
)
def test_bad_input_is_one_clear_error(params, change, message):
    with pytest.raises(InputError, match=message):
        run(params, **change)


def test_no_prompts_give_no_results(params):
    assert run(params, []) == []
