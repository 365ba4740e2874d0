"""What the tokenizer tests share: the lesson's corpus, a small trained BPE, the published files if there are any."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxlm import tokenizers
from jaxlm.tokenizers import BytePairTokenizer, NamedTokenizer

# Written for these tests. Repeats itself, so that merges form; has accents and an emoji, so that bytes matter.
PROSE = (
    "The gardener's well-known café opened at 12:30; it wasn't full. “Two coffees, please,” said the gardener.\n"
    "The price (1,000 crowns!) was well known, and the gardener's friend said: the café is the best café. 🚀\n"
) * 8


@pytest.fixture(scope="session")
def lesson_corpus() -> list[str]:
    """The three sentences of the source notebook on tokenization."""
    return [
        "The quick brown fox jumps over the lazy dog",
        "Tokenization converts text to numbers",
        "Large language models predict the next token",
    ]


@pytest.fixture(scope="session")
def prose() -> str:
    return PROSE


@pytest.fixture(scope="session")
def trained() -> BytePairTokenizer:
    return tokenizers.bpe(PROSE, 330)


@pytest.fixture(scope="session")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with the published files; downloads resolve there, into a cache of their own."""
    needed = ["vocab.bpe", "encoder.json", "cl100k_base.tiktoken", "tinyshakespeare.txt"]
    for name in filter(None, os.environ.get("JAXLM_MIRROR", "").split(os.pathsep)):
        if all(any(Path(name).rglob(file)) for file in needed):
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("JAXLM_MIRROR", name)
                patch.setenv("JAXLM_CACHE", str(tmp_path_factory.mktemp("cache")))
                yield Path(name)
            return
    pytest.skip(f"needs JAXLM_MIRROR to name a directory that holds {', '.join(needed)}")


@pytest.fixture(scope="session")
def gpt2(mirror: Path) -> NamedTokenizer:
    return tokenizers.named("gpt2")


@pytest.fixture(scope="session")
def cl100k(mirror: Path) -> NamedTokenizer:
    return tokenizers.named("cl100k_base")
