"""Toy models and batches for the training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import model
from jaxlm.config import ModelConfig, TrainConfig
from jaxlm.presets import preset

V, B, T = 11, 8, 6

# A bigram table goes through every line of the step and compiles in a moment; a block is for what needs a model.
BIGRAM = preset("bigram", vocab_size=V)
BLOCK = ModelConfig(vocab_size=V, n_layers=1, d_model=8, n_heads=2, d_ff=12, max_seq_len=T)


@pytest.fixture(scope="session")
def toy() -> Callable[..., TrainConfig]:
    """toy("bigram" or "block", **options) with batches of 8."""

    def make(kind: str = "bigram", **options: Any) -> TrainConfig:
        changes = options.pop("model", {})
        cfg = (BIGRAM if kind == "bigram" else BLOCK).replace(**changes)
        return TrainConfig(model=cfg, **{"steps": 100, "batch_size": B, "schedule": "constant", **options})

    return make


@pytest.fixture(scope="session")
def random_params() -> Callable[[ModelConfig], Any]:
    """Parameters from numpy: none is zero, and nothing compiles."""

    def make(cfg: ModelConfig) -> Any:
        rng = np.random.default_rng(3)
        shapes = jax.eval_shape(lambda: model.init(cfg, jax.random.key(0)))
        return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape).astype(np.float32) * 0.5), shapes)

    return make


@pytest.fixture(scope="session")
def batch() -> dict[str, np.ndarray]:
    """Random tokens; targets that follow from them, so that there is something to learn."""
    tokens = np.random.default_rng(4).integers(0, V, (B, T)).astype(np.int32)
    return {"tokens": tokens, "targets": (3 * tokens + 1) % V}


@pytest.fixture(scope="session")
def masked(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The batch with all optional parts, and masks that leave each row another number of targets."""
    mask = (np.arange(T) < np.array([6, 1, 0, 3, 5, 2, 6, 4])[:, None]).astype(np.float32)
    segments = np.tile(np.array([1, 1, 2, 2, 2, 2], np.int32), (B, 1))
    positions = np.tile(np.array([0, 1, 0, 1, 2, 3], np.int32), (B, 1))
    return batch | {"loss_mask": mask, "segment_ids": segments, "positions": positions}
