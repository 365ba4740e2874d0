"""The draw: one uniform number per row through the inverse of the cumulative distribution, in vocabulary order."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxlm.errors import InputError
from jaxlm.sample import cuts, exact
from jaxlm.sample.arguments import found
from jaxlm.sample.cuts import Options, Rows, Window


def sample_token(
    keys: jax.Array,
    logits: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    top_k: ArrayLike = 0,
    top_p: ArrayLike = 1.0,
    min_p: ArrayLike = 0.0,
    typical_p: ArrayLike = 1.0,
    window: int | None = None,
) -> jax.Array:
    """Draws one token per row from the filtered distribution.

    A uniform number u of 32 bits comes from the row's key; the token is the first, in vocabulary order, where the
    cumulative probability of kept tokens is strictly above u. Sums are exact, so a row gets the same token alone, in
    any batch and under `vmap`. Call it on a whole batch, not under `vmap`, to leave XLA the choice of the faster path.

    Args:
        keys: typed PRNG keys [...].
        logits: [..., V], any float type.
        temperature: scalar or [...]; 0 takes the first largest logit.
        top_k: scalar or [...].
        top_p: scalar or [...].
        min_p: scalar or [...].
        typical_p: scalar or [...].
        window: as in `filter_logits`; it changes no draw.

    Returns:
        int32[...]; -1 for a row without a distribution: a NaN among its logits, nothing but -inf, or a bad option.

    Raises:
        InputError: as `filter_logits`, or keys that do not match the rows.
    """
    logits = jnp.asarray(logits)
    dtype, shape = getattr(keys, "dtype", None), getattr(keys, "shape", ())
    if dtype is None or not jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) or shape != logits.shape[:-1]:
        raise InputError(
            f"keys: expected typed keys of shape {logits.shape[:-1]} (jax.random.key), one for each row of logits, "
            f"found {found(keys) if dtype is None else f'{dtype} of shape {shape}'}."
        )
    option = cuts.per_row(logits, temperature, top_k, top_p, min_p, typical_p)
    return _sample(keys, logits, option, cuts.width(logits.shape[-1], window))


def draw_kept(keys: jax.Array, logits: jax.Array) -> jax.Array:
    """`sample_token` without any filter, the same draws: for logits that have been filtered, or need not be.

    It compiles in half of the time, without the search for thresholds that no row would use.

    Args:
        keys: typed PRNG keys [...].
        logits: float [..., V]; -inf for what may not be drawn.

    Returns:
        int32[...]; -1 for a row without a distribution.
    """
    u = _uniform(keys)
    rows = cuts.as_rows(logits, cuts.per_row(logits, 1.0, 0, 1.0, 0.0, 1.0), u)
    y = cuts.blocked(rows.x)
    token = _inverse_cdf(cuts.relative(y, rows.largest), u)
    return jnp.where(cuts.usable(rows), token, -1).reshape(logits.shape[:-1])


@partial(jax.jit, static_argnums=3)
def _sample(keys: jax.Array, logits: jax.Array, option: Options, width: int) -> jax.Array:
    u = _uniform(keys)
    rows = cuts.as_rows(logits, option, u)
    largest = cuts.first_largest(rows)

    def draw() -> jax.Array:
        found = cuts.look(rows, width)
        if not found.y.shape[1]:
            return _from_all(rows, u)
        return lax.cond(found.suffices.all(), lambda: _from_window(rows, found, u), lambda: _from_all(rows, u))

    token = lax.cond(rows.greedy.all(), lambda: largest, draw)
    token = jnp.where(cuts.usable(rows), jnp.where(rows.greedy, largest, token), -1)
    return token.reshape(logits.shape[:-1])


def _uniform(keys: jax.Array) -> tuple[jax.Array, ...]:
    """32 random bits a row, as digits in base 2**12 of a number in [0, 1)."""
    bits = jax.vmap(lambda key: jax.random.bits(key, (), jnp.uint32))(keys.reshape(-1))
    bits = lax.bitcast_convert_type(bits, jnp.int32)
    return (bits >> 20) & 0xFFF, (bits >> 8) & 0xFFF, (bits & 0xFF) << 4


def _from_window(rows: Rows, found: Window, u: tuple[jax.Array, ...]) -> jax.Array:
    kept = cuts.keeps(rows, found.y, found.prob, found.cut)
    weight = exact.limbs(jnp.where(kept, found.prob, 0.0))
    cumulative = exact.sums_where(found.token[:, None, :] <= found.token[:, :, None], weight)  # in vocabulary order
    total = exact.block_sums(exact.Limbs(*(limb[:, None] for limb in weight)))
    mark = exact.scaled(total, tuple(digit[:, None] for digit in u))
    return jnp.where(exact.above(cumulative, mark), found.token, rows.x.shape[1]).min(-1)


def _from_all(rows: Rows, u: tuple[jax.Array, ...]) -> jax.Array:
    y = cuts.blocked(cuts.warmed(rows, rows.x))
    prob = cuts.relative(y, rows.largest)
    kept = cuts.keeps(rows, y, prob, cuts.search(rows, y, prob))
    return _inverse_cdf(jnp.where(kept, prob, 0.0), u)


def _inverse_cdf(prob: jax.Array, u: tuple[jax.Array, ...]) -> jax.Array:
    """int32[B]: the first token where the running sum of float32[B, N, block] exceeds u of the whole."""
    weight = exact.limbs(prob)
    # First the block, then the token in it, so that nothing as long as the vocabulary is ever accumulated.
    cumulative = exact.running(exact.block_sums(weight))
    mark = exact.scaled(exact.Digits(*(digit[:, -1] for digit in cumulative)), u)
    mark = exact.Digits(*(digit[:, None] for digit in mark))
    block = (~exact.above(cumulative, mark)).sum(-1, keepdims=True, dtype=jnp.int32)
    earlier = jnp.maximum(block - 1, 0)
    before = (jnp.where(block > 0, jnp.take_along_axis(digit, earlier, axis=1), 0) for digit in cumulative)
    members = exact.Limbs(*(jnp.take_along_axis(limb, block[:, :, None], axis=1)[:, 0] for limb in weight))
    inside = exact.plus(exact.Digits(*before), exact.running(members))
    return block[:, 0] * prob.shape[2] + (~exact.above(inside, mark)).sum(-1, dtype=jnp.int32)
