"""Prompts with responses: the formats, the border between the two sides, and what is wrong with a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlm import tokenizers
from jaxlm.data.sft_examples import Example, encode_example, encode_examples, load_examples, pack_examples
from jaxlm.errors import InputError
from jaxlm.tokenizers import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizers.char("abcdefghijklmnopqrstuvwxyz ?:\n", eot=True)


def _lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def _assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def test_the_formats_may_be_mixed(tmp_path: Path) -> None:
    path = _lines(
        tmp_path / "a.jsonl",
        {"prompt": "Where?", "response": "Here.", "id": 7},
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Name a bird.", "input": "", "output": "Owl."},
        {"instruction": "Name a fish.", "output": "Carp."},
        {"messages": [_user("Hi"), _assistant("Hello")]},
    )
    assert load_examples(path) == [
        Example("Where?", "Here."),
        Example("Task: Add.\nText: 1 and 2\nAnswer:", "3"),
        Example("Task: Name a bird.\nAnswer:", "Owl."),
        Example("Task: Name a fish.\nAnswer:", "Carp."),
        Example("Hi", "Hello"),
    ]


def test_an_array_in_a_json_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"prompt": "a", "response": "b"}] * 3, indent=4))
    assert load_examples(path) == [Example("a", "b")] * 3


def test_each_assistant_turn_is_an_example(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    turns = [_user("Hi"), _assistant("Hello"), _user("Who?"), _assistant("Me")]
    with_system, without = (
        load_examples(_lines(tmp_path / "a.jsonl", {"messages": [system, *turns]})),
        load_examples(_lines(tmp_path / "b.jsonl", {"messages": turns})),
    )
    assert without == [
        Example("Hi", "Hello"),
        Example("User: Hi\nAssistant: Hello\nUser: Who?\nAssistant:", "Me"),
    ]
    assert with_system == [Example(f"Be brief.\n{prompt}", response) for prompt, response in without]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"prompt": "a"}, "expected the fields prompt and response, .* found an object with 'prompt'"),
        ({}, "found an object with no fields"),
        ("text", "found a string"),
        ({"prompt": "a", "response": ""}, "field 'response' is empty"),
        ({"prompt": " ", "response": "b"}, "field 'prompt' is empty"),
        ({"prompt": "a", "response": 3}, "field 'response' must be a string, found a number"),
        ({"prompt": "a\0", "response": "b"}, "field 'prompt' holds a NUL"),
        ({"instruction": "a", "output": ""}, "field 'output' is empty"),
        ({"instruction": "a", "input": 3, "output": "b"}, "field 'input' must be a string"),
        ({"messages": []}, "field 'messages' must be a list"),
        ({"messages": "hello"}, "found a string"),
        ({"messages": ["hello"]}, "message 1: expected an object with 'role' and 'content', found a string"),
        ({"messages": [{"role": "user"}]}, "found an object with 'role'"),
        ({"messages": [_user("a")]}, "no assistant turn"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "message 1: unknown role 'robot'"),
        ({"messages": [_user("a"), _assistant("")]}, "message 2: field 'content' is empty"),
        ({"messages": [_assistant("a")]}, "message 1: expected the user's turn, found assistant"),
        (
            {"messages": [_user("a"), _user("b"), _assistant("c")]},
            "message 2: expected the assistant's turn, found user",
        ),
        ({"messages": [_user("a"), _assistant("b"), _assistant("c")]}, "message 3: expected the user's turn"),
        ({"messages": [_user("a"), {"role": "system", "content": "s"}, _assistant("b")]}, "message 2: .* found system"),
        ({"messages": [_user("a"), _assistant("b"), _user("c")]}, "ends with the user's turn"),
    ],
)
def test_a_bad_record_is_named(tmp_path: Path, record: Any, said: str) -> None:
    good = {"prompt": "a", "response": "b"}
    with pytest.raises(InputError, match=said) as caught:
        load_examples(_lines(tmp_path / "a.jsonl", good, record, good))
    assert f"{tmp_path / 'a.jsonl'}:2: " in str(caught.value)
    path = tmp_path / "a.json"
    path.write_text(json.dumps([good, record]))
    with pytest.raises(InputError, match=said) as caught:
        load_examples(path)
    assert f"{path}: record 2: " in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"prompt": "a", "response": "b"}\n{"prompt": ', r"a\.jsonl:2: not a JSON value"),
        ("a.jsonl", "\n\n", "the file is empty"),
        ("a.json", "[]", "there are no examples"),
        ("a.json", '{"prompt": "a", "response": "b"}', "expected an array of examples at the top, found an object"),
        ("a.json", "[{]", r"a\.json: not a JSON file \(.*line 1 column 3"),
        ("a.json", "", "the file is empty"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: str, said: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(InputError, match=said):
        load_examples(path)


def test_bytes_that_are_not_text(tmp_path: Path) -> None:
    for name in ("a.json", "a.jsonl"):
        path = tmp_path / name
        path.write_bytes(b'[{"prompt": "caf\xe9"}]')
        with pytest.raises(InputError, match=r"byte 16 \(0xe9\) is not UTF-8"):
            load_examples(path)


def test_the_loss_counts_the_response_and_its_end(tokenizer: Tokenizer) -> None:
    ids, mask = encode_example(tokenizer, "who?", "me", "q: {prompt} a: ", max_len=64)
    eot = tokenizer.eot_id
    assert ids.tolist() == [eot, *tokenizer.encode("q: who? a: "), *tokenizer.encode("me"), eot]
    assert mask.tolist() == [0] * 12 + [1, 1, 1]
    assert (ids.dtype, mask.dtype) == (np.int32, np.uint8)


def test_the_two_sides_are_tokenized_apart() -> None:
    # A BPE that knows "ab" as one token would join the border of "a" and "b", and no mask could then cut it.
    bpe = tokenizers.bpe(["ab " * 100, "abab"], 270)
    assert len(bpe.encode("ab")) == 1
    ids, mask = encode_example(bpe, "a", "b", "{prompt}", max_len=8)
    assert ids.tolist() == [bpe.eot_id, *bpe.encode("a"), *bpe.encode("b"), bpe.eot_id]
    assert mask.tolist() == [0, 0, 1, 1]


def test_a_long_response_is_cut_and_a_long_prompt_refused(tokenizer: Tokenizer) -> None:
    # max_len counts pairs: 8 of them need 9 tokens, EOT + 4 + the first 4 of the response.
    ids, mask = encode_example(tokenizer, "abcd", "efghij", "{prompt}", max_len=8)
    assert tokenizer.decode(ids[1:]) == "abcdefgh"
    assert mask.tolist() == [0] * 5 + [1] * 4
    ids, mask = encode_example(tokenizer, "abcdefg", "xy", "{prompt}", max_len=8)
    assert mask.sum() == 1
    for prompt in ("abcdefgh", "abcdefghi"):
        with pytest.raises(InputError, match=f"has {len(prompt)} tokens, at most 7 leave room"):
            encode_example(tokenizer, prompt, "x", "{prompt}", max_len=8)


def test_long_prompts_are_dropped_and_counted(tokenizer: Tokenizer) -> None:
    examples = [Example("a", "b"), Example("x" * 8, "y"), Example("ab", "z" * 20), Example("c", "d")]
    sequences, masks, stats = encode_examples(tokenizer, examples, "{prompt}", 8)
    assert [tokenizer.decode(ids[1:2]) for ids in sequences] == ["a", "a", "c"]
    assert stats == (3, 1, 1, 2 + 6 + 2)
    assert stats.n_targets == sum(int(mask.sum()) for mask in masks)
    with pytest.raises(InputError, match="none of the 2 examples has a prompt below 8 tokens"):
        encode_examples(tokenizer, [examples[1]] * 2, "{prompt}", 8)


class _Stub:
    """Answers with the ids it was given, as a tokenizer with habits of its own might."""

    def __init__(self, eot_id: int | None, **ids: list[int]) -> None:
        self.eot_id, self._ids = eot_id, ids

    def encode(self, text: str) -> list[int]:
        return self._ids[text]


@pytest.mark.parametrize(
    ("stub", "said"),
    [
        (_Stub(None, p=[1], r=[2]), "needs a tokenizer with an end-of-text token"),
        (_Stub(0, p=[0, 1], r=[2]), "the prompt 'p' holds an end-of-text token"),  # a second start of text
        (_Stub(0, p=[1], r=[2, 0]), "the response 'r' holds an end-of-text token"),
        (_Stub(0, p=[], r=[2]), "the prompt 'p' has no tokens"),
        (_Stub(0, p=[1], r=[]), "the response 'r' has no tokens"),  # nothing but the end would count
    ],
)
def test_tokens_that_cannot_be_trained_on(stub: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        encode_example(stub, "p", "r", "{prompt}", 8)


def test_packed_examples_keep_their_masks(tokenizer: Tokenizer) -> None:
    examples = [Example("who", "me"), Example("where", "at home"), Example("when", "now")]
    sequences, masks, stats = encode_examples(tokenizer, examples, "{prompt}: ", 32)
    packed = pack_examples(sequences, masks, seq_len=32)
    assert packed.loss_mask.sum() == stats.n_targets == sum(len(response) + 1 for _, response in examples)
    # What counts, segment by segment, are the responses, each with its end.
    learned = [
        tokenizer.decode(row[(segments == number) & (mask == 1)][:-1])
        for row, segments, mask in zip(packed.targets, packed.segment_ids, packed.loss_mask, strict=True)
        for number in range(1, segments.max() + 1)
    ]
    assert sorted(learned) == sorted(response for _, response in examples)


def test_padding_never_counts_even_where_its_id_is_the_end_of_text() -> None:
    # Padding slots hold id 0 and so does this end-of-text: the two are told apart by segment and mask alone.
    packed = pack_examples([np.array([0, 5, 6, 0])], [np.array([0, 0, 1, 1])], seq_len=6)
    assert packed.tokens.tolist() == [[0, 5, 6, 0, 0, 0]]
    assert packed.loss_mask.tolist() == [[0, 1, 1, 0, 0, 0]]
    assert packed.segment_ids.tolist() == [[1, 1, 1, 0, 0, 0]]


def test_packing_refuses_what_cannot_be_learned() -> None:
    with pytest.raises(InputError, match="example 2 has no target that counts"):
        pack_examples([[0, 1, 0]] * 2, [[0, 1, 1], [1, 0, 0]], seq_len=8)
    with pytest.raises(InputError, match="example 1 has 10 tokens, at most 9 fit"):
        pack_examples([[0] * 10], [[1] * 10], seq_len=8)
