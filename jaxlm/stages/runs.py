"""A run by its name: runs/<name>/ points at the stages of a run in the store and holds its report. Loads no jax."""

from __future__ import annotations

import difflib
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from jaxlm._lock import dir_lock
from jaxlm._sealed import read_sealed, write_sealed
from jaxlm.config import RunConfig
from jaxlm.errors import InputError
from jaxlm.stages.spec import Manifest

FIGURES = "report-files"
REPORT_FILES = ("report.md", "report.html", "report.json")


def directory(cfg: RunConfig) -> Path:
    """Where a run's report and the pointers to its stages live."""
    return Path(cfg.root) / "runs" / cfg.name


def record(cfg: RunConfig, config_name: str, manifest: Manifest) -> Path:
    """Notes in runs/<name> that a stage of this run is done: run.json, a link to the stage, copies of its report files.

    Another configuration under the same name starts the notes afresh; its stages stay in the store.

    Returns:
        The run's directory.
    """
    folder = directory(cfg)
    with dir_lock(folder, wait=True):  # two processes of one run may have done a stage each, and neither may be lost
        _record(cfg, config_name, manifest, folder)
    return folder


def _record(cfg: RunConfig, config_name: str, manifest: Manifest, folder: Path) -> None:
    config = cfg.model_dump(mode="json")
    stages: dict[str, str] = {}
    with suppress(InputError):
        known = read_sealed(folder / "run.json")
        if known.get("config") == config:
            stages = dict(known["stages"])
    if not stages:
        _clear_links(folder)
    stages[manifest.stage] = os.path.relpath(manifest.directory.resolve(), folder.resolve())
    write_sealed(
        folder / "run.json", {"name": cfg.name, "config_name": config_name, "config": config, "stages": stages}
    )
    _link(folder / manifest.stage, stages[manifest.stage])
    for name in REPORT_FILES:
        if name in manifest.outputs:
            part = folder / f".{name}.{os.getpid()}.tmp"
            shutil.copyfile(manifest.directory / name, part)
            os.replace(part, folder / name)
            # report.md names its pictures by this folder, so it must be found beside the copy too.
            if (manifest.directory / FIGURES).is_dir():
                _link(folder / FIGURES, os.path.join(stages[manifest.stage], FIGURES))


def stages_of(run: Path) -> dict[str, Path]:
    """The stages of a run directory, in the order in which they were done.

    Raises:
        InputError: the directory has no readable run.json.
    """
    values: dict[str, Any] = read_sealed(run / "run.json")
    return {stage: (run / path).resolve() for stage, path in values.get("stages", {}).items()}


def resolve(path_or_name: str | Path, root: str | Path = ".", *, stages: Sequence[str] = ()) -> Path:
    """The directory that a person means: a path, the name of a run, `<run>/<stage>`, or `<stage>-<id>` of the store.

    Args:
        path_or_name: what was typed.
        root: the directory that holds store/ and runs/.
        stages: for a run, the first of these stages that it has, instead of the run itself.

    Raises:
        InputError: there is no such thing, or the run has none of `stages`.
    """
    text = str(path_or_name)
    root = Path(root)
    for candidate in (root / "runs" / text, root / "store" / text, Path(text), root / text):
        if text and candidate.exists():
            return _stage_in(candidate, stages)
    known = sorted({item.name for folder in ("runs", "store") for item in (root / folder).glob("[!.]*")})
    close = difflib.get_close_matches(text, known, n=3)
    if close:
        hint = f"did you mean {' or '.join(close)}?"
    elif runs := [item.name for item in sorted((root / "runs").glob("[!.]*"))]:
        hint = f"the runs here are {', '.join(runs[:10])}."
    else:
        hint = f"there are no runs in {root / 'runs'} yet."
    raise InputError(f"{text}: no such run, stage or directory; {hint}")


def _stage_in(found: Path, stages: Sequence[str]) -> Path:
    if not stages or not (found / "run.json").is_file():
        return found
    have = stages_of(found)
    for stage in stages:
        if stage in have:
            return have[stage]
    raise InputError(f"{found}: the run has no {' or '.join(stages)} stage yet; it has {', '.join(have) or 'none'}.")


def _link(link: Path, target: str) -> None:
    """A relative symbolic link, replaced atomically. A file system without links has run.json all the same."""
    part = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    with suppress(OSError):
        part.unlink(missing_ok=True)
        part.symlink_to(target, target_is_directory=True)
        os.replace(part, link)


def _clear_links(folder: Path) -> None:
    for item in folder.iterdir():
        if item.is_symlink() or item.name in REPORT_FILES:
            item.unlink()
