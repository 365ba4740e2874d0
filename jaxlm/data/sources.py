"""The public files that jaxlm knows by name: address, size, digest and licence, each said once. Loads no jax."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from jaxlm.data.download import Resource
from jaxlm.errors import InputError


@dataclass(frozen=True)
class Source:
    """One public file."""

    resource: Resource
    kind: Literal["text", "examples", "tokenizer"]  # what reads it: data.text, data.sft_examples, tokenizers
    title: str
    licence: str


SOURCES: dict[str, Source] = {
    "shakespeare": Source(
        Resource(
            name="tinyshakespeare.txt",
            url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
            size=1_115_394,
            sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        ),
        kind="text",
        title="Tiny Shakespeare: 65 distinct characters of his plays",
        licence="public domain",
    ),
    "verdict": Source(
        Resource(
            name="the-verdict.txt",
            url="https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch02/01_main-chapter-code/the-verdict.txt",
            size=20_479,
            sha256="b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f",
        ),
        kind="text",
        title="The Verdict, a short story by Edith Wharton, 1908",
        licence="public domain",
    ),
    "instructions": Source(
        Resource(
            name="instruction-data.json",
            url="https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch07/01_main-chapter-code/instruction-data.json",
            size=203_524,
            sha256="7e09a9af353722ca15c18bc580f093f9c39d3178335a75177319cb1e1d163944",
        ),
        kind="examples",
        title="1100 instructions with their answers",
        licence="Apache-2.0",
    ),
    "gpt2/vocab.bpe": Source(
        Resource(
            name="vocab.bpe",
            url="https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe",
            size=456_318,
            sha256="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        ),
        kind="tokenizer",
        title="GPT-2's merges",
        licence="MIT",
    ),
    "gpt2/encoder.json": Source(
        Resource(
            name="encoder.json",
            url="https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json",
            size=1_042_301,
            sha256="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        ),
        kind="tokenizer",
        title="GPT-2's vocabulary",
        licence="MIT",
    ),
    "cl100k_base": Source(
        Resource(
            name="cl100k_base.tiktoken",
            url="https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken",
            size=1_681_126,
            sha256="223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        ),
        kind="tokenizer",
        title="GPT-4's encoding",
        licence="MIT",
    ),
}


def source(name: str) -> Source:
    """The public file of that name.

    Raises:
        InputError: there is none; gives the nearest name.
    """
    if name not in SOURCES:
        close = difflib.get_close_matches(name, SOURCES, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known names: {', '.join(SOURCES)}"
        raise InputError(f"{name}: no public file of this name is known; {hint}")
    return SOURCES[name]
