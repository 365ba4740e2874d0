"""Cross-entropy of hidden states, in chunks where the logits would not fit."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig
from jaxlm.model.transformer import Params, unembed


def token_nll(cfg: ModelConfig, params: Params, hidden: jax.Array, targets: jax.Array, *, chunk: int = 0) -> jax.Array:
    """Negative log-probability of each target, float32[B, T], nats.

    Args:
        cfg: the model.
        params: its parameters.
        hidden: [B, T, D] from `forward`.
        targets: int32[B, T], each in 0 .. V-1.
        chunk: tokens whose logits exist at one time, forward and backward; 0 means all B * T. At V = 50,257 and
            float32 a chunk of 1024 takes 0.2 GB where 16 x 1024 tokens at once take 3.3 GB.
    """
    b, t = targets.shape
    if chunk <= 0 or chunk >= b * t:
        return _nll(cfg, params, hidden, targets)
    count = -(-b * t // chunk)
    pad = count * chunk - b * t
    flat = jnp.pad(hidden.reshape(b * t, -1), ((0, pad), (0, 0))).reshape(count, chunk, -1)
    flat_targets = jnp.pad(targets.reshape(-1), (0, pad)).reshape(count, chunk)
    # checkpoint: the backward pass computes a chunk's logits again instead of keeping all of them.
    one = jax.checkpoint(lambda pair: _nll(cfg, params, *pair))
    return jax.lax.map(one, (flat, flat_targets)).reshape(-1)[: b * t].reshape(b, t)


def _nll(cfg: ModelConfig, params: Params, hidden: jax.Array, targets: jax.Array) -> jax.Array:
    logits = unembed(cfg, params, hidden)
    with jax.named_scope("cross_entropy"):
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen
