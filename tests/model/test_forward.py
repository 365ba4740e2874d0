"""Properties that every model has, whatever its traits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import model
from jaxlm.errors import InputError

QUICK_COMPILE = True

TIGHT = {"rtol": 2e-5, "atol": 2e-5}  # float32, sums in another order


full = jax.jit(model.apply)


def places(tokens: np.ndarray) -> np.ndarray:
    return np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)


def logits_of(cfg, params, tokens):
    """Logits by the one compiled function of a model: positions from 0, one segment."""
    return full(cfg, params, tokens, positions=places(tokens), segment_ids=np.ones_like(tokens))


def test_logits_are_float32_of_the_vocabulary(cfg, weights, tokens):
    out = logits_of(cfg, weights(cfg), tokens)
    assert out.dtype == jnp.float32
    assert out.shape == (3, 8, cfg.vocab_size)
    assert np.isfinite(out).all()
    assert np.std(out) > 0.1  # the weights reach the logits


@jax.jit
def influence(cfg: Any, params: Any, row: Any) -> jax.Array:
    """|d logits[t] / d embedding of the token at s|: float32[T, T]. Each token of the row is a different one."""

    def logits(table: jax.Array) -> jax.Array:
        if cfg.kind == "bigram":
            return model.apply(cfg, {"bigram": {"table": table}}, row[None])[0]
        hidden, _ = model.forward(cfg, params | {"embed": params["embed"] | {"tokens": table}}, row[None])
        return model.unembed(cfg, params, hidden)[0]  # with the weights as they were: a tied head is no input

    table = params["bigram"]["table"] if cfg.kind == "bigram" else params["embed"]["tokens"]
    out, back = jax.vjp(logits, table)
    direction = jnp.cos(jnp.arange(out.shape[-1], dtype=out.dtype))
    cotangents = jnp.eye(len(row))[:, :, None] * direction
    (grads,) = jax.vmap(back)(cotangents)  # [T, V, D]
    return jnp.abs(grads).max(-1)[:, row]


def test_no_logit_depends_on_a_later_token_and_each_on_every_earlier_one(cfg, weights, tokens):
    cfg = cfg.replace(n_layers=1)  # the mask is the same in every layer
    grid = np.asarray(influence(cfg, weights(cfg), tokens[0]))
    later = np.triu(np.ones_like(grid, bool), 1)
    assert (grid[later] == 0).all()
    earlier = np.eye(len(grid), dtype=bool) if cfg.kind == "bigram" else ~later
    assert (grid[earlier] > 1e-6).all()
    assert (grid[~earlier] == 0).all()


def test_jit_equals_no_jit(models, weights, tokens):
    cfg = models["nano"].replace(n_layers=1)
    params = weights(cfg)
    # Also: no positions and no segments mean positions from 0 and one segment.
    np.testing.assert_allclose(model.apply(cfg, params, tokens), logits_of(cfg, params, tokens), **TIGHT)


def test_scan_over_layers_and_remat_equal_unrolled_layers(cfg, weights, tokens):
    if cfg.kind == "bigram":
        pytest.skip("a bigram has no layers to scan")
    other = cfg.replace(scan_layers=True, remat=True)
    np.testing.assert_allclose(logits_of(other, weights(cfg), tokens), logits_of(cfg, weights(cfg), tokens), **TIGHT)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nano", "lesson_sinusoidal"])
def test_scan_and_remat_have_the_gradients_of_unrolled_layers(models, name, weights, tokens):
    cfg = models[name]

    @jax.jit
    def grads(cfg, params):
        return jax.grad(lambda p: jnp.square(model.apply(cfg, p, tokens)).mean())(params)

    plain = grads(cfg, weights(cfg))
    for options in ({"scan_layers": True}, {"scan_layers": True, "remat": True}, {"remat": True}):
        found = grads(cfg.replace(**options), weights(cfg))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, plain)
    assert min(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(plain)) > 0


def test_a_row_of_a_batch_equals_the_row_alone(models, weights, tokens):
    params = weights(models["nano"])
    alone = logits_of(models["nano"], params, tokens[1:2])
    np.testing.assert_allclose(alone[0], logits_of(models["nano"], params, tokens)[1], **TIGHT)


def test_packed_documents_equal_the_same_documents_alone(cfg, weights, tokens):
    params = weights(cfg)
    packed = tokens.copy()
    packed[0] = np.concatenate([tokens[1, :5], tokens[2, :3]])
    segment_ids = np.ones_like(tokens)
    segment_ids[0, 5:] = 2
    positions = places(tokens).copy()
    positions[0, 5:] = np.arange(3)
    out = full(cfg, params, packed, positions=positions, segment_ids=segment_ids)
    np.testing.assert_allclose(out[0, :5], out[1, :5], **TIGHT)
    np.testing.assert_allclose(out[0, 5:], out[2, :3], **TIGHT)


@pytest.mark.parametrize("name", ["qwen3", "nano"])
def test_segments_alone_keep_documents_apart(models, name, weights, tokens):
    """Without positions of its own, a document still sees no token of the one before it."""
    cfg, other = models[name], tokens.copy()
    other[:, :5] = (other[:, :5] + 1) % cfg.vocab_size
    segment_ids = np.ones_like(tokens)
    segment_ids[:, 5:] = 2
    first, second = (
        full(cfg, weights(cfg), each, positions=places(tokens), segment_ids=segment_ids) for each in (tokens, other)
    )
    np.testing.assert_array_equal(first[:, 5:], second[:, 5:])
    assert np.abs(first[:, :5] - second[:, :5]).max() > 1e-3


@jax.jit
def decode(cfg: Any, params: Any, tokens: Any, cache: Any) -> tuple[jax.Array, Any]:
    hidden, cache = model.forward(cfg, params, tokens, cache=cache)
    return model.unembed(cfg, params, hidden), cache


def test_decoding_with_a_cache_equals_the_full_forward(cfg, weights, tokens):
    """A ragged prefill, then single steps, each row at its own length."""
    params = weights(cfg)
    expected = np.asarray(logits_of(cfg, params, tokens))
    lengths = np.array([4, 2, 3], np.int32)
    prompts = np.where(np.arange(4) < lengths[:, None], tokens[:, :4], 0)  # right-padded
    out, cache = decode(cfg, params, prompts, model.init_cache(cfg, 3, 7))
    assert (cache.length == 4).all()
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(out[row, :length], expected[row, :length], **TIGHT)
    cache = cache._replace(length=jnp.asarray(lengths))
    for _ in range(3):
        at = np.asarray(cache.length)
        out, cache = decode(cfg, params, tokens[np.arange(3), at][:, None], cache)
        np.testing.assert_allclose(out[:, 0], expected[np.arange(3), at], **TIGHT)
        np.testing.assert_array_equal(cache.length, at + 1)


def test_layers_and_caches_as_tuples_equal_stacked_ones(models, weights, tokens):
    """The layout of `sample.prepare`."""
    cfg = models["nano"]
    params = weights(cfg)
    apart = params | {"blocks": model.unstack(params["blocks"], cfg.n_layers)}
    apart_empty = model.init_cache(cfg, 3, 7, stacked=False)
    out, cache = decode(cfg, apart, tokens[:, :4], apart_empty)
    expected, stacked = decode(cfg, params, tokens[:, :4], model.init_cache(cfg, 3, 7))
    np.testing.assert_allclose(out, expected, **TIGHT)
    assert apart_empty.capacity == stacked.capacity == 7
    for apart, whole in ((cache.k, stacked.k), (cache.v, stacked.v)):  # a layer's: [B * K, S, h]
        rows = np.stack(apart).reshape(cfg.n_layers, 3, -1, 7, cfg.d_head)
        np.testing.assert_allclose(rows.swapaxes(2, 3), whole, **TIGHT)


def test_scan_decodes_as_unrolled_layers_do(models, weights, tokens):
    cfg = models["nano"]
    cache = model.init_cache(cfg, 3, 7)
    plain = decode(cfg, weights(cfg), tokens[:, :4], cache)
    scanned = decode(cfg.replace(scan_layers=True), weights(cfg), tokens[:, :4], cache)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **TIGHT), scanned, plain)
    assert scanned[1].tokens is not None
    apart = model.init_cache(cfg, 3, 7, stacked=False)  # a layer's array each: nothing to scan over
    out, held = decode(cfg.replace(scan_layers=True), weights(cfg), tokens[:, :4], apart)
    np.testing.assert_allclose(out, plain[0], **TIGHT)
    assert isinstance(held.k, tuple)


def test_writes_beyond_the_cache_are_dropped():
    from jaxlm.model.cache import write, write_tokens

    cache = jnp.zeros((2, 1, 4, 1))
    out = write(cache, jnp.arange(1.0, 5.0).reshape(2, 1, 2, 1), jnp.array([3, 1]))
    np.testing.assert_array_equal(out[:, 0, :, 0], [[0, 0, 0, 1], [0, 3, 4, 0]])
    ids = write_tokens(jnp.zeros((2, 3), jnp.int32), jnp.array([[5, 6], [7, 8]]), jnp.array([2, 0]))
    np.testing.assert_array_equal(ids, [[0, 0, 5], [7, 8, 0]])


def test_segments_and_a_cache_do_not_go_together(models, weights, tokens):
    cfg = models["nano"]
    with pytest.raises(ValueError, match="segment_ids and cache"):
        model.forward(cfg, weights(cfg), tokens, segment_ids=tokens, cache=model.init_cache(cfg, 3, 9))


def test_no_token_stands_beyond_the_learned_positions(models, weights):
    """Seen in shapes: so without computing anything, and inside `jit` too."""
    cfg = models["gpt2"].replace(max_seq_len=6)
    params = weights(cfg)
    shape = jax.ShapeDtypeStruct((2, 7), jnp.int32)
    with pytest.raises(InputError, match=r"^tokens: rows of 7 tokens are longer than the 6 positions .* learned"):
        jax.eval_shape(jax.jit(model.apply), cfg, params, shape)
    assert jax.eval_shape(model.apply, cfg, params, jax.ShapeDtypeStruct((2, 6), jnp.int32)).shape == (2, 6, 13)
    packed = jax.eval_shape(lambda x, at: model.apply(cfg, params, x, positions=at), shape, shape)
    assert packed.shape == (2, 7, 13)  # positions that start anew within a row
    with pytest.raises(InputError, match=r"^length: a cache of 7 places is longer than the 6 positions"):
        model.init_cache(cfg, 2, 7)
    assert model.init_cache(cfg, 2, 6).capacity == 6
    rotary = models["llama"].replace(max_seq_len=6)
    assert jax.eval_shape(model.apply, rotary, weights(rotary), shape).shape == (2, 7, 13)
    assert model.init_cache(rotary, 2, 7).capacity == 7


def test_dropout_is_off_without_a_key_and_follows_its_key(models, weights, tokens):
    cfg = models["nano"].replace(n_layers=1, dropout=0.4)
    params = weights(cfg)
    forward = jax.jit(lambda cfg, key: model.forward(cfg, params, tokens, dropout_key=key)[0])
    first, again, other = (np.asarray(forward(cfg, jax.random.key(seed))) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1
    np.testing.assert_allclose(forward(cfg.replace(scan_layers=True), jax.random.key(1)), first, **TIGHT)
    plain = forward(cfg.replace(dropout=0.0), None)
    np.testing.assert_array_equal(forward(cfg, None), plain)
    assert np.abs(first - plain).max() > 0.1


def test_dropout_drops_its_share_and_keeps_the_mean():
    from jaxlm.model.blocks import dropout

    x = jnp.full(100_000, 2.0)
    out = np.asarray(dropout(x, 0.25, jax.random.key(0)))
    assert set(np.unique(out)) == {0.0, np.float32(2 / 0.75)}
    assert abs((out == 0).mean() - 0.25) < 0.007  # 5 standard deviations of a binomial share
    np.testing.assert_array_equal(dropout(x, 0.25, None), x)


def test_bfloat16_compute_stays_near_float32_and_gives_float32_logits(models, weights, tokens):
    cfg = models["nano"]
    exact = np.asarray(logits_of(cfg, weights(cfg), tokens))
    rough = logits_of(cfg.replace(compute_dtype="bfloat16"), weights(cfg), tokens)
    assert rough.dtype == jnp.float32
    error = np.abs(np.asarray(rough) - exact).max()
    assert 1e-4 < error < 0.1 * np.abs(exact).max()  # 8 bits of mantissa: off, but not by much


def test_softcap_bounds_the_logits(models, weights, tokens):
    """Gemma 2 (arXiv 2408.00118): c tanh(x / c)."""
    cfg = models["nano"]
    raw = np.asarray(logits_of(cfg.replace(logit_softcap=None), weights(cfg), tokens))
    assert np.abs(raw).max() > 5  # beyond the part where tanh does nothing
    np.testing.assert_allclose(logits_of(cfg, weights(cfg), tokens), 15 * np.tanh(raw / 15), **TIGHT)


def test_the_configuration_is_static_under_jit(models):
    """It travels in the tree's structure: `jit` takes it as any argument, and another one compiles anew."""
    seen = []

    @jax.jit
    def f(cfg, x):
        seen.append(cfg.n_layers)
        return x * cfg.n_layers

    assert [int(f(models["gpt2"].replace(n_layers=n), 1)) for n in (2, 3, 2)] == [2, 3, 2]
    assert seen == [2, 3]
    assert jax.tree.leaves(models["gpt2"]) == []
