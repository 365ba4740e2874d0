"""Words as tokens: short sequences and a vocabulary that knows only the words it has seen."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import Any, Literal

from jaxlm.errors import InputError
from jaxlm.tokenizers.base import EOT, PAD, UNK, UnknownTextError, fingerprint_of, outside, write

Split = Literal["whitespace", "punctuation"]

# A word holds on to inner apostrophes and hyphens (don't, well-known), a number to inner marks (1,000 3.5 12:30).
# A line break is a token of its own; every other mark is one token.
_PATTERNS: dict[str, re.Pattern[str]] = {
    "whitespace": re.compile(r"\S+"),
    "punctuation": re.compile(r"\w+(?:(?:['’-]|(?<=\d)[.,:](?=\d))\w+)*|[^\w\s]|\n"),
}
CLOSING = frozenset(".,!?;:…%)]}”’")  # no space before
OPENING = frozenset("([{“‘$£€")  # no space after


@dataclass(frozen=True)
class WordTokenizer:
    """One token per word.

    With `split="whitespace"`, words are what stands between white space, and decode joins them with spaces.

    With `split="punctuation"`, words, single punctuation marks and line breaks are tokens. Decode puts one space
    between them, but none before a mark that closes (.,!?;: and closing brackets), none after one that opens, and none
    around a line break; the straight double quotes of a line open and close by turns. So English with single spaces
    comes back exactly, and text spaced otherwise comes back single-spaced, as the same tokens.

    A word outside the vocabulary becomes `[UNK]` where there is one, and is an `InputError` where there is none.
    `decode` skips `[PAD]` and writes `[UNK]` and `<|endoftext|>` out as words.

    Attributes:
        words: distinct words, in the order of their ids; the first comes after `[PAD]` (id 0) and `[UNK]` (id 1).
        split: what counts as a word.
        lower: text is lower-cased first.
        unk: there is an `[UNK]`.
        eot: `<|endoftext|>` is the last id.
    """

    words: tuple[str, ...]
    split: Split = "whitespace"
    lower: bool = True
    unk: bool = True
    eot: bool = False

    kind = "word"
    pad_id = 0

    @cached_property
    def _texts(self) -> list[str]:
        return [PAD] + [UNK] * self.unk + list(self.words) + [EOT] * self.eot

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words, start=1 + self.unk)}

    @property
    def vocab_size(self) -> int:
        return len(self._texts)

    @property
    def unk_id(self) -> int | None:
        return 1 if self.unk else None

    @property
    def eot_id(self) -> int | None:
        return self.vocab_size - 1 if self.eot else None

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint_of({"kind": self.kind, **self._fields()})

    def encode(self, text: str) -> list[int]:
        """The ids of the words of `text`.

        Raises:
            InputError: a word outside the vocabulary, and no `[UNK]`; names the word and its offset.
        """
        found = self.find(text)
        if self.unk:
            return list(map(self._ids.get, found, repeat(self.unk_id)))  # type: ignore[arg-type]
        try:
            return list(map(self._ids.__getitem__, found))
        except KeyError as error:
            word = str(error.args[0])
            matches = _PATTERNS[self.split].finditer(text.lower() if self.lower else text)
            offset = next(match.start() for match in matches if match[0] == word)
            raise UnknownTextError(
                f"word {word!r} at offset {offset} is not among the tokenizer's {len(self.words)} words; "
                "remove it from the text or use a tokenizer with [UNK].",
                offset,
            ) from None

    def find(self, text: str) -> list[str]:
        """The words of `text`, whether the vocabulary has them or not."""
        return _split(text, self.split, self.lower)

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.pieces(ids))

    def pieces(self, ids: Iterable[int]) -> Iterator[str]:
        texts, size = self._texts, self.vocab_size
        joined, quoted = True, False  # joined: the next token takes no space before it; quoted: inside "..."
        for i in ids:
            if not 0 <= i < size:
                raise outside(i, size)
            if i == self.pad_id:
                yield ""
                continue
            text = texts[i]
            if self.split == "whitespace":
                before = after = False
            elif text == "\n":
                before = after = True
                quoted = False
            elif text == '"':
                before, after = quoted, not quoted
                quoted = not quoted
            else:
                before, after = text in CLOSING, text in OPENING
            yield text if joined or before else f" {text}"
            joined = after

    def save(self, directory: str | Path) -> Path:
        return write(directory, self.kind, self._fields(), self.fingerprint)

    def _fields(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def _split(text: str, split: Split, lower: bool) -> list[str]:
    text = text.lower() if lower else text
    return text.split() if split == "whitespace" else _PATTERNS[split].findall(text)


def word(
    corpus: str | Iterable[str],
    *,
    split: Split = "whitespace",
    lower: bool | None = None,
    unk: bool = True,
    eot: bool = False,
) -> WordTokenizer:
    """A word tokenizer from a corpus: `[PAD]`, `[UNK]`, then the sorted distinct words, then `<|endoftext|>`.

    Args:
        corpus: a text or several.
        split: "whitespace", or "punctuation" (marks are tokens of their own; see `WordTokenizer`).
        lower: lower-case the text; by default with split="whitespace" only.
        unk: words outside the vocabulary are encoded as `[UNK]`; False: they are an error.
        eot: give `<|endoftext|>` the last id.

    Raises:
        InputError: the corpus has no words, or `split` is unknown.

    >>> word(["The quick brown fox", "jumps over the lazy dog"]).encode("The brown unicorn jumps")
    [9, 2, 1, 5]
    """
    if split not in _PATTERNS:
        raise InputError(f"split={split!r}: unknown way to find words; use one of {', '.join(_PATTERNS)}.")
    lower = split == "whitespace" if lower is None else lower
    found: set[str] = set()
    for text in [corpus] if isinstance(corpus, str) else corpus:
        found.update(_split(text, split, lower))
    if not found:
        raise InputError("a word tokenizer needs a corpus with at least one word, found none.")
    return WordTokenizer(tuple(sorted(found)), split=split, lower=lower, unk=unk, eot=eot)
