"""Cross-entropy: the whole against chunks, and against numpy."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxlm import model

QUICK_COMPILE = True


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    return rng.normal(size=(2, 7, 16)).astype(np.float32), rng.integers(0, 13, (2, 7)).astype(np.int32)


def test_token_nll_is_minus_the_log_probability(models, weights, case):
    cfg, (hidden, targets) = models["nano"], case
    params = weights(cfg)
    logits = 15 * np.tanh(hidden.astype(np.float64) @ np.asarray(params["head"]["kernel"], np.float64) / 15)
    chosen = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    expected = np.log(np.exp(logits).sum(-1)) - chosen
    np.testing.assert_allclose(model.token_nll(cfg, params, hidden, targets), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "lesson_learned"])
@pytest.mark.parametrize("chunk", [5, 7])  # 14 tokens: with a rest, and without
def test_chunks_change_neither_value_nor_gradient(models, weights, case, name, chunk):
    cfg, (hidden, targets) = models[name], case
    factors = np.cos(np.arange(14, dtype=np.float32)).reshape(2, 7)  # tells the tokens apart

    @jax.jit
    def value_and_grads(hidden, params):
        def total(hidden, params, chunk):
            nll = model.token_nll(cfg, params, hidden, targets, chunk=chunk)
            return (nll * factors).sum(), nll

        grad = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
        return grad(hidden, params, 0), grad(hidden, params, chunk)

    ends = {key: weights(cfg)[key] for key in ("embed", "head") if key in weights(cfg)}
    whole, parts = value_and_grads(hidden, ends)
    assert parts[0][1].shape == (2, 7)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), parts, whole)
    assert np.abs(whole[1][0]).max() > 1e-3
