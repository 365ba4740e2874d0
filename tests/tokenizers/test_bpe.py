from __future__ import annotations

import pickle

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from jaxlm import tokenizers
from jaxlm.errors import InputError
from jaxlm.tokenizers import BytePairTokenizer
from jaxlm.tokenizers.bpe import from_printable, to_printable, train

# The pattern as the GPT-2 release has it (encoder.py), to compare ours with.
RELEASED = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

ANY_TEXT = st.text()  # no surrogates; NUL, emoji, combining marks and unassigned code points included
# What merges and the pattern turn on: letters of the corpus, digits, apostrophes, and white space of every sort.
TRICKY = st.text(st.sampled_from("theacfgrdn's'TLl 0 1,.!é🚀\u0301\n\r\t\u00a0\u2003\u0085\x00"))


@given(ANY_TEXT | TRICKY)
def test_round_trip_is_identity(trained: BytePairTokenizer, text: str) -> None:
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert trained.token_bytes(ids) == text.encode()
    assert all(0 <= i < trained.vocab_size - 1 for i in ids)


@pytest.mark.parametrize("text", ["", "\x00", "\x00\x00 \x00", "👩‍👩‍👧‍👦🇨🇭", "e\u0301 é", "\ufeff\uffff", "\U0010ffff"])
def test_round_trip_of_odd_texts(trained: BytePairTokenizer, text: str) -> None:
    assert trained.decode(trained.encode(text)) == text


@pytest.fixture(scope="module")
def reference(prose: str) -> Tokenizer:
    """The same merges in tokenizers' own hands; 330 less the end of text."""
    return train([prose], 329)


@settings(max_examples=200)
@given(text=st.text(st.characters(exclude_categories=["Cs", "Co", "Cn"])) | TRICKY)
def test_tokenizers_itself_gives_the_same_ids(reference: Tokenizer, trained: BytePairTokenizer, text: str) -> None:
    assert trained.encode(text) == reference.encode(text).ids


def test_tokenizers_gives_the_same_ids_on_the_corpus(
    reference: Tokenizer, prose: str, trained: BytePairTokenizer
) -> None:
    ids = trained.encode(prose)
    assert ids == reference.encode(prose).ids
    assert len(ids) < len(prose.encode()) / 2  # merges are in use


@given(ANY_TEXT | TRICKY)
def test_words_are_cut_as_in_the_released_pattern(trained: BytePairTokenizer, text: str) -> None:
    assert trained.encode(text) == _released(trained).encode_ordinary(text)


def _released(tok: BytePairTokenizer) -> tiktoken.Encoding:
    ranks = {from_printable(token): i for i, token in enumerate(tok.tokens)}
    return tiktoken.Encoding("released", pat_str=RELEASED, mergeable_ranks=ranks, special_tokens={})


@pytest.mark.parametrize("after", ["", "x", ",", "\u00a0x"])
@pytest.mark.parametrize("length", [1, 2, 3, 998, 999, 1000, 1001, 1997, 1998, 1999, 2000])
def test_long_runs_of_white_space_are_cut_as_in_the_released_pattern(length: int, after: str) -> None:
    # The corpus makes every run of up to 4096 spaces a token or two, so that a cut in another place shows.
    tok = tokenizers.bpe(["x" + " " * 2**n for n in range(1, 13)], 300)
    for run in (" " * length, " " * (length - 1) + "\n"):
        assert tok.encode("a" + run + after) == _released(tok).encode_ordinary("a" + run + after)


@pytest.mark.parametrize("unit", [" ", "\n", " \n", "\u2003", "a", "7", "!"])
def test_very_long_runs(trained: BytePairTokenizer, unit: str) -> None:
    text = unit * 1_500_000 + "x"  # the engine's stack holds a million: the released pattern panics on white space
    assert trained.decode(trained.encode(text)) == text


def test_vocabulary() -> None:
    tok = tokenizers.bpe("abababab", 258)
    # 256 bytes, the one merge that there is room for (a, b), end of text.
    assert tok.tokens[256:] == ("ab",)
    assert (tok.vocab_size, tok.eot_id, tok.pad_id, tok.unk_id) == (258, 257, None, None)
    assert tok.encode("aba") == [256, tok.tokens.index("a")]
    without = tokenizers.bpe("abababab", 257, eot=False)
    assert (without.vocab_size, without.eot_id) == (257, None)
    # A short corpus has no more pairs than this: ab, abab, abababab.
    assert tokenizers.bpe("abababab", 5000).vocab_size == 256 + 3 + 1


def test_training_is_deterministic(prose: str, trained: BytePairTokenizer) -> None:
    assert tokenizers.bpe(iter([prose]), 330) == trained


def test_special_tokens_in_text_are_ordinary(trained: BytePairTokenizer) -> None:
    ids = trained.encode("a<|endoftext|>b")
    assert trained.eot_id not in ids
    assert trained.decode(ids) == "a<|endoftext|>b"
    assert trained.decode([*ids, 329]) == "a<|endoftext|>b<|endoftext|>"


def test_bytes_that_are_not_text(trained: BytePairTokenizer) -> None:
    ids = [trained.tokens.index(to_printable(bytes([byte]))) for byte in (0x61, 0xF0, 0x9F, 0x61)]
    assert trained.token_bytes(ids) == b"a\xf0\x9fa"
    assert trained.decode(ids) == "a\ufffda"


def test_lone_surrogate(trained: BytePairTokenizer) -> None:
    with pytest.raises(InputError, match=r"U\+D83D at offset 2 .*surrogate"):
        trained.encode("ab\ud83d")


@pytest.mark.parametrize("bad", [-1, 330, 2**40])
def test_ids_outside_the_vocabulary(trained: BytePairTokenizer, bad: int) -> None:
    for decode in (trained.decode, trained.token_bytes, lambda ids: list(trained.pieces(ids))):
        with pytest.raises(InputError, match=f"token id {bad} .* 330 entries"):
            decode([5, bad])


def test_bad_arguments() -> None:
    with pytest.raises(InputError, match=r"vocab_size=256: .* at least 257"):
        tokenizers.bpe("abc", 256)
    for empty in ("", [], [""]):
        with pytest.raises(InputError, match="at least one character"):
            tokenizers.bpe(empty, 300)
    with pytest.raises(InputError, match="256 bytes"):
        BytePairTokenizer(("a", "b"))


def test_pickles_small_and_works_again(trained: BytePairTokenizer) -> None:
    trained.encode("the café")
    data = pickle.dumps(trained)
    copy = pickle.loads(data)
    assert copy == trained
    assert copy.encode("the café") == trained.encode("the café")
    assert len(data) < 10_000  # tokens once, not the encoding as well
    assert len(repr(trained)) < 100
