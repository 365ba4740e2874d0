"""Small models with the traits of each family, and weights for them that are nowhere zero or one."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import model
from jaxlm.config import ModelConfig
from jaxlm.presets import preset

V, T, D = 13, 8, 16
_SMALL: dict[str, Any] = {"vocab_size": V, "n_layers": 2, "d_model": D, "n_heads": 4, "max_seq_len": 16}

MODELS: dict[str, ModelConfig] = {
    "gpt2": preset("gpt2", **_SMALL),
    "llama": preset("llama-3.2-1b", **_SMALL, n_kv_heads=2, head_dim=None, d_ff=24),
    "qwen3": preset("qwen3-0.6b", **_SMALL, n_kv_heads=2, head_dim=6, d_ff=24),
    "nano": preset("nano", **{**_SMALL, "embed_mix": 2}),
    "lesson_learned": preset("lesson_learned", **{**_SMALL, "d_ff": 24}),
    "lesson_sinusoidal": preset("lesson_sinusoidal", **{**_SMALL, "d_ff": 24}),
    "bigram": preset("bigram", vocab_size=V),
}
# Three of them add no trait of their own to what the others have together, and each compiles for seconds.
_RARE = ("gpt2", "llama", "lesson_learned")
_PARAMS = [pytest.param(name, marks=pytest.mark.slow if name in _RARE else ()) for name in MODELS]


@cache
def _weights(cfg: ModelConfig, seed: int) -> Any:
    rng = np.random.default_rng(seed)

    def fill(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        return jnp.asarray(1 + 0.2 * noise if "scale" in jax.tree_util.keystr(path) else 0.4 * noise)

    shapes = jax.eval_shape(lambda: model.init(cfg, jax.random.key(0)))
    return jax.tree_util.tree_map_with_path(fill, shapes)


@pytest.fixture(scope="session")
def weights() -> Callable[..., Any]:
    """weights(cfg, seed=0): random parameters from numpy, so that none is zero and nothing has to compile."""
    return lambda cfg, seed=0: _weights(cfg, seed)


@pytest.fixture(params=_PARAMS)
def cfg(request: pytest.FixtureRequest) -> ModelConfig:
    """Each model in turn."""
    return MODELS[request.param]


@pytest.fixture(scope="session")
def models() -> dict[str, ModelConfig]:
    return MODELS


@pytest.fixture(scope="session")
def tokens() -> np.ndarray:
    """int32[3, T], no token twice in a row."""
    rng = np.random.default_rng(1)
    return np.stack([rng.permutation(V)[:T] for _ in range(3)]).astype(np.int32)
