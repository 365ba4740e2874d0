"""Stage 1: the text of the training and validation splits, as files. Loads no jax.

Results: `splits`, for each of `train` and `val` its `file`, `documents`, `characters` and `bytes`; for the built-in
corpus also `log_prob`, nats over all of the split's stories, which is the floor of any model's loss on it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from jaxlm._memory import cores
from jaxlm.config import DataConfig
from jaxlm.data import Resource, fetch, read_documents, source, split_documents, split_text, storyworld
from jaxlm.errors import InputError
from jaxlm.stages import process
from jaxlm.stages.spec import Manifest, Spec

_CHUNK = 5000  # stories per unit of work


def run(spec: Spec, inputs: Mapping[str, Manifest]) -> dict[str, Any]:
    """Writes `train` and `val` as .txt (one document) or .jsonl (a document a line)."""
    data = spec.section("data", DataConfig)
    if data.source == "storyworld":
        seed = int(spec.settings["seed"])
        return {
            "splits": {
                "train": _stories(spec.directory, data.world, seed, "train", data.n_stories),
                "val": _stories(spec.directory, data.world, seed, "val", data.n_val_stories),
            },
            "words": storyworld.vocabulary(storyworld.WORLDS[data.world]),
        }
    documents = read_documents(_file(data))
    if len(documents) == 1:
        train, val = split_text(documents[0], data.val_fraction)
        return {"splits": {"train": _text(spec.directory, "train", train), "val": _text(spec.directory, "val", val)}}
    parts = split_documents(documents, data.val_fraction)
    return {
        "splits": {
            name: _lines(spec.directory, name, ({"text": text} for text in texts), texts)
            for name, texts in zip(("train", "val"), parts, strict=True)
        }
    }


def read_split(manifest: Manifest, name: str) -> list[str]:
    """The documents of a split of a finished download stage."""
    return read_documents(manifest.path(manifest.results["splits"][name]["file"]))


def vocabulary_texts(manifest: Manifest) -> Iterator[str]:
    """What a tokenizer is to be built on: the training split, and of a story world the words of its questions too.

    No question is trained on before fine-tuning. To a word tokenizer that never saw them, "Who", "belong" and "How"
    would all be `[UNK]`, and most questions alike.
    """
    yield from read_split(manifest, "train")
    yield from manifest.results.get("words", [])


def _file(data: DataConfig) -> Path:
    if data.source != "file":
        known = source(data.source)
        if known.kind != "text":
            raise InputError(f"data.source={data.source}: this is {known.kind}, not text to train on.")
        return fetch(known.resource)
    if data.path is not None:
        return Path(data.path)
    assert data.url is not None  # DataConfig checks that one of path and url is given, and url with size and digest
    assert data.size is not None
    assert data.sha256 is not None
    name = data.url.partition("?")[0].rpartition("/")[2] or "download.txt"
    return fetch(Resource(name, data.url, data.size, data.sha256))


def _stories(directory: Path, world: str, seed: int, split: str, n: int) -> dict[str, Any]:
    chunks = [(world, seed, split, start, min(_CHUNK, n - start)) for start in range(0, n, _CHUNK)]
    workers = min(cores(), len(chunks))
    if workers > 1:
        with ProcessPoolExecutor(workers, mp_context=process.Helpers()) as pool:
            parts = list(pool.map(_chunk_of_stories, chunks))
    else:
        parts = [_chunk_of_stories(chunk) for chunk in chunks]
    stories = [story for part in parts for story in part]
    records = ({"text": text, "log_prob": log_prob} for text, log_prob in stories)
    summary = _lines(directory, split, records, [text for text, _ in stories])
    return summary | {"log_prob": sum(log_prob for _, log_prob in stories)}


def _chunk_of_stories(chunk: tuple[str, int, str, int, int]) -> list[tuple[str, float]]:
    world, seed, split, start, n = chunk
    made = storyworld.stories(storyworld.WORLDS[world], seed, split, n, start=start)
    return [(story.text, story.log_prob) for story in made]


def _text(directory: Path, name: str, text: str) -> dict[str, Any]:
    encoded = text.encode()
    (directory / f"{name}.txt").write_bytes(encoded)
    return {"file": f"{name}.txt", "documents": 1, "characters": len(text), "bytes": len(encoded)}


def _lines(directory: Path, name: str, records: Iterable[dict[str, Any]], texts: Sequence[str]) -> dict[str, Any]:
    with open(directory / f"{name}.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return {
        "file": f"{name}.jsonl",
        "documents": len(texts),
        "characters": sum(map(len, texts)),
        "bytes": sum(len(text.encode()) for text in texts),
    }


if __name__ == "__main__":
    process.main(run)
