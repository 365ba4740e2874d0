"""Shards of a tokenization encoded beforehand, by other processes. Loads no jax.

They lie in `encoded/` in the tokenize stage's directory until the stage has joined them. What they hold follows from
the stage's identity alone, so a shard that is there is right, whoever made it and however many there are.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxlm import tokenizers
from jaxlm.config import TokenizerConfig
from jaxlm.stages import place
from jaxlm.stages.download import read_split, vocabulary_texts
from jaxlm.stages.store import read_manifest, read_spec
from jaxlm.tokenizers import Tokenizer, UnknownTextError

FOLDER = "encoded"
SPLITS = ("train", "val")


def build_tokenizer(directory: str | Path) -> str:
    """Makes the stage's tokenizer, unless it is there. Returns its fingerprint."""
    folder = Path(directory) / FOLDER
    tokenizer = saved_tokenizer(Path(directory))
    if tokenizer is None:
        spec = read_spec(Path(directory))
        texts = vocabulary_texts(read_manifest(spec.input_directory("download")))
        tokenizer = tokenizers.build(spec.section("tokenizer", TokenizerConfig), texts, eot=bool(spec.settings["eot"]))
        part = folder / f"tokenizer.{os.getpid()}.tmp"
        part.mkdir(parents=True, exist_ok=True)
        tokenizer.save(part)
        try:
            os.rename(part, folder / "tokenizer")
        except OSError:  # another process was first, with the same
            shutil.rmtree(part)
    return tokenizer.fingerprint


def encode_shard(directory: str | Path, shard: int, shards: int) -> int:
    """Encodes the documents of each split that belong to `shard`. Returns how many tokens they have.

    Raises:
        InputError: a document holds what the tokenizer cannot express; names the file and the line.
    """
    home = Path(directory)
    tokenizer = saved_tokenizer(home)
    assert tokenizer is not None  # build_tokenizer comes first
    spec = read_spec(home)
    download = read_manifest(spec.input_directory("download"))
    texts = {split: read_split(download, split) for split in SPLITS}
    total = 0
    for split, documents in texts.items():
        start, end = bounds(len(documents), shard, shards)
        file = home / FOLDER / _name(split, start, end)
        if not file.exists():
            try:
                ids = encode(tokenizer, documents[start:end])
            except UnknownTextError as error:
                error.document += start
                raise place.unknown_text(spec, download, texts, split, error) from None
            part = file.with_suffix(f".{os.getpid()}.tmp")
            with open(part, "wb") as out:
                np.savez(out, ids=np.concatenate([np.zeros(0, np.int32), *ids]), lengths=np.array([*map(len, ids)]))
            os.replace(part, file)
        total += int(np.load(file)["lengths"].sum())
    return total


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """The ids of each text, int32.

    Raises:
        UnknownTextError: a text holds what the tokenizer cannot express; its `document` says which.
    """
    out: list[np.ndarray] = []
    for text in texts:
        try:
            out.append(np.asarray(tokenizer.encode(text), np.int32))
        except UnknownTextError as error:
            error.document = len(out)
            raise
    return out


def saved_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer made beforehand, or None."""
    folder = directory / FOLDER / "tokenizer"
    return tokenizers.load(folder) if folder.is_dir() else None


def saved_ids(directory: Path, split: str, documents: Sequence[str]) -> dict[int, list[np.ndarray]]:
    """What has been encoded of a split: index of the first document -> ids of it and of those after it."""
    found = {}
    for file in sorted((directory / FOLDER).glob(f"{split}-*.npz")):
        start, end = (int(part) for part in file.stem.split("-")[1:])
        stored = np.load(file)
        if end <= len(documents):
            found[start] = np.split(stored["ids"], np.cumsum(stored["lengths"])[:-1]) if end > start else []
    return found


def remove(directory: Path) -> None:
    """Takes the shards away, once they have been joined."""
    shutil.rmtree(directory / FOLDER, ignore_errors=True)


def bounds(n: int, shard: int, shards: int) -> tuple[int, int]:
    """The documents of a shard, first and past the last."""
    return n * shard // shards, n * (shard + 1) // shards


def _name(split: str, start: int, end: int) -> str:
    return f"{split}-{start}-{end}.npz"
