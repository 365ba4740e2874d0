"""status.json in a run's directory: how its last flow ended, why, and the command that continues it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect.client.schemas.objects import FlowRun
from prefect.flows import Flow
from prefect.states import State

from flows import server
from jaxlm.config import RunConfig, load
from jaxlm.errors import JaxlmError
from jaxlm.stages import runs
from jaxlm.stages.store import write_json

FILE = "status.json"


def write(cfg: RunConfig, state: str, reason: str, command: str) -> None:
    """Leaves the status of a run. A disk that takes no more is no reason to lose what is being reported.

    Args:
        cfg: the run.
        state: running, completed, failed, crashed or cancelled.
        reason: a sentence.
        command: what continues the run; empty for one that is done.
    """
    folder = runs.directory(cfg)
    with suppress(OSError, JaxlmError):
        folder.mkdir(parents=True, exist_ok=True)
        values = {"state": state, "reason": reason, "command": command, "directory": str(Path.cwd())}
        write_json(folder / FILE, values | {"time": datetime.now(UTC).isoformat(timespec="seconds")})


def command(flow: str, config: str, overrides: Sequence[str], root: str, more: Sequence[str] = ()) -> str:
    """The command that runs this flow again, quoted for a shell. It continues what was not finished."""
    words = ["jaxlm", "flow", flow, config]
    for override in overrides:
        words += ["--set", override]
    if root != ".":
        words += ["--root", root]
    return shlex.join([*words, *more])


def state_of(cfg: RunConfig) -> str:
    """How the run's last flow ended, or `running`; empty where that is not known."""
    try:
        return str(json.loads((runs.directory(cfg) / FILE).read_text())["state"])
    except (OSError, ValueError, KeyError, TypeError, JaxlmError):
        return ""


def on_end(flow: Flow[Any, Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Prefect's hook for failure, crash and cancellation. Also run by a worker whose flow was killed.

    The disk has the truth: a flow that had done everything, and then could not report it, stays completed; one that was
    told to end has left the words of its stage.
    """
    with suppress(JaxlmError):
        cfg, again = of_parameters(flow.name, with_defaults(flow, flow_run.parameters))
        left = state_of(cfg)
        if left == "completed" and (not isinstance(state.data, Exception) or server.about_the_api(state.data)):
            return
        kind = "cancelled" if state.is_cancelling() or state.is_cancelled() else str(state.type.value).lower()
        if left == "cancelled" and kind in ("cancelled", "crashed"):
            return
        write(cfg, kind, sentence(state), again)


def with_defaults(flow: Flow[Any, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a flow run. One that was started from an untouched form has none of its own."""
    fields = flow.parameters.properties
    return {name: field["default"] for name, field in fields.items() if "default" in field} | dict(parameters)


def of_parameters(flow_name: str, parameters: Mapping[str, Any]) -> tuple[RunConfig, str]:
    """The run that a flow with these parameters makes, and the command that continues it.

    Raises:
        InputError: the configuration is wrong; there is then no run.
    """
    from flows.form import merged

    fields = {key: parameters[key] for key in _FIELDS if key in parameters}
    overrides = merged(list(parameters.get("overrides") or []), **fields)
    root, config = str(parameters.get("root", ".")), str(parameters["config"])
    cfg = load(config, tuple(overrides))
    cfg = cfg if root == "." else cfg.replace(root=root)
    return cfg, command(flow_name.removeprefix("jaxlm-"), config, overrides, root, options(parameters))


def options(parameters: Mapping[str, Any]) -> list[str]:
    """The options of `jaxlm flow` for those parameters that only some flows have."""
    words = [word for line in parameters.get("grid") or [] for word in ("--grid", line)]
    if (parameters.get("shards") or 1) > 1:  # with one the runner has nothing to do, and the command refuses it
        words += ["--shards", str(parameters["shards"])]
        words += ["--runner", str(parameters["runner"])] if parameters.get("runner") else []
    return words


def sentence(state: State[Any]) -> str:
    """Why a flow ended, from its final state."""
    data = state.data if isinstance(state.data, BaseException) else None
    text = str(data or state.message or state.name)
    text = " ".join(text.replace("Flow run encountered an exception:", "").split())
    if state.is_crashed() and ("SIGTERM" in text or "Termination" in text):
        text = "the flow's process was told to end; what its stage had done is saved"
    return text[:1000]


_FIELDS = ("name", "steps", "seed", "processes", "bounds", "publish_to")
HOOKS: dict[str, Any] = {"on_failure": [on_end], "on_crashed": [on_end], "on_cancellation": [on_end]}
