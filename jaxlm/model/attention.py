"""Grouped-query scaled dot-product attention, and the masks that go with it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# Finite, so that a row with nothing to attend to gives a mean and not NaN.
MASKED = -1e30


def training_mask(length: int, segment_ids: jax.Array | None) -> jax.Array:
    """True where a query may see a key: bool[1 or B, T, T]; causal, and within one document when segments are given."""
    causal = jnp.tril(jnp.ones((length, length), bool))[None]
    if segment_ids is None:
        return causal
    return causal & (segment_ids[:, :, None] == segment_ids[:, None, :])


def cache_mask(length: jax.Array, new: int, capacity: int) -> jax.Array:
    """bool[B, T, S]: query t of a row with `length` int32[B] tokens held sees places 0 .. length + t."""
    last = length[:, None] + jnp.arange(new)[None, :]
    return jnp.arange(capacity)[None, None, :] <= last[:, :, None]


def attend_next(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """`attend` for one query a row, and keys and values as the cache of decoding holds them.

    Args:
        q: [B, H, 1, h].
        k, v: [B * K, S, h].
        mask: bool[B, 1, S], True where the query sees the key.

    Returns:
        [B, H, 1, h] in q's type. Scores and softmax are float32.

    Keys come first in their product, and the barrier keeps them there: XLA's CPU backend would else turn all of them
    round at every step. The sum of the softmax divides at last, h numbers a head and not S.
    """
    batch, heads, _, h = q.shape
    grouped = (q * h**-0.5).reshape(k.shape[0], -1, h)
    scores = jnp.einsum("nsh,ngh->nsg", k, grouped, preferred_element_type=jnp.float32)
    scores = jax.lax.optimization_barrier(scores).swapaxes(1, 2)
    visible = jnp.repeat(mask, k.shape[0] // batch, axis=0)
    scores = jnp.where(visible, scores, MASKED)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    y = jnp.einsum("ngs,nsh->ngh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (y / weights.sum(-1, keepdims=True)).astype(q.dtype).reshape(batch, heads, 1, h)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Attention with H query heads over K key/value heads (head i reads key head i // (H/K)).

    Args:
        q: [B, H, T, h].
        k, v: [B, K, S, h].
        mask: bool[1 or B, T, S], True where the query sees the key.

    Returns:
        [B, H, T, h] in q's type. Scores and softmax are float32.

    Source: Vaswani et al. (arXiv 1706.03762), eq. 1; Ainslie et al. (arXiv 2305.13245) for grouped queries.
    """
    b, heads, t, h = q.shape
    kv = k.shape[1]
    grouped = (q * h**-0.5).reshape(b, kv, heads // kv, t, h)
    scores = jnp.einsum("bkgth,bksh->bkgts", grouped, k, preferred_element_type=jnp.float32)
    probs = jax.nn.softmax(jnp.where(mask[:, None, None], scores, MASKED), axis=-1)
    probs = checkpoint_name(probs, "blocks.attention.probs").astype(v.dtype)
    return jnp.einsum("bkgts,bksh->bkgth", probs, v).reshape(b, heads, t, h)
