"""Jobs of a Kubernetes cluster with JobSet, through its HTTP API.

The API by httpx and not kubectl: a flow's image then needs no second program, and every refusal comes with a code and a
reason. Inside the cluster the pod's service account is used; from elsewhere `kubectl proxy` (launch.kubernetes.api)
adds whatever login the cluster wants. The pods must mount the store under the path that it has here.
"""

from __future__ import annotations

import math
import re
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from jaxlm._disk import write_atomic
from jaxlm.errors import InputError, JaxlmError, UnavailableError
from jaxlm.launch.kubernetes_api import ACCOUNT, ForbiddenError, KubernetesApi
from jaxlm.launch.protocol import Handle, Job, Status
from jaxlm.launch.tail import Tail
from jaxlm.launch.template import rendered
from jaxlm.launch_config import KubernetesConfig

AWAY_SECONDS = 600.0  # the API may be away for so long before a poll gives up
START_SECONDS = 600.0  # a pod may fail to start (no image, no such secret) for so long before the job is given up
POD_GRACE = 60  # seconds in the manifest between SIGTERM and SIGKILL, unless launch.grace_seconds is longer
GONE_SECONDS = 30.0  # beyond that grace, in which a JobSet that is being deleted goes away

_JOBSETS = "/apis/jobset.x-k8s.io/v1alpha2/namespaces/{namespace}/jobsets"
_BROKEN = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "CreateContainerConfigError", "CreateContainerError")


class KubernetesLauncher:
    """One JobSet of a stage. See `jaxlm.launch.protocol.Launcher`."""

    name = "kubernetes"
    restarts = True

    def __init__(self, cfg: KubernetesConfig, *, grace: float = 0.0, account: Path = ACCOUNT) -> None:
        self._cfg = cfg
        self._api = KubernetesApi(cfg.api, account)
        self._grace = max(POD_GRACE, math.ceil(grace))
        self.poll_seconds = cfg.poll_seconds
        self._tail: Tail | None = None
        self._away_since: float | None = None
        self._broken_since: float | None = None

    def submit(self, job: Job) -> Handle:
        """Creates the JobSet. One of the same name that runs is taken over, one that has ended or ends is replaced."""
        self._tail = Tail(job.directory / "log.txt")
        text = self.manifest(job)
        name = jobset_name(job.name)
        write_atomic(job.directory / "launch.yaml", text.encode())
        found = self._get(name)
        if found is not None and (_finished(found) or _deleted(found)):
            self._delete(name)
            if not self._gone_within(name, self._grace + GONE_SECONDS):
                raise UnavailableError(f"JobSet {name}: an earlier one is still being deleted; try again later.")
            found = None
        if found is None:
            self._api.request("POST", self._path(), json=yaml.safe_load(text), accept=(409,))
        return Handle(
            launcher=self.name,
            id=name,
            name=job.name,
            directory=str(job.directory),
            place=self._cfg.namespace,
            submitted=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def manifest(self, job: Job) -> str:
        """The JobSet for `job`, as YAML."""
        cfg = self._cfg
        where = job.directory.resolve()
        if not where.is_relative_to(cfg.mount_path):
            raise InputError(
                f"launch.kubernetes.mount_path={cfg.mount_path}: the store is in {where}, which the pods would not "
                "see; set root to a directory on the shared volume."
            )
        return rendered(
            cfg.template,
            "jobset.yaml",
            name=jobset_name(job.name),
            stage=job.name.rpartition("-")[0],
            directory=str(where),
            workdir=cfg.mount_path,
            processes=job.processes,
            command=list(job.command),
            env=dict(job.env),
            grace_seconds=self._grace,
            node_selector=dict(line.split("=", 1) for line in cfg.node_selector),
            **{
                field: getattr(cfg, field)
                for field in (
                    "image", "volume_claim", "mount_path", "cpu", "memory", "accelerator", "accelerator_count", "queue",
                    "service_account",
                )
            },
        )  # fmt: skip

    def poll(self, handle: Handle) -> Status:
        """What the JobSet's conditions and its pods say."""
        try:
            found = self._get(handle.id)
            status = self._status(handle, found)
        except (UnavailableError, ForbiddenError) as error:
            now = time.monotonic()
            self._away_since = self._away_since or now
            if now - self._away_since > AWAY_SECONDS:
                raise UnavailableError(f"{error} The job {handle.id} goes on; run the same command later.") from None
            return Status("running", reason=str(error))
        self._away_since = None
        return status

    def cancel(self, handle: Handle, grace: float) -> Status:
        """Deletes the JobSet: its pods get SIGTERM, and SIGKILL after the grace that the manifest gives them."""
        try:
            self._delete(handle.id)
            if self._gone_within(handle.id, max(grace, self._grace) + GONE_SECONDS):
                return Status("ended", cancelled=True, reason=f"JobSet {handle.id} was deleted")
        except JaxlmError as error:
            print(error, file=sys.stderr)
        return Status("ending", reason=f"JobSet {handle.id} was told to end and has not ended yet")

    def logs(self, handle: Handle) -> list[str]:
        """What process 0 has added to log.txt in the stage's directory."""
        if self._tail is None:  # attached to a job that was started before
            self._tail = Tail(Path(handle.directory) / "log.txt")
        return self._tail.new()

    def _status(self, handle: Handle, found: dict[str, Any] | None) -> Status:
        if found is None:
            return Status("ended", cancelled=True, reason=f"JobSet {handle.id} is gone: someone has deleted it")
        pods = self._pods(handle.id)
        if _has(found, "Completed"):
            return Status("ended", exit_code=0)
        if _deleted(found):
            return Status("ending", reason=f"JobSet {handle.id} is being deleted")
        if _has(found, "Failed"):
            return self._failed(handle, pods)
        if _has(found, "Suspended"):
            return Status("waiting", reason=f"JobSet {handle.id} waits in its queue")
        return self._starting(handle, pods)

    def _failed(self, handle: Handle, pods: list[dict[str, Any]]) -> Status:
        """The exit code of the pod that failed first, and whether its machine was taken away."""
        for pod in sorted(pods, key=_ended_at):
            status = pod.get("status", {})
            taken = any(c["type"] == "DisruptionTarget" and c["status"] == "True" for c in status.get("conditions", []))
            if taken or status.get("reason") in ("Evicted", "Preempting", "NodeLost", "Shutdown", "Terminated"):
                return Status(
                    "ended", _exit_code(pod), preempted=True, reason=f"the pod {_name(pod)} was taken off its machine"
                )
            code = _exit_code(pod)
            if code:
                why = _terminated(pod).get("reason", "Error")
                reason = f"the pod {_name(pod)} ended with exit code {code} ({why})"
                if why == "OOMKilled":
                    reason += "; ask for more with launch.kubernetes.memory"
                last = self._last_line(pod)
                return Status("ended", code, reason=f"{reason}: {last}" if last else reason)
        return Status("ended", preempted=True, reason=f"the pods of JobSet {handle.id} are gone with their machine")

    def _starting(self, handle: Handle, pods: list[dict[str, Any]]) -> Status:
        """Running, or why not yet. A pod that cannot start is no reason to wait for ever."""
        for pod in pods:
            for container in pod.get("status", {}).get("containerStatuses", []):
                waiting = container.get("state", {}).get("waiting", {})
                if waiting.get("reason") in _BROKEN:
                    reason = f"the pod {_name(pod)} cannot start: {waiting.get('message') or waiting['reason']}"
                    now = time.monotonic()
                    self._broken_since = self._broken_since or now
                    if now - self._broken_since > START_SECONDS:
                        raise InputError(f"{reason}; correct launch.kubernetes.image, then run the same command.")
                    return Status("waiting", reason=reason)
        self._broken_since = None
        phases = {pod.get("status", {}).get("phase", "Pending") for pod in pods}
        if pods and phases <= {"Running", "Succeeded"}:
            return Status("running")
        for pod in pods:
            for condition in pod.get("status", {}).get("conditions", []):
                if condition.get("reason") == "Unschedulable":
                    return Status("waiting", reason=f"the pod {_name(pod)} waits: {condition.get('message', '')}")
        return Status("waiting", reason=f"the pods of JobSet {handle.id} are starting")

    def _pods(self, name: str) -> list[dict[str, Any]]:
        found = self._api.request(
            "GET",
            f"/api/v1/namespaces/{self._cfg.namespace}/pods",
            params={"labelSelector": f"jobset.sigs.k8s.io/jobset-name={name}"},
        )
        return list(found.get("items", []))

    def _last_line(self, pod: dict[str, Any]) -> str:
        """The end of a pod's output: what there is to see when a stage did not get as far as its own sentence."""
        try:
            path = f"/api/v1/namespaces/{self._cfg.namespace}/pods/{_name(pod)}/log"
            text = self._api.send("GET", path, params={"tailLines": "5"}).text
        except JaxlmError:
            return ""
        return next((line.strip()[:300] for line in reversed(text.splitlines()) if line.strip()), "")

    def _get(self, name: str) -> dict[str, Any] | None:
        found = self._api.request("GET", self._path(name), accept=(404,))
        return found if found.get("kind") == "JobSet" else None

    def _delete(self, name: str) -> None:
        # Foreground: the JobSet is gone when its pods are.
        self._api.request("DELETE", self._path(name), json={"propagationPolicy": "Foreground"}, accept=(404,))

    def _gone_within(self, name: str, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self._get(name) is None:
                return True
            time.sleep(min(self.poll_seconds, 1.0))
        return False

    def _path(self, name: str = "") -> str:
        return _JOBSETS.format(namespace=self._cfg.namespace) + (f"/{name}" if name else "")


def jobset_name(job: str) -> str:
    """A name that Kubernetes takes, and that leaves room for the suffixes of its pods."""
    return "jaxlm-" + re.sub(r"[^a-z0-9]+", "-", job.lower())[:46].strip("-")


def _has(found: dict[str, Any], kind: str) -> bool:
    conditions = found.get("status", {}).get("conditions", [])
    return any(c.get("type") == kind and c.get("status") == "True" for c in conditions)


def _finished(found: dict[str, Any]) -> bool:
    return _has(found, "Completed") or _has(found, "Failed")


def _deleted(found: dict[str, Any]) -> bool:
    """Whether it is on its way out: it stays until its pods have ended."""
    return "deletionTimestamp" in found.get("metadata", {})


def _name(pod: dict[str, Any]) -> str:
    return str(pod.get("metadata", {}).get("name", "?"))


def _terminated(pod: dict[str, Any]) -> dict[str, Any]:
    for container in pod.get("status", {}).get("containerStatuses", []):
        ended = container.get("state", {}).get("terminated")
        if ended:
            return dict(ended)
    return {}


def _exit_code(pod: dict[str, Any]) -> int | None:
    code = _terminated(pod).get("exitCode")
    return None if code is None else int(code)


def _ended_at(pod: dict[str, Any]) -> str:
    return str(_terminated(pod).get("finishedAt", "9999"))
