"""Talking to a model: what `jaxlm chat` and `jaxlm sample` do, for a run of ours, published weights or a GGUF file."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, NamedTuple

import jax

from jaxlm import interop
from jaxlm.config import ModelConfig
from jaxlm.data import encode_prompt
from jaxlm.errors import InputError
from jaxlm.interop.gguf import load_gguf
from jaxlm.model import Params
from jaxlm.sample import Sampling, generate, prepare
from jaxlm.sample.stream import stream
from jaxlm.stages import runs, saved
from jaxlm.stages.store import read_json
from jaxlm.tokenizers import Tokenizer

Messages = list[dict[str, str]]

HELP = "/reset forgets the conversation, /exit (or end of input) leaves, Ctrl-C stops an answer."
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


class Loaded(NamedTuple):
    """A model to talk to.

    Attributes:
        cfg: its shape.
        params: its weights, laid out for decoding.
        tokenizer: its own.
        stop_ids: what ends an answer.
        template: for a run of ours that was fine-tuned, the text that questions were put into (`sft.template`).
        notes: sentences to show the person, such as about a damaged checkpoint that was passed over.
    """

    cfg: ModelConfig
    params: Params
    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]
    template: str | None = None
    notes: tuple[str, ...] = ()


def load_model(
    name: str | Path,
    root: str | Path = ".",
    *,
    dtype: str | None = None,
    tokenizer: Tokenizer | None = None,
    prepared: bool = True,
) -> Loaded:
    """The model that a person means: a .gguf file, a Hugging Face directory, a run, or a repository id.

    Args:
        name: what was typed. A file or directory of that name comes before a run, a run before `owner/name` on the hub.
        root: the directory that holds store/ and runs/.
        dtype: of imported weights; float32 when empty. Runs have the type that they were saved in.
        tokenizer: instead of the one with imported weights, which may then have none.
        prepared: lay the weights out for decoding; False leaves them as `jaxlm.init` does.

    Raises:
        InputError: there is no such model, it is damaged, or it has no tokenizer.
        UnavailableError: a repository is neither in the cache nor reachable.
    """
    path = Path(name)
    if path.suffix == ".gguf":
        return _imported(name, load_gguf(path, dtype=dtype), tokenizer, prepared)
    if (path / "config.json").is_file():
        return _imported(name, interop.load_hf(path, dtype=dtype), tokenizer, prepared)
    root = Path(root)
    local = any(place.exists() for place in (path, root / "runs" / path, root / "store" / path, root / path))
    if not local and _REPO_ID.fullmatch(str(name)):
        return _imported(name, interop.load_hf(str(name), dtype=dtype), tokenizer, prepared)
    found = saved.load(runs.resolve(name, root, stages=("sft", "pretrain")))
    eot = found.tokenizer.eot_id
    params = prepare(found.cfg, found.params) if prepared else found.params
    return Loaded(
        found.cfg, params, found.tokenizer, () if eot is None else (eot,),
        _sft_template(runs.resolve(name, root)), tuple(found.notes),
    )  # fmt: skip


def _imported(name: str | Path, found: interop.Loaded, instead: Tokenizer | None, prepared: bool) -> Loaded:
    cfg, params, own = found
    tokenizer = own if instead is None else instead
    if tokenizer is None:
        raise InputError(f"{name}: there is no tokenizer with these weights; put its tokenizer.json beside them.")
    ends = [*getattr(tokenizer, "stop_ids", ()), *([] if tokenizer.eot_id is None else [tokenizer.eot_id])]
    params = prepare(cfg, params) if prepared else params
    return Loaded(cfg, params, tokenizer, tuple(dict.fromkeys(i for i in ends if i < cfg.vocab_size)))


def _sft_template(place: Path) -> str | None:
    if not (place / "run.json").is_file() or "sft" not in runs.stages_of(place):
        return None
    found = read_json(place / "run.json").get("config", {}).get("sft", {}).get("template")
    return found if isinstance(found, str) else None


def start_ids(tokenizer: Tokenizer, *, empty: bool) -> list[int]:
    """What comes before a text: bos_token where the model was trained with one, `<|endoftext|>` for our own models.

    Args:
        tokenizer: the model's.
        empty: there is no text, so some token has to stand there.
    """
    found = list(getattr(tokenizer, "start_ids", ()))
    own = not hasattr(tokenizer, "start_ids")
    if not found and (own or empty):
        candidates = (getattr(tokenizer, "bos_id", None), tokenizer.eot_id)
        found = [i for i in candidates if i is not None][:1]
    return found


def sample(
    model: Loaded,
    prompt: str,
    *,
    n: int = 1,
    max_new_tokens: int = 100,
    sampling: Sampling | None = None,
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
            key=key, tokenizer=_After(tokenizer, asked),
        )  # fmt: skip
        for piece in pieces:
            print(piece.text, end="", file=out, flush=True)
        print(file=out, flush=True)
        return
    outs = generate(
        model.cfg, model.params, [ids] * n, sampling=sampling, max_new_tokens=max_new_tokens, stop_ids=model.stop_ids,
        key=key, tokenizer=tokenizer,
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
        InputError: there is no message, it does not fit, or the model cannot chat. On a terminal, what is wrong with a
            message is said, and the conversation goes on.
    """
    stdin, out = sys.stdin if stdin is None else stdin, sys.stdout if out is None else out
    options = Sampling(temperature=0.7, top_p=0.95) if sampling is None else sampling
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
        text = stdin.read().strip()
        if not text:
            raise InputError("standard input is empty; give a message, or run jaxlm chat on a terminal.")
        turn([*opening, {"role": "user", "content": text}], 0)
        return
    chat_ids(model, [*opening, {"role": "user", "content": "?"}])  # a model that cannot chat says so at once
    print(HELP, file=out, flush=True)
    messages, number = list(opening), 0
    while (text := _line(stdin, out)) not in (None, "/exit"):
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
