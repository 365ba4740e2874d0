"""The training loop: dispatch, report, evaluate, save, and stop when asked."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from jaxlm.checkpoint import Checkpointer
from jaxlm.config import TrainConfig
from jaxlm.data import RowSet, rows_for_step
from jaxlm.errors import DivergedError, JaxlmError, Preempted
from jaxlm.metrics_log import MetricsLog, history
from jaxlm.model import Params
from jaxlm.parallel import Layout
from jaxlm.train.state import TrainState
from jaxlm.train.step import train_step


class Progress(Protocol):
    """What the loop tells while it goes: a progress bar, or nothing."""

    def __call__(self, step: int, *, loss: float, tokens_per_s: float) -> None: ...


@dataclass(frozen=True)
class Hooks:
    """What a loop is given beside the mathematics.

    Attributes:
        log: takes the metrics.
        checkpointer: takes the states.
        meta: stored with each checkpoint, to tell it from another run's.
        evaluate: params -> validation loss, nats per token.
        sample: params -> a text, at each evaluation; None for none.
        stop: True as soon as the run has been asked to stop.
        progress: called with figures of a recent step, often.
    """

    log: MetricsLog
    checkpointer: Checkpointer
    meta: dict[str, Any]
    evaluate: Callable[[Params], float]
    sample: Callable[[Params], str] | None
    stop: Callable[[], bool]
    progress: Progress


class Fitted(NamedTuple):
    """The end of a run.

    Attributes:
        state: after the last step.
        tokens: targets trained on, over all runs of this training; those of skipped steps do not count.
        train_loss: of the last step that was not skipped, nats per token.
        val_loss: of the whole validation split at the end, nats per token.
        tokens_per_s: over the steps of this process, compilation and evaluations left out.
    """

    state: TrainState
    tokens: int
    train_loss: float
    val_loss: float
    tokens_per_s: float


def items(state: TrainState) -> dict[str, Any]:
    """A state as checkpoint items: the parameters can be restored alone."""
    return {"params": state.params, "rest": state._replace(params={})}


def from_items(restored: dict[str, Any]) -> TrainState:
    """The reverse of `items`."""
    return restored["rest"]._replace(params=restored["params"])


def fit(
    cfg: TrainConfig,
    state: TrainState,
    rows: RowSet,
    layout: Layout,
    hooks: Hooks,
    *,
    tokens: int = 0,
    train_loss: float = math.nan,
) -> Fitted:
    """Trains from `state.step` to `cfg.steps`.

    The rows of each step follow from (seed, step) alone, so a state restored from a checkpoint continues exactly.

    Args:
        cfg: options and model.
        state: from `init_state` or a checkpoint, on the devices of `layout`.
        rows: the training split.
        layout: devices.
        hooks: reporting, evaluation, checkpoints.
        tokens: targets trained on before `state.step`.
        train_loss: of the step before, which is the last one when every step has been done already.

    Raises:
        DivergedError: a loss or gradient was not finite; names the step and the last good checkpoint.
        Preempted: asked to stop; the state of the last finished step has been saved.
    """
    shardings = layout.of_state(state)
    step_fn = jax.jit(train_step, donate_argnums=1, out_shardings=(shardings, layout.whole))
    start, seed = int(state.step), int(state.seed)
    report = _Report(cfg, hooks, state, tokens, train_loss)
    if 0 < start < cfg.steps and cfg.eval_every > 0 and start % cfg.eval_every == 0:
        report.evaluate(start, state.params)  # the process before had no time for it
    saved_at = time.monotonic()
    pending: tuple[int, dict[str, jax.Array]] | None = None

    for step in range(start, cfg.steps):
        batch = layout.put_batch(rows.batch(rows_for_step(rows.n_rows, cfg.batch_size, seed, step)))
        state, metrics = step_fn(cfg, state, batch)
        # The metrics of a step are read after the next one is under way, so the device never waits for the host.
        # A non-finite step is therefore noticed one step late; the halted flag keeps the state as it was.
        if pending is not None:
            report.step(*pending)
        pending = (step, metrics)

        done, last = step + 1, step + 1 == cfg.steps
        stopping = hooks.stop()
        evaluating = cfg.eval_every > 0 and done % cfg.eval_every == 0 and not last
        saving = (cfg.checkpoint_every > 0 and done % cfg.checkpoint_every == 0) or (
            time.monotonic() - saved_at > cfg.checkpoint_seconds
        )
        if not (stopping or evaluating or saving or last):
            continue
        report.step(*pending)
        pending = None
        # Asked to stop: no evaluation, the time to save is short.
        val_loss = report.evaluate(done, state.params) if (evaluating or last) and not stopping else None
        if last and not stopping:
            assert val_loss is not None
            hooks.checkpointer.save(done, items(state), meta=hooks.meta | report.meta(), metric=val_loss)
            hooks.checkpointer.wait()
            return Fitted(state, report.tokens, report.loss, val_loss, report.tokens_per_s())
        if saving or stopping:
            hooks.checkpointer.save(done, items(state), meta=hooks.meta | report.meta(), metric=val_loss)
            saved_at = time.monotonic()
        if stopping:
            hooks.checkpointer.wait()
            raise Preempted(f"stopped on request after step {done} of {cfg.steps}, saved; run the same command again.")
        report.resume_clock()

    # Every step was done before: only the closing evaluation is missing, or was lost with its process.
    val_loss = report.evaluate(start, state.params)
    hooks.checkpointer.save(start, items(state), meta=hooks.meta | report.meta(), metric=val_loss)
    hooks.checkpointer.wait()
    return Fitted(state, report.tokens, report.loss, val_loss, report.tokens_per_s())


class _Report:
    """Counts tokens and time, writes metrics, and raises when a step was not finite."""

    def __init__(self, cfg: TrainConfig, hooks: Hooks, state: TrainState, tokens: int, train_loss: float) -> None:
        self.cfg, self.hooks = cfg, hooks
        self.tokens, self.loss, self.seconds = tokens, train_loss, 0.0
        self._first, self._timed_tokens, self._skipped = int(state.step), 0, int(state.skipped)
        self._clock: float | None = None
        self._window: list[tuple[float, int]] = []

    def meta(self) -> dict[str, Any]:
        """What must survive a restart, for the checkpoint."""
        return {"tokens": self.tokens, "train_loss": self.loss if np.isfinite(self.loss) else None}

    def tokens_per_s(self) -> float:
        return self._timed_tokens / self.seconds if self.seconds else 0.0

    def resume_clock(self) -> None:
        """Starts timing again after an evaluation or a save."""
        self._clock = time.monotonic()

    def step(self, step: int, device_metrics: dict[str, jax.Array]) -> None:
        metrics = jax.device_get(device_metrics)
        now = time.monotonic()
        count = int(metrics["tokens"])
        # The first step of a process is mostly compilation.
        if self._clock is not None and step > self._first:
            self.seconds += now - self._clock
            self._timed_tokens += count
            self._window = [*self._window[-49:], (now - self._clock, count)]
        self._clock = now
        if metrics["halted"]:
            raise DivergedError(self._diverged(step, metrics))
        if metrics["finite"]:
            self.tokens += count
            self.loss = float(metrics["loss"])
        if metrics["skipped"] > self._skipped:
            self._skipped = int(metrics["skipped"])
            self.hooks.log.write({"event": "skipped", "step": step + 1, "skipped": self._skipped})
        rate = sum(n for _, n in self._window) / max(sum(s for s, _ in self._window), 1e-9) if self._window else 0.0
        self.hooks.progress(step + 1, loss=self.loss, tokens_per_s=rate)
        if (step + 1) % self.cfg.log_every == 0 or step + 1 == self.cfg.steps or step == 0:
            self.hooks.log.write(
                {
                    "step": step + 1, "split": "train", "loss": float(metrics["loss"]), "tokens": self.tokens,
                    "tokens_per_s": round(rate, 1), "lr": float(metrics["lr"]),
                    "grad_norm": float(metrics["grad_norm"]), "seconds": round(self.seconds, 3),
                    "skipped": self._skipped,
                }
            )  # fmt: skip

    def evaluate(self, step: int, params: Params) -> float:
        """Validation loss after `step`. Where the process before had logged it already, that figure stands."""
        if step == self._first:
            for record in history(self.hooks.log.path):
                if record.get("split") == "val" and record["step"] == step and record["loss"] is not None:
                    return float(record["loss"])
        loss = self.hooks.evaluate(params)
        self.hooks.log.write({"step": step, "split": "val", "loss": loss, "tokens": self.tokens})
        if self.hooks.sample is not None:
            self.hooks.log.write({"event": "sample", "step": step, "text": self.hooks.sample(params)})
        return loss

    def _diverged(self, step: int, metrics: dict[str, Any]) -> str:
        with suppress(JaxlmError):  # one may be on its way to the disk; its failure matters less than this one
            self.hooks.checkpointer.wait()
        good = self.hooks.checkpointer.latest_saved
        where = f"step {good} in {self.hooks.checkpointer.directory}" if good is not None else "none yet"
        if self.cfg.on_nonfinite == "skip":
            what = f"more than train.max_skips={self.cfg.max_skips} steps were not finite"
        else:
            what = f"loss {float(metrics['loss'])} and gradient norm {float(metrics['grad_norm'])}"
        return (
            f"training stopped before the update of step {step + 1}: {what}; the last good checkpoint is {where}; "
            "lower the learning rate or raise train.warmup_steps."
        )
