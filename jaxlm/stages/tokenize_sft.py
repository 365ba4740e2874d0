"""Stage 3: prompt/response pairs as packed rows, with the loss on the response only. Loads no jax.

Results: `indexes` for `train` and `val`, `examples` and `dropped` counts. `test.jsonl` holds the questions that the
evaluation asks, one `{type, prompt, answer, ...}` a line; none of them, nor the story it is about, was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm import tokenizers
from jaxlm._memory import cores
from jaxlm.config import DataConfig, SftConfig
from jaxlm.data import (
    Example,
    encode_examples,
    encode_prompt,
    fetch,
    load_examples,
    pack_examples,
    source,
    storyworld,
    write_rows,
)
from jaxlm.errors import InputError
from jaxlm.stages import process
from jaxlm.stages.runner import say
from jaxlm.stages.spec import Manifest, Spec

N_VAL, N_TEST = 200, 1200  # questions of the built-in corpus beside the training ones
_CHUNK = 400  # questions per unit of work
HELD_OUT = 0.05  # share of a file's examples that goes to each of val and test


def run(spec: Spec, inputs: Mapping[str, Manifest]) -> dict[str, Any]:
    """Makes or reads the pairs, encodes and packs them."""
    data, sft = spec.section("data", DataConfig), spec.section("sft", SftConfig)
    tokenizer = tokenizers.load(inputs["tokenize"].directory)
    if sft.source == "storyworld":
        pairs, test = _story_questions(data.world, int(spec.settings["seed"]), sft.n_examples)
    else:
        pairs, test = _from_file(_path(sft))
    seq_len = sft.seq_len or data.seq_len
    results: dict[str, Any] = {"indexes": {}, "examples": {}, "dropped": {}, "unknown": {}}
    for name, examples in pairs.items():
        with _named(sft, name):
            sequences, masks, stats = encode_examples(tokenizer, examples, sft.template, seq_len)
        if stats.n_dropped:
            say(
                f"{name}: {stats.n_dropped} of {stats.n_examples} examples left out, "
                f"their prompts leave no room in seq_len={seq_len}"
            )
        unknown = sum(int(np.count_nonzero(ids == tokenizer.unk_id)) for ids in sequences)
        if unknown:
            say(
                f"{name}: {unknown} of {sum(map(len, sequences))} tokens are unknown to the tokenizer, and read as one "
                "and the same; build it from a text that has them, or use tokenizer.kind=bpe"
            )
        results["indexes"][name] = write_rows(
            spec.directory,
            pack_examples(sequences, masks, seq_len=seq_len),
            name=name,
            vocab_size=tokenizer.vocab_size,
            tokenizer_fingerprint=tokenizer.fingerprint,
        )
        results["examples"][name], results["dropped"][name] = stats.n_examples, stats.n_dropped
        results["unknown"][name] = unknown
    with _named(sft, "test"):  # now, and not when training is over
        for record in test:
            encode_prompt(tokenizer, record["prompt"], sft.template)
    with open(spec.directory / "test.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in test)
    return results | {"test": len(test)}


@contextmanager
def _named(sft: SftConfig, split: str) -> Iterator[None]:
    """Puts in front of what is wrong with an example where it comes from."""
    try:
        yield
    except InputError as error:
        where = f"source={sft.source}" if sft.path is None else f"path={sft.path}"
        raise InputError(f"sft.{where}, {split} split: {error}") from None


def _story_questions(world: str, seed: int, n: int) -> tuple[dict[str, list[Example]], list[dict[str, Any]]]:
    counts = {"train": n, "val": N_VAL, "test": N_TEST}
    chunks = [
        (world, seed, split, start, min(_CHUNK, count - start))
        for split, count in counts.items()
        for start in range(0, count, _CHUNK)
    ]
    with ProcessPoolExecutor(cores(), mp_context=process.Helpers()) as pool:
        made = list(pool.map(_chunk_of_questions, chunks))
    asked: dict[str, list[storyworld.Question]] = {split: [] for split in counts}
    for (_, _, split, _, _), questions in zip(chunks, made, strict=True):
        asked[split] += questions
    pairs = {split: [Example(q.prompt, q.answer) for q in asked[split]] for split in ("train", "val")}
    return pairs, [question._asdict() for question in asked["test"]]


def _chunk_of_questions(chunk: tuple[str, int, str, int, int]) -> list[storyworld.Question]:
    world, seed, split, start, n = chunk
    return list(storyworld.questions(storyworld.WORLDS[world], seed, split, n, start=start))


def _path(sft: SftConfig) -> Path:
    if sft.path is not None:
        return Path(sft.path)
    known = source(sft.source)
    if known.kind != "examples":
        raise InputError(f"sft.source={sft.source}: this is {known.kind}, not prompt/response pairs.")
    return fetch(known.resource)


def _from_file(path: Path) -> tuple[dict[str, list[Example]], list[dict[str, Any]]]:
    examples = load_examples(path)
    held = max(1, round(HELD_OUT * len(examples)))
    if len(examples) < 3:
        raise InputError(
            f"{path}: found {len(examples)} examples, at least 3 needed for training, validation and test."
        )
    test = [{"type": "all", "prompt": e.prompt, "answer": e.response} for e in examples[-held:]]
    return {"train": examples[: -2 * held], "val": examples[-2 * held : -held]}, test


if __name__ == "__main__":
    process.main(run)
