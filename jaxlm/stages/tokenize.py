"""Stage 2: a tokenizer, and the splits as shards of token ids. Loads no jax.

Results: `indexes` (what `jaxlm.data.RowSet` opens, for `train` and `val`), `vocab_size`, `fingerprint`, `tokens` by
split. The tokenizer's file lies beside the shards.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
from rich.progress import Progress

from jaxlm import tokenizers
from jaxlm._memory import cores
from jaxlm.config import DataConfig, TokenizerConfig
from jaxlm.data import pack_documents, write_rows, write_stream
from jaxlm.errors import InputError
from jaxlm.stages import pieces, place, process
from jaxlm.stages.download import read_split, vocabulary_texts
from jaxlm.stages.spec import Manifest, Spec
from jaxlm.tokenizers import Tokenizer, UnknownTextError

PARALLEL_FROM = 20_000_000  # characters; below, starting workers costs more than it saves
_PIECE = 1_000_000  # characters handed to a worker at a time


def run(spec: Spec, inputs: Mapping[str, Manifest]) -> dict[str, Any]:
    """Builds the tokenizer on the training split and encodes both splits."""
    data, settings = spec.section("data", DataConfig), spec.settings
    cfg = spec.section("tokenizer", TokenizerConfig)
    texts = {name: read_split(inputs["download"], name) for name in ("train", "val")}
    tokenizer = pieces.saved_tokenizer(spec.directory)
    if tokenizer is None:
        tokenizer = tokenizers.build(cfg, vocabulary_texts(inputs["download"]), eot=bool(settings["eot"]))
    tokenizer.save(spec.directory)

    common: dict[str, Any] = {"vocab_size": tokenizer.vocab_size, "tokenizer_fingerprint": tokenizer.fingerprint}
    indexes, tokens = {}, {}
    for name, documents in texts.items():
        done = pieces.saved_ids(spec.directory, name, documents)
        try:
            ids = encode_all(tokenizer, documents, label=name, done=done)
        except UnknownTextError as error:
            raise place.unknown_text(spec, inputs["download"], texts, name, error) from None
        tokens[name] = sum(map(len, ids))
        if data.pack == "documents":
            if tokenizer.eot_id is None:
                raise InputError(
                    f"tokenizer.name={cfg.name}: it has no end-of-text token, which data.pack=documents needs."
                )
            packed = pack_documents(ids, eot_id=tokenizer.eot_id, seq_len=data.seq_len)
            indexes[name] = write_rows(spec.directory, packed, name=name, **common)
        else:
            stream = _joined(ids, tokenizer.eot_id)
            indexes[name] = write_stream(spec.directory, stream, name=name, seq_len=data.seq_len, **common)
    pieces.remove(spec.directory)
    return {
        "indexes": indexes,
        "tokens": tokens,
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": tokenizer.fingerprint,
    }


def encode_all(
    tokenizer: Tokenizer,
    documents: Sequence[str],
    *,
    label: str,
    done: Mapping[int, Sequence[np.ndarray]] | None = None,
) -> list[np.ndarray]:
    """The ids of each document, int32; in parallel over the cores where there is enough text.

    Args:
        tokenizer: encodes.
        documents: the texts.
        label: for the progress bar.
        done: index of a document -> the ids of it and of those after it, encoded beforehand (`jaxlm.stages.pieces`).

    Raises:
        UnknownTextError: a document holds what the tokenizer cannot express; says which.
    """
    out: list[np.ndarray | None] = [None] * len(documents)
    for start, encoded in (done or {}).items():
        out[start : start + len(encoded)] = list(encoded)
    missing = [index for index, ids in enumerate(out) if ids is None]
    texts_left = [documents[index] for index in missing]
    total = sum(map(len, texts_left))
    count = 0
    with Progress(disable=not sys.stdout.isatty(), transient=True) as bar:
        task = bar.add_task(f"tokenize {label}", total=total)
        try:
            for texts, batch in _encoded_batches(tokenizer, texts_left, total):
                for ids in batch:
                    out[missing[count]] = ids
                    count += 1
                bar.advance(task, sum(map(len, texts)))
        except UnknownTextError as error:
            error.document = missing[count + error.document]
            raise
    return [ids for ids in out if ids is not None]


def _encoded_batches(
    tokenizer: Tokenizer, documents: Sequence[str], total: int
) -> Iterator[tuple[list[str], list[np.ndarray]]]:
    batches = list(_batches(documents))
    if total < PARALLEL_FROM or len(batches) == 1:
        for batch in batches:
            yield batch, pieces.encode(tokenizer, batch)
        return
    workers = cores()
    with ProcessPoolExecutor(workers, mp_context=process.Helpers()) as pool:
        yield from zip(batches, pool.map(pieces.encode, [tokenizer] * len(batches), batches), strict=True)


def _batches(documents: Sequence[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= _PIECE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _joined(documents: Sequence[np.ndarray], eot_id: int | None) -> np.ndarray:
    """One stream; where the tokenizer has an end-of-text token, it closes every document but a lone one."""
    if eot_id is None or len(documents) == 1:
        return np.concatenate(documents)
    return np.concatenate([part for ids in documents for part in (ids, np.array([eot_id], np.int32))])


if __name__ == "__main__":
    process.main(run)
