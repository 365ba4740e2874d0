"""The training loop: dispatch, report, evaluate, save, and stop when asked."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax

from jaxlm.checkpoint import Checkpointer
from jaxlm.config import TrainConfig
from jaxlm.data import RowSet, rows_for_step
from jaxlm.errors import Preempted
from jaxlm.metrics_log import MetricsLog
from jaxlm.model import Params
from jaxlm.parallel import Layout, as_the_first
from jaxlm.train.guards import Watchdog
from jaxlm.train.reporting import Report
from jaxlm.train.state import TrainState
from jaxlm.train.step import train_step
from jaxlm.train.stopping import Interrupted, Stop, nothing_to_save

_CLOCK_STEPS = 20  # between two looks at the clock, with several processes


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
        evaluate: params -> validation loss, nats per token. It calls `stop.check` between its batches.
        sample: params -> a text, at each evaluation; None for none.
        stop: whether the run has been asked to stop.
        hung: what the watchdog calls, from its thread, when a step does not come back.
        progress: called with figures of a recent step, often.
    """

    log: MetricsLog
    checkpointer: Checkpointer
    meta: dict[str, Any]
    evaluate: Callable[[Params], float]
    sample: Callable[[Params], str] | None
    stop: Stop
    hung: Callable[[str], None]
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
    losses: Sequence[float] = (),
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
        losses: the last ones before, for the spike guard.

    Raises:
        DivergedError: a loss or gradient was not finite, or a loss a spike; names the last good checkpoint.
        Preempted: asked to stop; the state of the last finished step has been saved.
    """
    shardings = layout.of_state(state)
    step_fn = jax.jit(train_step, donate_argnums=1, out_shardings=(shardings, layout.whole))
    start, seed, stop = int(state.step), int(state.seed), hooks.stop

    def save(done: int, state: TrainState, val_loss: float | None = None) -> None:
        hooks.checkpointer.save(done, items(state), meta=hooks.meta | report.meta(), metric=val_loss)

    def save_whole(done: int, state: TrainState) -> None:
        save(done, state)
        hooks.checkpointer.wait()

    def evaluate(done: int, state: TrainState) -> float | None:
        """None when it was broken off: the time to save is short."""
        stop.leave_with(lambda: save_whole(done, state))
        try:
            return report.evaluate(done, state.params)
        except Interrupted:
            return None
        finally:
            stop.leave_with(None)

    with Watchdog(cfg.guards, hooks.hung) as watchdog:
        report = Report(cfg, hooks, state, watchdog, tokens=tokens, train_loss=train_loss, losses=losses)
        val_loss: float | None = None
        if stop.asked:
            raise Preempted(_stopped(start, cfg.steps))
        if 0 < start < cfg.steps and cfg.eval_every > 0 and start % cfg.eval_every == 0:
            # The process before had no time for it, or to save the state again with its loss.
            if (val_loss := evaluate(start, state)) is None:
                raise Preempted(_stopped(start, cfg.steps))
            save(start, state, val_loss)
        saved_at = time.monotonic()
        pending: tuple[int, dict[str, jax.Array]] | None = None
        stop.leave_with(nothing_to_save)  # the first step has to be compiled, which may take minutes

        for step in range(start, cfg.steps):
            batch = layout.put_rows(rows, rows_for_step(rows.n_rows, cfg.batch_size, seed, step))
            state, metrics = step_fn(cfg, state, batch)
            stop.leave_with(None)
            # The metrics of a step are read after the next one is under way, so the device never waits for the host.
            # A non-finite step is therefore noticed one step late; the halted flag keeps the state as it was.
            if pending is not None:
                report.step(*pending)
            pending = (step, metrics)

            done, last = step + 1, step + 1 == cfg.steps
            stopping: bool = stop.asked
            evaluating = last or (cfg.eval_every > 0 and done % cfg.eval_every == 0)
            saving = (cfg.checkpoint_every > 0 and done % cfg.checkpoint_every == 0) or (
                _looks_at_clock(done) and as_the_first(time.monotonic() - saved_at > cfg.checkpoint_seconds)
            )
            if not (stopping or evaluating or saving):
                continue
            report.step(*pending)
            pending = None
            val_loss = None
            if evaluating and not stopping:
                val_loss = evaluate(done, state)
                stopping = val_loss is None
            report.rest()
            if saving or stopping or last:
                save(done, state, val_loss)
                saved_at = time.monotonic()
            if stopping:
                hooks.checkpointer.wait()
                raise Preempted(_stopped(done, cfg.steps))
            report.resume_clock(done + 1)

        if start == cfg.steps:  # only the closing evaluation is missing, or was lost with its process
            if (val_loss := evaluate(start, state)) is None:
                raise Preempted(_stopped(start, cfg.steps))
            save(start, state, val_loss)
        hooks.checkpointer.wait()
        assert val_loss is not None  # of the last step
        return Fitted(state, report.tokens, report.loss, val_loss, report.tokens_per_s())


def _looks_at_clock(done: int) -> bool:
    """Processes that train together ask one another for the time, which no step should wait for."""
    return jax.process_count() == 1 or done % _CLOCK_STEPS == 0


def _stopped(done: int, steps: int) -> str:
    where = f"after step {done} of {steps}, saved" if done else "before the first step"
    return f"stopped on request {where}; run the same command again."
