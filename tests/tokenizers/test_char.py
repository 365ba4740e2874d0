from __future__ import annotations

import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm import tokenizers
from jaxlm.errors import InputError


@pytest.mark.parametrize("letters", [string.ascii_letters, list(string.ascii_letters)])
def test_the_lessons_alphabet(letters: str | list[str]) -> None:
    tok = tokenizers.char(letters, pad=True, unk=True)
    # The notebook's output. Two special tokens, then a-z from 2 and A-Z from 28: H = 28 + 7, e = 2 + 4, l = 2 + 11.
    assert tok.encode("Hello") == [35, 6, 13, 13, 16]
    assert tok.vocab_size == 54
    assert (tok.pad_id, tok.unk_id, tok.eot_id) == (0, 1, None)
    assert tok.decode([0, 35, 6, 13, 13, 16, 0]) == "Hello"
    assert tok.encode("é!") == [1, 1]
    assert tok.decode([35, 1]) == "H[UNK]"


def test_shakespeare_has_65_characters() -> None:
    # The characters that nanoGPT's prepare.py prints for it; sorted, so the line break is 0 and z is 64.
    tok = tokenizers.char("\n !$&',-.3:;?" + string.ascii_letters + "twice")
    assert tok.vocab_size == 65
    assert tok.encode("\n z") == [0, 1, 64]


def test_shakespeare_itself(mirror: Path) -> None:
    text = next(mirror.rglob("tinyshakespeare.txt")).read_text(encoding="utf-8")
    tok = tokenizers.char(text)
    assert tok.vocab_size == 65
    assert tok.decode(tok.encode(text)) == text


def test_a_text_is_sorted_and_an_alphabet_is_not() -> None:
    assert tokenizers.char("hello").encode("ehlo") == [0, 1, 2, 3]
    assert tokenizers.char("olhe").encode("olhe") == [0, 1, 2, 3]
    assert tokenizers.char(["low", "lower"]).encode("elorw") == [0, 1, 2, 3, 4]


@given(st.text(min_size=1), st.booleans(), st.booleans(), st.booleans())
def test_round_trip_on_the_training_text(text: str, pad: bool, unk: bool, eot: bool) -> None:
    tok = tokenizers.char([text, text], pad=pad, unk=unk, eot=eot)
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert len(ids) == len(text)
    assert not {tok.pad_id, tok.unk_id, tok.eot_id}.intersection(ids)
    assert tok.vocab_size == len(set(text)) + pad + unk + eot


def test_special_tokens_come_first_and_last() -> None:
    tok = tokenizers.char("ab", pad=True, unk=True, eot=True)
    assert (tok.pad_id, tok.unk_id, tok.encode("ab"), tok.eot_id, tok.vocab_size) == (0, 1, [2, 3], 4, 5)
    assert tok.decode([2, 4]) == "a<|endoftext|>"
    unk_only = tokenizers.char("ab", unk=True)
    assert (unk_only.pad_id, unk_only.unk_id, unk_only.encode("b?")) == (None, 0, [2, 0])


def test_an_unknown_character_is_named_with_its_place() -> None:
    with pytest.raises(InputError, match=r"'é' \(U\+00E9\) at offset 3 .* 3 characters"):
        tokenizers.char("acf").encode("café")


@pytest.mark.parametrize("bad", [-1, 3, 10**12])
def test_ids_outside_the_vocabulary(bad: int) -> None:
    with pytest.raises(InputError, match=f"token id {bad} .* 3 entries"):
        tokenizers.char("abc").decode([0, bad])


def test_no_characters() -> None:
    with pytest.raises(InputError, match="at least one character"):
        tokenizers.char("")
