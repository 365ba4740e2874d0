"""The tokenizer inside a GGUF, from metadata as its converter writes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from jaxlm.errors import InputError
from jaxlm.tokenizers import HFTokenizer
from jaxlm.tokenizers.gguf_vocab import from_gguf


def metadata(backend: Backend, name: str, **more: Any) -> dict[str, Any]:
    content = json.loads(backend.to_str())
    vocab = {**content["model"]["vocab"], **{token["content"]: token["id"] for token in content["added_tokens"]}}
    added = {token["id"] for token in content["added_tokens"]}
    ids = sorted(vocab.values())
    values = {
        "model": "gpt2",
        "pre": name,
        "tokens": [*sorted(vocab, key=vocab.__getitem__), "[PAD]"],
        "token_type": [3 if i in added else 1 for i in ids] + [5],
        "merges": [" ".join(merge) for merge in content["model"]["merges"]],
        "bos_token_id": backend.token_to_id("<|start|>"),
        "eos_token_id": backend.token_to_id("<|end|>"),
        **more,
    }
    return {"general.architecture": "llama"} | {f"tokenizer.ggml.{name}": value for name, value in values.items()}


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_the_tokenizer_in_a_gguf(make_backend: Callable[[str], Backend], hard: list[str], pre: str) -> None:
    backend = make_backend(pre.replace("gpt-2", "gpt2"))
    found = metadata(backend, pre, eot_token_id=5)
    tok = from_gguf({**found, "tokenizer.chat_template": "T"}, "x.gguf")
    assert tok is not None
    for text in hard:
        if "<|" not in text:
            assert tok.encode(text) == backend.encode(text, add_special_tokens=False).ids
    assert tok.encode("<|end|>") == HFTokenizer(backend.to_str()).encode("<|end|>")
    assert tok.backend.encode("a<|end|>").ids[-1] == tok.eot_id == backend.token_to_id("<|end|>")
    assert (tok.stop_ids, tok.chat_template, tok.template_from) == ((tok.eot_id, 5), "T", "x.gguf")
    assert tok.vocab_size == backend.get_vocab_size()  # without the padding
    assert tok.start_ids == ((tok.bos_id,) if pre == "llama-bpe" else ())  # what llama.cpp does when the file is silent
    assert from_gguf({"general.architecture": "llama"}, "x.gguf") is None


def test_sentencepiece_in_a_gguf() -> None:
    # By hand, as llama.cpp merges: of all neighbours, those whose union has the highest score. "▁the": th (-1) before
    # he (-2), then the (-3), then ▁the (-4); "hex" has he; "é" is no piece, so its two bytes.
    pieces = ["<unk>", "<s>", "</s>", "<0xC3>", "<0xA9>", "th", "he", "the", "▁the", "▁", "t", "h", "e", "x"]
    kinds = [2, 3, 3, 6, 6] + [1] * 9
    scores = [0.0] * 5 + [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0, -8.0, -9.0]
    found = {
        "general.architecture": "llama", "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": kinds, "tokenizer.ggml.scores": scores, "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
    }  # fmt: skip
    tok = from_gguf(found, "x.gguf")
    assert tok is not None
    assert tok.encode("the hex é") == [8, 9, 6, 13, 9, 3, 4]
    assert tok.decode([8, 9, 6, 13, 9, 3, 4]) == "the hex é"
    assert (tok.start_ids, tok.eot_id, tok.unk_id) == ((1,), 2, 0)
    plain = from_gguf({**found, "tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}, "x")
    assert plain is not None
    assert (plain.encode("the"), plain.start_ids) == ([7], ())


def by_scores(text: str, scores: dict[str, float]) -> list[str]:
    """The pieces of a text as llama.cpp's SPM tokenizer finds them: of all neighbours whose union is a piece, those of
    the highest score merge first, the left ones of equals; what is no piece in the end is its bytes."""
    parts = list(f" {text}".replace(" ", "▁")) if text else []
    while True:
        unions = [(scores[a + b], -i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in scores]
        if not unions:
            return [
                p for part in parts for p in ([part] if part in scores else [f"<0x{b:02X}>" for b in part.encode()])
            ]
        at = -max(unions)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@pytest.fixture(scope="module")
def spm(sentencepiece: Backend) -> tuple[HFTokenizer, Backend, dict[str, float]]:
    """The GGUF vocabulary of a tokenizer that the library trained, its pieces scored in the order of their merges."""
    vocab = sorted(sentencepiece.get_vocab().items(), key=lambda item: item[1])
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3}
    scores = {text: -float(i) for text, i in vocab if text not in kinds and not text.startswith("<0x")}
    found = {
        "general.architecture": "llama", "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [text for text, _ in vocab],
        "tokenizer.ggml.token_type": [kinds.get(text, 1 if text in scores else 6) for text, _ in vocab],
        "tokenizer.ggml.scores": [scores.get(text, 0.0) for text, _ in vocab],
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
    }  # fmt: skip
    tok = from_gguf(found, "x.gguf")
    assert tok is not None
    return tok, sentencepiece, scores


def spm_agrees(spm: tuple[HFTokenizer, Backend, dict[str, float]], text: str) -> None:
    tok, backend, scores = spm
    ids = tok.encode(text)
    assert ids == backend.encode(text, add_special_tokens=False).ids
    assert ids == [backend.token_to_id(piece) for piece in by_scores(text, scores)]
    assert tok.decode(ids) == backend.decode(ids)


def test_a_sentencepiece_vocabulary_is_the_librarys(
    spm: tuple[HFTokenizer, Backend, dict[str, float]], hard: list[str], prose: str
) -> None:
    for text in [*hard, prose, prose.upper(), "▁▁a▁"]:
        spm_agrees(spm, text)
    assert spm[0].start_ids == (1,)
    assert max(map(len, by_scores(prose, spm[2]))) > 4  # pieces of several characters are found at all


@settings(max_examples=80, deadline=None)
@given(text=st.one_of(st.text(max_size=40), st.text(alphabet="the gardn'scafé.▁", max_size=60)))
def test_any_text_by_a_sentencepiece_vocabulary(spm: tuple[HFTokenizer, Backend, dict[str, float]], text: str) -> None:
    spm_agrees(spm, text)


def test_the_known_ends_of_a_turn_are_stop_ids(make_backend: Callable[[str], Backend]) -> None:
    """An old file of Llama 3 names its end of text alone; a spelling that is no control token ends nothing."""
    found = metadata(make_backend("llama-bpe"), "llama-bpe")
    tokens, types = found["tokenizer.ggml.tokens"][:-1], found["tokenizer.ggml.token_type"][:-1]
    more = {"tokenizer.ggml.tokens": [*tokens, "<|eot_id|>", "<|im_end|>"], "tokenizer.ggml.token_type": [*types, 3, 4]}
    tok, n = from_gguf(found | more, "x.gguf"), len(tokens)
    assert tok is not None
    assert tok.stop_ids == (found["tokenizer.ggml.eos_token_id"], tokens.index("<|end|>"), n)[::2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "bert"}, "field tokenizer.ggml.model: 'bert' is not known here"),
        ({"pre": "tekken"}, "field tokenizer.ggml.pre: 'tekken' is not known here"),
        ({"pre": None}, "field tokenizer.ggml.pre: None"),
        ({"merges": None}, "field tokenizer.ggml.merges: missing"),
        ({"tokens": []}, "field tokenizer.ggml.tokens: missing"),
        ({"token_type": [1]}, "field tokenizer.ggml.token_type: 1 values for"),
        ({"token_type": 1}, "field tokenizer.ggml.token_type: missing"),
        ({"pre": ["gpt-2"]}, r"field tokenizer.ggml.pre: \['gpt-2'\] is not known"),
        ({"tokens": [1, 2]}, "field tokenizer.ggml.tokens: expected a list of str, found 1 in it"),
        ({"merges": [5]}, "field tokenizer.ggml.merges: expected a list of str, found 5 in it"),
        ({"model": "llama", "scores": [0.5]}, "field tokenizer.ggml.scores: 1 values for 344 tokens"),
        ({"model": "llama", "scores": ["a"]}, "field tokenizer.ggml.scores: expected a list of float"),
        ({"bos_token_id": "0"}, "field tokenizer.ggml.bos_token_id: '0' is not among"),
        ({"bos_token_id": [0]}, r"field tokenizer.ggml.bos_token_id: \[0\] is not among"),
        ({"bos_token_id": 0.5}, "field tokenizer.ggml.bos_token_id: 0.5 is not among"),
        ({"eot_token_id": "5"}, "field tokenizer.ggml.eot_token_id: '5' is not among"),
        ({"eot_token_id": 10_000}, "field tokenizer.ggml.eot_token_id: 10000 is not among"),
        ({"eos_token_id": 10_000}, "field tokenizer.ggml.eos_token_id: 10000 is not among"),
        ({"merges": ["no such"]}, "tokenizer: definition: "),
    ],
)
def test_a_gguf_tokenizer_that_is_not_understood(
    make_backend: Callable[[str], Backend], change: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words) as caught:
        from_gguf(metadata(make_backend("gpt2"), "gpt-2", **change), "x.gguf")
    assert str(caught.value).startswith("x.gguf: ")
