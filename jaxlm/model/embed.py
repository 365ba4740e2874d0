"""Tokens to vectors: embeddings, those of the tokens before mixed in, and positions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig
from jaxlm.model.cache import Cache, write_tokens
from jaxlm.model.positions import sinusoidal


def embed(
    cfg: ModelConfig,
    params: dict[str, Any],
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array | None,
    cache: Cache | None,
) -> tuple[jax.Array, jax.Array | None]:
    """Embeddings [B, T, D], and the cache's token history with `tokens` written to it."""
    dtype = jnp.dtype(cfg.compute_dtype)
    table = params["embed"]["tokens"].astype(dtype)
    x, history = table[tokens], None
    if cfg.embed_mix:
        earlier, history = _earlier(cfg.embed_mix, table, x, tokens, positions, segment_ids, cache)
        x = x + jnp.einsum("jbtd,jd->btd", earlier, params["embed"]["mix"].astype(dtype))
    if cfg.embed_scale == "sqrt_d":
        x = x * jnp.asarray(cfg.d_model**0.5, dtype)
    if cfg.position == "learned":
        x = x + params["embed"]["positions"].astype(dtype)[positions]
    elif cfg.position == "sinusoidal":
        x = x + sinusoidal(positions, cfg.d_model).astype(dtype)
    return x, history


def _earlier(
    reach: int,
    table: jax.Array,
    x: jax.Array,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array | None,
    cache: Cache | None,
) -> tuple[jax.Array, jax.Array | None]:
    """Embeddings of the tokens 1 .. reach places back, [reach, B, T, D], zero where there is none; and the history.

    Mixed into the embedding of a place, they make a causal depthwise convolution: each place knows the few tokens
    before it, so one attention layer can look up "what came after this" where it would take two. Compare So et al.,
    Primer (arXiv 2109.08668, section 3.2), which convolves queries, keys and values; here decoding needs to remember
    token ids only. Nothing is mixed across a document's edge: where positions restart, or the segment changes.
    """
    t = tokens.shape[1]
    if cache is None:
        # Shifting x, not gathering again: the gradient of a gather is a slow scatter.
        padded = jnp.pad(x, ((0, 0), (reach, 0), (0, 0)))
        shifted = jnp.stack([padded[:, reach - j : reach - j + t] for j in range(1, reach + 1)])
        return jnp.where(linked(positions, segment_ids, reach)[..., None], shifted, 0), None
    assert cache.tokens is not None  # init_cache makes it for such a model
    history = write_tokens(cache.tokens, tokens, cache.length)
    places = cache.length[:, None] + jnp.arange(t)[None, :]
    back = jnp.stack([places - j for j in range(1, reach + 1)])
    ids = history[jnp.arange(tokens.shape[0])[None, :, None], jnp.maximum(back, 0)]
    return jnp.where((back >= 0)[..., None], table[ids], 0), history


def linked(positions: jax.Array, segment_ids: jax.Array | None, reach: int) -> jax.Array:
    """bool[reach, B, T]: whether the tokens 1 .. reach places back are there and of the same document."""
    t = positions.shape[1]
    there = jnp.stack([positions >= j for j in range(1, reach + 1)])
    if segment_ids is None:
        return there
    ids = jnp.pad(segment_ids, ((0, 0), (reach, 0)), mode="edge")
    return there & jnp.stack([ids[:, reach - j : reach - j + t] == segment_ids for j in range(1, reach + 1)])
