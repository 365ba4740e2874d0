"""The logit lens: what the model would predict if it ended after each block."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.analysis import _checks
from jaxlm.analysis.capture import capture, select
from jaxlm.config import ModelConfig
from jaxlm.errors import InputError
from jaxlm.model import Params, unembed
from jaxlm.model.transformer import normalized

LAYERS = ("embed", "blocks.*.out")  # the residual stream, from the embedding to the last block


class LensSummary(NamedTuple):
    """One number per place of the stream (L + 1: the embedding, then after each block).

    Attributes:
        nats: float32[L + 1], mean negative log-probability of the targets; NaN where one that counts is no token.
        agreement: float32[L + 1], share of tokens whose likeliest next token is the model's own.
        divergence: float32[L + 1], mean Kullback-Leibler divergence of the prediction from the model's own; nats.

    All are NaN where no target counts.
    """

    nats: jax.Array
    agreement: jax.Array
    divergence: jax.Array


def logit_lens(
    cfg: ModelConfig,
    params: Params,
    tokens: jax.Array,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """Log-probabilities of the next token read off the residual stream by the model's own final norm and head.

    Args:
        cfg: a model with blocks.
        params: its parameters.
        tokens: int32[B, T].
        positions: as for `jaxlm.forward`.
        segment_ids: as for `jaxlm.forward`.

    Returns:
        float32[L + 1, B, T, V]: after the embedding, then after each block; the last is the model's own prediction.
        At large V that is much memory: pass few tokens.

    Raises:
        InputError: a bigram table, which has no stream; or what `capture` refuses.

    Source: nostalgebraist, interpreting GPT: the logit lens (2020).
    """
    if cfg.kind == "bigram":
        raise InputError("logit_lens: a bigram table has no layers to look into; use a transformer.")
    stream = capture(cfg, params, tokens, select(cfg, LAYERS), positions=positions, segment_ids=segment_ids)
    x = jnp.stack(list(stream.values()))
    return jax.nn.log_softmax(unembed(cfg, params, normalized(cfg, params, x)), axis=-1)


def lens_summary(log_probs: jax.Array, targets: jax.Array, mask: jax.Array | None = None) -> LensSummary:
    """How good each place's prediction is, and how close to the last one's.

    Args:
        log_probs: [L + 1, B, T, V] from `logit_lens`.
        targets: int32[B, T], the tokens that came next, 0 to V - 1; where the mask is zero, anything, such as the -1
            of `token_labels`. Their values are data, so that none can be refused: see `LensSummary.nats`.
        mask: [B, T], non-zero where the target counts; by default everywhere.

    Raises:
        InputError: shapes that do not go together, or targets that are no whole numbers; seen under `jit` while it
            traces.
    """
    if targets is None:
        raise InputError("targets: expected one for each token, found None; pass the tokens that came next.")
    log_probs = jnp.asarray(log_probs)
    if log_probs.ndim != 4:
        raise InputError(f"log_probs: expected [L + 1, B, T, V] from logit_lens, found shape {log_probs.shape}.")
    targets = _checks.by_token("targets", targets, log_probs.shape[1:-1])
    counts = jnp.ones(targets.shape, bool) if mask is None else jnp.asarray(mask) != 0
    if counts.shape != targets.shape:
        raise InputError(f"mask: expected one for each target, shape {targets.shape}, found {counts.shape}.")
    own = log_probs[-1]

    def mean(values: jax.Array) -> jax.Array:
        return jnp.where(counts, values, 0.0).sum((-2, -1)) / counts.sum()

    token = (targets >= 0) & (targets < log_probs.shape[-1])
    index = jnp.broadcast_to(jnp.where(token, targets, 0)[None, ..., None], (*log_probs.shape[:-1], 1))
    chosen = jnp.take_along_axis(log_probs, index, -1)[..., 0]
    return LensSummary(
        nats=-mean(jnp.where(token, chosen, jnp.nan)),
        agreement=mean((log_probs.argmax(-1) == own.argmax(-1)).astype(jnp.float32)),
        divergence=mean((jnp.exp(own) * (own - log_probs)).sum(-1)),
    )
