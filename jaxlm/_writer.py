"""The one writer of a directory of checkpoints: saves beside the training and keeps the newest and the best."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp

from jaxlm._digests import Leaf, Manifest, as_json, check, write_manifest
from jaxlm._disk import disk_errors, free_bytes
from jaxlm._leaves import describe, nest, to_arrays
from jaxlm._lock import dir_lock
from jaxlm._memory import available_bytes
from jaxlm._steps import UNFINISHED, best, clean_up, complete, put_in_place, remove, step_folders
from jaxlm.errors import DiskError, InputError

_TIMEOUT_MS = 20 * 60 * 1000  # how long a process waits for process 0's digests; Orbax waits as long for its own part


class Checkpointer:
    """Writes the checkpoints of one run; a context manager, whose end waits for the save in progress.

    It holds `dir_lock(directory)` from its creation to `close`, and removes what a killed writer left unfinished there.
    At most one save is in progress: the next `save`, `wait` or `close` waits for it and raises its failure, once. A
    save that failed leaves nothing behind and is not reported by `latest_saved`. After a good save, the `keep_latest`
    newest checkpoints and (`keep_best`) the one of the lowest finite metric are kept and the others removed.

    With several processes each makes its Checkpointer and calls the same methods in the same order, on a directory that
    they share; process 0 holds the lock and writes the manifests.

    Args:
      directory: made if it is missing.
      keep_latest: how many of the newest checkpoints stay, at least 1.
      keep_best: also keep the one with the lowest metric.
      asynchronous: `save` returns when the arrays have been copied to the host; else when the checkpoint is complete.

    Raises:
      InputError: the directory is in use by another writer, or may not be written.
      DiskError: the disk failed.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep_latest: int = 2,
        keep_best: bool = True,
        asynchronous: bool = True,
    ) -> None:
        if keep_latest < 1:
            raise InputError(f"keep_latest is {keep_latest}; at least one checkpoint must be kept")
        self.directory = Path(os.path.abspath(directory))
        self._keep_latest, self._keep_best, self._asynchronous = keep_latest, keep_best, asynchronous
        self._primary = jax.process_index() == 0
        self._closed = False
        self._pending: Future[None] | None = None
        with ExitStack() as stack:
            if self._primary:
                stack.enter_context(dir_lock(self.directory))
                with disk_errors("clean up", self.directory):
                    clean_up(self.directory)
            # Orbax logs every failure, with tracebacks, before it raises it; once, in one sentence, is enough.
            stack.callback(logging.getLogger("absl").removeFilter, _below_error)
            logging.getLogger("absl").addFilter(_below_error)
            self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
            stack.callback(self._orbax.close)
            self._barrier = ocp.multihost.get_barrier_sync_fn()  # does nothing in a single process
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            stack.callback(self._worker.shutdown)
            self._saved = complete(self.directory)
            self._resources = stack.pop_all()

    @property
    def latest_saved(self) -> int | None:
        """The newest step that is completely on the disk, manifest included; never one still being saved."""
        return max(self._saved, default=None)

    def save(
        self,
        step: int,
        items: Mapping[str, Any],
        *,
        meta: Mapping[str, Any],
        metric: float | None = None,
        force: bool = False,
    ) -> bool:
        """Starts to save `items` as the checkpoint of `step`, after the save before it has ended.

        Once it returns, the arrays may be donated and numpy leaves changed: what is saved is a copy.

        Args:
          step: 0 or more.
          items: name -> pytree of jax or numpy arrays or Python numbers; each can be restored without the others.
          meta: what `restore(expect=...)` is to compare and whatever else belongs to the step; plain JSON values.
          metric: lower is better; a NaN or infinite one never counts as best.
          force: write although this step, or a newer one, has a complete checkpoint. A replaced one of the same step is
            removed only after the new one is complete.

        Returns:
          True when a save was started (or, not asynchronous, done); False when the step already has a complete and
          undamaged checkpoint, which stays as it is: a resumed run that saves its first step again loses nothing. (The
          newest is written again when it was saved without this metric.)

        Raises:
          InputError: a newer undamaged checkpoint exists (and not `force`), an item cannot be saved exactly, or this
            machine has no memory for the copy; names the bytes needed and available.
          DiskError: of this save or of the one before it; names the directory and the free bytes.
        """
        if self._closed:
            raise RuntimeError("this Checkpointer is closed and no longer holds its directory")
        self.wait()
        meta = as_json(meta)
        if step < 0:
            raise InputError(f"step {step} cannot be saved; steps count from 0")
        if not force and self._already_saved(step, metric):
            return False
        leaves = {name: to_arrays(name, tree) for name, tree in items.items()}
        size = sum(leaf.nbytes for tree in leaves.values() for leaf in tree.values())
        if self._primary and (free := free_bytes(self.directory)) < size:
            raise DiskError(
                f"cannot save step {step} in {self.directory}: it needs {size:,} bytes and {free:,} are free there; "
                "make room or choose another disk"
            )
        copied = sum(_own_bytes(leaf) for tree in leaves.values() for leaf in tree.values())
        if (memory := available_bytes()) is not None and memory < copied:
            raise InputError(
                f"cannot save step {step} in {self.directory}: its copy needs {copied:,} bytes of memory and "
                f"{memory:,} are available; train a smaller model, or on a machine with more memory"
            )
        specs = {name: describe(tree) for name, tree in leaves.items()}
        arguments = {name: ocp.args.StandardSave(stored) for name, tree in leaves.items() if (stored := nest(tree))}
        if not arguments:
            raise InputError(f"there is no array to save in {', '.join(items) or 'no items'} at step {step}")
        folder = self.directory / f"{step}{UNFINISHED}"
        self._discard(step)  # of an earlier attempt that a signal's handler broke off
        try:
            with disk_errors(f"save step {step}", self.directory):
                self._orbax.save(folder, ocp.args.Composite(**arguments))
        except BaseException:
            self._discard(step)
            raise
        self._pending = self._worker.submit(self._finish, step, specs, meta, metric)
        if not self._asynchronous:
            self.wait()
        return True

    def wait(self) -> None:
        """Waits until the save in progress, if any, is complete; raises its failure, once."""
        if self._pending is not None:
            wait_for([self._pending])  # if a signal's handler raises here, the save stays pending and close waits again
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Waits as `wait` does and gives the directory free, also when the save has failed. Safe to call twice."""
        self._closed = True
        with self._resources:
            self.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception as failure:
            if error is None:
                raise
            error.add_note(f"The checkpoint that was being saved failed too: {failure}")

    def _already_saved(self, step: int, metric: float | None) -> bool:
        """Whether `step` has a good checkpoint. Newer ones found damaged (contents compared) no longer count."""
        newer = [s for s in self._saved if s >= step]
        damaged = {s for s in newer if isinstance(check(self.directory / str(s), s), list)}
        self._saved = {s: manifest for s, manifest in self._saved.items() if s not in damaged}
        if step in self._saved:
            # By their texts: NaN is not equal to itself.
            known = metric is None or repr(self._saved[step].metric) == repr(metric)
            return known or step < max(self._saved)
        if self._saved and step < max(self._saved):
            raise InputError(
                f"step {step} is older than the checkpoint of step {max(self._saved)} in {self.directory}; "
                "continue from that one, remove it, or save to another directory"
            )
        return False

    def _finish(self, step: int, specs: dict[str, list[Leaf]], meta: dict[str, Any], metric: float | None) -> None:
        """In the background: from "Orbax is done" to a complete checkpoint, then removes the ones no longer kept."""
        folder, final = self.directory / f"{step}{UNFINISHED}", self.directory / str(step)
        try:
            with disk_errors(f"save step {step}", self.directory):
                self._orbax.wait_until_finished()
                manifest = Manifest(step, meta, metric, specs, {})
                if self._primary:
                    manifest = write_manifest(folder, manifest)
                    put_in_place(folder, final)
                self._barrier(key=f"jaxlm checkpoint {step}", timeout_ms=_TIMEOUT_MS)
        except BaseException:
            self._discard(step)
            raise
        self._saved = {**self._saved, step: manifest}
        if self._primary:
            with disk_errors("remove old checkpoints", self.directory):
                self._retire(step)

    def _retire(self, step: int) -> None:
        """Removes what is neither `step` (just saved), nor among the newest, nor the best; newer damaged ones stay."""
        keep = {step, *sorted(self._saved)[-self._keep_latest :]}
        if self._keep_best and (lowest := best(self._saved)) is not None:
            keep.add(lowest)
        for old, folder in step_folders(self.directory).items():
            if old not in keep and old < max(self._saved):
                self._saved = {s: manifest for s, manifest in self._saved.items() if s != old}
                remove(folder)

    def _discard(self, step: int) -> None:
        """Gives back the space of a save that failed; its own failure matters less than the one being raised."""
        if self._primary:
            for left in self.directory.glob(f"{step}{UNFINISHED}*"):
                shutil.rmtree(left, ignore_errors=True)


def _own_bytes(leaf: Any) -> int:
    """What this process copies of an array: its own shards, each once."""
    if isinstance(leaf, jax.Array):
        return sum(shard.data.nbytes for shard in leaf.addressable_shards if shard.replica_id == 0)
    return int(leaf.nbytes)


def _below_error(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR
