"""The folders in a directory of checkpoints: what each name means, and moving them so that no crash loses a checkpoint.

`<step>` is complete, or damaged. `<step>.unfinished` (with Orbax's own suffix while Orbax writes) is being saved;
`<step>.replaced` waits for its successor to take its name; `<step>.deleted` is on its way out.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from jaxlm._digests import Manifest, check
from jaxlm._disk import disk_errors, sync_directory

UNFINISHED, REPLACED, DELETED = ".unfinished", ".replaced", ".deleted"
_STEP = re.compile(r"0|[1-9][0-9]*")
_ASIDE = re.compile(r"(0|[1-9][0-9]*)\.replaced")
_LEFTOVER = re.compile(r"[0-9]+(\.unfinished|\.replaced|\.deleted|(\.unfinished)?\.orbax-checkpoint-tmp.*)")


def step_folders(root: Path) -> dict[int, Path]:
    """The folder of each step, damaged ones too. A folder set aside counts when its successor never arrived."""
    if not root.is_dir():
        return {}
    with disk_errors("list checkpoints", root):
        names = sorted(path.name for path in root.iterdir() if path.is_dir())
    aside = {int(name.removesuffix(REPLACED)): root / name for name in names if _ASIDE.fullmatch(name)}
    return {**aside, **{int(name): root / name for name in names if _STEP.fullmatch(name)}}


def complete(root: Path) -> dict[int, Manifest]:
    """The manifests of the steps that have all their files in their sizes; contents are not read."""
    checked = {step: check(folder, step, contents=False) for step, folder in step_folders(root).items()}
    return {step: manifest for step, manifest in checked.items() if isinstance(manifest, Manifest)}


def best(saved: Mapping[int, Manifest]) -> int | None:
    """The step with the lowest finite metric, the newest of equals."""
    metrics = {s: m.metric for s, m in saved.items() if m.metric is not None and math.isfinite(m.metric)}
    return min(metrics, key=lambda step: (metrics[step], -step), default=None)


def put_in_place(folder: Path, final: Path) -> None:
    """Gives a finished folder its step's name; what had that name is removed only after."""
    aside = final.with_name(final.name + REPLACED)
    if os.path.lexists(final):
        remove(aside)
        os.replace(final, aside)
    os.replace(folder, final)
    sync_directory(final.parent)
    remove(aside)


def clean_up(root: Path) -> None:
    """Removes what a writer that was killed left behind; only the holder of the lock may."""
    for path in sorted(root.iterdir()):
        final = root / path.name.removesuffix(REPLACED)
        if _ASIDE.fullmatch(path.name) and not final.exists():
            os.replace(path, final)
        elif _LEFTOVER.fullmatch(path.name):
            remove(path)


def remove(folder: Path) -> None:
    """Takes a folder away under another name first, so that a crash never leaves half a checkpoint in its place."""
    if not folder.exists():
        return
    gone = folder.with_name(folder.name.split(".")[0] + DELETED)
    if folder != gone:
        if gone.exists():
            shutil.rmtree(gone)
        os.replace(folder, gone)
    shutil.rmtree(gone)
