"""Logit filters: temperature, top-k, top-p, min-p and typical, each row with its own options, without sorting.

What is kept, in this order:

- temperature: logits are divided by it. 0 keeps the first largest logit alone, undivided.
- top-k: tokens with fewer than k tokens strictly more likely. `k <= 0` and `k >= V` keep all.
- top-p: with the probabilities of what is left renormalised, a token is dropped while the total probability of all
  tokens no more likely than it is at most 1 - p; the most likely is always kept. `p >= 1` keeps all, `p <= 0` only the
  most likely.
- min-p: tokens at least `min_p` times as likely as the most likely. `min_p <= 0` keeps all, `min_p >= 1` only those.
- typical: of what is left, renormalised, the tokens whose information, -log p, is closest to its mean, the entropy:
  the fewest that together have the probability `typical_p`. `typical_p >= 1` keeps all, `typical_p <= 0` only the
  closest. The most likely token may go.

Tokens with equal logits, or equally far from the entropy in float32, are kept or dropped together, so nothing depends
on the order of the vocabulary. Probabilities are summed as integers (see `jaxlm.sample.exact`), so a row gets the same
bits alone, in any batch, under `vmap`, and on either of two paths (see `jaxlm.sample.cuts`): a search for the
thresholds over the whole vocabulary, or `lax.top_k` where every row's k is small. A token less likely than 2**-40
times the most likely counts as probability zero.

Rows without a distribution: one with a NaN logit, or with an option that is NaN, or a temperature that is negative or
infinite, becomes all NaN; a row of nothing but `-inf` stays so. Logits of `+inf` share all probability equally. A
temperature so small that the largest logit overflows is 0. Neighbours never notice any of it.

transformers applies the same order, breaking ties at p by sort order. llama.cpp, mlx-lm and MaxText apply temperature
last, so their top-p sets differ from these when the temperature is not 1.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxlm.sample import cuts
from jaxlm.sample.cuts import Options


def filter_logits(
    logits: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    top_k: ArrayLike = 0,
    top_p: ArrayLike = 1.0,
    min_p: ArrayLike = 0.0,
    typical_p: ArrayLike = 1.0,
    window: int | None = None,
) -> jax.Array:
    """Logits after temperature, with dropped tokens at -inf. The rules are at the top of this module.

    Args:
        logits: [..., V], any float type; work is in float32.
        temperature: scalar or [...].
        top_k: scalar or [...], integers.
        top_p: scalar or [...].
        min_p: scalar or [...].
        typical_p: scalar or [...].
        window: batches whose rows all have a top-k below this look only at `lax.top_k` of so many tokens, at most 1024;
            0 turns that off, and by default it is 64 from a vocabulary of 8192. It changes no bit of the result.

    Returns:
        float32[..., V].

    Raises:
        InputError: a vocabulary outside 1 .. 524,288, a negative window, or an option that is no number.

    References:
        Fan et al. (arXiv 1805.04833) for top-k; Holtzman et al. (arXiv 1904.09751) for top-p; Nguyen et al.
        (arXiv 2407.01082) for min-p; Meister et al. (arXiv 2202.00666), section 5, for typical.
    """
    logits = jnp.asarray(logits)
    option = cuts.per_row(logits, temperature, top_k, top_p, min_p, typical_p)
    return _filter(logits, option, cuts.width(logits.shape[-1], window))


def temperature(logits: ArrayLike, t: ArrayLike) -> jax.Array:
    """Logits [..., V] over the temperature `t` (scalar or [...]); 0 keeps the first largest logit alone."""
    return filter_logits(logits, temperature=t)


def top_k(logits: ArrayLike, k: ArrayLike) -> jax.Array:
    """The `k` (scalar or [...]) largest logits of [..., V] and those tied with the last of them, others at -inf."""
    return filter_logits(logits, top_k=k)


def top_p(logits: ArrayLike, p: ArrayLike) -> jax.Array:
    """The most likely tokens of logits [..., V] that together have the probability `p` (scalar or [...])."""
    return filter_logits(logits, top_p=p)


def min_p(logits: ArrayLike, p: ArrayLike) -> jax.Array:
    """The tokens of logits [..., V] at least `p` (scalar or [...]) times as likely as the most likely."""
    return filter_logits(logits, min_p=p)


def typical(logits: ArrayLike, p: ArrayLike) -> jax.Array:
    """The tokens of logits [..., V] nearest to the entropy that together have the probability `p` (scalar or [...])."""
    return filter_logits(logits, typical_p=p)


@partial(jax.jit, static_argnums=2)
def _filter(logits: jax.Array, option: Options, width: int) -> jax.Array:
    rows = cuts.as_rows(logits, option)
    found = cuts.look(rows, width)

    y = cuts.warmed(rows, rows.x)

    def by_search() -> cuts.Cut:
        blocks = cuts.blocked(y)
        return cuts.search(rows, blocks, cuts.relative(blocks, rows.largest))

    cut = lax.cond(found.suffices.all(), lambda: found.cut, by_search)
    kept = cuts.keeps(rows, y, cuts.relative(y, rows.largest), cut)
    first = jnp.arange(y.shape[1]) == cuts.first_largest(rows)[:, None]
    y = jnp.where(jnp.where(rows.greedy[:, None], first, kept), y, -jnp.inf)
    return jnp.where(jnp.isnan(rows.largest)[:, None], jnp.nan, y).reshape(logits.shape)
