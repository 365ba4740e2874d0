"""What every tokenizer offers, and the few helpers they share. Loads no jax.

The special tokens are `[PAD]` (id 0 where there is one), `[UNK]` (next) and `<|endoftext|>` (the last id). They are
ids, not spellings: text that happens to contain "<|endoftext|>" is encoded as ordinary text.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxlm.errors import DiskError, InputError

PAD = "[PAD]"
UNK = "[UNK]"
EOT = "<|endoftext|>"

FILE_NAME = "tokenizer.jaxlm.json"
FORMAT = 1


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back. Tokenizers are immutable, hashable and can be pickled."""

    @property
    def kind(self) -> str:
        """What sort of tokenizer this is: char, word, bpe or named."""
        ...

    @property
    def vocab_size(self) -> int:
        """V: every id is in 0 .. V - 1."""
        ...

    @property
    def fingerprint(self) -> str:
        """sha256 (64 hexadecimal digits) of everything that decides ids."""
        ...

    @property
    def pad_id(self) -> int | None:
        """Id of `[PAD]`, which `decode` skips; None: there is none."""
        ...

    @property
    def unk_id(self) -> int | None:
        """Id of `[UNK]`, which stands for what the vocabulary lacks; None: there is none."""
        ...

    @property
    def eot_id(self) -> int | None:
        """Id of `<|endoftext|>`, which ends a document; None: there is none."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of `text`. Adds no special token.

        Raises:
            InputError: the text holds something that the vocabulary cannot express.
        """
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`.

        Raises:
            InputError: an id outside the vocabulary.
        """
        ...

    def pieces(self, ids: Iterable[int]) -> Iterator[str]:
        """Strings that join to `decode(ids)`, each as soon as the id that completes it has come."""
        ...

    def save(self, directory: str | Path) -> Path:
        """Writes `tokenizer.jaxlm.json` into `directory`, atomically; `jaxlm.tokenizers.load` reads it back.

        Returns:
            The file's path.

        Raises:
            DiskError: the file cannot be written.
        """
        ...


class UnknownTextError(InputError):
    """The text holds something that the vocabulary lacks, and there is no `[UNK]`.

    Attributes:
        offset: where, in characters from the start of the text.
        document: which text, for who encodes several.
    """

    def __init__(self, sentence: str, offset: int = 0) -> None:
        super().__init__(sentence)
        self.offset, self.document = offset, 0


def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Text to show while `ids` are still being generated: never an empty string, never a part of a character.

    Args:
        tokenizer: any tokenizer.
        ids: token ids, taken one at a time as they come.

    Yields:
        Non-empty strings that join to `tokenizer.decode(ids)`.
    """
    return (piece for piece in tokenizer.pieces(ids) if piece)


def fingerprint_of(identity: Mapping[str, Any]) -> str:
    """sha256 of JSON values, in a form that does not depend on the order of the keys."""
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def outside(token_id: int, vocab_size: int) -> InputError:
    """The error for an id that `decode` cannot turn into text."""
    return InputError(
        f"token id {token_id} is not in the tokenizer's vocabulary of {vocab_size} entries; "
        "decode ids with the tokenizer that made them."
    )


def write(directory: str | Path, kind: str, fields: Mapping[str, Any], fingerprint: str) -> Path:
    """Puts a tokenizer's file in place by rename, so that a reader sees the old one or the new one, whole."""
    folder = Path(directory)
    target = folder / FILE_NAME
    # Escaped to ASCII: a control character or a combining mark in a vocabulary survives any editor.
    text = json.dumps({"format": FORMAT, "kind": kind, "fingerprint": fingerprint, **fields}, indent=1) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{FILE_NAME}.", suffix=".part")
        try:
            with os.fdopen(handle, "w", encoding="ascii") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner reads
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise DiskError(
            f"{target}: cannot be written ({error.strerror}); free the disk or choose another place."
        ) from None
    return target


def encodable(text: str) -> str:
    """The same text, when it has a UTF-8 form.

    Raises:
        InputError: a lone surrogate, which is no character; names its offset.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"character U+{ord(text[error.start]):04X} at offset {error.start} is half of a surrogate pair and "
            "cannot be encoded as UTF-8; read the text with the right encoding."
        ) from None
    return text
