"""Small models with the traits that matter to a look inside, and weights from numpy, so that nothing compiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import model
from jaxlm.config import ModelConfig
from jaxlm.presets import preset

V, T, D = 11, 6, 16
_SMALL: dict[str, Any] = {"vocab_size": V, "n_layers": 2, "d_model": D, "n_heads": 4, "max_seq_len": 16, "d_ff": 24}

MODELS: dict[str, ModelConfig] = {
    "gpt2": preset("gpt2", **_SMALL),
    "qwen3": preset("qwen3-0.6b", **_SMALL, n_kv_heads=2, head_dim=6),  # grouped queries, QK norm, SwiGLU
    "nano": preset("nano", **_SMALL),  # key_offset, embed_mix
    "lesson_sinusoidal": preset("lesson_sinusoidal", **_SMALL),  # norms after the sums, no final norm
}


# Each model compiles for seconds: two of them have most traits.
_QUICK = ("qwen3", "nano")
_PARAMS = [pytest.param(name, marks=() if name in _QUICK else pytest.mark.slow) for name in MODELS]


@pytest.fixture(params=_PARAMS)
def cfg(request: pytest.FixtureRequest) -> ModelConfig:
    return MODELS[request.param]


@pytest.fixture(scope="session")
def models() -> dict[str, ModelConfig]:
    return MODELS


@pytest.fixture(scope="session")
def weights() -> Callable[[ModelConfig], Any]:
    """weights(cfg): random parameters, none of them zero."""

    def make(cfg: ModelConfig) -> Any:
        rng = np.random.default_rng(0)

        def fill(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            noise = rng.normal(size=leaf.shape).astype(np.float32)
            return jnp.asarray(1 + 0.2 * noise if "scale" in jax.tree_util.keystr(path) else 0.4 * noise)

        shapes = jax.eval_shape(lambda: model.init(cfg, jax.random.key(0)))
        return jax.tree_util.tree_map_with_path(fill, shapes)

    return make


@pytest.fixture(scope="session")
def tokens() -> np.ndarray:
    """int32[2, T]."""
    return np.random.default_rng(1).integers(0, V, (2, T)).astype(np.int32)
