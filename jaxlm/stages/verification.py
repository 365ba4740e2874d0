"""Whether a run is byte by byte what was written: its stages, their checkpoints, its own notes. Loads no jax."""

from __future__ import annotations

from pathlib import Path

from jaxlm._digests import Damage, check, digest_file
from jaxlm._sealed import read_sealed
from jaxlm._steps import step_folders
from jaxlm.errors import InputError, JaxlmError
from jaxlm.stages import provenance, runs, store


def verify_place(place: Path) -> list[str]:
    """Reads every file of a run, of one stage, or of an imported model, and names each that is damaged or missing.

    Args:
        place: as `runs.resolve` finds it.

    Returns:
        One sentence for each, and for each foreign file of a run or a stage; empty when all is whole.

    Raises:
        InputError: there is none of them.
    """
    if is_imported(place):
        return verify_imported(place)
    if not (place / "run.json").exists():
        if not (place / "manifest.json").exists() and not (place / "spec.json").exists():
            missing = "run.json" if place.resolve().parent.name == "runs" else "manifest.json"
            raise InputError(
                f"{place}: neither a run nor a stage, it has no {missing}; name one of those, or a directory made by "
                "jaxlm import-hf."
            )
        return verify_stage(place)
    try:
        notes = read_sealed(place / "run.json", hint="run the command of this run again, which writes it anew")
        stages = runs.stages_of(place)
    except JaxlmError as error:
        return [str(error)]
    problems = []
    if notes.get("name") != place.resolve().name:
        problems.append(f"{place / 'run.json'}: is of the run {notes.get('name')!r}, not of this directory.")
    for stage, directory in stages.items():
        problems += verify_stage(directory)
        link = place / stage
        if link.exists() and link.resolve() != directory:
            problems.append(f"{link}: points at {link.resolve()}, and run.json says {directory}.")
    return problems + _copies(place, stages.get("evaluate"))


def is_imported(place: Path) -> bool:
    """Whether it is a model's directory as `jaxlm import-hf` makes it: no run's, and no stage's in a store."""
    notes = any((place / name).exists() for name in ("run.json", "spec.json", "manifest.json"))
    in_store = place.resolve().parent.name == "store"
    return not notes and not in_store and bool(step_folders(place / "checkpoints"))


def verify_imported(directory: Path) -> list[str]:
    """Compares every file of an imported model with the digest that its checkpoint notes.

    Returns:
        One sentence for each file that is damaged or missing.
    """
    problems = []
    for step, folder in sorted(step_folders(directory / "checkpoints").items()):
        saved = check(folder, step)
        if isinstance(saved, list):
            problems += _sentences(folder, saved)
            continue
        for name, digest in saved.meta.get("files", {}).items():
            file = directory / name
            if not file.is_file():
                problems.append(f"{file}: missing.")
            elif digest_file(file)[1] != digest:
                problems.append(f"{file}: is not the one that was imported.")
    return problems


def verify_stage(directory: Path) -> list[str]:
    """Reads every file of a stage; of one that has not finished, its own notes and its checkpoints.

    Returns:
        One sentence for each file that is damaged, missing or foreign, and one when the stage has not finished.
    """
    if (directory / "manifest.json").is_file():
        found = store.verify(directory)
        # A checkpoint's own digests are older than the manifest, which might vouch for damage that came before it.
        for step, folder in sorted(step_folders(directory / store.CHECKPOINTS).items()):
            if not any(line.startswith(f"{folder}/") for line in found):
                found += _of_checkpoint(folder, step, f"; remove {folder} and run the stage again")
        return found
    problems = []
    try:
        store.read_spec(directory)
        if (kept := directory / provenance.FILE_NAME).is_file():
            read_sealed(kept)
    except JaxlmError as error:
        problems.append(str(error))
    whole = []
    for step, folder in sorted(step_folders(directory / "checkpoints").items()):
        found = _of_checkpoint(folder, step)
        problems += found
        if not found:
            whole.append(str(step))
    saved = f"; whole checkpoints: {', '.join(whole)}" if whole else ""
    return [
        *problems,
        f"{directory}: has not finished, or its manifest.json was removed{saved}; run the same command to continue.",
    ]


def _of_checkpoint(folder: Path, step: int, then: str = "") -> list[str]:
    found = check(folder, step)
    return _sentences(folder, found, then) if isinstance(found, list) else []


def _sentences(folder: Path, found: list[Damage], then: str = "") -> list[str]:
    """`then` is what to do about damage; a file that cannot be read may be whole."""
    unread = "; check the disk and the permissions"
    return [f"{folder / one.file}: {one.problem}{unread if one.unread else then}." for one in found]


def stages_in(place: Path) -> int:
    """How many stages a run has; 1 for a stage."""
    return len(runs.stages_of(place)) if (place / "run.json").is_file() else 1


def _copies(place: Path, evaluate: Path | None) -> list[str]:
    """The run's copies of its report, compared with the digests of the stage that made it."""
    if evaluate is None:
        return []
    try:
        outputs = store.read_manifest(evaluate).outputs
    except JaxlmError:
        return []  # named already
    problems = []
    for name in runs.REPORT_FILES:
        if name not in outputs:
            continue
        copy = place / name
        if not copy.is_file():
            problems.append(f"{copy}: missing.")
        elif digest_file(copy)[1] != outputs[name]["sha256"]:
            problems.append(f"{copy}: is not the {name} that {evaluate} made.")
    return problems
