"""Byte-level byte-pair encoding: learned with `tokenizers`, served by `tiktoken`.

References:
    Sennrich, Haddow and Birch, "Neural Machine Translation of Rare Words with Subword Units", ACL 2016 (the merges).
    Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, section 2.2 (on bytes, not characters).
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.errors import InputError
from jaxlm.tokenizers.base import EOT, encodable, fingerprint_of, outside, write

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

# The published patterns end in `\s+(?!\S)|\s+`: of a run of white space, all but the last character, which goes with
# the next word. Matched so, a run of a million characters overflows the stack of tiktoken's regex engine, which panics.
# The same split in steps of 999 characters does not.
BLANKS = r"(?:\s{999}+(?=\s))*+\s+(?!\S)|(?:\s{999}+(?=\s))++|\s"

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|" + BLANKS
"""How GPT-2 cuts text into words before merging, with possessive quantifiers."""


def _printable_bytes() -> dict[int, str]:
    """GPT-2's way to write a byte as a visible character: itself where it is one, else the next from U+0100 on."""
    visible = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}


TO_PRINTABLE = _printable_bytes()
FROM_PRINTABLE = {character: byte for byte, character in TO_PRINTABLE.items()}


def to_printable(token: bytes) -> str:
    """A token's bytes as visible characters, the way vocabulary files hold them: b" the" is "Ġthe"."""
    return "".join(TO_PRINTABLE[byte] for byte in token)


def from_printable(text: str) -> bytes:
    """The inverse of `to_printable`. A `KeyError` is a character that stands for no byte."""
    return bytes(FROM_PRINTABLE[character] for character in text)


@dataclass(frozen=True, repr=False)
class BytePairTokenizer:
    """Byte-level BPE. Every text has ids and comes back exactly; there is no `[UNK]` and no `[PAD]`.

    Encoding never gives a special id: "<|endoftext|>" in a text is ordinary characters.

    Attributes:
        tokens: the mergeable tokens as visible characters (`to_printable`), in the order of their ids, which is also
            the order of the merges. All 256 bytes are among them.
        pattern: the regular expression that cuts text into words; merges stay inside a word.
        specials: names and ids of the special tokens; the ids follow those of `tokens`, with or without gaps.
    """

    tokens: tuple[str, ...]
    pattern: str = GPT2_PATTERN
    specials: tuple[tuple[str, int], ...] = ()

    kind = "bpe"
    pad_id = None
    unk_id = None

    def __post_init__(self) -> None:
        try:
            distinct = {from_printable(token) for token in self.tokens}
        except KeyError as error:
            raise InputError(f"tokens: {error.args[0]!r} stands for no byte; make the tokenizer again.") from None
        if len(distinct) != len(self.tokens) or any(bytes([byte]) not in distinct for byte in range(256)):
            raise InputError(
                "tokens: expected distinct tokens with all 256 bytes among them; make the tokenizer again."
            )

    @cached_property
    def encoding(self) -> tiktoken.Encoding:
        """The `tiktoken.Encoding` that does the work."""
        import tiktoken

        return tiktoken.Encoding(
            f"jaxlm-{self.kind}",
            pat_str=self.pattern,
            mergeable_ranks={from_printable(token): i for i, token in enumerate(self.tokens)},
            special_tokens=dict(self.specials),
        )

    @property
    def vocab_size(self) -> int:
        return max([len(self.tokens), *(i + 1 for _, i in self.specials)])

    @property
    def eot_id(self) -> int | None:
        return dict(self.specials).get(EOT)

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint_of({"kind": "byte-level bpe", **self._fields()})

    def encode(self, text: str) -> list[int]:
        """The ids of `text`.

        Raises:
            InputError: a lone surrogate, which is no character and has no UTF-8 form; names its offset.
        """
        return self.encoding.encode_ordinary(encodable(text))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.token_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`, which need not be whole characters.

        Raises:
            InputError: an id outside the vocabulary.
        """
        return b"".join(map(self._bytes_of, ids))

    def pieces(self, ids: Iterable[int]) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for i in ids:
            yield decoder.decode(self._bytes_of(i))
        yield decoder.decode(b"", final=True)

    def save(self, directory: str | Path) -> Path:
        return write(directory, self.kind, self._fields(), self.fingerprint)

    def _bytes_of(self, token_id: int) -> bytes:
        try:
            return self.encoding.decode_single_token_bytes(token_id)
        except (KeyError, OverflowError):
            raise outside(token_id, self.vocab_size) from None

    def _fields(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "pattern": self.pattern, "specials": self.specials}

    def __repr__(self) -> str:  # the default would print every token
        return f"{type(self).__name__}(vocab_size={self.vocab_size}, fingerprint={self.fingerprint[:12]!r})"

    def __getstate__(self) -> dict[str, Any]:  # a worker process rebuilds the encoding rather than receive it
        return {name: value for name, value in self.__dict__.items() if name != "encoding"}


def bpe(texts: str | Iterable[str], vocab_size: int, *, eot: bool = True) -> BytePairTokenizer:
    """Learns byte-level BPE merges: the most frequent pair of tokens becomes a token, again and again.

    Args:
        texts: the corpus; no merge is learned across two texts.
        vocab_size: number of ids, the 256 bytes and `<|endoftext|>` among them. A corpus that runs out of pairs gives
            fewer.
        eot: give `<|endoftext|>` the last id.

    Raises:
        InputError: `vocab_size` has no room for the bytes, or there is no text.
    """
    room = vocab_size - eot
    if room < 256:
        raise InputError(f"vocab_size={vocab_size}: byte-level BPE needs at least {256 + eot}, one for every byte.")
    vocabulary = train([texts] if isinstance(texts, str) else texts, room).get_vocab()
    tokens = tuple(sorted(vocabulary, key=vocabulary.__getitem__))
    return BytePairTokenizer(tokens, specials=((EOT, len(tokens)),) if eot else ())


def train(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """The `tokenizers` model that `bpe` takes its ids from: the 256 bytes, then the merges in order.

    A token's id is then its rank, and tiktoken, which merges by the rank of the result, does what the merge list says:
    merging in order leaves each token exactly one way to come about.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    seen = 0

    def counted() -> Iterator[str]:
        nonlocal seen
        for text in texts:
            seen += len(text)
            yield text

    model.train_from_iterator(counted(), trainer)
    if not seen:
        raise InputError("a BPE tokenizer needs a corpus with at least one character, found none.")
    return model
