"""What a stage is asked to do, and the record that it did: identities and manifests. Loads no jax.

A `Spec` says which stage, with which settings, on which results of earlier stages. Its `id` is a hash of exactly those
of its fields that decide the result, so it is known before anything runs, and two runs that need the same result share
it. A `Manifest` is what the stage leaves behind when it has finished.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from jaxlm.config import Frozen, validated
from jaxlm.errors import InputError

SCHEMA = 1  # of spec.json and manifest.json
ID_LENGTH = 12  # hex digits: 48 bits, so two of a million results collide with a probability of 0.2 %

M = TypeVar("M", bound=Frozen)


class Input(TypedDict):
    """The result of an earlier stage, by name."""

    stage: str
    id: str


class Output(TypedDict):
    """One file of a finished stage."""

    bytes: int
    sha256: str
    mtime_ns: int


@dataclass(frozen=True)
class Spec:
    """A stage, its settings and its inputs.

    Attributes:
        stage: its name.
        version: of the stage's behaviour (`jaxlm.stages.plan.VERSIONS`).
        config: the settings that decide the result, as plain JSON values by section.
        inputs: the results it reads, by the name under which the stage's `run` gets their manifests.
        options: settings that decide nothing (log intervals, paths, batch sizes of an evaluation), by section.
        root: the directory that holds store/.
        module: the Python module that runs it; empty: `jaxlm.stages.<stage>`.
    """

    stage: str
    version: int
    config: Mapping[str, Any]
    inputs: Mapping[str, Input] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    root: str = "."
    module: str = ""

    @property
    def id(self) -> str:
        """First hex digits of the SHA-256 over the canonical JSON of stage, version, config and the inputs' ids."""
        decides = {
            "stage": self.stage,
            "version": self.version,
            "config": self.config,
            "inputs": {name: [item["stage"], item["id"]] for name, item in self.inputs.items()},
        }
        return hashlib.sha256(canonical(decides).encode()).hexdigest()[:ID_LENGTH]

    @property
    def name(self) -> str:
        """`<stage>-<id>`, the name of its directory."""
        return f"{self.stage}-{self.id}"

    @property
    def directory(self) -> Path:
        """Where its result lives: `root/store/<stage>-<id>`."""
        return Path(self.root) / "store" / self.name

    @property
    def module_name(self) -> str:
        """The module to run with `python -m`."""
        return self.module or f"jaxlm.stages.{self.stage}"

    @property
    def settings(self) -> dict[str, Any]:
        """`config` and `options` merged, section by section: all that the stage was given."""
        return _merged(self.config, self.options)

    def section(self, path: str, model: type[M]) -> M:
        """The settings under a dotted path such as `sft.train`, as their pydantic model.

        Raises:
            InputError: the settings do not fit the model, as when spec.json was written by another version.
        """
        values: Any = self.settings
        for part in path.split("."):
            values = values.get(part, {})
        return validated(model, dict(values), where=f"{self.name}, {path}")

    def as_input(self) -> Input:
        """This result as the input of a later stage."""
        return {"stage": self.stage, "id": self.id}

    def input_directory(self, name: str) -> Path:
        """Where the result of the named input lives."""
        item = self.inputs[name]
        return Path(self.root) / "store" / f"{item['stage']}-{item['id']}"

    def to_json(self) -> dict[str, Any]:
        """All but `root`, which is where the file is found, so that a store can be moved."""
        return {
            "schema": SCHEMA,
            "stage": self.stage,
            "id": self.id,
            "version": self.version,
            "config": dict(self.config),
            "inputs": {name: dict(item) for name, item in self.inputs.items()},
            "options": dict(self.options),
            "module": self.module_name,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any], root: str | Path = ".", where: str = "spec") -> Spec:
        """The reverse of `to_json`.

        Raises:
            InputError: another schema version, a missing field, or an id that does not belong to the fields.
        """
        _check_schema(values, where)
        try:
            spec = cls(
                stage=values["stage"],
                version=values["version"],
                config=values["config"],
                inputs=values["inputs"],
                options=values.get("options", {}),
                root=str(root),
                module=values.get("module", ""),
            )
            written = values["id"]
        except KeyError as error:
            raise InputError(f"{where}: the field {error} is missing; delete its directory and run again.") from None
        if spec.id != written:
            raise InputError(
                f"{where}: the id {written} does not belong to the fields beside it ({spec.id}); "
                "delete its directory and run again."
            )
        return spec


@dataclass(frozen=True)
class Manifest:
    """The record of a finished stage.

    Attributes:
        spec: what was asked.
        outputs: every file of the result: path relative to the directory, size, digest and time.
        results: the small JSON values that the stage reports and later stages read.
        seconds: wall time of the stage.
        environment: library versions, code hash, XLA flags, devices, git commit: shown, never part of the identity.
        started: ISO time, UTC.
        finished: ISO time, UTC.
        directory: where it was read from; outputs are relative to it.
    """

    spec: Spec
    outputs: Mapping[str, Output]
    results: Mapping[str, Any]
    seconds: float
    environment: Mapping[str, Any]
    started: str
    finished: str
    directory: Path

    @property
    def stage(self) -> str:
        """The stage's name."""
        return self.spec.stage

    @property
    def id(self) -> str:
        """The identity of the result."""
        return self.spec.id

    def path(self, name: str) -> Path:
        """The path of an output file.

        Raises:
            InputError: the stage made no such file.
        """
        if name not in self.outputs:
            raise InputError(f"{self.directory}: the manifest lists no file {name}; delete it and run again.")
        return self.directory / name

    def to_json(self) -> dict[str, Any]:
        """All but `directory`."""
        return {
            "schema": SCHEMA,
            "stage": self.stage,
            "id": self.id,
            "spec": self.spec.to_json(),
            "results": dict(self.results),
            "seconds": self.seconds,
            "started": self.started,
            "finished": self.finished,
            "environment": dict(self.environment),
            "outputs": {name: dict(item) for name, item in self.outputs.items()},
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any], directory: Path) -> Manifest:
        """The reverse of `to_json`.

        Raises:
            InputError: another schema version, a missing field, or an id that does not belong to the spec.
        """
        where = str(directory / "manifest.json")
        _check_schema(values, where)
        try:
            return cls(
                spec=Spec.from_json(values["spec"], root=directory.parent.parent, where=where),
                outputs=values["outputs"],
                results=values["results"],
                seconds=values["seconds"],
                environment=values["environment"],
                started=values["started"],
                finished=values["finished"],
                directory=directory,
            )
        except KeyError as error:
            raise InputError(f"{where}: the field {error} is missing; delete the directory and run again.") from None


def canonical(value: Any) -> str:
    """One text per JSON value: sorted keys, no spaces, shortest exact floats (Python's repr), no NaN or infinity.

    Raises:
        ValueError: a number that is not finite.
        TypeError: not a JSON value.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in over.items():
        inner = out.get(key)
        out[key] = _merged(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return out


def _check_schema(values: Mapping[str, Any], where: str) -> None:
    found = values.get("schema") if isinstance(values, Mapping) else None
    if found != SCHEMA:
        raise InputError(
            f"{where}: schema version {found!r}, and this version of jaxlm reads {SCHEMA}; "
            "delete its directory and run again, or use the version that wrote it."
        )
