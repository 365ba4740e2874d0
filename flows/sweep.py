"""The same pipeline over a grid of overrides, its results in one table."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from prefect import flow
from prefect.artifacts import create_table_artifact

from flows import server, status
from flows.artifacts import key, text
from flows.chain import chain, configured, reported, specs_of
from flows.command import run_name
from flows.form import Config, Grid, Name, Overrides, Root, Steps, merged
from jaxlm._disk import write_atomic
from jaxlm.config import RunConfig
from jaxlm.errors import DivergedError, InputError
from jaxlm.stages import runs
from jaxlm.stages.runner import say
from jaxlm.stages.store import write_json

FIGURES = ("val_loss", "perplexity", "bits_per_byte", "accuracy_after")
LARGEST = 500  # combinations


@flow(name="jaxlm-sweep", flow_run_name=run_name, persist_result=False, **status.HOOKS)
def sweep(
    config: Config = "configs/quickstart.yaml",
    grid: Grid = ["seed=0,1"],  # noqa: B006 (Prefect shows the default in its form; nothing changes it)
    overrides: Overrides = [],  # noqa: B006
    name: Name = None,
    steps: Steps = None,
    root: Root = ".",
) -> dict[str, Any]:
    """Runs the pipeline for every combination of the grid's values and compares them. Stages in common are made once.

    Returns:
        `run`, the directory of the sweep with sweep.json and sweep.md; `table`, a row for each combination, the best
        validation loss first; `best`, the name of that run, None where all diverged.
    """
    given = merged(overrides, name=name, steps=steps)
    again = status.command("sweep", config, given, root, status.options({"grid": grid}))
    return run_grid(config, grid, given, root, again=again)


def run_grid(
    config: str,
    grid: Sequence[str],
    overrides: Sequence[str],
    root: str,
    *,
    again: str = "",
    modules: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Runs a sweep; to be called in a flow. A combination that diverges, or misses the gate, is a row all the same.

    Raises:
        JaxlmError: the grid is wrong, or a stage failed in another way.
    """
    whole = configured(config, overrides, root)
    rows: list[dict[str, Any]] = []
    with reported(whole, "the combinations of a sweep are being run", "every combination has been run", again):
        for row, cfg in runs_of(config, grid, overrides, root, modules=modules):
            settings = {field: override.partition("=")[2] for field, override in row.items()}
            say(f"sweep: {cfg.name} ({', '.join(f'{field}={value}' for field, value in settings.items())})")
            rows.append({"run": cfg.name, **settings, **_measured(cfg, config, again, modules)})
            _write(whole, ranked(rows), list(row))
    return outcome(whole)


def outcome(whole: RunConfig) -> dict[str, Any]:
    """What `sweep` returns, from the sweep.json of one that is done."""
    table = json.loads((runs.directory(whole) / "sweep.json").read_text(encoding="utf-8"))["rows"]
    return {
        "run": str(runs.directory(whole)),
        "table": table,
        "best": table[0]["run"] if "val_loss" in table[0] else None,
        "results": {name: table[0][name] for name in FIGURES if name in table[0]},
        "report": str(runs.directory(whole) / "sweep.md"),
    }


def runs_of(
    config: str,
    grid: Sequence[str],
    overrides: Sequence[str],
    root: str,
    *,
    modules: Mapping[str, str] | None = None,
) -> list[tuple[dict[str, str], RunConfig]]:
    """The runs of a sweep, each with its settings as field -> override. All are checked before the first one runs.

    Raises:
        InputError: the grid or the configuration of a run is wrong.
    """
    name = configured(config, overrides, root).name
    found = []
    for k, row in enumerate(combinations(grid)):
        cfg = configured(config, [*overrides, *row.values()], root).replace(name=f"{name}-{k}")
        specs_of(cfg, "evaluate", modules)
        found.append((row, cfg))
    return found


def combinations(grid: Sequence[str]) -> list[dict[str, str]]:
    """Every combination of the values of a grid, as field -> override.

    Args:
        grid: lines such as `train.learning_rate=0.001,0.003`; a value with commas in it is written as a YAML list,
            `model.d_model=[64, 128]`.

    Raises:
        InputError: a line has no field, or a value that is empty or comes twice; a field comes twice, or is `name`; or
            there are too many combinations.
    """
    axes: dict[str, list[str]] = {}
    for line in grid:
        field, equals, values = line.partition("=")
        field = field.strip()
        if not (field and equals and values.strip()):
            raise InputError(f"--grid {line}: expected section.field=value,value.")
        if field == "name":
            raise InputError(f"--grid {line}: a sweep names its runs itself; give the sweep a name with --set name=….")
        if field in axes:
            raise InputError(f"--grid {line}: {field} comes twice; put all of its values into one line.")
        axes[field] = [f"{field}={value}" for value in _values(line, values)]
        if len(set(axes[field])) < len(axes[field]):
            raise InputError(f"--grid {line}: a value comes twice; leave one out.")
    if not axes:
        raise InputError("the grid is empty; give lines such as train.learning_rate=0.001,0.003.")
    if (count := math.prod(map(len, axes.values()))) > LARGEST:
        raise InputError(f"the grid has {count} combinations; {LARGEST} is the most that one sweep runs.")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _values(line: str, values: str) -> list[str]:
    if not values.strip().startswith("["):
        plain = [value.strip() for value in values.split(",")]
        if not all(plain):
            raise InputError(f"--grid {line}: a value is empty; leave a comma out, or write null.")
        return plain
    try:
        listed = yaml.safe_load(values)
    except yaml.YAMLError:
        listed = None
    if not (isinstance(listed, list) and listed):
        raise InputError(f"--grid {line}: not readable as a YAML list with a value or more in it.")
    return [yaml.safe_dump(value, default_flow_style=True, width=10_000).split("\n")[0] for value in listed]


def _measured(cfg: RunConfig, config: str, again: str, modules: Mapping[str, str] | None) -> dict[str, Any]:
    try:
        out = chain(cfg, config, again=again, modules=modules, alone=False)
    except DivergedError as error:
        say(str(error))
        return {"note": str(error)}
    seconds = sum(stage["seconds"] for stage in out["stages"].values() if not stage["cached"])
    figures = {name: out["results"][name] for name in FIGURES if name in out["results"]}
    return {**figures, "seconds": round(seconds, 1), "note": ""}


def ranked(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows by validation loss; those without one, which diverged, at the end."""
    return [dict(row) for row in sorted(rows, key=lambda row: row.get("val_loss", math.inf))]


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table for people."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    names = [name for name in names if any(row.get(name) not in (None, "") for row in rows)]
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    lines += [f"| {' | '.join(text(row.get(name)).replace('|', '/') for name in names)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _write(whole: RunConfig, rows: list[dict[str, Any]], fields: Sequence[str]) -> Path:
    """sweep.json and sweep.md after every combination, and the table in Prefect."""
    folder = runs.directory(whole)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "sweep.json", {"fields": list(fields), "rows": rows})
    write_atomic(folder / "sweep.md", f"# Sweep {whole.name}\n\n{markdown(rows)}".encode())
    cells = [{name: text(value) for name, value in row.items()} for row in rows]
    try:
        if not server.away():
            create_table_artifact(cells, key=key(whole.name, "sweep"), description=f"# Sweep {whole.name}")
    except Exception as error:  # reporting never fails a run
        say(f"sweep: Prefect did not take the table ({type(error).__name__})")
    return folder
