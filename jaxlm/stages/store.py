"""Results on disk: a result exists when its manifest is in place. Loads no jax.

`manifest.json` is written last, by rename, when every output has reached the disk. Looking for a result compares sizes
and times, and digests where a time differs; `verify` reads everything.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jaxlm._digests import Damage, digest_file
from jaxlm._digests import check as check_checkpoint
from jaxlm._disk import disk_errors, sync_directory, write_atomic
from jaxlm._json import read_json as read_json
from jaxlm._json import unreadable
from jaxlm._sealed import read_sealed, write_sealed
from jaxlm._steps import remove, step_folders
from jaxlm.errors import DiskError, InputError, JaxlmError
from jaxlm.metrics_log import FILE_NAME as RECORD
from jaxlm.stages.spec import Manifest, Output, Spec

CHECKPOINTS = "checkpoints"  # the folder of a stage that trains

# Files of the frame itself, at the top of a stage's directory: no part of its result.
FRAME_FILES = frozenset(
    [
        "spec.json",
        "manifest.json",
        "error.json",
        "traceback.txt",
        "log.txt",
        "stacks.txt",
        "launch.json",
        "launch.sbatch",
        "launch.yaml",
    ]
)
# What to do about a damaged one: nothing but the file itself has to go.
_SPEC_AGAIN = "remove it and run the command again, which writes it anew"
_MANIFEST_AGAIN = "remove it and run its stage again, which keeps what is whole"
NOT_OUTPUTS = (".part", ".tmp", ".lock")  # ends of names: files that were still being written, and locks


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Puts a JSON object at `path`, so that a reader sees the old file or the whole new one.

    Raises:
        ValueError: a number in it is not finite.
        DiskError: the disk is full or failing.
    """
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    with disk_errors(f"write {path.name}", path.parent):
        write_atomic(path, text.encode())


def write_spec(spec: Spec) -> Path:
    """Makes the stage's directory and writes its spec.json. Returns the directory."""
    with disk_errors("make a stage", spec.directory):
        spec.directory.mkdir(parents=True, exist_ok=True)
    write_sealed(spec.directory / "spec.json", spec.to_json())
    return spec.directory


def read_spec(directory: Path) -> Spec:
    """The spec in a stage's directory, with the store's place on this machine as its root.

    Raises:
        InputError: there is none, it is not what was written, or it is of another stage or version.
    """
    file, place = directory / "spec.json", directory.resolve()
    spec = Spec.from_json(
        read_sealed(file, hint=_SPEC_AGAIN if file.exists() else "name the directory of a stage"),
        root=place.parent.parent,
        where=str(file),
    )
    if place.parent.name == "store" and place.name != spec.name:
        raise InputError(f"{file}: is of {spec.name}, not of this directory; {_SPEC_AGAIN}.")
    return spec


def write_manifest(
    spec: Spec, results: Mapping[str, Any], *, seconds: float, started: datetime, environment: Mapping[str, Any]
) -> Manifest:
    """Digests every output of a finished stage, forces them to the disk and puts the manifest in place.

    Args:
        spec: what was asked; the outputs are the files in its directory.
        results: small JSON values; finite numbers only.
        seconds: wall time of the stage.
        started: when it began.
        environment: see `jaxlm.stages.provenance`.

    Raises:
        ValueError: a result is not a finite JSON value.
        DiskError: the disk is full or failing.
    """
    directory = spec.directory
    outputs: dict[str, Output] = {}
    with disk_errors("finish the stage", directory):
        for name in output_names(directory):
            size, sha256 = digest_file(directory / name, sync=True)
            outputs[name] = {"bytes": size, "sha256": sha256, "mtime_ns": (directory / name).stat().st_mtime_ns}
        for folder in {(directory / name).parent for name in outputs}:
            sync_directory(folder)
    manifest = Manifest(
        spec=spec,
        outputs=outputs,
        results=results,
        seconds=round(seconds, 3),
        environment=environment,
        started=started.isoformat(timespec="milliseconds"),
        finished=datetime.now(UTC).isoformat(timespec="milliseconds"),
        directory=directory,
    )
    write_sealed(directory / "manifest.json", manifest.to_json())
    return manifest


def read_manifest(directory: Path) -> Manifest:
    """The manifest in a stage's directory, its files unchecked.

    Raises:
        InputError: there is none, or it is not what was written.
    """
    file = directory / "manifest.json"
    return Manifest.from_json(read_sealed(file, hint=_MANIFEST_AGAIN if file.exists() else "run its stage"), directory)


def output_names(directory: Path) -> list[str]:
    """The files that make up a result, relative to its directory, sorted."""
    return sorted(
        name
        for file in directory.rglob("*")
        if file.is_file()
        and not file.name.endswith(NOT_OUTPUTS)
        and (name := file.relative_to(directory).as_posix()) not in FRAME_FILES
    )


def find(spec: Spec) -> Manifest | None:
    """The finished result of `spec`, or None. See `check` for the reason, and what it raises."""
    return check(spec)[0]


def check(spec: Spec) -> tuple[Manifest | None, str]:
    """The finished result of `spec`, or None and why it cannot be used.

    Raises:
        DiskError: a file is there and cannot be read: whether it is damaged is not known.
    """
    if not (spec.directory / "manifest.json").is_file():
        return None, "not done yet"
    try:
        manifest = read_manifest(spec.directory)
    except InputError as error:
        return None, str(error)
    if manifest.id != spec.id:
        return None, f"{spec.directory}: the manifest is of {manifest.spec.name}"
    for name, output in manifest.outputs.items():
        damage = _damage(spec.directory / name, output, trust_times=True)
        if damage:
            return None, damage
    return manifest, ""


def verify(directory: Path) -> list[str]:
    """Reads every file of a finished stage and compares digests.

    Returns:
        One sentence for each file that is damaged, missing, foreign or cannot be read; empty when the result is whole.
    """
    try:
        manifest = read_manifest(directory)
    except JaxlmError as error:
        return [str(error)]
    problems = _misplaced(manifest) or _problems(manifest, _told)
    try:
        if read_spec(directory).id != manifest.id:
            problems.append(f"{directory / 'spec.json'}: is of another stage than the manifest beside it.")
    except JaxlmError as error:
        problems.append(str(error))
    foreign = set(output_names(directory)) - set(manifest.outputs)
    return problems + [f"{directory / name}: not listed in the manifest." for name in sorted(foreign)]


def damage(manifest: Manifest) -> list[str]:
    """Reads every output of a finished stage and compares digests; and whether it is the stage of that directory.

    Returns:
        One sentence for each file that is not what it should be.

    Raises:
        DiskError: a file is there and cannot be read.
    """
    return _misplaced(manifest) or _problems(manifest, _damage)


def _misplaced(manifest: Manifest) -> list[str]:
    place = manifest.directory.resolve()
    if place.parent.name != "store" or place.name == manifest.spec.name:
        return []
    return [f"{manifest.directory / 'manifest.json'}: is of {manifest.spec.name}, not of this directory."]


def _problems(manifest: Manifest, look: Callable[[Path, Output], str]) -> list[str]:
    found = [look(manifest.directory / name, output) for name, output in manifest.outputs.items()]
    return [problem for problem in found if problem]


def discard_damaged(directory: Path) -> list[str]:
    """Takes damaged files away before a stage begins, lest it goes on from one, or a new manifest vouches for it.

    Checkpoints are judged by their own digests, which are older than any manifest, whether the stage has finished or
    not; a damaged one goes only where another is whole: the last evidence is never removed.

    Returns:
        One sentence for each damaged checkpoint or other file.

    Raises:
        DiskError: a file is there and cannot be read; nothing has been removed.
        InputError: a checkpoint is of a later version, or a damaged file may not be removed.
    """
    checkpoints = directory / CHECKPOINTS
    folders = step_folders(checkpoints)
    damaged = {folder: found for step, folder in folders.items() if (found := _checkpoint_damage(folder, step))}
    another = len(damaged) < len(folders)
    what = "this checkpoint is removed, another is whole" if another else "no other checkpoint is whole"
    said = [f"{folder / found.file}: {found.problem}; {what}." for folder, found in damaged.items()]
    problems: dict[Path, str] = {}
    try:
        outputs = read_manifest(directory).outputs if (directory / "manifest.json").is_file() else {}
    except InputError as error:
        said.append(f"{str(error).rstrip('.')}; it is made again.")
        outputs = {}
    for file, output in ((directory / name, output) for name, output in outputs.items()):
        if damaged.keys().isdisjoint(file.parents) and (problem := _damage(file, output)):
            problems[file] = problem.rstrip(".")
    with disk_errors("take away what is damaged", directory):
        for folder in damaged if another else ():
            remove(folder)
        for file, problem in problems.items():
            of_checkpoint = checkpoints in file.parents
            said.append(f"{problem}; {_BY_OWN_DIGESTS if of_checkpoint else _take_away(file)}.")
    return said


_BY_OWN_DIGESTS = "training goes on from the newest checkpoint that is whole by its own digests"


def _checkpoint_damage(folder: Path, step: int) -> Damage | None:
    """The first file of a checkpoint that is not what was saved."""
    found = check_checkpoint(folder, step)
    if not isinstance(found, list):
        return None
    for one in found:
        if one.unread:
            raise DiskError(f"{folder / one.file}: {one.problem}; check the disk and the permissions.")
    return found[0]


def _take_away(file: Path) -> str:
    """Removes a damaged file, or sets it aside where nothing makes it again. Returns what becomes of it, in words."""
    if file.name == RECORD and file.exists():
        aside = file.with_name(f"{RECORD}.damaged.part")
        os.replace(file, aside)
        return f"it is set aside as {aside.name}, and begun anew where training goes on"
    with suppress(FileNotFoundError, NotADirectoryError):
        file.unlink()
    return "it is made again, from where training goes on" if file.name == RECORD else "it is made again"


def digest(path: Path) -> str:
    """SHA-256 of a file, or of a directory's file names and contents. Hidden files are left out of a directory.

    Raises:
        InputError: no such file, an unreadable one, or an empty directory.
    """
    try:
        if path.is_file():
            return digest_file(path)[1]
        total = hashlib.sha256()
        files = [item for item in sorted(path.rglob("*")) if item.is_file() and not item.name.startswith(".")]
        for item in files:
            total.update(f"{item.relative_to(path).as_posix()}\0{digest(item)}\n".encode())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from None
    if not files:
        raise InputError(f"{path}: no such file, or an empty directory; give the path of a file that exists.")
    return total.hexdigest()


def _damage(file: Path, expected: Output, *, trust_times: bool = False) -> str:
    """What is wrong with a file, in a sentence; empty when nothing is.

    Raises:
        DiskError: it is there and cannot be read, as on a file system whose server is away: that is no damage.
    """
    try:
        found = file.stat()
        if found.st_size != expected["bytes"]:
            return f"{file}: {found.st_size} bytes where the manifest says {expected['bytes']}."
        if trust_times and found.st_mtime_ns == expected["mtime_ns"]:
            return ""
        actual = digest_file(file)[1]
    except (FileNotFoundError, NotADirectoryError):
        return f"{file}: missing."
    except OSError as error:
        raise unreadable(file, error) from None
    if actual != expected["sha256"]:
        return f"{file}: its SHA-256 is {actual[:12]}… where the manifest says {expected['sha256'][:12]}…."
    return ""


def _told(file: Path, expected: Output) -> str:
    """As `_damage`, with a file that cannot be read told like the others."""
    try:
        return _damage(file, expected)
    except DiskError as error:
        return str(error)
