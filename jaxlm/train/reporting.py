"""What the loop tells: counts of tokens and time, metrics, and the errors that end a training."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxlm.config import TrainConfig
from jaxlm.errors import DivergedError, JaxlmError
from jaxlm.metrics_log import history
from jaxlm.model import Params
from jaxlm.train.guards import SpikeGuard, Watchdog
from jaxlm.train.state import TrainState

if TYPE_CHECKING:
    from jaxlm.train.loop import Hooks


class Report:
    """Counts tokens and time, writes metrics, and raises when a step was not finite or its loss a spike.

    Args:
        cfg: options.
        hooks: where to tell.
        state: before the first step of this process.
        tokens, train_loss, losses: as `jaxlm.train.fit` takes them.
        watchdog: told when a step is under way.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        hooks: Hooks,
        state: TrainState,
        watchdog: Watchdog,
        *,
        tokens: int,
        train_loss: float,
        losses: Sequence[float],
    ) -> None:
        self.cfg, self.hooks = cfg, hooks
        self.tokens, self.loss, self.seconds = tokens, train_loss, 0.0
        self._first, self._timed_tokens, self._skipped = int(state.step), 0, int(state.skipped)
        self._clock: float | None = None
        self._window: list[tuple[float, int]] = []
        self._watchdog, self._spikes = watchdog, SpikeGuard(cfg.guards, losses)

    def meta(self) -> dict[str, Any]:
        """What must survive a restart, for the checkpoint."""
        kept = {"tokens": self.tokens, "train_loss": self.loss if np.isfinite(self.loss) else None}
        return kept | ({"losses": self._spikes.losses} if self._spikes.losses else {})

    def tokens_per_s(self) -> float:
        return self._timed_tokens / self.seconds if self.seconds else 0.0

    def resume_clock(self, step: int) -> None:
        """Starts timing again after an evaluation or a save; the next step to come back is `step`, from 1."""
        self._clock = time.monotonic()
        self._watch(step)

    def step(self, step: int, device_metrics: dict[str, jax.Array]) -> None:
        """Waits for the metrics of `step` (from 0), and tells them."""
        metrics = jax.device_get(device_metrics)
        now = time.monotonic()
        count = int(metrics["tokens"])
        # The first step of a process is mostly compilation.
        if self._clock is not None and step > self._first:
            self.seconds += now - self._clock
            self._timed_tokens += count
            self._window = [*self._window[-49:], (now - self._clock, count)]
        self._clock = now
        self._watch(step + 2)
        if metrics["halted"]:
            raise DivergedError(self._diverged(step, self._not_finite(metrics), "before"))
        loss = float(metrics["loss"])
        if metrics["finite"]:
            if (usual := self._spikes.usual(loss)) is not None:
                raise DivergedError(
                    self._diverged(step, f"loss {loss:.4g}, where the last ones had a median of {usual:.4g}", "after")
                )
            self.tokens += count
            self.loss = loss
        if metrics["skipped"] > self._skipped:
            self._skipped = int(metrics["skipped"])
            self.hooks.log.write({"event": "skipped", "step": step + 1, "skipped": self._skipped})
        rate = sum(n for _, n in self._window) / max(sum(s for s, _ in self._window), 1e-9) if self._window else 0.0
        self.hooks.progress(step + 1, loss=self.loss, tokens_per_s=rate)
        if (step + 1) % self.cfg.log_every == 0 or step + 1 == self.cfg.steps or step == 0:
            self.hooks.log.write(
                {
                    "step": step + 1, "split": "train", "loss": loss, "tokens": self.tokens,
                    "tokens_per_s": round(rate, 1), "lr": float(metrics["lr"]),
                    "grad_norm": float(metrics["grad_norm"]), "seconds": round(self.seconds, 3),
                    "skipped": self._skipped,
                }
            )  # fmt: skip

    def evaluate(self, step: int, params: Params) -> float:
        """Validation loss after `step`, and a sample. What the process before had logged already stands."""
        self._watchdog.rest()
        loss, sampled = self._told(step) if step == self._first else (None, False)
        if loss is None:
            loss = self.hooks.evaluate(params)
            self.hooks.log.write({"step": step, "split": "val", "loss": loss, "tokens": self.tokens})
        if self.hooks.sample is not None and not sampled:
            self.hooks.log.write({"event": "sample", "step": step, "text": self.hooks.sample(params)})
        return loss

    def rest(self) -> None:
        """A save begins: it may take its time."""
        self._watchdog.rest()

    def _watch(self, step: int) -> None:
        self._watchdog.watch(step, [seconds for seconds, _ in self._window])

    def _told(self, step: int) -> tuple[float | None, bool]:
        """The validation loss of `step` that is in the log, if it is, and whether its sample is too."""
        records = [record for record in history(self.hooks.log.path) if record.get("step") == step]
        losses = [float(r["loss"]) for r in records if r.get("split") == "val" and r["loss"] is not None]
        return (losses[0] if losses else None), any(r.get("event") == "sample" for r in records)

    def _not_finite(self, metrics: dict[str, Any]) -> str:
        if self.cfg.on_nonfinite == "skip":
            return f"more than train.max_skips={self.cfg.max_skips} steps were not finite"
        return f"loss {float(metrics['loss'])} and gradient norm {float(metrics['grad_norm'])}"

    def _diverged(self, step: int, what: str, when: str) -> str:
        with suppress(JaxlmError):  # one may be on its way to the disk; its failure matters less than this one
            self.hooks.checkpointer.wait()
        good = self.hooks.checkpointer.latest_saved
        where = f"step {good} in {self.hooks.checkpointer.directory}" if good is not None else "none yet"
        hint = ", or train.guards.spike_factor" if when == "after" else ""
        return (
            f"training stopped {when} the update of step {step + 1}: {what}; the last good checkpoint is {where}; "
            f"lower the learning rate or raise train.warmup_steps{hint}."
        )
