"""`stream`: one prompt in, its text out piece by piece, the same as `generate` gives for the request."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import jax
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.model import Params
from jaxlm.sample import decode as decoding
from jaxlm.sample import drive
from jaxlm.sample import requests as asking
from jaxlm.sample.generate import _REASONS, _find
from jaxlm.sample.options import Sampling
from jaxlm.sample.requests import Decodes, Overflow

_STRIDE = 4  # tokens between two looks at the device, after the first


class Streams(Decodes, Protocol):
    """What `stream` needs of a tokenizer."""

    def pieces(self, ids: Iterable[int]) -> Iterator[str]: ...


@dataclass(frozen=True)
class Piece:
    """What has come since the piece before.

    The pieces' texts join to `Generation.text`, and so do tokens and log_probs. A text may lag behind its tokens: what
    could be the beginning of a stop string, or of a character, waits for what follows.

    Attributes:
        text: complete characters, never a part of a stop string; empty without a tokenizer.
        tokens: new ids.
        log_probs: of these ids under the model itself, before any filter; nats.
        finish_reason: of the last piece, as in `Generation`; None before that.
    """

    text: str
    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    finish_reason: Literal["stop", "length", "error"] | None = None


def stream(
    cfg: ModelConfig,
    params: Params,
    prompt: Sequence[int],
    *,
    sampling: Sampling | None = None,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    stop: str | Sequence[str] = (),
    key: jax.Array | None = None,
    tokenizer: Streams | None = None,
    overflow: Overflow = "refuse",
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

    Yields:
        Pieces; exactly one, the last, has a finish_reason.

    Raises:
        InputError: as `generate`; at the call, before the first piece is asked for.
    """
    (request,) = asking.check(cfg, [prompt], sampling, max_new_tokens, overflow)
    stops = asking.check_ends(cfg, stop, stop_ids, tokenizer)
    n_vocab = min(cfg.vocab_size, tokenizer.vocab_size) if tokenizer is not None else cfg.vocab_size
    answer = _Answer(cfg, params, request, asking.check_key(key), tuple(stop_ids), n_vocab)
    return _pieces(answer, stops, tokenizer)


class _Answer:
    """One request's tokens, decoded as they are asked for."""

    def __init__(
        self,
        cfg: ModelConfig,
        params: Params,
        request: asking.Request,
        key: jax.Array,
        stop_ids: tuple[int, ...],
        n_vocab: int,
    ) -> None:
        self.cfg, self.params, self.request = cfg, params, request
        self.key, self.stop_ids, self.n_vocab = key, stop_ids, n_vocab
        self.reason: Literal["stop", "length", "error"] | None = None
        self._untold: list[tuple[int, float]] = []  # tokens that no piece has told of

    def tokens(self) -> Iterator[int]:
        """Ids that have a text: all but a stop id at the end."""
        params = decoding.prepare(self.cfg, self.params)
        asked, state = drive.start(
            self.cfg, params, [self.request], slots=1, key=self.key, stop_ids=self.stop_ids, n_vocab=self.n_vocab
        )
        seen, finished, steps = 0, decoding.RUNNING, 1
        while finished == decoding.RUNNING:
            state = drive.advance(self.cfg, params, asked, state, steps, slides=self.request.slides)
            n, finished = int(state.n_new[0]), int(state.finished[0])
            ids, log_probs = np.asarray(state.tokens)[0, seen:n].tolist(), np.asarray(state.log_probs)[0, seen:n]
            for i, told in enumerate(zip(ids, log_probs.tolist(), strict=True), start=seen + 1):
                self._untold.append(told)
                if i < n or finished != decoding.STOP:
                    yield told[0]
            seen, steps = n, _STRIDE
        self.reason = _REASONS[finished]

    def piece(self, text: str, reason: Literal["stop", "length", "error"] | None = None) -> Piece:
        """A piece with all tokens that came since the last one."""
        told, self._untold = self._untold, []
        return Piece(text, tuple(token for token, _ in told), tuple(log_prob for _, log_prob in told), reason)


def _pieces(answer: _Answer, stops: tuple[str, ...], tokenizer: Streams | None) -> Iterator[Piece]:
    ids, held = answer.tokens(), ""
    for text in tokenizer.pieces(ids) if tokenizer is not None else ("" for _ in ids):
        held += text
        place = _find(held, stops)
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
