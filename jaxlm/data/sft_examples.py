"""Prompts with responses: read from the formats in use, turned into tokens whose loss counts the response only."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxlm.data.packing import PackedRows, pack_sequences
from jaxlm.data.text import checked_text, json_lines, kind_of, read_text
from jaxlm.errors import InputError

if TYPE_CHECKING:
    from jaxlm.tokenizers.base import Tokenizer


class Example(NamedTuple):
    """One prompt with the response to learn."""

    prompt: str
    response: str


class _NoRoomError(InputError):
    """The prompt alone fills a row."""


class EncodeStats(NamedTuple):
    """What became of the examples."""

    n_examples: int  # encoded, truncated ones included
    n_dropped: int  # the prompt left no room for a response
    n_truncated: int  # the response was cut off at the length
    n_targets: int  # tokens that the loss counts


def load_examples(path: str | Path) -> list[Example]:
    """Reads a `.jsonl` file (an object a line) or a `.json` file (an array of objects). An object is one of:

    - `{"prompt", "response"}`;
    - `{"instruction", "output"}`, with or without `"input"`: an instruction, the text it is about, and the answer;
    - `{"messages": [{"role", "content"}, ..]}`: a conversation of user and assistant in turn, which may begin with a
      system message. Each assistant turn becomes one example, whose prompt is everything said before it.

    Args:
        path: the file, UTF-8.

    Returns:
        The examples in the file's order, neither side of any of them empty.

    Raises:
        InputError: names the file, the line or record, and the field.
        DiskError: the file cannot be read.
    """
    path = Path(path)
    examples = [example for place, record in _records(path) for example in _examples(place, record)]
    if not examples:
        raise InputError(f"{path}: there are no examples in this file.")
    return examples


def encode_example(
    tokenizer: Tokenizer, prompt: str, response: str, template: str, max_len: int
) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """EOT + prompt + response + EOT as tokens. The two sides are tokenized apart, so that their border is exact and
    the prompt has the tokens that it has when a model is asked.

    Args:
        tokenizer: must have an end-of-text token.
        prompt: what is asked.
        response: what to learn.
        template: text in which `{prompt}` is replaced by the prompt; the response follows it.
        max_len: T; at most this many pairs of input and target, so T + 1 tokens. A longer response is cut off there,
            and then has no end-of-text.

    Returns:
        ids int32[n] and loss_mask uint8[n], 1 on the tokens of the response and on the closing end-of-text.

    Raises:
        InputError: the tokenizer has no end-of-text, either side has no tokens or holds an end-of-text token itself,
            or the prompt has `max_len` tokens or more, so that no target of the response is left.
    """
    eot = tokenizer.eot_id
    if eot is None:
        raise InputError("fine-tuning needs a tokenizer with an end-of-text token; this one has none.")
    asked = encode_prompt(tokenizer, prompt, template)
    answer = tokenizer.encode(response)
    for side, what, text in ((asked, "prompt", prompt), (answer, "response", response)):
        if not side:
            raise InputError(f"the {what} {_shown(text)} has no tokens; remove the example.")
        if eot in side:
            raise InputError(
                f"the {what} {_shown(text)} holds an end-of-text token, which is added around each example; remove it."
            )
    if len(asked) >= max_len:
        raise _NoRoomError(
            f"the prompt {_shown(prompt)} has {len(asked)} tokens, at most {max_len - 1} leave room for a response; "
            "shorten it or raise data.seq_len."
        )
    ids = np.array([eot, *asked, *answer, eot], dtype=np.int32)
    mask = np.ones(len(ids), dtype=np.uint8)
    mask[: len(asked) + 1] = 0
    return ids[: max_len + 1], mask[: max_len + 1]


def encode_prompt(tokenizer: Tokenizer, prompt: str, template: str) -> list[int]:
    """The tokens between the opening end-of-text and the response; the same in training and when a model is asked."""
    return tokenizer.encode(template.replace("{prompt}", prompt))


def encode_examples(
    tokenizer: Tokenizer, examples: Iterable[Example], template: str, max_len: int
) -> tuple[list[NDArray[np.int32]], list[NDArray[np.uint8]], EncodeStats]:
    """Encodes many examples; those whose prompt leaves no room for a response are dropped and counted.

    Args:
        tokenizer: must have an end-of-text token.
        examples: what to encode.
        template: text in which `{prompt}` is replaced.
        max_len: T, see `encode_example`.

    Returns:
        Token ids and loss masks of the examples that fit, and the counts.

    Raises:
        InputError: as `encode_example`, with the example's number, but for a long prompt only when none is left.
    """
    sequences, masks, dropped, truncated = [], [], 0, 0
    for number, example in enumerate(examples, start=1):
        try:
            ids, mask = encode_example(tokenizer, example.prompt, example.response, template, max_len)
        except _NoRoomError:
            dropped += 1
            continue
        except InputError as error:
            raise InputError(f"example {number} ({_shown(example.prompt)}): {error}") from None
        truncated += int(ids[-1]) != tokenizer.eot_id
        sequences.append(ids)
        masks.append(mask)
    if not sequences:
        raise InputError(
            f"none of the {dropped} examples has a prompt below {max_len} tokens; raise data.seq_len or shorten them."
        )
    stats = EncodeStats(len(sequences), dropped, truncated, int(sum(mask[1:].sum() for mask in masks)))
    return sequences, masks, stats


def pack_examples(
    sequences: Sequence[NDArray[np.int32]], loss_masks: Sequence[NDArray[np.uint8]], *, seq_len: int
) -> PackedRows:
    """Packs encoded examples into rows; see `jaxlm.data.packing`.

    Args:
        sequences: ids of each example, framed by end-of-text.
        loss_masks: 1 on the tokens that the loss counts.
        seq_len: T; no example may have more than T + 1 tokens.

    Returns:
        The rows.

    Raises:
        InputError: no examples, one that is too long for a row, or one whose every target is masked.
    """
    for number, (ids, mask) in enumerate(zip(sequences, loss_masks, strict=True), start=1):
        if len(ids) > seq_len + 1:
            raise InputError(f"example {number} has {len(ids)} tokens, at most {seq_len + 1} fit a row; cut it.")
        if not np.asarray(mask)[1:].any():
            raise InputError(f"example {number} has no target that counts, everything is masked; remove it.")
    return pack_sequences(sequences, loss_masks, seq_len=seq_len)


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix != ".json":
        yield from json_lines(path)
        return
    try:
        records = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a JSON file ({error}); fix it at that place.") from None
    if not isinstance(records, list):
        raise InputError(f"{path}: expected an array of examples at the top, found {kind_of(records)}.")
    for number, record in enumerate(records, start=1):
        yield f"{path}: record {number}", record


def _examples(place: str, record: Any) -> list[Example]:
    if isinstance(record, dict):
        if "messages" in record:
            return _conversation(place, record["messages"])
        if {"prompt", "response"} <= record.keys():
            return [Example(*(checked_text(record[field], place, field) for field in ("prompt", "response")))]
        if {"instruction", "output"} <= record.keys():
            return [_instruction(place, record)]
    raise InputError(
        f"{place}: expected the fields prompt and response, instruction and output, or messages; "
        f"found {kind_of(record)}."
    )


def _instruction(place: str, record: Mapping[str, Any]) -> Example:
    instruction = checked_text(record["instruction"], place, "instruction")
    about = record.get("input", "")
    if about not in ("", None):
        instruction = f"{instruction}\nText: {checked_text(about, place, 'input')}"
    return Example(f"Task: {instruction}\nAnswer:", checked_text(record["output"], place, "output"))


def _conversation(place: str, messages: Any) -> list[Example]:
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{place}: field 'messages' must be a list of messages, found {kind_of(messages)}.")
    turns = []
    for number, message in enumerate(messages, start=1):
        where = f"{place}: message {number}"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise InputError(f"{where}: expected an object with 'role' and 'content', found {kind_of(message)}.")
        role = message["role"]
        if role not in ("system", "user", "assistant"):
            raise InputError(f"{where}: unknown role {role!r}; use system, user or assistant.")
        turns.append((role, checked_text(message["content"], where, "content")))
    if not any(role == "assistant" for role, _ in turns):
        raise InputError(f"{place}: the conversation has no assistant turn, so there is nothing to learn; remove it.")

    first = 1 if turns[0][0] == "system" else 0
    for number, (role, _) in enumerate(turns[first:]):
        expected = "user" if number % 2 == 0 else "assistant"
        if role != expected:
            raise InputError(
                f"{place}: message {first + number + 1}: expected the {expected}'s turn, found {role}; "
                "user and assistant take turns, after at most one system message."
            )
    if turns[-1][0] != "assistant":
        raise InputError(f"{place}: the conversation ends with the user's turn; its last turn must be the assistant's.")

    preamble = f"{turns[0][1]}\n" if first else ""
    examples = []
    for end in range(first + 1, len(turns), 2):
        said = turns[first:end]
        if len(said) == 1:
            text = said[0][1]  # one question needs no labels
        else:
            text = "\n".join(f"{role.capitalize()}: {content}" for role, content in said) + "\nAssistant:"
        examples.append(Example(preamble + text, turns[end][1]))
    return examples


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}…")
