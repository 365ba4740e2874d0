"""lineage.json in a run's directory: from which inputs, settings and code each of its results was made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlm._digests import digest_file
from jaxlm.config import RunConfig
from jaxlm.stages import runs
from jaxlm.stages.spec import Manifest, Spec
from jaxlm.stages.store import write_json

FILE = "lineage.json"


def write(cfg: RunConfig, config_name: str, done: Sequence[Manifest]) -> Path:
    """Writes the lineage of the stages that are done. Returns the file.

    Each stage names its inputs by stage and id, so the file is a graph: follow `inputs` back to the user's files,
    which are under `files` with their digests.
    """
    folder = runs.directory(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    stages = [_stage(manifest) for manifest in done]
    write_json(folder / FILE, {"run": cfg.name, "config_name": config_name, "stages": stages})
    return folder / FILE


def asset_key(stage: str, identity: str) -> str:
    """The name of a result as a Prefect asset."""
    return f"jaxlm://store/{stage}-{identity}"


def assets_of(spec: Spec) -> tuple[str, Sequence[str]]:
    """The asset that a stage makes, and those that it reads."""
    return asset_key(spec.stage, spec.id), [asset_key(item["stage"], item["id"]) for item in spec.inputs.values()]


def _stage(manifest: Manifest) -> dict[str, Any]:
    spec, made_with = manifest.spec, manifest.environment
    return {
        "stage": spec.stage,
        "id": spec.id,
        "version": spec.version,
        "inputs": {name: dict(item) for name, item in spec.inputs.items()},
        "files": dict(spec.config.get("files", {})),
        "settings": dict(spec.config),
        "code_sha256": made_with.get("code_sha256"),
        "git": made_with.get("git"),
        "libraries": made_with.get("libraries"),
        "started": manifest.started,
        "finished": manifest.finished,
        "manifest_sha256": digest_file(manifest.directory / "manifest.json")[1],
        "bytes": sum(output["bytes"] for output in manifest.outputs.values()),
        "directory": str(manifest.directory),
    }
