"""Beam search: the most likely continuations of prompts, over the key/value cache, in a compiled loop.

Every step extends each of a prompt's n beams by every token and ranks all extensions by their total log-probability.
Those among the n best that end, by a stop id or at the length limit, become hypotheses; the n best others go on as
beams. At most n hypotheses are kept, by score:

    score = log_prob / length ** length_penalty

where log_prob is the sum of the new tokens' log-probabilities under the model (nats), and length counts the new tokens,
the stop id among them, but not the prompt. Equal totals rank by beam, then by token id.

Prompts search side by side, P at a time, each as if alone: the rows of the cache are the P * n beams, prompt by prompt.
Windows do not slide here: a score would add up log-probabilities given different pasts.

Source: Wu et al. (arXiv 1609.08144), section 7, with the penalty in the simple form that transformers uses.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.errors import InputError
from jaxlm.model import Params
from jaxlm.sample import arguments, beam_loop
from jaxlm.sample import decode as decoding
from jaxlm.sample import requests as asking
from jaxlm.sample.answers import STRIDE
from jaxlm.sample.arguments import Decodes
from jaxlm.sample.beam_loop import Ended, Options
from jaxlm.sample.requests import bucket

MAX_SLOTS = 8


@dataclass(frozen=True)
class Hypothesis:
    """One continuation that beam search found.

    Attributes:
        tokens: the new ids; a stop id is the last of them.
        text: `tokens` decoded, without the stop id; None without a tokenizer.
        score: `log_prob / len(tokens) ** length_penalty`, what hypotheses are ranked by.
        log_prob: of the tokens together under the model, in nats.
        finish_reason: `stop` (a stop id), `length` (max_new_tokens), or `error`: the logits left nothing to choose.
    """

    tokens: list[int]
    text: str | None
    score: float
    log_prob: float
    finish_reason: Literal["stop", "length", "error"]


def beam_search(
    cfg: ModelConfig,
    params: Params,
    prompt: Sequence[int],
    *,
    n_beams: int,
    max_new_tokens: int,
    length_penalty: float = 1.0,
    early_stopping: bool = False,
    n_best: int = 1,
    stop_ids: Sequence[int] = (),
    tokenizer: Decodes | None = None,
    overflow: Literal["refuse", "crop"] = "refuse",
    stopped: Callable[[], bool] | None = None,
) -> list[Hypothesis]:
    """The best continuations of one prompt: what `beam_searches` finds for it, which says all else."""
    (found,) = beam_searches(
        cfg, params, [prompt], n_beams=n_beams, max_new_tokens=max_new_tokens, length_penalty=length_penalty,
        early_stopping=early_stopping, n_best=n_best, stop_ids=stop_ids, tokenizer=tokenizer, overflow=overflow,
        stopped=stopped,
    )  # fmt: skip
    return found


def beam_searches(
    cfg: ModelConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    n_beams: int,
    max_new_tokens: int,
    length_penalty: float = 1.0,
    early_stopping: bool = False,
    n_best: int = 1,
    stop_ids: Sequence[int] = (),
    tokenizer: Decodes | None = None,
    slots: int | None = None,
    overflow: Literal["refuse", "crop"] = "refuse",
    stopped: Callable[[], bool] | None = None,
) -> list[list[Hypothesis]]:
    """The continuations with the highest scores that `n_beams` beams find, for each prompt.

    With `n_beams` of at least V ** max_new_tokens nothing is ever cut, and the result is exact. Two programs are
    compiled for each pair of prompt bucket and new-token bucket (as `generate` has them), `slots` and `n_beams`: one
    takes in the prompts, one searches, which is compiled again for another power of two of stop ids. At fixed `slots`
    and `n_beams` a prompt's result is the same with any neighbours.

    Args:
        cfg: the model.
        params: from `init`, or better from `prepare`, which is otherwise done on every call.
        prompts: token ids, any lengths from 1.
        n_beams: n, beams that run and hypotheses that are kept, for each prompt.
        max_new_tokens: longest continuation; a beam that reaches it is a hypothesis.
        length_penalty: 0 ranks by log-probability; above 0 favours longer continuations, below 0 shorter ones.
        early_stopping: True ends once n hypotheses are there. False goes on until no beam can still reach a score
            above the worst of them; then the result is the same as without any stopping before max_new_tokens.
        n_best: hypotheses returned at most, best first; at most n_beams.
        stop_ids: ids that end a continuation.
        tokenizer: decodes the tokens; ids from its vocab_size on are never produced.
        slots: P, prompts that search together, with n_beams rows each; by default a power of two, at most 8, that holds
            all.
        overflow: as in `generate`, but for `slide`.
        stopped: asked before each `slots` prompts are taken in, and before each eight tokens of theirs; True, which it
            then has to stay, ends all searches with the hypotheses there are.

    Returns:
        For each prompt up to n_best hypotheses, best first: fewer where the vocabulary does not hold so many. A beam
        whose logits hold a NaN is dropped; when that leaves no hypothesis, there is one of no tokens with
        finish_reason `error`. So there is for each prompt whose search was stopped before any, or never begun.

    Raises:
        InputError: an empty prompt, an id outside the vocabulary, a request longer than the context, or an option out
            of range.
    """
    arguments.check_cfg(cfg)
    n_beams, n_best = arguments.check_count("n_beams", n_beams), arguments.check_count("n_best", n_best)
    if n_best > n_beams:
        raise InputError(f"n_best: must be at most n_beams={n_beams}, found {n_best}.")
    if n_beams * cfg.vocab_size >= 2**31:
        raise InputError(f"n_beams: {n_beams} beams times {cfg.vocab_size} tokens are too many to rank; use fewer.")
    if not isinstance(length_penalty, numbers.Real) or not math.isfinite(length_penalty):
        raise InputError(f"length_penalty: must be a finite number, found {arguments.found(length_penalty)}.")
    if not isinstance(early_stopping, bool):
        raise InputError(f"early_stopping: must be True or False, found {arguments.found(early_stopping)}.")
    max_new_tokens = arguments.check_count("max_new_tokens", max_new_tokens)
    requests = asking.check(cfg, prompts, None, max_new_tokens, overflow, can_slide=False)
    arguments.check_tokenizer(tokenizer)
    _, stop_ids = arguments.check_ends(cfg, (), stop_ids, tokenizer)
    slots = arguments.check_slots(slots, len(requests), MAX_SLOTS)

    ends = sorted(set(stop_ids))
    padded = np.full(1 << max(len(ends) - 1, 0).bit_length(), -1, np.int32)
    padded[: len(ends)] = ends
    given = np.int32(max_new_tokens), np.float32(length_penalty), np.bool_(early_stopping)
    options = Options(*jax.device_put((*given, padded, np.int32(arguments.real_vocab(cfg, tokenizer)))))
    dparams = decoding.prepare(cfg, params)
    out: dict[int, list[Hypothesis]] = {}
    for group in asking.groups(cfg, requests, slots):
        if stopped is not None and stopped():
            break
        rows = np.full((slots, asking.width(cfg, group[0])), -1, np.int32)
        for row, request in zip(rows, group, strict=False):
            row[: len(request.prompt)] = request.prompt
        found = jax.device_get(_search(cfg, dparams, jnp.asarray(rows), options, n_beams, max_new_tokens, stopped))
        for i, request in enumerate(group):
            mine = Ended(*(leaf[i] for leaf in found))
            best = (place for place in range(n_best) if mine.score[place] > -math.inf)
            out[request.index] = [_read(mine, place, tokenizer) for place in best]
    nothing = Hypothesis([], None if tokenizer is None else "", -math.inf, -math.inf, "error")
    return [out.get(i) or [nothing] for i in range(len(requests))]


def _read(found: Ended, place: int, tokenizer: Decodes | None) -> Hypothesis:
    tokens, stopped = found.tokens[place, : found.length[place]].tolist(), bool(found.stopped[place])
    text = None if tokenizer is None else tokenizer.decode(tokens[:-1] if stopped else tokens)
    score, total = float(found.score[place]), float(found.total[place])
    return Hypothesis(tokens, text, score, total, "stop" if stopped else "length")


def _search(
    cfg: ModelConfig,
    params: Params,
    prompt: jax.Array,
    options: Options,
    n: int,
    max_new: int,
    stopped: Callable[[], bool] | None,
) -> Ended:
    search = beam_loop.begin(cfg, params, prompt, n=n, room=bucket(max_new))
    if stopped is None:  # nobody to ask
        return beam_loop.go_on(cfg, params, options, search, max_new)[0].beams.ended
    for until in range(STRIDE, max_new + STRIDE, STRIDE):
        if stopped():
            break
        search, runs = beam_loop.go_on(cfg, params, options, search, until)
        if not runs:
            break
    return search.beams.ended
