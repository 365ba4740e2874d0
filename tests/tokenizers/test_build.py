from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxlm import tokenizers
from jaxlm.config import TokenizerConfig
from jaxlm.errors import InputError
from jaxlm.tokenizers import BytePairTokenizer, CharTokenizer, WordTokenizer

TEXTS = ["Anna took the ball. Was it red?\n", "“Yes,” said Ben; it was red."]


def texts() -> Iterator[str]:
    yield from TEXTS


@pytest.mark.parametrize("eot", [False, True])
@pytest.mark.parametrize("kind", ["char", "word", "bpe"])
def test_training_texts_come_back_and_eot_is_there_when_asked_for(kind: str, eot: bool) -> None:
    cfg = TokenizerConfig(kind="bpe", vocab_size=280) if kind == "bpe" else TokenizerConfig(kind=kind)
    tok = tokenizers.build(cfg, texts(), eot=eot)
    for text in TEXTS:
        assert tok.decode(tok.encode(text)) == text
        assert tok.unk_id not in tok.encode(text)
    assert tok.eot_id == (tok.vocab_size - 1 if eot else None)


def test_what_the_options_mean() -> None:
    char = tokenizers.build(TokenizerConfig(kind="char", unk=False), texts(), eot=False)
    assert char == CharTokenizer("".join(sorted(set("".join(TEXTS)))))
    assert tokenizers.build(TokenizerConfig(kind="char"), ["ba"], eot=False) == CharTokenizer("ab", unk=True)
    word = tokenizers.build(TokenizerConfig(kind="word"), texts(), eot=True)
    assert isinstance(word, WordTokenizer)
    assert (word.split, word.lower, word.unk, word.eot) == ("punctuation", False, True, True)
    assert tokenizers.build(TokenizerConfig(kind="word", unk=False), texts(), eot=True).unk_id is None
    bpe = tokenizers.build(TokenizerConfig(kind="bpe", vocab_size=270), texts(), eot=True)
    assert isinstance(bpe, BytePairTokenizer)
    assert bpe.vocab_size == 270


def test_named_is_loaded_and_the_text_left_alone(tmp_path: Path) -> None:
    def unread() -> Iterator[str]:
        raise AssertionError("read")
        yield ""

    tokenizers.char("ab", eot=True).save(tmp_path)
    cfg = TokenizerConfig(kind="named", name=str(tmp_path))
    assert tokenizers.build(cfg, unread(), eot=True) == CharTokenizer("ab", eot=True)
    tokenizers.char("ab").save(tmp_path)
    assert tokenizers.build(cfg, unread(), eot=False) == CharTokenizer("ab")
    with pytest.raises(InputError, match=r"tokenizer\.name=.* has no <\|endoftext\|>"):
        tokenizers.build(cfg, unread(), eot=True)


@pytest.mark.parametrize("kind", ["char", "word", "bpe"])
def test_empty_text(kind: str) -> None:
    with pytest.raises(InputError, match="found none"):
        tokenizers.build(TokenizerConfig(kind=kind), iter([]), eot=False)
