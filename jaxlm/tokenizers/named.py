"""The published encodings `gpt2` and `cl100k_base`, from their published files."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jaxlm.errors import InputError
from jaxlm.tokenizers.base import EOT, write
from jaxlm.tokenizers.bpe import BLANKS, GPT2_PATTERN, TO_PRINTABLE, BytePairTokenizer, to_printable

if TYPE_CHECKING:
    from jaxlm.data.download import Resource


class Published(NamedTuple):
    """How an encoding's tokens are published, and what the file does not say."""

    source: str  # the file, by its name in jaxlm.data.sources
    read: Callable[[str], tuple[str, ...]]
    pattern: str
    specials: tuple[tuple[str, int], ...]

    @property
    def resource(self) -> Resource:
        """Address, size and digest of the file."""
        from jaxlm.data.sources import source

        return source(self.source).resource


def _merge_list(text: str) -> tuple[str, ...]:
    """Tokens from `vocab.bpe`: the bytes, the visible ones first, then what each line's two tokens merge into."""
    return (*TO_PRINTABLE.values(), *(line.replace(" ", "") for line in text.split("\n")[1:-1]))


def _rank_list(text: str) -> tuple[str, ...]:
    """Tokens from a `.tiktoken` file: lines of a token's bytes in base64 and its rank, from 0 on."""
    return tuple(to_printable(base64.b64decode(line.split()[0])) for line in text.splitlines())


# Patterns and special tokens as tiktoken has them. GPT-2's other file, encoder.json, says the same as its merges.
PUBLISHED: dict[str, Published] = {
    "gpt2": Published(
        source="gpt2/vocab.bpe",
        read=_merge_list,
        pattern=GPT2_PATTERN,
        specials=((EOT, 50256),),
    ),
    "cl100k_base": Published(
        source="cl100k_base",
        read=_rank_list,
        pattern=r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r"|\s++$|\s*[\r\n]|" + BLANKS,
        specials=(
            (EOT, 100257),
            ("<|fim_prefix|>", 100258),
            ("<|fim_middle|>", 100259),
            ("<|fim_suffix|>", 100260),
            ("<|endofprompt|>", 100276),
        ),
    ),
}


@dataclass(frozen=True, repr=False)
class NamedTokenizer(BytePairTokenizer):
    """A published encoding. Saved as its name and the digest of its file, not as its tokens."""

    name: str = ""

    kind = "named"

    def save(self, directory: str | Path) -> Path:
        fields = {"name": self.name, "sha256": PUBLISHED[self.name].resource.sha256}
        return write(directory, self.kind, fields, self.fingerprint)


def named(name: str) -> NamedTokenizer:
    """A published encoding, its file found in the local cache, the mirrors in `JAXLM_MIRROR` or the network.

    Args:
        name: "gpt2" (50,257 ids) or "cl100k_base" (100,277).

    Raises:
        InputError: the name is unknown, or the file found has another digest.
        UnavailableError: the file is in no cache and no mirror, and the network is away.
    """
    if name not in PUBLISHED:
        raise InputError(f"{name}: no published encoding of that name is known; use one of {', '.join(PUBLISHED)}.")
    from jaxlm.data.download import fetch

    published = PUBLISHED[name]
    tokens = published.read(fetch(published.resource).read_text(encoding="utf-8"))
    return NamedTokenizer(tokens, pattern=published.pattern, specials=published.specials, name=name)
