"""The commands of the flows: flow, serve-flows."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import cyclopts
from cyclopts import Parameter

from jaxlm.errors import InputError, JaxlmError

Name = Literal["prepare", "pretrain", "sft", "evaluate", "pipeline", "sweep"]
Set = Annotated[
    list[str] | None, Parameter(name="--set", help="replace a setting, e.g. --set train.steps=500", negative="")
]
Root = Annotated[Path, Parameter(help="directory that holds store/ and runs/")]
Lines = Annotated[list[str] | None, Parameter(negative="")]


def flow(
    name: Name,
    config: str,
    /,
    *,
    set_: Set = None,
    root: Root = Path("."),
    grid: Lines = None,
    shards: int | None = None,
    runner: Literal["threads", "processes", "dask", "ray"] | None = None,
) -> None:
    """Run a flow in Prefect, with its artifacts; no server has to be set up.

    Parameters
    ----------
    name
        prepare, pretrain, sft, evaluate, pipeline, or sweep.
    config
        A YAML file, or the bare name of one in configs/.
    grid
        sweep: a setting and its values, e.g. --grid train.learning_rate=0.001,0.003; once for each setting.
    shards
        prepare: tokenize in this many tasks.
    runner
        prepare: what runs those tasks.
    """
    from flows import command, deployments, server, sweep

    chosen = deployments.FLOWS[name]
    options = {"grid": grid, "shards": shards, "runner": runner}
    extra = {key: value for key, value in options.items() if value is not None}
    known = inspect.signature(chosen.fn).parameters
    for option in extra:
        if option not in known:
            owner = "sweep" if option == "grid" else "prepare"
            raise InputError(f"--{option}: the flow {name} has no such option; it belongs to {owner}.")
    if shards is not None and shards < 1:
        raise InputError(f"--shards {shards}: expected 1 or more.")
    if runner and (shards or 1) == 1:
        raise InputError(f"--runner {runner}: there is one task and nothing to divide; give --shards 2 or more.")
    if name == "sweep":
        if not grid:
            raise InputError("--grid: a sweep needs at least one, such as --grid train.learning_rate=0.001,0.003.")
        sweep.runs_of(config, grid, set_ or [], str(root))  # a wrong one is told before a server is started
    last: Any = {"pipeline": "evaluate", "sweep": "evaluate"}.get(name, name)
    try:
        command.run(config, set_ or [], str(root), flow=chosen, last=last, **extra)
    except JaxlmError as error:
        if server.away():  # Python's own way out would wait for a server that is not there
            print(f"jaxlm: {error}", file=sys.stderr)
            server.leave(error.exit_code)
        raise
    if server.away():
        server.leave(0)


def serve_flows(*, limit: int = 1) -> None:
    """Serve every flow from this process, to be started in Prefect's UI. Needs a server (PREFECT_API_URL).

    Parameters
    ----------
    limit
        How many runs at a time; a machine with one accelerator has room for one.
    """
    from flows import deployments

    deployments.serve_all(limit=limit)


def register(app: cyclopts.App) -> None:
    """Adds the commands to `app`."""
    app.command(flow)
    app.command(serve_flows, name="serve-flows")
