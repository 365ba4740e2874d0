"""Published evaluations, computed again: the loss of a published model on a text, beside the figure that was published.

A recipe is a YAML file; `configs/verdict_gpt2.yaml` is one. It needs the model's weights, and says so when they are not
to be had.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from jaxlm import tokenizers
from jaxlm._frozen import Frozen, Positive
from jaxlm._yaml import read_mapping
from jaxlm.config import ModelConfig, find_config, validated
from jaxlm.data.download import fetch
from jaxlm.data.sources import source
from jaxlm.errors import InputError, UnavailableError
from jaxlm.evaluate import eval_step
from jaxlm.loading import load_model
from jaxlm.model import Params


class Published(Frozen):
    """The figures to compare with."""

    train: float | None = Field(None, description="loss of the first part, nats per token")
    val: float | None = Field(None, description="loss of the last part, nats per token")
    tolerance: float = Field(0.001, gt=0, description="how far a loss may be from its figure")


class Recipe(Frozen):
    """The loss of a model on the two parts of a text, in windows."""

    name: str = Field("recipe", description="of the recipe")
    model: str = Field(description="a run, a Hugging Face directory or repository, or a .gguf file")
    tokenizer: str | None = Field(None, description="a published encoding; empty: the model's own")
    source: str = Field(description="a text of jaxlm.data.sources")
    val_fraction: float = Field(0.1, gt=0, lt=1, description="last share of the characters, scored apart")
    length: Positive = Field(256, description="T, tokens per window")
    stride: Positive = Field(256, description="tokens from one window to the next")
    batch_size: Positive = Field(2, description="windows at a time")
    published: Published = Published()


class Losses(NamedTuple):
    """Nats per token of the two parts."""

    train: float
    val: float


def load(path: str | Path) -> Recipe:
    """Reads a recipe; a bare name also finds `configs/NAME.yaml`.

    Raises:
        InputError: no such file, or it is no recipe; names the field.
    """
    file = find_config(path)
    values = read_mapping(file)
    return validated(Recipe, {"name": file.stem, **values}, where=str(file))


def run(recipe: Recipe, root: str | Path = ".") -> Losses:
    """Computes the losses.

    Args:
        recipe: what to compute.
        root: the directory that holds store/ and runs/.

    Raises:
        UnavailableError: the weights or the text are not on this machine and not reachable; says what is missing.
        InputError: the model cannot be read, or a part of the text has no whole window.
    """
    where = _mirrored(recipe.model)
    named = None if recipe.tokenizer is None else tokenizers.load(recipe.tokenizer)
    try:
        loaded = load_model(where, root, tokenizer=named, prepared=False)
    except UnavailableError as error:
        raise UnavailableError(
            f"{recipe.name}: the weights of {recipe.model} are missing here ({str(error).rstrip('.')}); go online, or "
            f"put config.json and model.safetensors in {recipe.model} below a directory that JAXLM_MIRROR names."
        ) from None
    text = fetch(source(recipe.source).resource).read_text(encoding="utf-8")
    cut = int((1 - recipe.val_fraction) * len(text))
    parts = (np.array(loaded.tokenizer.encode(part), np.int32) for part in (text[:cut], text[cut:]))
    return Losses(*(window_loss(loaded.cfg, loaded.params, ids, recipe) for ids in parts))


def _mirrored(name: str) -> str | Path:
    """A directory of that name in `JAXLM_MIRROR`, or the name itself."""
    folders = filter(None, os.environ.get("JAXLM_MIRROR", "").split(os.pathsep))
    found = (Path(folder) / name for folder in folders)
    return next((path for path in found if (path / "config.json").is_file()), name)


def windows(ids: NDArray[np.int32], length: int, stride: int) -> NDArray[np.int32]:
    """int32[N, length + 1]: the whole windows of inputs and targets that begin every `stride` tokens."""
    starts = range(0, len(ids) - length, stride)
    return (
        np.stack([ids[start : start + length + 1] for start in starts])
        if starts
        else np.zeros((0, length + 1), np.int32)
    )


def window_loss(cfg: ModelConfig, params: Params, ids: NDArray[np.int32], recipe: Recipe) -> float:
    """Nats per token over the whole windows of `ids`, each seen alone; what is left at the end is not scored."""
    rows = windows(ids, recipe.length, recipe.stride)
    if not len(rows):
        raise InputError(
            f"{recipe.name}: {len(ids)} tokens hold no window of {recipe.length}; choose a smaller length."
        )
    nats = tokens = 0.0
    for batch in _batches(rows, recipe.batch_size):
        nll, count = eval_step(cfg, params, {"tokens": batch[:, :-1], "targets": batch[:, 1:]})
        nats, tokens = nats + float(nll), tokens + float(count)
    return nats / tokens


def _batches(rows: NDArray[np.int32], size: int) -> Iterator[NDArray[np.int32]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def report(recipe: Recipe, losses: Losses) -> str:
    """The losses beside the published figures, a line each.

    Raises:
        InputError: a loss is further from its figure than the recipe's tolerance: another model, or a fault of ours.
    """
    lines, off = [], []
    for part, loss in losses._asdict().items():
        figure = getattr(recipe.published, part)
        beside = "" if figure is None else f", published {figure:.4f}"
        lines.append(f"{part:>5} loss {loss:.4f}{beside}")
        if figure is not None and not abs(loss - figure) <= recipe.published.tolerance:  # NaN is off too
            off.append(f"{part} loss {loss:.4f} is not the published {figure:.4f}")
    if off:
        raise InputError(f"{recipe.name}: {' and '.join(off)}; are these the weights of {recipe.model}?")
    return "\n".join(lines)
