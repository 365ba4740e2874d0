"""One optimizer step as a pure function."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlm import model
from jaxlm.config import TrainConfig
from jaxlm.train import optimizers, schedules
from jaxlm.train.state import TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def train_step(cfg: TrainConfig, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """Fits one batch. Jit it with the state donated: `jax.jit(train_step, donate_argnums=1)`.

    Args:
        cfg: static.
        state: from `init_state` or the step before.
        batch: tokens and targets int32[B, T]; optional loss_mask [B, T], segment_ids and positions int32[B, T].

    Returns:
        The new state, and metrics, all scalars: `loss` (nats per valid token, over the whole batch), `tokens` (valid
        ones), `grad_norm` (before clipping), `lr` (of AdamW or of Adam beside Muon), `finite`, `halted`, `skipped`.
        When the loss or the gradients are not finite the parameters and the optimizer state stay as they were.
    """
    loss, grads, tokens = loss_and_grads(cfg, state, batch)
    with jax.named_scope("update"):
        grad_norm = optax.global_norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        updates, opt_state = optimizers.build(cfg).update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)

    go = finite & ~state.halted
    skip = ~finite & ~state.halted & (cfg.on_nonfinite == "skip")
    skipped = state.skipped + skip
    halted = state.halted | (~finite & ~skip) | (skipped > cfg.max_skips)
    keep = lambda new, old: jnp.where(go, new, old)  # noqa: E731
    new_state = TrainState(
        step=state.step + (go | (skip & ~halted)),
        params=jax.tree.map(keep, params, state.params),
        opt_state=jax.tree.map(keep, opt_state, state.opt_state),
        seed=state.seed,
        halted=halted,
        skipped=skipped,
    )
    lr = cfg.learning_rate * schedules.shape(cfg)(optimizers.updates_done(state.opt_state))
    metrics = {
        "loss": loss, "tokens": tokens, "grad_norm": grad_norm, "lr": jnp.asarray(lr, jnp.float32),
        "finite": finite, "halted": halted, "skipped": skipped,
    }  # fmt: skip
    return new_state, metrics


def loss_and_grads(cfg: TrainConfig, state: TrainState, batch: Batch) -> tuple[jax.Array, Any, jax.Array]:
    """Mean loss over the batch's valid tokens, its gradients, and how many tokens were valid.

    The mean is over all microbatches together, so that accumulation changes nothing but the memory in use. A batch
    without one valid token has loss 0 and zero gradients.

    Inside `jax.shard_map` over rows, the batch is the shard's own. The loss and the count are its own too, while the
    gradients by parameters that are the same on all N shards come out summed over them, as jax differentiates: N times
    those of the whole batch, to be divided by N, as long as every shard has as many valid tokens. With a loss_mask
    they may not, and then no mean of the shards' means is the batch's. Shards of any count are put together right by

        own = state._replace(params=jax.lax.pcast(state.params, axis, to="varying"))  # gradients are the shard's own
        loss, grads, count = loss_and_grads(cfg, own, batch)
        total = jnp.maximum(jax.lax.psum(count, axis), 1)
        loss, grads = jax.tree.map(lambda x: jax.lax.psum(x * count, axis) / total, (loss, grads))
    """
    valid = batch.get("loss_mask")
    count = jnp.asarray(batch["targets"].size, jnp.float32) if valid is None else valid.astype(jnp.float32).sum()
    scale = 1.0 / jnp.maximum(count, 1.0)
    step_key = jax.random.fold_in(jax.random.key(state.seed), state.step)

    def loss_fn(params: model.Params, micro: Batch, index: jax.Array) -> jax.Array:
        key = jax.random.fold_in(step_key, index) if cfg.model.dropout > 0 else None
        hidden, _ = model.forward(
            cfg.model, params, micro["tokens"], positions=micro.get("positions"),
            segment_ids=micro.get("segment_ids"), dropout_key=key,
        )  # fmt: skip
        nll = model.token_nll(cfg.model, params, hidden, micro["targets"], chunk=cfg.loss_chunk)
        if "loss_mask" in micro:
            # where, not a product: a masked token's nll may be infinite, and 0 * inf is NaN.
            mask = micro["loss_mask"].astype(jnp.float32)
            nll = jnp.where(mask > 0, nll * mask, 0.0)
        return nll.sum() * scale

    n = cfg.grad_accum_steps
    if n == 1:
        loss, grads = jax.value_and_grad(loss_fn)(state.params, batch, jnp.zeros((), jnp.int32))
        return loss, grads, count

    # Microbatch i takes rows i, i + n, ...: so the rows of each stay spread over the devices as the batch is.
    micros = jax.tree.map(lambda x: x.reshape(x.shape[0] // n, n, *x.shape[1:]).swapaxes(0, 1), batch)

    def accumulate(carry: tuple[jax.Array, Any], item: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        loss, grads = jax.value_and_grad(loss_fn)(state.params, *item)
        return (carry[0] + loss, jax.tree.map(jnp.add, carry[1], grads)), None

    # The loss differs between the shards of jax.shard_map where the batch does, and so must what it is added to.
    nothing = (micros["tokens"].ravel()[0] * 0).astype(jnp.float32)
    zero = (nothing, jax.tree.map(jnp.zeros_like, state.params))
    (loss, grads), _ = jax.lax.scan(accumulate, zero, (micros, jnp.arange(n)))
    return loss, grads, count
