"""What training carries from step to step."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm import model
from jaxlm.config import TrainConfig
from jaxlm.train import optimizers


class TrainState(NamedTuple):
    """One pytree, all of it saved in a checkpoint.

    Attributes:
        step: int32[], updates done; also the index of the next batch.
        params: the model's parameters, float32.
        opt_state: the optimizer's state.
        seed: uint32[]; all randomness of a step is a function of (seed, step, microbatch).
        halted: bool[], set by the first non-finite step (or by too many skipped ones) and never cleared: later steps
            change nothing, so the host may notice a step late and still hold the last good state.
        skipped: int32[], steps passed over because they were not finite (`on_nonfinite: skip`).
    """

    step: jax.Array
    params: model.Params
    opt_state: Any
    seed: jax.Array
    halted: jax.Array
    skipped: jax.Array


def init_state(cfg: TrainConfig, seed: int, params: model.Params | None = None) -> TrainState:
    """The state before the first step.

    Args:
        cfg: options and model.
        seed: decides the parameters and all later randomness.
        params: start from these instead of fresh ones.
    """
    if params is None:
        params = model.init(cfg.model, jax.random.fold_in(jax.random.key(seed), 0))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizers.build(cfg).init(params),
        seed=jnp.asarray(seed, jnp.uint32),
        halted=jnp.zeros((), bool),
        skipped=jnp.zeros((), jnp.int32),
    )
