"""Optimizers, from optax: AdamW with decay masks, and Muon for the matrices with Adam for the rest."""

from __future__ import annotations

from typing import Any

import jax
import optax

from jaxlm.config import TrainOptions
from jaxlm.model.weights import decay_mask, path_of, weight
from jaxlm.train.schedules import shape


def build(cfg: TrainOptions) -> optax.GradientTransformation:
    """The update rule for `cfg`: global-norm clipping, then AdamW or Muon.

    Which weights decay, and which axes of a stacked weight form the matrix that Muon orthogonalises, comes from the
    weight table; left to itself optax's Muon would take stacked biases for matrices. The Adam beside Muon has Nesterov
    momentum, as optax's Muon gives it (Dozat, 2016).

    References:
        Loshchilov & Hutter, decoupled weight decay (arXiv 1711.05101).
        Jordan et al., Muon (https://kellerjordan.github.io/posts/muon), 2024.
    """
    relative = shape(cfg)

    def rate(peak: float) -> optax.Schedule:
        return lambda step: peak * relative(step)

    if cfg.optimizer == "muon":
        rule = optax.contrib.muon(
            rate(cfg.muon_learning_rate),
            beta=cfg.muon_momentum,
            weight_decay=cfg.weight_decay,
            weight_decay_mask=decay_mask,
            adam_b1=cfg.beta1,
            adam_b2=cfg.beta2,
            adam_learning_rate=rate(cfg.learning_rate),
            muon_weight_dimension_numbers=_muon_dims,
        )
    else:
        rule = optax.adamw(
            rate(cfg.learning_rate), b1=cfg.beta1, b2=cfg.beta2, weight_decay=cfg.weight_decay, mask=decay_mask
        )
    if cfg.grad_clip > 0:
        return optax.chain(optax.clip_by_global_norm(cfg.grad_clip), rule)
    return rule


def updates_done(opt_state: Any) -> jax.Array:
    """int32[]: how many updates the optimizer has made, which is what its schedules go by.

    It falls behind the step where steps are skipped, and starts ahead of it when it comes from another training.
    """
    count: jax.Array = optax.tree_utils.tree_get_all_with_path(opt_state, "count")[0][1]  # all of them are equal
    return count


def _muon_dims(params: Any) -> Any:
    def dims(path: Any, _: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        matrix = weight(path_of(path)).matrix
        return None if matrix is None else optax.contrib.MuonDimensionNumbers(*matrix)

    return jax.tree_util.tree_map_with_path(dims, params)
