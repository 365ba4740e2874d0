"""A trained model as a directory: what the fitting stages leave, and how later ones read it.

model.json             the resolved ModelConfig
tokenizer.jaxlm.json   the tokenizer
checkpoints/N/         states, each verified by its digests before it is read
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxlm import model, tokenizers
from jaxlm.checkpoint import best_step, restore, restore_step_dir
from jaxlm.config import ModelConfig, validated
from jaxlm.errors import InputError
from jaxlm.stages.store import read_json, write_json
from jaxlm.tokenizers import Tokenizer

CHECKPOINTS = "checkpoints"


class Saved(NamedTuple):
    """A model read from disk.

    Attributes:
        cfg: its shape.
        params: its parameters, on the default device.
        tokenizer: the one it was trained with.
        step: of the checkpoint.
        notes: a sentence for each damaged checkpoint that was passed over.
    """

    cfg: ModelConfig
    params: model.Params
    tokenizer: Tokenizer
    step: int
    notes: list[str]


def write_description(directory: Path, cfg: ModelConfig, tokenizer: Tokenizer) -> None:
    """Puts model.json and the tokenizer beside the checkpoints."""
    write_json(directory / "model.json", cfg.model_dump(mode="json"))
    tokenizer.save(directory)


def read_config(directory: Path) -> ModelConfig:
    """The model's shape.

    Raises:
        InputError: model.json is missing or is not one.
    """
    file = directory / "model.json"
    return validated(ModelConfig, read_json(file), where=str(file))


def abstract_params(cfg: ModelConfig) -> Any:
    """Shapes and types of a model's parameters."""
    return jax.eval_shape(lambda: model.init(cfg, jax.random.key(0)))


def load(path: Path, *, best: bool = False) -> Saved:
    """Reads a model from a fitting stage's directory, or from one of its checkpoints (`checkpoints/N`).

    Args:
        path: the directory.
        best: take the checkpoint with the lowest validation loss instead of the newest.

    Raises:
        InputError: no model or no undamaged checkpoint there; each damage is named.
    """
    single = path.parent.name == CHECKPOINTS
    home = path.parent.parent if single else path
    cfg = read_config(home)
    tokenizer = tokenizers.load(home)
    wanted = {"params": abstract_params(cfg)}
    expect = {"tokenizer": tokenizer.fingerprint, "model": cfg.identity()}
    if single:
        found = restore_step_dir(path, wanted, expect=expect)
    else:
        step = best_step(home / CHECKPOINTS) if best else None
        newest = restore(home / CHECKPOINTS, wanted, step=step, expect=expect)
        if newest is None:
            raise InputError(f"{home / CHECKPOINTS}: there is no checkpoint; run the stage first.")
        found = newest
    notes = [f"damaged checkpoint passed over: {damage}" for damage in found.damaged]
    return Saved(cfg, found.items["params"], tokenizer, found.step, notes)
