"""From logits to what a person sees of a token: its probability, what the settings made of it, and its rivals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Decodes(Protocol):
    """What texts are made with."""

    def decode(self, ids: list[int]) -> str: ...


class Told(NamedTuple):
    """What is to be told of chosen tokens; natural logarithms.

    Attributes:
        token: int32[...], the tokens chosen; -1 where there was nothing to choose.
        log_prob: float32[...], of them under the model itself.
        kept_log_prob: float32[...], of them after temperature and filters; -inf where those had dropped the token.
        rank: int32[...], how many tokens the model holds more likely.
        top_tokens: int32[..., M], the most likely under the model, best first.
        top_log_probs: float32[..., M], of those.
        top_kept_log_probs: float32[..., M], of those after temperature and filters.
    """

    token: jax.Array
    log_prob: jax.Array
    kept_log_prob: jax.Array
    rank: jax.Array
    top_tokens: jax.Array
    top_log_probs: jax.Array
    top_kept_log_probs: jax.Array


def tell(logits: jax.Array, kept: jax.Array, token: jax.Array, n_rivals: int) -> Told:
    """The figures of chosen tokens.

    Args:
        logits: float32[..., V], the model's own; -inf for tokens that do not exist.
        kept: float32[..., V], the logits after temperature and filters, -inf for what those dropped.
        token: int32[...], what was chosen from them.
        n_rivals: M, at most V.
    """
    log_probs, kept_log_probs = jax.nn.log_softmax(logits), jax.nn.log_softmax(kept)
    place = jnp.maximum(token, 0)[..., None]

    def at(values: jax.Array, ids: jax.Array) -> jax.Array:
        return jnp.take_along_axis(values, ids, axis=-1)

    best, top = lax.top_k(log_probs, n_rivals)
    own = at(log_probs, place)
    return Told(
        token,
        own[..., 0],
        at(kept_log_probs, place)[..., 0],
        (log_probs > own).sum(-1, dtype=jnp.int32),
        top,
        best,
        at(kept_log_probs, top),
    )


@dataclass(frozen=True)
class Rival:
    """One of the most likely tokens at a place.

    Attributes:
        text: as it would have stood there.
        token: its id.
        prob: under the model itself.
        kept: after temperature and filters; 0 where those dropped it.
    """

    text: str
    token: int
    prob: float
    kept: float


@dataclass(frozen=True)
class Token:
    """A token of an answer.

    Attributes:
        text: what it adds to the text; empty where it ends the answer or completes no character.
        token: its id.
        prob: under the model itself.
        kept: after temperature and filters.
        rank: 0 is the most likely.
        rivals: the most likely tokens at its place, best first; it may be among them.
        ends: it is a stop token, and not part of the text.
    """

    text: str
    token: int
    prob: float
    kept: float
    rank: int
    rivals: tuple[Rival, ...]
    ends: bool = False

    @property
    def surprise(self) -> float:
        """-ln prob, nats."""
        return -math.log(self.prob) if self.prob > 0 else math.inf


def read(told: Told, text: str, tokenizer: Decodes, before: int | None, *, ends: bool = False) -> Token:
    """One token for a person, from arrays on the host.

    Args:
        told: of one token: scalars, and vectors of M.
        text: what the token adds to the answer.
        tokenizer: gives the rivals' texts.
        before: the id before it, on which a rival's text may depend (a space, or none); None: there is none.
        ends: it is a stop token.
    """
    ids = np.asarray(told.top_tokens).tolist()
    probs = np.exp(np.asarray(told.top_log_probs, np.float64)).tolist()
    kept = np.exp(np.asarray(told.top_kept_log_probs, np.float64)).tolist()
    texts = texts_after(tokenizer, before, ids)
    rivals = tuple(Rival(*item) for item in zip(texts, ids, probs, kept, strict=True))
    own, own_kept = math.exp(float(told.log_prob)), math.exp(float(told.kept_log_prob))
    return Token(text, int(told.token), own, own_kept, int(told.rank), rivals, ends)


def texts_after(tokenizer: Decodes, before: int | None, ids: Sequence[int]) -> list[str]:
    """What each of `ids` would add to a text that ends with the token `before`."""
    if before is None:
        return [tokenizer.decode([i]) for i in ids]
    start = tokenizer.decode([before])
    both = [tokenizer.decode([before, i]) for i in ids]
    return [
        text[len(start) :] if text.startswith(start) else tokenizer.decode([i])
        for text, i in zip(both, ids, strict=True)
    ]
