"""The manifest that makes a folder a checkpoint: what is in it, and the size and sha256 of each of its files.

`digests.json` is written when everything else is on the disk. It carries its own digest and is compared byte by byte
with its canonical form, so that a change to any byte of any file of a checkpoint shows, this file's own included.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm._disk import sync_directory, write_atomic
from jaxlm.errors import InputError

MANIFEST = "digests.json"
SCHEMA = 1
_UNREAD = "cannot be read"
_READERS = 4  # sha256 runs outside the interpreter's lock at about the speed of one disk per thread


class Leaf(NamedTuple):
    """One array of a saved tree: its place ("blocks/mlp/up"), its global shape and its dtype's name."""

    path: str
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


class Damage(NamedTuple):
    """A file of a checkpoint that is not what was saved. `file` is relative to the folder of its step."""

    step: int
    file: str
    problem: str

    @property
    def unread(self) -> bool:
        """The file is there and cannot be read now: it may be whole, and nothing may be removed for it."""
        return self.problem.startswith(_UNREAD)

    def __str__(self) -> str:
        return f"step {self.step}: {self.file} {self.problem}"


class Manifest(NamedTuple):
    """What `digests.json` says. `files` maps a path relative to the step's folder to (bytes, sha256 in hex)."""

    step: int
    meta: dict[str, Any]
    metric: float | None
    items: dict[str, list[Leaf]]
    files: dict[str, tuple[int, str]]


def digest_file(path: Path, *, sync: bool = False) -> tuple[int, str]:
    """(bytes, sha256 in hex) of a file; with `sync`, the file is forced to the disk too."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if sync:
            os.fsync(file.fileno())
        return file.tell(), digest


def as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` as they come back from the manifest (tuples are lists there)."""
    try:
        return dict(json.loads(json.dumps(dict(values), allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise InputError(f"a checkpoint's meta must be plain JSON: {error}") from None


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Digests and syncs every file below `folder`, then writes `manifest` with them there. No one else may write."""
    files: dict[str, tuple[int, str]] = {}
    for parent, _, names in sorted(os.walk(folder)):
        for name in sorted(names):
            path = Path(parent, name)
            files[path.relative_to(folder).as_posix()] = digest_file(path, sync=True)
        sync_directory(Path(parent))
    manifest = manifest._replace(files=files)
    write_atomic(folder / MANIFEST, _to_bytes(manifest))
    return manifest


def _to_bytes(manifest: Manifest) -> bytes:
    body: dict[str, Any] = {
        "schema": SCHEMA,
        "step": manifest.step,
        "meta": manifest.meta,
        # JSON has no NaN and no infinity; float() reads their names back.
        "metric": manifest.metric if manifest.metric is None else repr(manifest.metric),
        "items": {name: [list(leaf) for leaf in leaves] for name, leaves in manifest.items.items()},
        "files": {name: list(entry) for name, entry in manifest.files.items()},
    }
    return _canonical(body)


def _canonical(body: dict[str, Any]) -> bytes:
    """The one way to write `body`, with its sha256 as the last field."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, indent=1).encode() + b"\n"


def read_manifest(folder: Path, step: int) -> Manifest | Damage:
    """The manifest of the checkpoint in `folder`, or what is wrong with it. Reads no other file.

    Raises:
      InputError: the manifest is whole but of a schema that this version does not know.
    """
    try:
        raw = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        return Damage(step, MANIFEST, "is missing")
    except OSError as error:
        return Damage(step, MANIFEST, f"{_UNREAD} ({error.strerror})")
    try:
        body = json.loads(raw)
        if _canonical({name: value for name, value in body.items() if name != "sha256"}) != raw:
            return Damage(step, MANIFEST, "does not match its own digest")
    except (ValueError, AttributeError, RecursionError):
        return Damage(step, MANIFEST, "is not what was written")
    if body["schema"] != SCHEMA:
        raise InputError(
            f"{folder / MANIFEST} has schema {body['schema']}, this jaxlm reads {SCHEMA}; use the version that wrote it"
        )
    if body["step"] != step:
        return Damage(step, MANIFEST, f"is of step {body['step']}")
    return Manifest(
        step=body["step"],
        meta=body["meta"],
        metric=None if body["metric"] is None else float(body["metric"]),
        items={name: [Leaf(p, tuple(s), d) for p, s, d in leaves] for name, leaves in body["items"].items()},
        files={name: (size, digest) for name, (size, digest) in body["files"].items()},
    )


def check(folder: Path, step: int, *, contents: bool = True) -> Manifest | list[Damage]:
    """The manifest of the checkpoint of `step` in `folder` when all is as it was saved, else what is not."""
    manifest = read_manifest(folder, step)
    if isinstance(manifest, Damage):
        return [manifest]
    return find_damage(folder, manifest, contents=contents) or manifest


def find_damage(folder: Path, manifest: Manifest, *, contents: bool = True) -> list[Damage]:
    """Compares every file with the manifest: its size, and with `contents` its digest."""
    with ThreadPoolExecutor(_READERS) as pool:
        problems = pool.map(
            lambda entry: _problem(folder / entry[0], entry[1][0], entry[1][1] if contents else None),
            manifest.files.items(),
        )
        return [Damage(manifest.step, name, p) for name, p in zip(manifest.files, problems, strict=True) if p]


def _problem(path: Path, size: int, digest: str | None) -> str | None:
    try:
        found_size = path.stat().st_size
        if found_size != size:
            return f"has {found_size:,} bytes, not the {size:,} that were saved"
        found_digest = digest if digest is None else digest_file(path)[1]
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    except OSError as error:
        return f"{_UNREAD} ({error.strerror})"
    return None if found_digest == digest else f"has changed: its sha256 is {found_digest}, not {digest}"
