"""The fields of the flows' form in Prefect's UI: type, title and help of each, said once for all flows."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field


def _shown(title: str, description: str) -> Any:
    # Prefect writes a parameter's own name over a field's title; what is in the extra comes after that.
    return Field(json_schema_extra={"title": title, "description": description})


Runner = Literal["threads", "processes", "dask", "ray"]

Config = Annotated[str, _shown("Configuration", "A YAML file, or the name of one in configs/, such as quickstart.")]
Overrides = Annotated[
    list[str], _shown("Overrides", "Settings in place of those of the file, one a line, such as train.steps=500.")
]
Root = Annotated[
    str, _shown("Directory", "Where store/ and runs/ are, on the machine that runs the flow; . takes the file's own.")
]
Name = Annotated[str | None, _shown("Run name", "Names the directory runs/<name>; empty: the configuration's name.")]
Steps = Annotated[
    int | None, Field(ge=1), _shown("Training steps", "Steps of the pretraining; empty: as the configuration says.")
]
Seed = Annotated[
    int | None, Field(ge=0), _shown("Seed", "Decides data order and initialisation; empty: as the configuration says.")
]
Processes = Annotated[
    int | None,
    Field(ge=1),
    _shown("Processes", "How many pretrain together, data-parallel; empty: as the configuration says."),
]
Bounds = Annotated[
    list[str],
    _shown("Quality gate", "Bounds that the evaluation must keep, one a line, such as val_loss<=1.6; else it fails."),
]
PublishTo = Annotated[
    str | None,
    _shown("Publish to", "A directory or bucket for the model and its report, after the gate; empty: nowhere."),
]
Shards = Annotated[
    int,
    Field(ge=1),
    _shown("Tokenizing tasks", "Into how many tasks the tokenization is split; 1: one stage does it all."),
]
TaskRunnerName = Annotated[
    Runner, _shown("Task runner", "What runs those tasks; dask and ray need their Prefect packages.")
]
Grid = Annotated[
    list[str],
    _shown("Grid", "Settings and their values, one setting a line, such as train.learning_rate=0.001,0.003."),
]


def merged(
    overrides: list[str],
    *,
    name: str | None = None,
    steps: int | None = None,
    seed: int | None = None,
    processes: int | None = None,
    bounds: list[str] | None = None,
    publish_to: str | None = None,
) -> list[str]:
    """The overrides of a form: its lines, and then its fields that are not empty."""
    fields = {
        "name": name,
        "train.steps": steps,
        "seed": seed,
        "launch.processes": processes,
        "gate.bounds": bounds or None,
        "publish.to": publish_to,
    }
    return [*overrides, *(f"{field}={_yaml(value)}" for field, value in fields.items() if value not in (None, ""))]


def _yaml(value: Any) -> str:
    import json

    return json.dumps(value)
