"""`stream`: one prompt in, its text out piece by piece, the same as `generate` gives for the request."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax

from jaxlm.config import ModelConfig
from jaxlm.model import Params
from jaxlm.sample import answers, arguments, drive
from jaxlm.sample import decode as decoding
from jaxlm.sample import requests as asking
from jaxlm.sample.answers import Arrays, Reason
from jaxlm.sample.arguments import Decodes
from jaxlm.sample.options import Sampling
from jaxlm.sample.requests import Overflow

_STRIDE = 4  # tokens between two looks at the device, after the first


class Streams(Decodes, Protocol):
    """What `stream` needs of a tokenizer."""

    def pieces(self, ids: Iterable[int]) -> Iterator[str]: ...


@dataclass(frozen=True)
class Piece:
    """What has come since the piece before.

    The pieces' texts join to `Generation.text`, and so do tokens and their log-probabilities. A text may lag behind its
    tokens: what could be the beginning of a stop string, or of a character, waits for what follows.

    Attributes:
        text: complete characters, never a part of a stop string; empty without a tokenizer.
        tokens: new ids.
        log_probs: of these ids under the model itself, before any filter; nats.
        finish_reason: of the last piece, as in `Generation`; None before that.
        top_log_probs: for each new id the (id, log-probability) of those most likely, as in `Generation`; None where
            none were asked for.
    """

    text: str
    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    finish_reason: Reason | None = None
    top_log_probs: tuple[tuple[tuple[int, float], ...], ...] | None = None


def stream(
    cfg: ModelConfig,
    params: Params,
    prompt: Sequence[int],
    *,
    sampling: Sampling | None = None,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    stop: str | Sequence[str] = (),
    key: jax.Array | int | None = None,
    tokenizer: Streams | None = None,
    overflow: Overflow = "refuse",
    top_log_probs: int = 0,
) -> Iterator[Piece]:
    """Continues one prompt, with the tokens that `generate(cfg, params, [prompt], ...)` gives for the same arguments.

    It runs the same compiled programs. The first piece comes after the prefill and one decoding step; then a few tokens
    are decoded between two looks at the device. Each token that completes some text is a piece of its own. To leave the
    loop early costs nothing: tokens are decoded only as pieces are asked for.

    Args:
        cfg: the model.
        params: from `init`, or better from `prepare`.
        prompt: token ids, at least one.
        sampling: its options.
        max_new_tokens: at least 1.
        stop_ids: ids that end the answer; they are among the tokens and not in the text.
        stop: strings that end the answer; neither they nor anything after them is in the text.
        key: as in `generate`, for its prompt 0.
        tokenizer: turns ids into text, with `pieces`. Without one each token is a piece without text.
        overflow: as in `generate`.
        top_log_probs: most likely tokens to report at each new one.

    Yields:
        Pieces; exactly one, the last, has a finish_reason.

    Raises:
        InputError: as `generate`; at the call, before the first piece is asked for.
    """
    (request,) = asking.check(cfg, [prompt], sampling, max_new_tokens, overflow)
    arguments.check_tokenizer(tokenizer, "pieces")
    stops, stop_ids = arguments.check_ends(cfg, stop, stop_ids, tokenizer)
    arguments.check_count("top_log_probs", top_log_probs, 0, cfg.vocab_size)
    key, n_vocab = arguments.check_key(key), arguments.real_vocab(cfg, tokenizer)
    asked = {"key": key, "stop_ids": stop_ids, "n_vocab": n_vocab, "n_top": top_log_probs}
    arguments.check_params(cfg, params)
    return _pieces(_Answer(cfg, params, request, asked), stops, tokenizer)


class _Answer:
    """One request's tokens, decoded as they are asked for."""

    def __init__(self, cfg: ModelConfig, params: Params, request: asking.Entry, asked: dict[str, Any]) -> None:
        self.cfg, self.params, self.request, self.asked = cfg, params, request, asked
        self.reason: Reason | None = None
        self._row: Any = None  # the leaves of its state, on the host
        self._out, self._told = 0, 0  # tokens that `tokens` has yielded, or ended with; and those that pieces told of

    def tokens(self) -> Iterator[int]:
        """Ids that have a text: all but a stop id at the end."""
        cfg, params = self.cfg, decoding.prepare(self.cfg, self.params)
        asked, state = drive.start(cfg, params, [self.request], slots=1, **self.asked)
        finished, steps = decoding.RUNNING, 1
        while finished == decoding.RUNNING:
            state = drive.advance(cfg, params, asked, state, steps, slides=self.request.slides)
            row = self._row = Arrays(*jax.device_get(tuple(answers.arrays(state)))).row(0)
            n, finished = int(row.n_new), int(row.finished)
            while self._out < n:
                self._out += 1
                if self._out < n or finished != decoding.STOP:
                    yield int(row.tokens[self._out - 1])
            steps = _STRIDE
        self.reason = answers.REASONS[finished]

    def piece(self, text: str, reason: Reason | None = None) -> Piece:
        """A piece with all tokens that came since the last one."""
        row, new = self._row, slice(self._told, self._out)
        if row is None:  # a tokenizer may begin with text of its own, such as the prompt
            return Piece(text, (), (), reason, None)
        self._told = self._out
        tops = answers.tops(row.top_tokens[new], row.top_log_probs[new])
        return Piece(
            text,
            tuple(row.tokens[new].tolist()),
            tuple(row.log_probs[new].tolist()),
            reason,
            None if tops is None else tuple(map(tuple, tops)),
        )


def _pieces(answer: _Answer, stops: tuple[str, ...], tokenizer: Streams | None) -> Iterator[Piece]:
    ids, held = answer.tokens(), ""
    for text in tokenizer.pieces(ids) if tokenizer is not None else ("" for _ in ids):
        held += text
        place = answers.find(held, stops)
        if place >= 0:
            yield answer.piece(held[:place], "stop")
            return
        ready = len(held) - _unsure(held, stops)
        if ready or tokenizer is None:
            yield answer.piece(held[:ready])
            held = held[ready:]
    yield answer.piece(held, answer.reason)


def _unsure(text: str, stops: tuple[str, ...]) -> int:
    """How many characters at the end could be the beginning of a stop string."""
    longest = min(len(text), max(map(len, stops), default=1) - 1)
    return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in stops)), 0)
