"""Jobs of a Slurm cluster, through its command-line tools: sbatch, squeue, sacct, scancel.

The machine that submits must have the tools, and share the store with the nodes. A job outlives the process that
submitted it; `cancel` sends SIGTERM to its steps first, so that a training saves.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from jaxlm._disk import write_atomic
from jaxlm.errors import InputError, UnavailableError
from jaxlm.launch.protocol import Handle, Job, Status
from jaxlm.launch.tail import Tail
from jaxlm.launch.template import rendered
from jaxlm.launch_config import SlurmConfig

AWAY_SECONDS = 600.0  # Slurm's controller or its accounting may not answer for so long before a poll gives up
UNKNOWN_SECONDS = 60.0  # a job that has just been submitted may not be in the accounting yet
COMMAND_SECONDS = 60.0  # that a tool may take

_WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "CONFIGURING", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
_RUNNING = {"RUNNING", "SUSPENDED", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED"}
# How Slurm ends a job that did nothing wrong.
_PREEMPTED = {
    "PREEMPTED": "was preempted",
    "NODE_FAIL": "lost a node",
    "BOOT_FAIL": "lost a node that did not start",
    "TIMEOUT": "reached its time limit (launch.slurm.time_limit)",
    "DEADLINE": "reached its deadline",
    "REVOKED": "was taken over by another cluster",
}
# What sbatch says when its controller is away, as against when the job is wrong.
_AWAY = ("contact slurm controller", "timed out", "connection refused", "connect failure", "try again", "unable to")


class SlurmLauncher:
    """One job of a stage. See `jaxlm.launch.protocol.Launcher`."""

    name = "slurm"
    restarts = True

    def __init__(self, cfg: SlurmConfig) -> None:
        self._cfg = cfg
        self.poll_seconds = cfg.poll_seconds
        self._tail: Tail | None = None
        self._away_since: float | None = None
        self._unknown_since: float | None = None

    def submit(self, job: Job) -> Handle:
        """Hands the batch script to sbatch, unless a job of this name is under way."""
        self._tail = Tail(job.directory / "log.txt")
        number = self._job_named(job.name)
        if number is None:
            script = self.script(job)
            write_atomic(job.directory / "launch.sbatch", script.encode())
            # --parsable: "<job>" or "<job>;<cluster>"
            number = self._run(["sbatch", "--parsable", str(job.directory / "launch.sbatch")]).strip().partition(";")[0]
        return Handle(
            launcher=self.name,
            id=number,
            name=job.name,
            directory=str(job.directory),
            place=os.environ.get("SLURM_CLUSTER_NAME", ""),
            submitted=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def script(self, job: Job) -> str:
        """The batch script for `job`."""
        cfg = self._cfg
        return rendered(
            cfg.template,
            "slurm.sbatch",
            name=job.name,
            directory=str(job.directory),
            workdir=os.getcwd(),
            nodes=min(cfg.nodes, job.processes),  # srun gives each at least one process
            processes=job.processes,
            cpus_per_task=cfg.cpus_per_task,
            gpus_per_task=cfg.gpus_per_task,
            time_limit=cfg.time_limit,
            warn_seconds=cfg.warn_seconds,
            partition=cfg.partition,
            account=cfg.account,
            options=cfg.options,
            setup=cfg.setup,
            env=dict(job.env),
            command=job.command,
        )

    def poll(self, handle: Handle) -> Status:
        """What the accounting says of the job."""
        try:
            state, code = self._accounted(handle.id)
        except UnavailableError as error:
            now = time.monotonic()
            self._away_since = self._away_since or now
            if now - self._away_since > AWAY_SECONDS:
                raise UnavailableError(f"{error} The job {handle.id} goes on; run the same command later.") from None
            return Status("running", reason=str(error))
        self._away_since = None
        if not state:
            return self._unaccounted(handle)
        self._unknown_since = None
        if state in _WAITING:
            return Status("waiting", reason=f"Slurm job {handle.id} is {state.lower()}")
        if state in _RUNNING:
            return Status("running")
        if state == "COMPLETING":
            return Status("ending")
        if state == "COMPLETED":
            return Status("ended", exit_code=0)
        if state in _PREEMPTED:
            # A training that was told in time has saved and ended with 75, and Slurm still calls it preempted.
            return Status("ended", code or None, preempted=True, reason=f"Slurm job {handle.id} {_PREEMPTED[state]}")
        if state == "CANCELLED":
            return Status("ended", code or None, cancelled=True, reason=f"Slurm job {handle.id} was cancelled")
        if state == "OUT_OF_MEMORY":
            reason = f"Slurm job {handle.id} needed more memory than it had; ask for more with launch.slurm.options"
            return Status("ended", code or 1, reason=reason)
        return Status("ended", code or 1, reason=f"Slurm job {handle.id} ended as {state}")

    def cancel(self, handle: Handle, grace: float) -> Status:
        """SIGTERM to the job's steps, the grace, and then the end of the job."""
        self._quietly(["scancel", "--signal=TERM", handle.id])
        status = self._ended_within(handle, grace)
        if status is None:
            self._quietly(["scancel", handle.id])
            status = self._ended_within(handle, grace + self._cfg.kill_wait)
        return status or Status("ending", reason=f"Slurm job {handle.id} was cancelled and has not ended yet")

    def logs(self, handle: Handle) -> list[str]:
        """What the job has added to log.txt in the stage's directory."""
        if self._tail is None:  # attached to a job that was started before
            self._tail = Tail(Path(handle.directory) / "log.txt")
        return self._tail.new()

    def _unaccounted(self, handle: Handle) -> Status:
        """Jobs enter the accounting late, and leave it where old ones are purged."""
        now = time.monotonic()
        self._unknown_since = self._unknown_since or now
        if now - self._unknown_since < UNKNOWN_SECONDS:
            return Status("waiting", reason=f"Slurm does not list job {handle.id} yet")
        return Status("ended", preempted=True, reason=f"Slurm no longer knows job {handle.id}")

    def _accounted(self, number: str) -> tuple[str, int]:
        """State and exit code of a job; an empty state when the accounting does not know it."""
        out = self._run(
            ["sacct", "--jobs", number, "--allocations", "--noheader", "--parsable2", "--format=State,ExitCode"]
        )
        for line in out.splitlines():
            state, _, code = line.partition("|")
            if state.strip():
                status, _, number_of_signal = code.partition(":")
                exit_code = int(status or 0) or -int(number_of_signal or 0)
                return state.split()[0].rstrip("+"), exit_code  # "CANCELLED by 1000", "CANCELLED+"
        return "", 0

    def _job_named(self, name: str) -> str | None:
        """The number of a job of ours of that name that has not ended. squeue lists those that are ending too (CG)."""
        out = self._run(["squeue", "--me", "--noheader", "--name", name, "--format=%i %t"])
        found = (line.split() for line in out.splitlines() if line.strip())
        return next((words[0] for words in found if words[-1] != "CG"), None)

    def _ended_within(self, handle: Handle, seconds: float) -> Status | None:
        end = time.monotonic() + seconds
        while True:
            status = self.poll(handle)
            if status.phase == "ended":
                return status
            if time.monotonic() > end:
                return None
            time.sleep(min(self.poll_seconds, 1.0))

    def _quietly(self, command: Sequence[str]) -> None:
        """scancel fails for a job that has just ended; the poll after it tells."""
        try:
            self._run(command)
        except (InputError, UnavailableError) as error:
            print(error, file=sys.stderr)

    def _run(self, command: Sequence[str]) -> str:
        tool = command[0]
        if shutil.which(tool) is None:
            raise InputError(
                f"launch.kind=slurm: there is no {tool} on this machine; run this on a login node of the cluster."
            )
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            raise UnavailableError(f"{tool} did not answer within {COMMAND_SECONDS:.0f} s.") from None
        if done.returncode == 0:
            return done.stdout
        said = " ".join((done.stderr or done.stdout).split())[:300] or f"exit code {done.returncode}"
        # sacct and squeue take no input of the user's: whatever they fail with is the cluster's.
        if tool in ("sacct", "squeue") or any(word in said.lower() for word in _AWAY):
            raise UnavailableError(f"Slurm is away ({said}).")
        raise InputError(f"launch.slurm: {tool} refused the job ({said}); correct the settings under launch.slurm.")
