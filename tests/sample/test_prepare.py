"""Weights laid out for decoding: the same logits, told from others, and exported."""

from __future__ import annotations

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import inspect_model
from jaxlm.config import ModelConfig
from jaxlm.errors import InputError
from jaxlm.model import apply
from jaxlm.model.blocks import product
from jaxlm.sample import prepare

QUICK_COMPILE = True

SMALL = ModelConfig(
    vocab_size=60, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, max_seq_len=16, tie_embeddings=False
)


def test_prepared_weights_give_the_same_logits_and_prepare_is_idempotent(random_params):
    cfg, tokens = SMALL.replace(compute_dtype="bfloat16"), jnp.arange(16)[None]
    params = random_params(cfg)
    prepared = prepare(cfg, params)
    assert [layer["mlp"]["up"]["turned"].dtype for layer in prepared["blocks"]] == [jnp.bfloat16] * 2
    assert prepared["blocks"][0]["norm1"]["scale"].dtype == jnp.float32
    again = prepare(cfg, prepared)
    assert jax.tree.structure(again) == jax.tree.structure(prepared)
    assert all(a is b for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(prepared), strict=True))
    full = jax.jit(apply)
    logits = full(cfg, params, tokens)
    # Products with turned matrices add in another order; bfloat16 keeps 8 bits of each sum.
    np.testing.assert_allclose(full(cfg, prepared, tokens), logits, atol=2**-6 * np.abs(logits).max())


@pytest.mark.parametrize(("rows", "outputs"), [((1, 1), 48), ((1, 1), 47), ((3, 2), 48), ((8, 1), 47), ((0, 2), 48)])
def test_a_product_with_a_turned_matrix_is_that_with_the_matrix(rows, outputs):
    rng = np.random.default_rng(0)
    x, matrix = (rng.normal(size=size).astype(np.float32) for size in ((*rows, 64), (64, outputs)))
    got = jax.jit(product)(x, matrix.T.copy())
    np.testing.assert_allclose(got, x.astype(np.float64) @ matrix.astype(np.float64), atol=1e-4)


def test_prepared_weights_give_the_same_logits_in_float32_with_either_head(random_params):
    tokens = jnp.arange(8)[None]
    for cfg in (SMALL, SMALL.replace(tie_embeddings=True)):
        params = random_params(cfg)
        prepared = prepare(cfg, params)
        assert "kernel" not in prepared.get("head", {})
        np.testing.assert_allclose(apply(cfg, prepared, tokens), apply(cfg, params, tokens), atol=1e-5)


def test_prepared_weights_are_told_from_others(random_params):
    """By what needs them as they were, and by a model of another shape."""
    prepared = prepare(SMALL, random_params(SMALL))
    with pytest.raises(InputError, match="as they were before sample"):
        inspect_model.report(SMALL, prepared)
    other = SMALL.replace(n_kv_heads=1 if SMALL.kv_heads > 1 else SMALL.n_heads * 2, n_heads=SMALL.n_heads * 2)
    with pytest.raises(InputError, match=r"qkv has \d+ outputs, but the configuration"):
        apply(other, prepared, jnp.arange(8)[None])


def test_prepared_weights_are_exported_with_any_number_of_rows(random_params):
    prepared = prepare(SMALL, random_params(SMALL))
    (rows,) = jax.export.symbolic_shape("rows")
    tokens = jax.ShapeDtypeStruct((rows, 6), jnp.int32)
    exported = jax.export.export(jax.jit(lambda p, x: apply(SMALL, p, x)))(prepared, tokens)
    for n in (1, 3):
        x = jnp.arange(6 * n).reshape(n, 6)
        np.testing.assert_allclose(exported.call(prepared, x), apply(SMALL, prepared, x), atol=1e-5)
