from __future__ import annotations

from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from jaxlm import tokenizers
from jaxlm.tokenizers import BytePairTokenizer, stream_text
from jaxlm.tokenizers.bpe import to_printable


@given(st.data())
def test_streamed_is_decoded(trained: BytePairTokenizer, data: st.DataObject) -> None:
    word = tokenizers.word('Say “hi”, "you" (all)!\nYes.', split="punctuation", eot=True)
    char = tokenizers.char("añ🚀", pad=True, unk=True, eot=True)
    for tok in (trained, word, char):
        ids = data.draw(st.lists(st.integers(0, tok.vocab_size - 1)))
        parts = list(stream_text(tok, ids))
        assert "".join(parts) == tok.decode(ids)
        assert all(parts)


def test_a_character_comes_whole_and_at_once(trained: BytePairTokenizer) -> None:
    ids = [trained.tokens.index(to_printable(bytes([byte]))) for byte in "aé🚀b".encode()]
    taken = 0

    def arriving() -> Iterator[int]:
        nonlocal taken
        for i in ids:
            taken += 1
            yield i

    # One byte, two bytes, four bytes, one byte: each is shown when its last byte has come, and not later.
    assert [(piece, taken) for piece in stream_text(trained, arriving())] == [("a", 1), ("é", 3), ("🚀", 7), ("b", 8)]


def test_what_is_left_incomplete_is_shown_at_the_end(trained: BytePairTokenizer) -> None:
    ids = [trained.tokens.index(to_printable(bytes([byte]))) for byte in "a🚀".encode()[:-1]]
    assert list(stream_text(trained, ids)) == ["a", "\ufffd"]


def test_nothing_gives_nothing(trained: BytePairTokenizer) -> None:
    assert list(stream_text(trained, [])) == []
