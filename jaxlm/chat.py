"""Talking to a model: what `jaxlm chat` and `jaxlm sample` do, for a run of ours, published weights or a GGUF file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import IO, TypeVar

import jax

from jaxlm.data import encode_prompt
from jaxlm.errors import InputError
from jaxlm.loading import Loaded, load_model, start_ids
from jaxlm.sample import Sampling, generate
from jaxlm.sample.requests import Overflow
from jaxlm.sample.stream import stream
from jaxlm.tokenizers import Tokenizer

__all__ = ["HELP", "Loaded", "Messages", "answer", "chat", "chat_ids", "fitted", "load_model", "sample", "start_ids"]

Messages = list[dict[str, str]]
_Text = TypeVar("_Text", str, str | None)

HELP = "/reset forgets the conversation, /exit (or end of input) leaves, Ctrl-C stops an answer."


def sample(
    model: Loaded,
    prompt: str,
    *,
    n: int = 1,
    max_new_tokens: int = 100,
    sampling: Sampling | None = None,
    overflow: Overflow = "refuse",
    seed: int = 0,
    out: IO[str] | None = None,
) -> None:
    """Continues a prompt, and writes the prompt and what follows; one text is written while it comes.

    Args:
        model: from `load_model`.
        prompt: the text to continue.
        n: how many continuations.
        max_new_tokens: longest continuation.
        sampling: the options; the defaults when empty.
        overflow: what to do when prompt and new tokens exceed the context, as in `generate`.
        seed: the same seed gives the same texts.
        out: where to write; standard output when empty.

    Raises:
        InputError: `n` is below 1, the prompt is empty and the tokenizer has no start of text, or does not fit.
    """
    out = sys.stdout if out is None else out
    if n < 1:
        raise InputError(f"--n {n}: ask for at least one continuation.")
    tokenizer = model.tokenizer
    asked = tokenizer.encode(prompt)
    ids = start_ids(tokenizer, empty=not asked) + asked
    if not ids:
        raise InputError("--prompt: it is empty, and this model's tokenizer has no start of text; give a prompt.")
    key = jax.random.key(seed)
    if n == 1:
        pieces = stream(
            model.cfg, model.params, ids, sampling=sampling, max_new_tokens=max_new_tokens, stop_ids=model.stop_ids,
            key=key, tokenizer=_After(tokenizer, asked), overflow=overflow,
        )  # fmt: skip
        for piece in pieces:
            print(piece.text, end="", file=out, flush=True)
        print(file=out, flush=True)
        return
    outs = generate(
        model.cfg, model.params, [ids] * n, sampling=sampling, max_new_tokens=max_new_tokens, stop_ids=model.stop_ids,
        key=key, tokenizer=tokenizer, overflow=overflow,
    )  # fmt: skip
    for done in outs:
        ended = done.finish_reason == "stop" and done.tokens[-1] in model.stop_ids
        print(tokenizer.decode(asked + done.tokens[: len(done.tokens) - ended]), file=out, flush=True)


class _After:
    """A tokenizer whose texts begin with a prompt: how a word is written depends on what stands before it."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int]) -> None:
        self._tokenizer, self._before = tokenizer, list(before)
        self.vocab_size = tokenizer.vocab_size

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(self._before + ids)

    def pieces(self, ids: Iterable[int]) -> Iterator[str]:
        return self._tokenizer.pieces(chain(self._before, ids))


def chat_ids(model: Loaded, messages: Messages) -> list[int]:
    """The prompt of the model's next turn.

    A published model's template decides. A run of ours was fine-tuned on single questions, so it is asked the last one.

    Raises:
        InputError: the model has no chat template and was not fine-tuned here, or its template refuses.
    """
    tokenizer = model.tokenizer
    if getattr(tokenizer, "chat_template", None) is not None:
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))  # type: ignore[attr-defined]
    if model.template is None:
        raise InputError("this model has no chat template, so it cannot chat; use jaxlm sample to continue text.")
    return start_ids(tokenizer, empty=False) + encode_prompt(tokenizer, messages[-1]["content"], model.template)


def _check_system(model: Loaded, system: str) -> None:
    """Refuses a system message that the model would never see: whatever it says, the prompt is the same."""
    question = {"role": "user", "content": "?"}
    one, other = (chat_ids(model, [{"role": "system", "content": text}, question]) for text in (system, f"{system} x"))
    if one == other:
        raise InputError(
            "--system: this model's template has no place for a system message, so it would not be seen; leave it out, "
            "or say it in the message."
        )


def fitted(model: Loaded, messages: Messages, max_new_tokens: int) -> tuple[list[int], int]:
    """The prompt, oldest turns forgotten until it leaves room for an answer, and the room for new tokens.

    Args:
        model: from `load_model`.
        messages: the conversation; the turns that are forgotten are taken out of it. The system message stays.
        max_new_tokens: longest answer wanted.

    Raises:
        InputError: the last message alone leaves no room.
    """
    context = model.cfg.max_seq_len
    while True:
        ids = chat_ids(model, messages)
        if len(ids) + max_new_tokens <= context:
            return ids, max_new_tokens
        first = 1 if messages[0]["role"] == "system" else 0
        if len(messages) - first > 2:
            del messages[first : first + 2]  # a question and its answer
        elif len(ids) < context:
            return ids, context - len(ids)
        else:
            raise InputError(f"the message has {len(ids)} tokens, and the model's context {context}; shorten it.")


def answer(
    model: Loaded, messages: Messages, *, max_new_tokens: int, sampling: Sampling, key: jax.Array
) -> Iterator[str]:
    """The model's next turn, piece by piece. Arguments as in `chat`."""
    ids, room = fitted(model, messages, max_new_tokens)
    pieces = stream(
        model.cfg, model.params, ids, sampling=sampling, max_new_tokens=room, stop_ids=model.stop_ids, key=key,
        tokenizer=model.tokenizer,
    )  # fmt: skip
    return (piece.text for piece in pieces)


def chat(
    model: Loaded,
    *,
    system: str | None = None,
    max_new_tokens: int = 512,
    sampling: Sampling | None = None,
    seed: int = 0,
    stdin: IO[str] | None = None,
    out: IO[str] | None = None,
    interactive: bool | None = None,
) -> None:
    """A conversation. On a terminal, turn by turn; otherwise all of the input is one message, and one answer follows.

    Args:
        model: from `load_model`.
        system: the system message; None: what the model's template puts there.
        max_new_tokens: longest answer.
        sampling: the options; by default temperature 0.7 and top_p 0.95.
        seed: the same seed and messages give the same answers.
        stdin: where messages come from; standard input when empty.
        out: where answers go; standard output when empty.
        interactive: turn by turn or not; by default, whether `stdin` is a terminal.

    Raises:
        InputError: there is no message, it does not fit, or the model cannot chat or has no place for `system`. On a
            terminal, what is wrong with a message is said, and the conversation goes on.
    """
    stdin, out = sys.stdin if stdin is None else stdin, sys.stdout if out is None else out
    options = Sampling(temperature=0.7, top_p=0.95) if sampling is None else sampling
    if system is not None:
        _check_system(model, system)
    opening: Messages = [] if system is None else [{"role": "system", "content": system}]
    key = jax.random.key(seed)

    def turn(messages: Messages, number: int) -> str:
        said: list[str] = []
        turn_key = jax.random.fold_in(key, number)
        try:
            for text in answer(model, messages, max_new_tokens=max_new_tokens, sampling=options, key=turn_key):
                said.append(text)
                print(text, end="", file=out, flush=True)
        except KeyboardInterrupt:
            if not interactive:
                raise
        print(file=out, flush=True)
        return "".join(said)

    if interactive is None:
        interactive = stdin.isatty()
    if not interactive:
        text = _decoded(stdin.read).strip()
        if not text:
            raise InputError("standard input is empty; give a message, or run jaxlm chat on a terminal.")
        turn([*opening, {"role": "user", "content": text}], 0)
        return
    chat_ids(model, [*opening, {"role": "user", "content": "?"}])  # a model that cannot chat says so at once
    print(HELP, file=out, flush=True)
    messages, number = list(opening), 0
    while (text := _decoded(lambda: _line(stdin, out))) not in (None, "/exit"):
        if text == "/reset":
            messages = list(opening)
        elif text:
            messages.append({"role": "user", "content": text})
            try:
                messages.append({"role": "assistant", "content": turn(messages, number)})
            except InputError as error:
                messages.pop()
                print(f"jaxlm: {error}", file=out, flush=True)
            number += 1


def _decoded(read: Callable[[], _Text]) -> _Text:
    try:
        return read()
    except UnicodeDecodeError as error:
        raise InputError(f"standard input: byte {error.start} is not UTF-8; send UTF-8 text.") from None


def _line(stdin: IO[str], out: IO[str]) -> str | None:
    """One message; None at the end of the input."""
    if stdin is sys.stdin and stdin.isatty():
        try:
            return input("> ").strip()  # not readline(): this one has line editing
        except EOFError:
            return None
    print("> ", end="", file=out, flush=True)
    line = stdin.readline()
    return line.strip() if line else None
