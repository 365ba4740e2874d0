"""Our tokenizers as tokenizer.json: the `tokenizers` library's ids and text against ours, on hard text."""

from __future__ import annotations

import json
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm import tokenizers
from jaxlm.errors import InputError
from jaxlm.tokenizers import BytePairTokenizer, HFTokenizer, NamedTokenizer, Tokenizer, WordTokenizer, hf_files
from jaxlm.tokenizers.bpe import TO_PRINTABLE
from jaxlm.tokenizers.to_hf import merges, to_hf

MARKS = (
    'She said, "Stop!" and left. “No,” he said; (well) [so] {it} costs $3.50, 5% at 12:30 — it wasn\'t ‘old’…\n'
    '"An open quote\nends" with "its" line. ""Twice"" "" I’d £1 €2 a-b- -c naïve café e\u0301 x² ½ Ⅳ a_b _ 1,000,000.\n'
)


@pytest.fixture(scope="module")
def ours(trained: BytePairTokenizer, prose: str, hard: list[str]) -> dict[str, Tokenizer]:
    alphabet = "".join(sorted(set("".join(hard) + MARKS)))
    texts = [prose, MARKS, *hard]
    return {
        "bpe": trained,
        "bpe without end": tokenizers.bpe(prose, 300, eot=False),
        "char": tokenizers.char(alphabet, pad=True, unk=True, eot=True),
        "char, strict": tokenizers.char(alphabet),
        "word": tokenizers.word(texts, split="punctuation", lower=False, eot=True),
        "word, strict": tokenizers.word(texts, split="punctuation", lower=False, unk=False),
        "word, lower": tokenizers.word(texts, split="punctuation", lower=True, eot=True),
        "whitespace": tokenizers.word([prose, MARKS], eot=True),
        "whitespace, case": tokenizers.word([prose, MARKS], lower=False, unk=False),
    }


NAMES = [
    "bpe", "bpe without end", "char", "char, strict", "word", "word, strict", "word, lower", "whitespace",
    "whitespace, case",
]  # fmt: skip


def ids_or_refusal(tokenizer: Tokenizer, text: str) -> Any:
    try:
        return tokenizer.encode(text)
    except Exception:  # ours an InputError, the library a plain Exception
        return "refused"


def agree(tokenizer: Tokenizer, form: HFTokenizer, text: str) -> None:
    ids = ids_or_refusal(tokenizer, text)
    assert ids_or_refusal(form, text) == ids
    if ids != "refused":
        assert form.decode(ids) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", NAMES)
def test_ids_and_text_are_ours(ours: dict[str, Tokenizer], hard: list[str], prose: str, name: str) -> None:
    tokenizer = ours[name]
    form = to_hf(tokenizer)
    for text in [
        *hard,
        "".join(hard),
        " ".join(hard),
        prose,
        MARKS,
        MARKS.upper(),
        "[PAD] [UNK] <|endoftext|>",
        "[PAD]",
    ]:
        agree(tokenizer, form, text)
    roles = (form.vocab_size, form.eot_id, form.pad_id, form.unk_id)
    assert roles == (tokenizer.vocab_size, tokenizer.eot_id, tokenizer.pad_id, tokenizer.unk_id)
    assert form.bos_id == form.eot_id
    quoted = tokenizer.encode('"its" "its') if "whitespace" not in name else []
    assert "".join(form.pieces(quoted)) == form.decode(quoted)  # how a quote is written depends on all before it
    # As our models are asked: they were trained on documents that begin with the end of the one before.
    assert form.start_ids == (() if tokenizer.eot_id is None else (tokenizer.eot_id,))
    for i in range(tokenizer.vocab_size):
        assert form.decode([i]) == tokenizer.decode([i])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_text_and_any_ids(ours: dict[str, Tokenizer], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(NAMES))
    tokenizer, form = ours[name], to_hf(ours[name])
    agree(tokenizer, form, data.draw(st.one_of(st.text(), st.text(alphabet="ab1,.:'’\"“” \n\t(é-²_"))))
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=20))
    assert form.decode(ids) == tokenizer.decode(ids)
    assert "".join(form.pieces(ids)) == form.decode(ids)


def test_every_character_is_cut_alike() -> None:
    """One word for each character that Unicode 14 has: what Python's \\w, \\d and \\s are is what the pattern says."""
    last = "15.0" if unicodedata.unidata_version >= "15" else ""
    known = [chr(i) for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i)) not in ("Cn", "Cs", "Co")]
    known = [c for c in known if not last or not 0x31350 <= ord(c) <= 0x323AF]
    text = " ".join(f"1{c}1 b{c}" for c in known[:: 1 if len(known) < 400_000 else 2])
    for split in ("punctuation", "whitespace"):
        tokenizer = WordTokenizer(("b",), split=split, lower=False)  # type: ignore[arg-type]
        pre = to_hf(tokenizer).backend.pre_tokenizer
        assert [word for word, _ in pre.pre_tokenize_str(text)] == tokenizer.find(text)


def test_merges_by_hand() -> None:
    base = tuple(TO_PRINTABLE.values())
    # "aab" is "aa" + "b", since "aa" comes first; "abab" is "ab" + "ab".
    assert merges((*base, "aa", "ab", "aab", "abab")) == [("a", "a"), ("a", "b"), ("aa", "b"), ("ab", "ab")]
    with pytest.raises(InputError, match="no two tokens before it make the token 'xyz'"):
        merges((*base, "xyz"))


def test_the_published_encodings(gpt2: NamedTokenizer, hard: list[str], mirror: Path) -> None:
    form = to_hf(gpt2)
    # The merges are those of the published vocab.bpe.
    published = [line for file in mirror.rglob("vocab.bpe") for line in file.read_text(encoding="utf-8").split("\n")]
    assert json.loads(form.definition)["model"]["merges"] == [line for line in published[1:] if line]
    for text in [*hard, MARKS]:
        agree(gpt2, form, text)


@pytest.mark.slow
def test_the_larger_published_encoding(cl100k: NamedTokenizer, hard: list[str]) -> None:
    form = to_hf(cl100k)
    for text in [*hard, MARKS, "".join(hard), "x \n ", "x \n y\n\n", "12345 6\n "]:
        agree(cl100k, form, text)
    assert (form.vocab_size, form.eot_id) == (100_277, 100_257)
    assert form.backend.token_to_id("<|endofprompt|>") == 100_276  # though 100,256 is nobody's


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        (WordTokenizer(("[PAD]", "a")), r"its word '\[PAD\]' is spelled like a special token"),
        (WordTokenizer(("σας",)), "its word 'σας' has a sigma"),
        (WordTokenizer(("two words",)), "its word 'two words' is not one that it finds in text"),
        (WordTokenizer(("A",)), "its word 'A' is not one that it finds"),  # it lower-cases
        (WordTokenizer(("a.",), split="punctuation"), r"its word 'a\.' is not one that it finds"),
        (tokenizers.char("a\ud800"), "half of a surrogate pair"),
        (BytePairTokenizer(tuple(TO_PRINTABLE.values()), pattern=r"\w+|\W"), r"its pattern '\\\\w\+"),
        (BytePairTokenizer((*TO_PRINTABLE.values(), "xyz")), "no two tokens before it make the token 'xyz'"),
    ],
)
def test_what_cannot_be_said_exactly_is_refused(tokenizer: Tokenizer, reason: str) -> None:
    with pytest.raises(InputError, match=f"a tokenizer.json cannot express it: .*{reason}") as caught:
        to_hf(tokenizer)
    assert "\n" not in str(caught.value)


def test_the_files(ours: dict[str, Tokenizer], tmp_path: Path) -> None:
    form = to_hf(ours["word"])
    hf_files.write_directory(form, tmp_path, spelled=False)
    assert hf_files.from_directory(tmp_path) == replace(form, add_bos=None)  # for the definition says it
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["split_special_tokens"] is config["add_bos_token"] is True
    assert to_hf(form) is form
