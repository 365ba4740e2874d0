"""The loss of a whole split, and the figures that follow from it."""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.errors import InputError
from jaxlm.model import forward, token_nll

if TYPE_CHECKING:
    from jaxlm.data.shards import RowSet


class SplitLoss(NamedTuple):
    """What a model pays for a split."""

    nats: float  # negative log-likelihood of all scored tokens together
    tokens: int  # how many were scored
    loss: float  # nats per token


@functools.partial(jax.jit, static_argnums=0, static_argnames="chunk")
def eval_step(
    cfg: ModelConfig, params: Any, batch: Mapping[str, Any], *, chunk: int = 0
) -> tuple[jax.Array, jax.Array]:
    """The summed loss of one batch, without dropout.

    Args:
        cfg: the model (static).
        params: its parameters.
        batch: tokens and targets int32[B, T]; optional loss_mask float32[B, T], segment_ids and positions int32[B, T].
        chunk: tokens whose logits exist at one time (static); 0: all.

    Returns:
        (nll_sum, token_count): float32 nats over the targets whose loss_mask is not 0, and int32 their number.
    """
    hidden, _ = forward(
        cfg, params, batch["tokens"], positions=batch.get("positions"), segment_ids=batch.get("segment_ids")
    )
    nll = token_nll(cfg, params, hidden, batch["targets"], chunk=chunk)
    counted = batch["loss_mask"] > 0 if "loss_mask" in batch else jnp.ones(nll.shape, bool)
    # where, not a product: what stands in a padding row must not reach the sum even if it is NaN.
    return jnp.sum(jnp.where(counted, nll, 0.0)), jnp.sum(counted, dtype=jnp.int32)


def split_loss(
    cfg: ModelConfig,
    params: Any,
    rows: RowSet,
    batch_size: int,
    *,
    max_rows: int = 0,
    chunk: int = 0,
    place: Callable[[dict[str, Any]], Any] = lambda batch: batch,
) -> SplitLoss:
    """Scores every target of a split exactly once.

    The last batch is filled up with rows of loss_mask 0, so that one compiled `eval_step` serves all of them. Sums are
    float32 within a batch and float64 across batches.

    Args:
        cfg: the model.
        params: its parameters.
        rows: the split.
        batch_size: rows per call.
        max_rows: score only this many rows, spread evenly over the split; 0: all.
        chunk: as `eval_step` takes it.
        place: puts a host batch on the devices, e.g. `Layout.put_batch`; batches then have `batch_size` rows always.

    Raises:
        InputError: no target is left to score.
    """
    n = min(max_rows, rows.n_rows) if max_rows else rows.n_rows
    chosen = np.arange(n, dtype=np.int64) * rows.n_rows // max(n, 1)
    size = batch_size
    total = np.zeros(2, np.float64)
    pending: deque[tuple[jax.Array, jax.Array]] = deque()
    for start in range(0, n, size):
        pending.append(eval_step(cfg, params, place(_padded(rows, chosen[start : start + size], size)), chunk=chunk))
        if len(pending) > 2:  # reading a batch overlaps with computing the ones before, and the queue stays short
            total += np.asarray(jax.device_get(pending.popleft()), np.float64)
    for sums in pending:
        total += np.asarray(jax.device_get(sums), np.float64)
    nats, tokens = total
    if tokens == 0:
        raise InputError(f"the split of {rows.n_rows} rows has no token to score; give it a longer text.")
    return SplitLoss(float(nats), int(tokens), float(nats / tokens))


def _padded(rows: RowSet, indices: np.ndarray, size: int) -> dict[str, np.ndarray]:
    """A batch of `size` rows with a loss_mask that is 0 in those beyond `indices`."""
    filled = np.concatenate([indices, np.repeat(indices[:1], size - len(indices))])
    batch = dict(rows.batch(filled))
    mask = np.array(batch.get("loss_mask", np.ones(batch["targets"].shape)), np.float32)
    mask[len(indices) :] = 0.0
    return {**batch, "loss_mask": mask}


def perplexity(loss: float) -> float:
    """exp(loss in nats per token); infinite where that leaves the range of a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Bits that the model needs per byte of UTF-8 text: comparable between tokenizers, as a loss per token is not.

    Args:
        nats: negative log-likelihood of the whole text.
        n_bytes: its length in UTF-8.

    Raises:
        ValueError: `n_bytes` is not positive.
    """
    if n_bytes <= 0:
        raise ValueError(f"n_bytes must be positive, found {n_bytes}")
    return nats / math.log(2) / n_bytes
