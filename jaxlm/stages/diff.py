"""Why two runs differ: their settings, inputs, code, libraries, devices, and where their losses part. Loads no jax.

What is compared is what each stage has written down: spec.json, provenance.json, manifest.json and metrics.jsonl. So a
stage that never finished can be compared as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm._sealed import read_sealed
from jaxlm.errors import InputError, JaxlmError
from jaxlm.metrics_log import history
from jaxlm.stages import provenance, runs
from jaxlm.stages.spec import Manifest, Spec
from jaxlm.stages.store import read_manifest, read_spec


class Difference(NamedTuple):
    """One thing that is not the same.

    `kind` is `setting` (decides the result), `option` (does not), `input`, `version` (of a stage), `code`, `library`,
    `machine`, `output`, `metrics` or `stage` (one run lacks it). `ours` and `theirs` are short texts.
    """

    stage: str
    kind: str
    what: str
    ours: str
    theirs: str


CAUSES = ("stage", "setting", "version", "input", "code", "library", "machine")
_ABSENT = "-"


@dataclass(frozen=True)
class _Record:
    """What a stage has written down about itself."""

    directory: Path
    spec: Spec
    provenance: Mapping[str, Any]
    manifest: Manifest | None

    @property
    def environment(self) -> Mapping[str, Any]:
        facts = dict(self.provenance.get("environment", {}))
        if self.manifest is not None:
            facts |= self.manifest.environment
        known = {"devices": self.provenance.get("devices"), "layout": self.provenance.get("layout")}
        return facts | {name: value for name, value in known.items() if value is not None}


def differences(ours: Path, theirs: Path) -> list[Difference]:
    """What differs between two runs, or two stages, in the order of the stages.

    Args:
        ours, theirs: directories of runs or of stages, as `runs.resolve` finds them.

    Raises:
        InputError: one of them is neither, or is damaged.
    """
    first, second = _stages(ours), _stages(theirs)
    if len(first) == len(second) == 1 and set(first) != set(second):
        raise InputError(
            f"{ours} is a {next(iter(first))} stage and {theirs} a {next(iter(second))} stage; compare two of a kind."
        )
    found: list[Difference] = []
    for stage in dict.fromkeys([*first, *second]):
        a, b = first.get(stage), second.get(stage)
        if a is None or b is None:
            found.append(Difference(stage, "stage", "the stage", *("absent" if x is None else "there" for x in (a, b))))
        elif a.directory.resolve() != b.directory.resolve():
            found += _compare(stage, a, b)
    return found


def report(ours: Path, theirs: Path) -> str:
    """`differences` as text for people: first the reason, then all of them by stage."""
    found = differences(ours, theirs)
    if not found:
        return f"{ours} and {theirs} are the same result."
    lines = [_reason(found), ""]
    for stage in dict.fromkeys(item.stage for item in found):
        lines.append(stage)
        width = max(len(f"{d.kind} {d.what}") for d in found if d.stage == stage)
        lines += [f"  {f'{d.kind} {d.what}':<{width}}  {d.ours} | {d.theirs}" for d in found if d.stage == stage]
    return "\n".join(lines)


def _reason(found: list[Difference]) -> str:
    """The first cause there is; a stage that only reads what another made differently is not one."""
    causes = [d for d in found if d.kind in CAUSES and d.kind != "input"]
    if not causes:
        kinds = {d.kind for d in found}
        if kinds <= {"option"}:
            return "They differ in nothing that decides a result."
        return "They differ in what came out, and in nothing that is recorded as going in."
    first = min(causes, key=lambda d: CAUSES.index(d.kind))
    same_kind = sum(d.kind == first.kind for d in causes) - 1
    more = f" (and {same_kind} more of the kind)" if same_kind else ""
    what = f"{first.kind} {first.what}" if first.kind != "stage" else "the stage itself"
    return (
        f"They differ from {first.stage} on: {what} is {first.ours} in the one and {first.theirs} in the other{more}."
    )


def _stages(place: Path) -> dict[str, _Record]:
    if (place / "run.json").is_file():
        return {stage: _record(folder) for stage, folder in runs.stages_of(place).items()}
    record = _record(place)
    return {record.spec.stage: record}


def _record(directory: Path) -> _Record:
    if not (directory / "spec.json").is_file():
        raise InputError(f"{directory}: neither a run nor a stage, it has no spec.json; name one of those.")
    manifest = read_manifest(directory) if (directory / "manifest.json").is_file() else None
    kept = directory / provenance.FILE_NAME
    return _Record(directory, read_spec(directory), read_sealed(kept) if kept.is_file() else {}, manifest)


def _compare(stage: str, a: _Record, b: _Record) -> list[Difference]:
    out: list[Difference] = []

    def differ(kind: str, ours: Any, theirs: Any, *, prefix: str = "") -> None:
        first, second = _flat(ours, prefix), _flat(theirs, prefix)
        for name in dict.fromkeys([*first, *second]):
            if first.get(name, _ABSENT) != second.get(name, _ABSENT):
                out.append(Difference(stage, kind, name, *(_short(x.get(name, _ABSENT)) for x in (first, second))))

    differ("version", {"of the stage": a.spec.version}, {"of the stage": b.spec.version})
    differ("setting", a.spec.config, b.spec.config)
    differ("input", *({name: f"{i['stage']}-{i['id']}" for name, i in x.spec.inputs.items()} for x in (a, b)))
    differ("option", a.spec.options, b.spec.options)
    ours, theirs = a.environment, b.environment
    differ("code", *({name: x.get(name) for name in ("code_sha256", "git")} for x in (ours, theirs)))
    differ("library", *({"python": x.get("python"), **x.get("libraries", {})} for x in (ours, theirs)))
    machine = ("platform", "variables", "devices", "layout")
    differ("machine", *({name: x[name] for name in machine if x.get(name) is not None} for x in (ours, theirs)))
    if a.manifest is not None and b.manifest is not None:
        differ("output", *({name: o["sha256"] for name, o in x.manifest.outputs.items()
                            if name not in _OWN_TIMES and not name.startswith("checkpoints/")}
                           for x in (a, b) if x.manifest is not None))  # fmt: skip
    parted = _where_losses_part(a.directory, b.directory)
    if parted is not None:
        out.append(Difference(stage, "metrics", *parted))
    return out


# They hold times, as checkpoints hold names drawn at random, and so differ between runs of the same bits.
_OWN_TIMES = ("metrics.jsonl", provenance.FILE_NAME, "report.json", "report.md", "report.html")


def _where_losses_part(ours: Path, theirs: Path) -> tuple[str, str, str] | None:
    """The first step whose training loss is not the same to the bit, of those that both have logged."""
    try:
        first, second = (
            {r["step"]: r["loss"] for r in history(folder) if r.get("split") == "train"} for folder in (ours, theirs)
        )
    except JaxlmError:
        return None
    for step in sorted(first.keys() & second.keys()):
        if first[step] != second[step]:
            return f"loss from step {step} on", repr(first[step]), repr(second[step])
    return None


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by their dotted names."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    out: dict[str, Any] = {}
    for name, item in value.items():
        out |= _flat(item, f"{prefix}.{name}" if prefix else str(name))
    return out


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return f"{text[:12]}…" if len(text) == 64 and set(text) <= set("0123456789abcdef") else text
