"""Characters as tokens: the smallest vocabulary and the longest sequences."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import repeat
from pathlib import Path

from jaxlm.errors import InputError
from jaxlm.tokenizers.base import EOT, PAD, UNK, UnknownTextError, fingerprint_of, outside, write


@dataclass(frozen=True)
class CharTokenizer:
    """One token per character (Unicode code point).

    A character outside the alphabet becomes `[UNK]` where there is one, and is an `InputError` where there is none.
    `decode` skips `[PAD]` and writes `[UNK]` and `<|endoftext|>` out.

    Attributes:
        alphabet: distinct characters, in the order of their ids.
        pad: `[PAD]` is the first id.
        unk: `[UNK]` comes before the alphabet.
        eot: `<|endoftext|>` is the last id.
    """

    alphabet: str
    pad: bool = False
    unk: bool = False
    eot: bool = False

    kind = "char"

    @cached_property
    def _texts(self) -> list[str]:
        return [PAD] * self.pad + [UNK] * self.unk + list(self.alphabet) + [EOT] * self.eot

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {character: i for i, character in enumerate(self.alphabet, start=self.pad + self.unk)}

    @property
    def vocab_size(self) -> int:
        return len(self._texts)

    @property
    def pad_id(self) -> int | None:
        return 0 if self.pad else None

    @property
    def unk_id(self) -> int | None:
        return int(self.pad) if self.unk else None

    @property
    def eot_id(self) -> int | None:
        return self.vocab_size - 1 if self.eot else None

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint_of({"kind": self.kind, **self._fields()})

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, one per character.

        Raises:
            InputError: a character outside the alphabet, and no `[UNK]`; names it, its code point and its offset.
        """
        if self.unk:
            return list(map(self._ids.get, text, repeat(self.unk_id)))  # type: ignore[arg-type]
        try:
            return list(map(self._ids.__getitem__, text))
        except KeyError:
            offset, character = next((i, c) for i, c in enumerate(text) if c not in self._ids)
            raise UnknownTextError(
                f"character {character!r} (U+{ord(character):04X}) at offset {offset} is not among the tokenizer's "
                f"{len(self.alphabet)} characters; remove it from the text or use a tokenizer with [UNK].",
                offset,
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.pieces(ids))

    def pieces(self, ids: Iterable[int]) -> Iterator[str]:
        texts, size, pad = self._texts, self.vocab_size, self.pad_id
        for i in ids:
            if not 0 <= i < size:
                raise outside(i, size)
            yield "" if i == pad else texts[i]

    def save(self, directory: str | Path) -> Path:
        return write(directory, self.kind, self._fields(), self.fingerprint)

    def _fields(self) -> dict[str, str | bool]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def char(text: str | Iterable[str], pad: bool = False, unk: bool = False, eot: bool = False) -> CharTokenizer:
    """A character tokenizer from a text or from a fixed alphabet.

    When no character comes twice, they are an alphabet and keep their order; otherwise they are a text, and its
    distinct characters are sorted. A list of strings counts as one string.

    Args:
        text: the text or the alphabet.
        pad: give `[PAD]` the id 0.
        unk: give `[UNK]` the next id; characters outside the alphabet are then encoded as it, else they are an error.
        eot: give `<|endoftext|>` the last id.

    Raises:
        InputError: the text is empty.

    >>> char("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", pad=True, unk=True).encode("Hello")
    [35, 6, 13, 13, 16]
    """
    parts = [text] if isinstance(text, str) else list(text)
    characters: set[str] = set().union(*parts)
    none_twice = sum(map(len, parts)) == len(characters)
    alphabet = "".join(parts if none_twice else sorted(characters))
    if not alphabet:
        raise InputError("a character tokenizer needs a text with at least one character, found none.")
    return CharTokenizer(alphabet, pad=pad, unk=unk, eot=eot)
