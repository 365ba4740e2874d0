"""Speculative decoding: several tokens guessed cheaply, then checked by the model in one pass.

Each round drafts up to K tokens a row, feeds them to the target model at once, accepts the first few, and adds one
token of the target's own. Whoever drafts, an answer has the distribution of `generate` with the same options: they are
applied to the target's logits and to the draft model's, at each place with the tokens before it.

- *Prompt lookup* (`draft=None`): the longest run of the latest tokens, at most `max_ngram`, that occurred before, and
  what came after its last occurrence, is the guess. The target draws each token as `generate` does, with the same keys,
  and guesses that equal the draws save passes. So the tokens are those of `generate`, but for the rounding of logits
  computed several places at once; and a guess x is accepted with the probability p(x), the most that any rule can.
- *A draft model* draws guesses from its own distribution q. A guess x is accepted with probability min(1, p(x)/q(x));
  in place of the first rejected one comes a draw from max(0, p - q), renormalised, and after K accepted ones a draw
  from p. That makes each token's distribution exactly p (Leviathan et al., arXiv 2211.17192, appendix A.1; Chen et al.,
  arXiv 2302.01318, theorem 1). With temperature 0 the tokens are the greedy ones.

Randomness follows a request's key and the token's position, never the round. It is worth it where a pass is bound by
reading the weights: at small batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxlm.config import ModelConfig
from jaxlm.errors import InputError
from jaxlm.model import Cache, Params, forward, unembed
from jaxlm.sample import decode as decoding
from jaxlm.sample import guess
from jaxlm.sample import requests as asking
from jaxlm.sample.decode import Requests, State
from jaxlm.sample.filters import filter_logits
from jaxlm.sample.generate import Generation, _read, _with_text
from jaxlm.sample.options import Sampling
from jaxlm.sample.requests import Decodes, bucket
from jaxlm.sample.sampler import sample_token


@dataclass(frozen=True)
class Speculated:
    """Answers, and how well the guessing went.

    Attributes:
        generations: one a prompt, in order.
        rounds: passes of the target model over a row, all rows together.
        proposed: tokens guessed.
        accepted: guesses that became part of an answer.
    """

    generations: list[Generation]
    rounds: int
    proposed: int
    accepted: int

    @property
    def acceptance_rate(self) -> float:
        """Accepted guesses among all, those after a rejected one included; 0 when there were none."""
        return self.accepted / max(self.proposed, 1)

    @property
    def tokens_per_round(self) -> float:
        """New tokens for each pass of the target; 1 is plain decoding."""
        return sum(len(g.tokens) for g in self.generations) / max(self.rounds, 1)


class _Run(NamedTuple):
    """A batch under way.

    Attributes:
        state: of the target.
        history: int32[B, S], prompt and answer, -1 after the end.
        draft: cache of the draft model, or None.
        counts: int32[B, 3], rounds, proposed and accepted.
    """

    state: State
    history: jax.Array
    draft: Cache | None
    counts: jax.Array


def speculate(
    cfg: ModelConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    draft: tuple[ModelConfig, Params] | None = None,
    n_draft: int = 4,
    max_ngram: int = 3,
    sampling: Sampling | Sequence[Sampling] | None = None,
    stop_ids: Sequence[int] = (),
    key: jax.Array | None = None,
    tokenizer: Decodes | None = None,
    slots: int = 1,
) -> Speculated:
    """Continues prompts as `generate` does, in fewer passes of the model.

    Requests are decoded `slots` at a time, with shapes like those of `generate`; each row accepts as many guesses as it
    can, whatever its neighbours do. Stop strings are not looked for: cut the text afterwards, or use `generate`.

    Args:
        cfg: the target model.
        params: its weights, from `init` or better from `prepare`.
        prompts: token ids, any lengths from 1.
        max_new_tokens: for all requests, or one for each.
        draft: a smaller model of the same vocabulary, its shape and weights; empty for prompt lookup.
        n_draft: K, tokens guessed a round.
        max_ngram: longest run of tokens that prompt lookup looks for.
        sampling: options for all requests, or one for each.
        stop_ids: ids that end an answer.
        key: as in `generate`.
        tokenizer: decodes the answers; ids from its vocab_size on are never produced.
        slots: rows decoded together.

    Raises:
        InputError: as in `generate`; a draft model of another vocabulary or a shorter context than needed; n_draft,
            max_ngram or slots below 1.
    """
    requests = asking.check(cfg, prompts, sampling, max_new_tokens, "refuse")
    for name, value in (("n_draft", n_draft), ("max_ngram", max_ngram), ("slots", slots)):
        if value < 1:
            raise InputError(f"{name}: must be at least 1, found {value}.")
    asking.check_ends(cfg, (), stop_ids, tokenizer)
    key = asking.check_key(key)
    draft_cfg, draft_params = None, None
    if draft is not None:
        draft_cfg, draft_params = draft
        if draft_cfg.vocab_size != cfg.vocab_size:
            raise InputError(
                f"draft: its vocabulary of {draft_cfg.vocab_size} tokens is not the model's of {cfg.vocab_size}; take "
                "a draft model with the same tokenizer."
            )
        longest = max((len(r.prompt) + r.max_new for r in requests), default=0)
        if longest > draft_cfg.max_seq_len:
            raise InputError(f"draft: its context of {draft_cfg.max_seq_len} tokens is below the {longest} asked for.")
        draft_params = decoding.prepare(draft_cfg, draft_params)
    n_vocab = cfg.vocab_size if tokenizer is None else min(cfg.vocab_size, tokenizer.vocab_size)
    dparams = decoding.prepare(cfg, params)

    out: dict[int, Generation] = {}
    counts = np.zeros(3, np.int64)
    for group in asking.groups(cfg, requests, slots):
        width, room = asking.width(cfg, group[0]), bucket(max(r.max_new for r in group))
        asked = asking.pack(group, slots, width, key, tuple(stop_ids), n_vocab)
        capacity = width + room + bucket(n_draft + 1)  # guesses may reach beyond the last token
        run = _Run(
            state=decoding.prefill(cfg, dparams, asked.prompt, capacity=capacity, n_new=room),
            history=jnp.pad(asked.prompt, ((0, 0), (0, capacity - width)), constant_values=-1),
            draft=None
            if draft_cfg is None
            else decoding.prefill(draft_cfg, draft_params, asked.prompt, capacity=capacity, n_new=room).cache,
            counts=jnp.zeros((slots, 3), jnp.int32),
        )
        run = _decode(cfg, dparams, draft_cfg, draft_params, asked, run, n_draft=n_draft, max_ngram=max_ngram)
        state, counted = run.state, np.asarray(run.counts)
        answers = (state.tokens, state.log_probs, state.n_new, state.finished, state.top_tokens, state.top_log_probs)
        host = [np.asarray(array) for array in answers]
        for row, request in enumerate(group):
            done = _read(*(array[row] for array in host))
            out[request.index] = _with_text(done, (), tuple(stop_ids), tokenizer)
            counts += counted[row]
    return Speculated([out[i] for i in range(len(requests))], *map(int, counts))


@partial(jax.jit, static_argnames=("n_draft", "max_ngram"), donate_argnames="run")
def _decode(
    cfg: ModelConfig,
    params: Params,
    draft_cfg: ModelConfig | None,
    draft_params: Params | None,
    requests: Requests,
    run: _Run,
    *,
    n_draft: int,
    max_ngram: int,
) -> _Run:
    def one_round(run: _Run) -> _Run:
        if draft_cfg is None:
            guesses = guess.look_up(run.history, run.state.cache.length + 1, n_draft, max_ngram)
            return _check(cfg, params, requests, run, guesses, None)
        assert draft_params is not None
        assert run.draft is not None
        guesses, q, cache = guess.from_model(draft_cfg, draft_params, requests, run.state, run.draft, n_draft)
        run = _check(cfg, params, requests, run._replace(draft=cache), guesses, q)
        assert run.draft is not None
        return run._replace(draft=run.draft._replace(length=run.state.cache.length))

    return lax.while_loop(lambda run: (run.state.finished == decoding.RUNNING).any(), one_round, run)


def _check(
    cfg: ModelConfig, params: Params, requests: Requests, run: _Run, guesses: jax.Array, q: jax.Array | None
) -> _Run:
    """One pass of the target over the last token and the guesses int32[B, K], and what comes of it."""
    state, n = run.state, guesses.shape[1]
    places = jnp.arange(n + 1)[None, :]
    fed = jnp.concatenate([state.last[:, None], jnp.maximum(guesses, 0)], axis=1)
    hidden, cache = forward(cfg, params, fed, cache=state.cache)
    assert cache is not None
    logits = unembed(cfg, params, hidden)  # [B, K + 1, V]: place i follows i guesses
    with jax.named_scope("accept"):
        adjusted = _adjusted(logits, requests, state, guesses)
        position = state.cache.length[:, None] + 1 + places
        drawn, accepted = (
            _as_drawn(requests, position, adjusted, guesses)
            if q is None
            else _as_weighed(requests, position, adjusted, guesses, q)
        )

    # Of `accepted` guesses and one token more, what comes before the first end.
    stops = (drawn[:, :, None] == requests.stop_ids[:, None, :]).any(-1)
    stopped_before = jnp.cumsum(stops, axis=1) - stops > 0
    left = (requests.max_new - state.n_new)[:, None]
    running = state.finished == decoding.RUNNING
    emits = running[:, None] & (places <= accepted[:, None]) & (places < left) & (drawn >= 0) & ~stopped_before
    count = emits.sum(-1, dtype=jnp.int32)
    last = jnp.maximum(count - 1, 0)[:, None]
    n_new, any_new = state.n_new + count, count > 0
    at_end = jnp.where(
        any_new & jnp.take_along_axis(stops, last, axis=1)[:, 0],
        decoding.STOP,
        jnp.where(
            n_new >= requests.max_new, decoding.LENGTH, jnp.where(count <= accepted, decoding.ERROR, decoding.RUNNING)
        ),
    )
    rows = jnp.arange(count.shape[0])[:, None]
    chosen = jnp.take_along_axis(logits, jnp.maximum(drawn, 0)[:, :, None], axis=2)[:, :, 0]
    log_probs = chosen - jax.nn.logsumexp(logits, axis=-1)
    answer_place = jnp.where(emits, state.n_new[:, None] + places, state.tokens.shape[1])
    history_place = jnp.where(emits, position, run.history.shape[1])
    proposed = jnp.where(running, (guesses >= 0).sum(-1), 0)
    taken = jnp.minimum(count, jnp.where(running, accepted, 0))
    return run._replace(
        state=state._replace(
            cache=cache._replace(length=state.cache.length + count),
            last=jnp.where(any_new, jnp.take_along_axis(drawn, last, axis=1)[:, 0], state.last),
            n_new=n_new,
            tokens=state.tokens.at[rows, answer_place].set(drawn, mode="drop"),
            log_probs=state.log_probs.at[rows, answer_place].set(log_probs, mode="drop"),
            finished=jnp.where(running, at_end, state.finished),
        ),
        history=run.history.at[rows, history_place].set(drawn, mode="drop"),
        counts=run.counts + jnp.stack([running.astype(jnp.int32), proposed, taken], axis=1),
    )


def _as_drawn(
    requests: Requests, position: jax.Array, adjusted: jax.Array, guesses: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The target's own draws int32[B, K + 1], and how many guesses equal them."""
    keys = jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))(requests.key, position)
    drawn = sample_token(keys, adjusted, **_filters(requests, position.shape))
    same = (drawn[:, :-1] == guesses) & (guesses >= 0)
    return drawn, jnp.cumprod(same, axis=1).sum(-1, dtype=jnp.int32)


def _as_weighed(
    requests: Requests, position: jax.Array, adjusted: jax.Array, guesses: jax.Array, q: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Accepted guesses followed by one more token, int32[B, K + 1], and how many guesses are accepted."""
    n = guesses.shape[1]
    p = jax.nn.softmax(filter_logits(adjusted, **_filters(requests, position.shape)), axis=-1)
    of_guess = jnp.maximum(guesses, 0)[:, :, None]
    px, qx = (jnp.take_along_axis(dist, of_guess, axis=2)[:, :, 0] for dist in (p[:, :n], q))
    keys = guess.keys_at(requests.key, position[:, :n], guess.ACCEPT)
    u = jax.vmap(jax.vmap(jax.random.uniform))(keys)
    takes = (guesses >= 0) & (u * qx < px)
    accepted = jnp.cumprod(takes, axis=1).sum(-1, dtype=jnp.int32)

    at = accepted[:, None, None]
    p_at = jnp.take_along_axis(p, at, axis=1)[:, 0]
    # Where there was no guess, all of p is left.
    padded = jnp.pad(jnp.where(guesses[:, :, None] >= 0, q, 0.0), ((0, 0), (0, 1), (0, 0)))
    rest = jnp.maximum(p_at - jnp.take_along_axis(padded, at, axis=1)[:, 0], 0.0)
    rest = jnp.where(rest.sum(-1, keepdims=True) == 0, p_at, rest)  # p = q, but for rounding
    where = jnp.take_along_axis(position, accepted[:, None], axis=1)[:, 0]
    token = sample_token(guess.keys_at(requests.key, where, guess.REST), jnp.log(rest))
    drawn = jnp.pad(guesses, ((0, 0), (0, 1)))
    return jnp.where(jnp.arange(n + 1) == accepted[:, None], token[:, None], drawn), accepted


def _adjusted(logits: jax.Array, requests: Requests, state: State, guesses: jax.Array) -> jax.Array:
    """Penalties, bias and bans on logits [B, K + 1, V], place i as if the first i guesses had been produced."""
    batch, width, vocab = logits.shape
    places = jnp.arange(width)
    room = state.tokens.shape[1]
    into = jnp.minimum(state.n_new[:, None] + places[None, :-1], room)
    tokens = state.tokens.at[jnp.arange(batch)[:, None], into].set(guesses, mode="drop")
    n_new = state.n_new[:, None] + places
    known = jnp.arange(room) < n_new[:, :, None]

    def repeat(leaf: jax.Array) -> jax.Array:
        return jnp.repeat(leaf, width, axis=0) if leaf.ndim else leaf

    keyless = state._replace(cache=Cache((), (), state.cache.length))
    ahead = jax.tree.map(repeat, keyless)._replace(
        tokens=jnp.where(known, tokens[:, None], -1).reshape(batch * width, room),
        n_new=n_new.reshape(-1),
        last=jnp.concatenate([state.last[:, None], guesses], axis=1).reshape(-1),
    )
    flat = decoding.adjust(logits.reshape(-1, vocab), jax.tree.map(repeat, requests), ahead)
    return flat.reshape(logits.shape)


def _filters(requests: Requests, shape: tuple[int, ...]) -> dict[str, Any]:
    """The filters' options, for every place [B, K + 1]."""
    return {name: jnp.broadcast_to(option[:, None], shape) for name, option in guess.filters_of(requests).items()}
