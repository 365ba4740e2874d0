"""The library's functions inside a caller's own jax.shard_map, with its check of what differs between shards."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxlm import apply, init
from jaxlm.config import TrainConfig
from jaxlm.presets import preset
from jaxlm.sample import filter_logits, sample_token
from jaxlm.train import init_state
from jaxlm.train.step import loss_and_grads

QUICK_COMPILE = True
OPTIONS = {"temperature": 0.8, "top_k": 10, "top_p": 0.9, "min_p": 0.01}
ROWS = P("b")


@pytest.fixture(scope="module")
def mesh():
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices: JAX_NUM_CPU_DEVICES=2")
    return jax.make_mesh((2,), ("b",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])


def logits(vocab: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(4, vocab)).astype(np.float32))


def keys() -> jax.Array:
    return jax.random.split(jax.random.key(0), 4)


def sharded(mesh, f, *args, specs, out=ROWS):
    return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=out))(*args)


@pytest.mark.parametrize("options", [OPTIONS, {"typical_p": 0.9}], ids=["usual", "typical"])
def test_filters_on_sharded_rows(mesh, options):
    x = logits(50)
    found = sharded(mesh, lambda x: filter_logits(x, **options), x, specs=(ROWS,))
    np.testing.assert_array_equal(found, filter_logits(x, **options))


@pytest.mark.parametrize("vocab", [50, 9000])  # all of the vocabulary, and a window of it
def test_draws_on_sharded_rows(mesh, vocab):
    x = logits(vocab)
    found = sharded(mesh, lambda k, x: sample_token(k, x, **OPTIONS), keys(), x, specs=(ROWS, ROWS))
    np.testing.assert_array_equal(found, sample_token(keys(), x, **OPTIONS))


def test_only_keys_or_only_options_are_sharded(mesh):
    row = logits(50)[:1]
    found = sharded(mesh, lambda k: sample_token(k, jnp.repeat(row, 2, 0), **OPTIONS), keys(), specs=(ROWS,))
    np.testing.assert_array_equal(found, sample_token(keys(), jnp.repeat(row, 4, 0), **OPTIONS))
    t = jnp.array([0.5, 1.0, 0.0, 2.0])
    found = sharded(mesh, lambda t: filter_logits(jnp.repeat(row, 2, 0), temperature=t, top_p=0.9), t, specs=(ROWS,))
    np.testing.assert_array_equal(found, filter_logits(jnp.repeat(row, 4, 0), temperature=t, top_p=0.9))


@pytest.mark.parametrize("accumulated", [1, 2])
def test_model_and_loss_on_sharded_rows(mesh, accumulated):
    cfg = preset("nano", vocab_size=31, n_layers=1, d_model=16, n_heads=2, max_seq_len=16, zero_init_head=False)
    tokens = np.arange(32, dtype=np.int32).reshape(4, 8) % 31
    params = init(cfg, jax.random.key(0))
    found = sharded(mesh, lambda p, t: apply(cfg, p, t), params, tokens, specs=(P(), ROWS))
    np.testing.assert_allclose(found, apply(cfg, params, tokens), atol=1e-5)

    train = TrainConfig(steps=5, batch_size=4, model=cfg, grad_accum_steps=accumulated)
    state, batch = init_state(train, 0), {"tokens": tokens, "targets": tokens}
    state = state._replace(params=jax.tree.map(lambda x: 4 * x, state.params))  # else all tokens are equally likely
    # 15 valid tokens in one shard, 3 in the other.
    masked = batch | {"loss_mask": np.arange(8) < np.array([[8], [7], [1], [2]])}

    def together(state, batch):
        own = state._replace(params=jax.lax.pcast(state.params, "b", to="varying"))
        loss, grads, count = loss_and_grads(train, own, batch)
        total = jnp.maximum(jax.lax.psum(count, "b"), 1)
        whole = jax.tree.map(lambda x: jax.lax.psum(x * count, "b") / total, (loss, grads))
        return whole, jax.lax.pmean(loss, "b")

    def both(state, batch, masked):
        loss, grads, _ = loss_and_grads(train, state, batch)
        return (jax.lax.pmean(loss, "b"), grads), *together(state, masked)

    plain, right, wrong = sharded(mesh, both, state, batch, masked, specs=(P(), ROWS, ROWS), out=P())
    unsharded = jax.jit(lambda batch: loss_and_grads(train, state, batch)[:2])
    whole, whole_masked = unsharded(batch), unsharded(masked)
    near = partial(jax.tree.map, partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6))
    near(plain, (whole[0], jax.tree.map(lambda g: 2 * g, whole[1])))  # as many times too large as there are shards
    near(right, whole_masked)
    assert abs(wrong - whole_masked[0]) > 0.01  # the mean of the shards' means
