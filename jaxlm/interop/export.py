"""Models out: safetensors, `config.json` and the tokenizer's files, in a directory that transformers loads.

A model whose configuration is of a published family is written in that family's format. One that no family expresses
(the `nano` presets, post-norm models, bigram tables) is written in ours: `model_type` is `jaxlm`, `config.json` holds
the options of `ModelConfig`, and the tensors have the names and shapes of our tree. `load_hf` reads both.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlm import model
from jaxlm._disk import disk_errors, sync_directory, write_atomic
from jaxlm.config import ModelConfig
from jaxlm.errors import InputError
from jaxlm.interop import safetensors_io as files
from jaxlm.interop.families import OURS, Family, family_of
from jaxlm.interop.hf import CONFIG, SINGLE
from jaxlm.interop.placing import tensors
from jaxlm.tokenizers import Tokenizer, hf_files
from jaxlm.tokenizers.base import FILE_NAME
from jaxlm.tokenizers.hf_json import HFTokenizer
from jaxlm.tokenizers.to_hf import to_hf

GENERATION = "generation_config.json"
_WRITTEN = {CONFIG, SINGLE, GENERATION, FILE_NAME, hf_files.JSON, hf_files.CONFIG, hf_files.TEMPLATE}


def save_hf(directory: str | Path, cfg: ModelConfig, params: model.Params, tokenizer: Tokenizer | None = None) -> Path:
    """Writes a model for transformers, or for `load_hf`, which gives back the same bits.

    The directory appears as a whole, by rename; an earlier export there is replaced.

    Args:
        directory: where to; missing, empty, or an earlier export.
        cfg: the model's shape.
        params: its parameters, as `init` or `load_hf` made them; their type is kept.
        tokenizer: its files, chat template and stop ids are written too. One of our own is written twice: as itself,
            which `load_hf` prefers, and as a `tokenizer.json`. One that this cannot express (see `tokenizers.to_hf`)
            has only the first file, and a warning says why.

    Returns:
        The directory.

    Raises:
        InputError: the parameters are not of that shape or not finite, the tokenizer has more entries than the
            embedding, or the directory holds other files.
        DiskError: the disk is full or failed.
    """
    target = Path(directory).resolve()
    family = family_of(cfg)
    if tokenizer is not None and tokenizer.vocab_size > cfg.vocab_size:
        raise InputError(
            f"{target}: the tokenizer has {tokenizer.vocab_size:,} entries, but the model embeds {cfg.vocab_size:,}; "
            "save the model with the tokenizer that it was trained with."
        )
    described, values = tensors(cfg, family, params)
    with disk_errors("export the model", target.parent):
        replaced = _replaceable(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = target.with_name(f".{target.name}.{os.getpid()}.part")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        try:
            files.write(staging / SINGLE, described, values)
            ids = _special_ids(tokenizer)
            _write_json(staging / CONFIG, _config(cfg, family, ids, str(described[0][1])))
            _write_json(staging / GENERATION, ids)
            note = None if tokenizer is None else _write_tokenizer(staging, tokenizer, family)
            sync_directory(staging)
            _swap(staging, target, replaced)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    if note:
        warnings.warn(f"{target}: {note}", stacklevel=2)
    return Path(directory)


def _config(cfg: ModelConfig, family: Family, ids: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    fields = {"architectures": [family.architecture]} if family.architecture else {}
    return {
        "model_type": family.model_type, **fields, **family.config_to_hf(cfg), "torch_dtype": dtype,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,  # or transformers' defaults would hold
        **ids, OURS: cfg.model_dump(mode="json"),
    }  # fmt: skip


def _special_ids(tokenizer: Tokenizer | None) -> dict[str, int | list[int]]:
    """What config.json and generation_config.json say of special tokens; only those that there are."""
    if tokenizer is None:
        return {}
    end = tokenizer.eot_id
    stops = list(getattr(tokenizer, "stop_ids", ())) or ([] if end is None else [end])
    # Our own tokenizers have one token between documents, which is both their end and their start.
    ids = {
        "bos_token_id": getattr(tokenizer, "bos_id", end),
        "eos_token_id": stops[0] if len(stops) == 1 else stops or None,
        "pad_token_id": tokenizer.pad_id,
    }
    return {name: value for name, value in ids.items() if value is not None}


def _write_tokenizer(directory: Path, tokenizer: Tokenizer, family: Family) -> str | None:
    """Writes the tokenizer for transformers, one of our own for jaxlm too; returns what to know about it."""
    if isinstance(tokenizer, HFTokenizer):
        hf_files.write_directory(tokenizer, directory)
        return None
    tokenizer.save(directory)
    try:
        hf_files.write_directory(to_hf(tokenizer), directory, spelled=False)
    except InputError as error:
        return f"only jaxlm reads this tokenizer: {error}"
    if family.model_type == "qwen2":
        return (
            "transformers 5 takes the tokenizer of every qwen2 model for Qwen's own, so there read this one with "
            "PreTrainedTokenizerFast.from_pretrained and not with AutoTokenizer."
        )
    return None


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_atomic(path, (json.dumps(content, indent=2) + "\n").encode())


def _replaceable(target: Path) -> bool:
    """Whether an earlier export is there, rather than nothing."""
    if not target.exists():
        return False
    names = {path.name for path in target.iterdir()}
    # A published model has the same files; but only an export says what it is of ours.
    other = sorted(names if _is_published(target / CONFIG) else names - _WRITTEN)
    if other:
        raise InputError(f"{target}: holds {other[0]}, which an export would remove; choose another directory.")
    return bool(names)


def _is_published(config: Path) -> bool:
    try:
        return OURS not in json.loads(config.read_bytes())
    except (OSError, ValueError, TypeError):
        return True


def _swap(staging: Path, target: Path, replaced: bool) -> None:
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    if replaced:
        os.rename(target, old)
    try:
        os.rename(staging, target)
    except BaseException:
        if replaced:
            os.rename(old, target)
        raise
    sync_directory(target.parent)
    shutil.rmtree(old, ignore_errors=True)
