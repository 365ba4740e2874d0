"""AdamW and Muon against numpy in float64, on parameters whose paths stand in the weight table."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import TrainOptions
from jaxlm.train import build_optimizer

QUICK_COMPILE = True

L, D, F = 3, 8, 24


def tree(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    return {
        "embed": {"tokens": normal(5, D)},
        "blocks": {
            "mlp": {
                "up": {"kernel": normal(L, D, F), "bias": normal(L, F)},
                "down": {"kernel": normal(L, F, D)},
            },
            "norm1": {"scale": normal(L, D)},
        },
    }


def leaves(values: Any) -> dict[str, np.ndarray]:
    flat = jax.tree_util.tree_flatten_with_path(values)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf, np.float64) for path, leaf in flat}


@cache
def compiled(options: TrainOptions) -> Any:
    rule = build_optimizer(options)
    return rule, jax.jit(rule.update)


def updates_of(options: TrainOptions, params: Any, all_grads: list[Any]) -> list[dict[str, np.ndarray]]:
    rule, update = compiled(options)
    state, out = rule.init(params), []
    for grads in all_grads:
        updates, state = update(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        out.append(leaves(updates))
    return out


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_adamw_by_hand(clip):
    """Loshchilov & Hutter (arXiv 1711.05101), algorithm 2; clipping by the global norm (Pascanu et al., 1211.5063)."""
    options = TrainOptions(
        steps=10, schedule="linear", final_lr_ratio=0.0, learning_rate=0.1, weight_decay=0.3, beta1=0.8, beta2=0.9,
        grad_clip=clip,
    )  # fmt: skip
    params, all_grads = tree(0), [tree(1), tree(2)]
    found = updates_of(options, params, all_grads)
    w = leaves(params)
    m, v = ({name: np.zeros_like(x) for name, x in w.items()} for _ in range(2))
    for t, grads in enumerate(map(leaves, all_grads), start=1):
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        assert norm > 1
        lr = 0.1 * (1 - (t - 1) / 10)
        for name, g in grads.items():
            g = g / norm * clip if clip else g
            m[name] = 0.8 * m[name] + 0.2 * g
            v[name] = 0.9 * v[name] + 0.1 * g**2
            step = m[name] / (1 - 0.8**t) / (np.sqrt(v[name] / (1 - 0.9**t)) + 1e-8)
            decay = 0.3 * w[name] if name.endswith("kernel") else 0.0  # matrices decay, nothing else does
            update = -lr * (step + decay)
            np.testing.assert_allclose(found[t - 1][name], update, rtol=1e-4, atol=1e-6, err_msg=name)
            w[name] = w[name] + update


MUON = TrainOptions(
    optimizer="muon", schedule="constant", learning_rate=0.01, muon_learning_rate=0.5, weight_decay=0.2, grad_clip=0.0,
    beta1=0.8, beta2=0.9,
)  # fmt: skip


@pytest.fixture(scope="module")
def muon() -> tuple[Any, list[dict[str, np.ndarray]]]:
    """Gradients of two steps, and the updates of parameters that are zero, so that nothing decays."""
    grads = [tree(1), tree(2)]
    return grads, updates_of(MUON, jax.tree.map(np.zeros_like, tree(0)), grads)


@pytest.mark.parametrize(("name", "scale"), [("up", (F / D) ** 0.5), ("down", 1.0)])
def test_muon_updates_of_each_layer_are_nearly_orthogonal(muon, name, scale):
    """Jordan et al. 2024: five Newton-Schulz steps bring every singular value near 1 (between 0.7 and 1.2); the update
    of a matrix with more outputs than inputs is longer by the root of their ratio."""
    _, found = muon
    for updates in found:
        for layer in updates[f"blocks/mlp/{name}/kernel"]:
            values = np.linalg.svd(layer, compute_uv=False) / (0.5 * scale)
            assert len(values) == D
            assert (values > 0.65).all()
            assert (values < 1.25).all()


def test_muon_takes_each_layer_by_itself(muon):
    """A layer with a gradient 1000 times the others' changes no update, not even its own."""
    (first, _), found = muon
    kernel = first["blocks"]["mlp"]["up"]["kernel"] * np.array([1, 1000, 1], np.float32)[:, None, None]
    scaled = {"embed": first["embed"], "blocks": first["blocks"] | {"mlp": first["blocks"]["mlp"] | {
        "up": first["blocks"]["mlp"]["up"] | {"kernel": kernel}}}}  # fmt: skip
    (update,) = updates_of(MUON, jax.tree.map(np.zeros_like, first), [scaled])
    name = "blocks/mlp/up/kernel"
    np.testing.assert_allclose(update[name], found[0][name], rtol=1e-3, atol=1e-3)


def test_muon_points_downhill_along_the_gradients_singular_vectors(muon):
    """The update is -lr * scale * (near U V^T), where the gradient is U S V^T."""
    grads, found = muon
    for g, update in zip(grads[0]["blocks"]["mlp"]["down"]["kernel"], found[0]["blocks/mlp/down/kernel"], strict=True):
        u, _, vt = np.linalg.svd(g.astype(np.float64), full_matrices=False)
        inside = u.T @ update @ vt.T  # diagonal, if the singular vectors are the gradient's
        np.testing.assert_allclose(inside, np.diag(np.diag(inside)), atol=1e-3)
        assert (np.diag(inside) < -0.3).all()


@pytest.mark.parametrize("name", ["embed/tokens", "blocks/mlp/up/bias", "blocks/norm1/scale"])
def test_muon_leaves_the_rest_to_adam_at_its_own_rate(muon, name):
    """The first step of Adam with Nesterov momentum (Dozat 2016): m^ = b1 m / (1 - b1^2) + g, v^ = g^2, so that the
    update is -lr sign(g) (1 + b1 / (1 + b1)), 1.444 times Adam's."""
    grads, found = muon
    g = leaves(grads[0])[name]
    np.testing.assert_allclose(found[0][name], -0.01 * np.sign(g) * (1 + 0.8 / 1.8), rtol=1e-4)


def test_muon_decays_matrices_only():
    params, zero = tree(0), jax.tree.map(np.zeros_like, tree(1))
    (update,) = updates_of(MUON, params, [zero])
    for name, w in leaves(params).items():
        expected = -0.5 * 0.2 * w if name.endswith("kernel") else np.zeros_like(w)
        np.testing.assert_allclose(update[name], expected, rtol=1e-5, atol=1e-7, err_msg=name)
