"""Our own tokenizers as a Hugging Face `tokenizer.json`, which gives the same ids and the same text. Loads no jax.

What that format cannot say exactly is refused, with the reason. Its regular expressions are Oniguruma's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from jaxlm.errors import InputError
from jaxlm.tokenizers.base import EOT, PAD, UNK, Tokenizer
from jaxlm.tokenizers.bos import starting
from jaxlm.tokenizers.bpe import GPT2_PATTERN, BytePairTokenizer
from jaxlm.tokenizers.char import CharTokenizer
from jaxlm.tokenizers.hf_json import HFTokenizer, canonical
from jaxlm.tokenizers.named import PUBLISHED
from jaxlm.tokenizers.word import CLOSING, OPENING, WordTokenizer

# What Python takes for white space, which is more than Oniguruma does (U+001C to U+001F).
_SPACE = r"\t-\r\x{1c}-\x{20}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}"
_LETTER = r"[\p{L}\p{N}_]"  # Python's \w; Oniguruma's has accents on their own too
_WORDS = {
    "whitespace": rf"[^{_SPACE}]+",
    "punctuation": rf"{_LETTER}+(?:(?:['’\-]|(?<=\p{{Nd}})[.,:](?=\p{{Nd}})){_LETTER}+)*"
    rf"|[^\p{{L}}\p{{N}}_{_SPACE}]|\n",
}
# Our patterns of byte-level BPE as Oniguruma has them: there `{1,3}+` is not possessive and `$` ends any line. None:
# the library's own, which is GPT-2's.
_ONIGURUMA = {
    GPT2_PATTERN: None,
    PUBLISHED["cl100k_base"].pattern: r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++\z|\s*[\r\n]|\s+(?!\S)|\s",
}


def to_hf(tokenizer: Tokenizer) -> HFTokenizer:
    """The tokenizer as the `tokenizers` library has it; texts start with `<|endoftext|>`, as in training.

    Raises:
        InputError: the format cannot say exactly what this tokenizer does; says why.
    """
    if isinstance(tokenizer, HFTokenizer):
        return tokenizer
    if isinstance(tokenizer, BytePairTokenizer):
        specials, parts = dict(tokenizer.specials), _bpe(tokenizer)
    elif isinstance(tokenizer, CharTokenizer | WordTokenizer):
        ids = ((PAD, tokenizer.pad_id), (UNK, tokenizer.unk_id), (EOT, tokenizer.eot_id))
        specials = {text: i for text, i in ids if i is not None}
        parts = _char(tokenizer, specials) if isinstance(tokenizer, CharTokenizer) else _word(tokenizer, specials)
    else:
        raise _refusal(f"nothing is known of the kind {tokenizer.kind}")
    roles = {"bos_token": EOT, "eos_token": EOT, "pad_token": PAD, "unk_token": UNK}
    return HFTokenizer(
        canonical(
            {
                "version": "1.0",
                "added_tokens": [_added(text, i) for text, i in sorted(specials.items(), key=lambda item: item[1])],
                "normalizer": None,
                "post_processor": starting(EOT, specials[EOT]) if EOT in specials else None,
                **parts,
            }
        ),
        special_tokens=tuple((role, text) for role, text in roles.items() if text in specials),
        add_bos=EOT in specials,
    )


def _refusal(reason: str) -> InputError:
    return InputError(f"tokenizer: a tokenizer.json cannot express it: {reason}.")


def _added(text: str, token_id: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": text, **flags, "special": True}


def _split(pattern: str, behavior: str, *, invert: bool) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}


def _bpe(tokenizer: BytePairTokenizer) -> dict[str, Any]:
    if tokenizer.pattern not in _ONIGURUMA:
        raise _refusal(f"its pattern {tokenizer.pattern[:40]!r} is neither GPT-2's nor that of cl100k_base")
    pattern = _ONIGURUMA[tokenizer.pattern]
    words = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pattern is None}
    cut = [] if pattern is None else [_split(pattern, "Isolated", invert=False)]
    return {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*cut, words]},
        "decoder": {**words, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            # The special tokens too: an id that is in no vocabulary would be given out anew. No merge makes them.
            "vocab": {text: i for i, text in enumerate(tokenizer.tokens)} | dict(tokenizer.specials),
            "merges": [f"{left} {right}" for left, right in merges(tokenizer.tokens)],
        },
    }  # fmt: skip


def merges(tokens: Sequence[str]) -> list[tuple[str, str]]:
    """The two tokens that each longer token is made of: what its characters become by the merges before its own.

    There is only one such pair. Wherever the token is about to be made, its span has been merged apart from what stands
    around it, so by the same merges in the same order.

    Args:
        tokens: in the order of their ranks; those of one character are made of nothing.

    Raises:
        InputError: the merges before it leave a token in more than two parts, so that no list of merges makes it.
    """
    ranks = {text: i for i, text in enumerate(tokens)}
    found = []
    for rank, token in enumerate(tokens):
        parts = list(token)
        while len(parts) > 2:
            best, at = min((ranks.get(a + b, rank), i) for i, (a, b) in enumerate(pairwise(parts)))
            if best >= rank:
                raise _refusal(f"no two tokens before it make the token {token!r}")
            parts[at : at + 2] = [tokens[best]]
        if len(parts) == 2:
            found.append((parts[0], parts[1]))
    return found


def _word_level(tokens: Iterable[str], specials: Mapping[str, int], *, first: int) -> dict[str, Any]:
    # Not the last id, which the library gives to the one added token left: so its spelling is a word like any other.
    vocab = {text: i for text, i in specials.items() if text != EOT}
    vocab |= {text: i for i, text in enumerate(tokens, start=first)}
    # Without [UNK] what is unknown is an error there too: the empty text is no token.
    return {"type": "WordLevel", "vocab": vocab, "unk_token": UNK if UNK in specials else ""}


def _char(tokenizer: CharTokenizer, specials: Mapping[str, int]) -> dict[str, Any]:
    if any(0xD800 <= ord(character) < 0xE000 for character in tokenizer.alphabet):
        raise _refusal("its alphabet holds half of a surrogate pair, which has no UTF-8 form")
    return {
        "pre_tokenizer": _split(r"[\s\S]", "Isolated", invert=False),
        "decoder": {"type": "Fuse"},
        "model": _word_level(tokenizer.alphabet, specials, first=tokenizer.pad + tokenizer.unk),
    }


def _word(tokenizer: WordTokenizer, specials: Mapping[str, int]) -> dict[str, Any]:
    for word in tokenizer.words:
        if word in specials:
            raise _refusal(f"its word {word!r} is spelled like a special token")
        if tokenizer.find(word) != [word]:
            raise _refusal(f"its word {word!r} is not one that it finds in text")
        if tokenizer.lower and set("σς").intersection(word):
            raise _refusal(f"its word {word!r} has a sigma, whose small form depends on its place in a word")
    steps: list[dict[str, Any]] = [{"type": "Lowercase"}] if tokenizer.lower else []
    if tokenizer.split == "whitespace" and not tokenizer.lower:
        # As text, [PAD] is a word that is unknown.
        alone = rf"(?<![^{_SPACE}])\[PAD\](?![^{_SPACE}])"
        steps.append({"type": "Replace", "pattern": {"Regex": alone}, "content": UNK if tokenizer.unk else "[PAD]\0"})
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps} if steps else None,
        "pre_tokenizer": _split(_WORDS[tokenizer.split], "Removed", invert=True),
        "decoder": None if tokenizer.split == "whitespace" else _spacing(),
        "model": _word_level(tokenizer.words, specials, first=1 + tokenizer.unk),
    }


def _spacing() -> dict[str, Any]:
    """`WordTokenizer`'s way to write marks, as replacements in the joined text, where spaces stand only between tokens.

    A tab, which no token has, stands for a straight quote that closes: the second of a pair on its line.
    """
    opening, closing = (re.escape("".join(sorted(marks))) for marks in (OPENING, CLOSING))

    def replaced(pattern: dict[str, str], content: str) -> dict[str, Any]:
        return {"type": "Replace", "pattern": pattern, "content": content}

    return {
        "type": "Sequence",
        "decoders": [
            {"type": "WordPiece", "prefix": " ", "cleanup": False},  # a space before each but the first
            {"type": "Fuse"},
            replaced({"Regex": r'"[^"\n]*\K"'}, "\t"),
            replaced({"Regex": rf'(?<=[{opening}"\n]) | (?=[{closing}\t\n])'}, ""),
            replaced({"String": "\t"}, '"'),
        ],
    }
