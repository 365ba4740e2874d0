"""What a result was made with: recorded beside it, shown when runs are compared, never part of an identity.

A stage's directory holds provenance.json from its first moment on, so that a run that never finished can be told from
another too: the resolved configuration, the versions and the code, the devices and their layout, and the digest of
every file of its inputs. The manifest repeats the environment.

Loads no jax: the devices are asked for only where the stage has loaded it already.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm._sealed import read_sealed, write_sealed

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from jaxlm.stages.spec import Manifest, Spec

FILE_NAME = "provenance.json"
LIBRARIES = ("jaxlm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tiktoken", "tokenizers")
VARIABLES = ("XLA_FLAGS", "JAX_PLATFORMS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION")


def environment(*, with_devices: bool = True) -> dict[str, Any]:
    """Versions, flags, code, devices and machine of this process, as small JSON values.

    Args:
        with_devices: False before the stage has said how many it wants: to look at them is to start them.
    """
    facts = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": {name: version for name in LIBRARIES if (version := _version(name))},
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "code_sha256": code_hash(),
        "git": _git(),
    }
    return facts | {"devices": devices()} if with_devices else facts


def write(spec: Spec, inputs: Mapping[str, Manifest]) -> None:
    """Puts provenance.json into a stage's directory, at its start."""
    record = {
        "settings": spec.settings,
        "environment": environment(with_devices=False),
        "inputs": {
            name: {
                "stage": manifest.spec.name,
                "files": {file: output["sha256"] for file, output in manifest.outputs.items()},
            }
            for name, manifest in inputs.items()
        },
    }
    write_sealed(spec.directory / FILE_NAME, record)


def add(directory: Path, **facts: Any) -> None:
    """Adds what only the stage itself can tell, once it has loaded jax."""
    file = directory / FILE_NAME
    write_sealed(file, (read_sealed(file) if file.is_file() else {}) | facts)


def layout(mesh: Mesh) -> dict[str, int]:
    """The axes of a mesh of devices, as a small JSON value."""
    return {str(axis): int(size) for axis, size in mesh.shape.items()}


def code_hash() -> str:
    """SHA-256 over the names and contents of the package's Python files."""
    package = Path(__file__).resolve().parent.parent
    total = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        total.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return total.hexdigest()


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """The commit of the checkout that the code runs from, and whether it has changes; None outside one."""
    checkout = Path(__file__).resolve().parent.parent.parent
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout)]
    try:
        commit = subprocess.run(
            [*command, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        changes = subprocess.run(
            [*command, "status", "--porcelain"], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "dirty": bool(changes)}


def devices() -> dict[str, Any] | None:
    """The devices of this process, once jax has been loaded; None before."""
    jax = sys.modules.get("jax")
    if jax is None:
        return None
    found = jax.devices()
    return {
        "platform": found[0].platform,
        "kind": found[0].device_kind,
        "count": len(found),
        "processes": jax.process_count(),
    }
