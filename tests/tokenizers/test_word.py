from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm import tokenizers
from jaxlm.errors import InputError


def test_the_lesson(lesson_corpus: list[str]) -> None:
    tok = tokenizers.word(lesson_corpus)
    # The notebook's own output.
    assert tok.vocab_size == 21
    assert tok.encode("The brown unicorn jumps") == [17, 2, 1, 6]
    assert tok.decode([17, 2, 1, 6]) == "the brown [UNK] jumps"
    assert tok.decode([0, 17, 0, 2, 0]) == "the brown"
    assert (tok.pad_id, tok.unk_id, tok.eot_id) == (0, 1, None)


def test_whitespace_words_keep_their_marks() -> None:
    tok = tokenizers.word("Stop, thief!  Stop!")
    assert tok.decode(tok.encode("thief! stop,\nSTOP!")) == "thief! stop, stop!"
    assert tok.vocab_size == 2 + 3
    assert tokenizers.word("Stop stop", lower=False).vocab_size == 2 + 2


@pytest.mark.parametrize(
    "text",
    [
        "Anna put the red ball in the kitchen. Where is it? In the kitchen!",
        "Wait: two things; a cup, and a plate.",
        "It wasn't the gardener's well-known café, was it?",
        "It cost $3.50 at 12:30, or 1,000 crowns (about 5%).",
        'He said, "Stop," and (quietly) left. "Why?" she asked.',
        "“Yes,” he said. [Exit.]\n“No…”\n\nThe end.",
        'An open "quote ends with its line\n"so this one opens."',
        "\nA leading line.",
    ],
)
def test_single_spaced_english_comes_back_exactly(text: str) -> None:
    tok = tokenizers.word(text, split="punctuation", unk=False)
    assert tok.decode(tok.encode(text)) == text


def test_what_counts_as_a_token() -> None:
    text = "Don't stop: 3.5 well-known (old) cats."
    tok = tokenizers.word(text, split="punctuation")
    expected = ["Don't", "stop", ":", "3.5", "well-known", "(", "old", ")", "cats", "."]
    assert [tok.decode([i]) for i in tok.encode(text)] == expected
    assert tok.encode("don't") == [1]  # case is kept, so this is another word


SENTENCES = st.lists(
    st.lists(st.from_regex(r"[A-Za-z]{1,6}([-'][a-z]{1,3})?", fullmatch=True), min_size=1, max_size=6).flatmap(
        lambda words: st.sampled_from(".,!?;:").map(lambda mark: " ".join(words) + mark)
    ),
    min_size=1,
    max_size=5,
).map(" ".join)


@given(SENTENCES)
def test_sentences_come_back_exactly(text: str) -> None:
    tok = tokenizers.word(text, split="punctuation", unk=False)
    assert tok.decode(tok.encode(text)) == text


@given(st.text(st.sampled_from("ab 5.,:'’‘\"“”()$-\n\t_é\u0301"), min_size=1).filter(str.strip))
def test_other_spacing_comes_back_as_the_same_tokens(text: str) -> None:
    tok = tokenizers.word(text, split="punctuation", unk=False)
    ids = tok.encode(text)
    assert tok.encode(tok.decode(ids)) == ids


def test_special_tokens_are_ids_and_not_spellings() -> None:
    tok = tokenizers.word("a [PAD] b [UNK] <|endoftext|>", split="whitespace", lower=False, eot=True)
    ids = tok.encode("[PAD] [UNK] <|endoftext|> a")
    assert not {tok.pad_id, tok.unk_id, tok.eot_id}.intersection(ids)
    assert tok.decode(ids) == "[PAD] [UNK] <|endoftext|> a"
    assert tok.eot_id == tok.vocab_size - 1 == 2 + 5
    assert tok.decode([2, 7]).endswith(" <|endoftext|>")


def test_an_unknown_word_is_named_with_its_place() -> None:
    tok = tokenizers.word("a cat sat.", split="punctuation", unk=False)
    assert tok.unk_id is None
    with pytest.raises(InputError, match=r"word 'catalogue' at offset 6 .* 4 words"):
        tok.encode("a cat catalogue sat.")


@pytest.mark.parametrize("bad", [-1, 4])
def test_ids_outside_the_vocabulary(bad: int) -> None:
    with pytest.raises(InputError, match=f"token id {bad} .* 4 entries"):
        tokenizers.word("two words").decode([bad])


@pytest.mark.parametrize("corpus", ["", " \n\t", [], [" "]])
def test_no_words(corpus: str | list[str]) -> None:
    with pytest.raises(InputError, match="at least one word"):
        tokenizers.word(corpus)


def test_unknown_split() -> None:
    with pytest.raises(InputError, match=r"split='letters'.*whitespace, punctuation"):
        tokenizers.word("a", split="letters")  # type: ignore[arg-type]


def test_fast_enough_for_millions_of_words() -> None:
    text = "Anna put the red ball in the kitchen, and then she left. " * 40_000  # 560,000 tokens
    tok = tokenizers.word(text[:57], split="punctuation")
    start = time.process_time()
    assert len(tok.encode(text)) == 40_000 * 14
    assert time.process_time() - start < 2.0  # 0.3 s on a slow laptop core: 5 million words in three seconds
