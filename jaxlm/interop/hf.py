"""Hugging Face models in: a directory or a repository with `config.json` and safetensors, sharded or not."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.typing import DTypeLike

from jaxlm import model, tokenizers
from jaxlm._json import read_json
from jaxlm.config import ModelConfig
from jaxlm.errors import DiskError, InputError
from jaxlm.interop import families, hub
from jaxlm.interop import safetensors_io as files
from jaxlm.interop.placing import Sharding, Source, place
from jaxlm.tokenizers import Tokenizer

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer.jaxlm.json")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
_AGAIN = "get the file again"


class Loaded(NamedTuple):
    """A model read from files.

    Attributes:
        cfg: its shape.
        params: its parameters, as `jaxlm.init` lays them out.
        tokenizer: its own, or None when there is none beside the weights.
    """

    cfg: ModelConfig
    params: model.Params
    tokenizer: Tokenizer | None


def load_hf(
    dir_or_repo_id: str | Path,
    *,
    dtype: DTypeLike | None = None,
    revision: str | None = None,
    sharding: Sharding | None = None,
) -> Loaded:
    """A published model, or one that `save_hf` wrote: GPT-2, Llama 2 and 3, SmolLM2, Qwen1.5, 2, 2.5 and 3.

    Tensors go from the file to their place one at a time, so memory holds little more than one copy of the parameters.
    Pickles are never opened.

    Args:
        dir_or_repo_id: a directory, or `owner/name` on the Hugging Face hub, downloaded once (see `hub.locate`).
        dtype: of the parameters: float32 (the default, whatever the file has), bfloat16 or float16. What the model
            computes in is `cfg.compute_dtype`.
        revision: commit, tag or branch of a repository.
        sharding: path of a weight, such as `blocks/attn/q/kernel` -> where to put it, or None for the default device.

    Returns:
        cfg, params and tokenizer; the tokenizer is None when the directory has no file of one.

    Raises:
        InputError: the files are not of a model that jaxlm expresses, or damaged; names the file and the tensor.
        UnavailableError: the hub is away and the model is not in the cache.
        DiskError: a file cannot be read.
    """
    directory = hub.locate(dir_or_repo_id, revision)
    try:
        family, cfg = read_config(directory)
        source = _source(directory)
        tokenizer = _tokenizer(directory, cfg, family)
        return Loaded(cfg, place(cfg, family, source, dtype=dtype, sharding=sharding), tokenizer)
    except OSError as error:
        raise DiskError(f"{error.filename or directory}: cannot be read ({error.strerror}); check the disk.") from error


def read_config(directory: Path) -> tuple[families.Family, ModelConfig]:
    """The family and the shape of the model in a directory, from its `config.json` alone.

    Raises:
        InputError: there is none, it is damaged, or it asks for what this model does not have.
        DiskError: it cannot be read.
    """
    raw = read_json(directory / CONFIG, hint="take the one that belongs to the weights")
    return families.read_config(raw, str(directory / CONFIG))


def _source(directory: Path) -> Source:
    """The tensors of a directory's safetensors; every header has been checked."""
    if (directory / SINGLE).exists():
        shards, home = {SINGLE: files.read_header(directory / SINGLE)}, SINGLE
    elif (directory / INDEX).exists():
        shards, home = _shards(directory), INDEX
    else:
        raise InputError(f"{directory}: {_no_weights(directory)}.")
    place_of = {name: (directory / shard, entry) for shard, header in shards.items() for name, entry in header.items()}

    def read(name: str) -> np.ndarray:
        path, entry = place_of[name]
        return files.read_tensor(path, name, entry)

    def where(name: str) -> str:
        return str(place_of[name][0] if name in place_of else directory / home)

    return Source({name: entry.shape for name, (_, entry) in place_of.items()}, read, where)


def _shards(directory: Path) -> dict[str, dict[str, files.Entry]]:
    """For each shard that the index names, the tensors that are there: those of the index, and any others."""
    path = directory / INDEX
    weight_map = read_json(path, hint=_AGAIN).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise InputError(f"{path}: field weight_map: expected the shard of each tensor; get the file again.")
    headers: dict[str, dict[str, files.Entry]] = {}
    for name, shard in weight_map.items():
        if shard not in headers:
            if shard in ("", "..") or Path(shard).name != shard:
                raise InputError(f"{path}: tensor {name}: shard {shard!r} is not a file of this directory.")
            if not (directory / shard).is_file():
                raise InputError(f"{path}: shard {shard}, which holds tensor {name}, is missing; get the file.")
            headers[shard] = files.read_header(directory / shard)
        if name not in headers[shard]:
            raise InputError(f"{directory / shard}: tensor {name} is missing, but {INDEX} says that it is here.")
    # A tensor that the index does not list is as superfluous as in a single file, but not where another shard has it.
    return {
        shard: {name: entry for name, entry in header.items() if weight_map.get(name, shard) == shard}
        for shard, header in headers.items()
    }


def _no_weights(directory: Path) -> str:
    found = sorted(path.name for path in directory.iterdir())
    pickles = [name for name in found if name.endswith(_PICKLES)]
    if pickles:
        return (
            f"there is {pickles[0]} where {SINGLE} was expected; pickles can run code and are never opened, so save "
            "the model as safetensors"
        )
    others = [name for name in found if name.endswith((".safetensors", ".gguf"))]
    hint = f", only {others[0]}" if others else ""
    return f"there is neither {SINGLE} nor {INDEX}{hint}; get the model's weights"


def _tokenizer(directory: Path, cfg: ModelConfig, family: families.Family) -> Tokenizer | None:
    if not any((directory / name).is_file() for name in _TOKENIZERS):
        return None
    tokenizer = tokenizers.load(directory)
    if tokenizer.vocab_size > cfg.vocab_size:
        names = {rule.paths[0]: rule.name for rule in family.table}
        raise InputError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size:,} entries, but tensor {names['embed/tokens']} has "
            f"rows for {cfg.vocab_size:,}; take the tokenizer that belongs to the weights."
        )
    return tokenizer
