"""The tokenizer that a configuration asks for."""

from __future__ import annotations

from collections.abc import Iterable

from jaxlm.data_config import TokenizerConfig
from jaxlm.errors import InputError
from jaxlm.tokenizers.base import EOT, Tokenizer
from jaxlm.tokenizers.bpe import bpe
from jaxlm.tokenizers.char import char
from jaxlm.tokenizers.load import load
from jaxlm.tokenizers.word import word


def build(cfg: TokenizerConfig, texts: Iterable[str], *, eot: bool) -> Tokenizer:
    """Makes the tokenizer of a run from its training text.

    Args:
        cfg: which tokenizer.
        texts: the training text, in any number of parts; gone through once, and not at all for kind=named.
        eot: documents are told apart, so the tokenizer needs an `<|endoftext|>`.

    Returns:
        kind=char: the text's characters, sorted. kind=word: words and punctuation marks, case kept; see `WordTokenizer`
        for the text that this gives back exactly. kind=bpe, char: every training text comes back exactly.

    Raises:
        InputError: the text is empty, `vocab_size` too small, or a named tokenizer unknown, damaged or without the
            `<|endoftext|>` that is needed.
    """
    if cfg.kind == "char":
        characters: set[str] = set()
        for text in texts:
            characters.update(text)
        return char("".join(sorted(characters)), unk=cfg.unk, eot=eot)
    if cfg.kind == "word":
        return word(texts, split="punctuation", lower=False, unk=cfg.unk, eot=eot)
    if cfg.kind == "bpe":
        return bpe(texts, cfg.vocab_size, eot=eot)
    tokenizer = load(cfg.name or "")
    if eot and tokenizer.eot_id is None:
        raise InputError(f"tokenizer.name={cfg.name}: has no {EOT} to end documents with; choose another tokenizer.")
    return tokenizer
