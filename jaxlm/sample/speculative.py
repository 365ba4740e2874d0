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
reading the weights: at small batches. Windows do not slide here: guesses would reach past the point where they are cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxlm.config import ModelConfig
from jaxlm.errors import InputError
from jaxlm.model import Cache, Params, forward, unembed
from jaxlm.sample import answers, arguments, drive, guess
from jaxlm.sample import decode as decoding
from jaxlm.sample import requests as asking
from jaxlm.sample.answers import Generation
from jaxlm.sample.arguments import Decodes
from jaxlm.sample.decode import Requests, State
from jaxlm.sample.filters import filter_logits
from jaxlm.sample.options import Sampling
from jaxlm.sample.sampler import draw_kept, sample_token


@dataclass(frozen=True)
class Speculated:
    """Answers, and how well the guessing went.

    Attributes:
        generations: n of the first prompt, n of the second, and so on.
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
        """New tokens for each pass of the target; 1 is plain decoding, and less where stop strings cut answers."""
        return sum(len(g.tokens) for g in self.generations) / max(self.rounds, 1)


class _Run(NamedTuple):
    """A batch under way.

    Attributes:
        state: of the target.
        draft: cache of the draft model, or None.
        counts: int32[B, 3], rounds, proposed and accepted.
    """

    state: State
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
    n: int = 1,
    stop_ids: Sequence[int] = (),
    stop: str | Sequence[str] = (),
    key: jax.Array | int | None = None,
    tokenizer: Decodes | None = None,
    slots: int = 1,
    overflow: Literal["refuse", "crop"] = "refuse",
    top_log_probs: int = 0,
) -> Speculated:
    """Continues prompts as `generate` does, in fewer passes of the model.

    Requests are decoded `slots` at a time, with shapes like those of `generate`; each row accepts as many guesses as it
    can, whatever its neighbours do.

    Args:
        cfg: the target model.
        params: its weights, from `init` or better from `prepare`.
        prompts: token ids, any lengths from 1.
        max_new_tokens: for all requests, or one for each.
        draft: a smaller model of the same vocabulary, its shape and weights; empty for prompt lookup.
        n_draft: K, tokens guessed a round.
        max_ngram: longest run of tokens that prompt lookup looks for.
        sampling: options for all requests, or one for each.
        n: samples of each prompt, with the keys that they have in `generate`.
        stop_ids: ids that end an answer.
        stop: strings that end an answer, looked for between rounds; they need a tokenizer.
        key: as in `generate`.
        tokenizer: decodes the answers; ids from its vocab_size on are never produced.
        slots: rows decoded together.
        overflow: as in `generate`, but for `slide`.
        top_log_probs: most likely tokens to report at each new one.

    Raises:
        InputError: as in `generate`; a draft model of another vocabulary or a shorter context than needed; n_draft,
            max_ngram or slots below 1.
    """
    requests = asking.check(cfg, prompts, sampling, max_new_tokens, overflow, n, can_slide=False)
    for name, value in (("n_draft", n_draft), ("max_ngram", max_ngram), ("slots", slots)):
        arguments.check_count(name, value)
    arguments.check_count("top_log_probs", top_log_probs, 0, cfg.vocab_size)
    arguments.check_tokenizer(tokenizer)
    stops, stop_ids = arguments.check_ends(cfg, stop, stop_ids, tokenizer)
    draft_cfg, draft_params = None, None
    if draft is not None:
        if not isinstance(draft, tuple | list) or len(draft) != 2:
            raise InputError(
                f"draft: expected the pair (cfg, params) of a smaller model, found {arguments.found(draft)}."
            )
        draft_cfg, draft_params = draft
        arguments.check_cfg(draft_cfg, "draft[0]")
        if draft_cfg.vocab_size != cfg.vocab_size:
            raise InputError(
                f"draft: its vocabulary of {draft_cfg.vocab_size} tokens is not the model's of {cfg.vocab_size}; take "
                "a draft model with the same tokenizer."
            )
        longest = max((len(r.prompt) + r.max_new for r in requests), default=0)
        if longest > draft_cfg.max_seq_len:
            raise InputError(f"draft: its context of {draft_cfg.max_seq_len} tokens is below the {longest} asked for.")
        draft_params = decoding.prepare(draft_cfg, draft_params)
    dparams = decoding.prepare(cfg, params)
    begin = partial(
        drive.start, slots=slots, key=arguments.check_key(key), stop_ids=stop_ids,
        n_vocab=arguments.real_vocab(cfg, tokenizer),
    )  # fmt: skip
    decode = partial(_decode, cfg, dparams, draft_cfg, draft_params, n_draft=n_draft, max_ngram=max_ngram)

    out: dict[tuple[int, int], Generation] = {}
    counts = np.zeros(3, np.int64)
    for group in asking.groups(cfg, requests, slots):
        asked, state = begin(cfg, dparams, group, n_top=top_log_probs)
        guessing = begin(draft_cfg, draft_params, group)[1].cache if draft_cfg and draft_params else None
        run = _finish(decode, asked, _Run(state, guessing, jnp.zeros((slots, 3), jnp.int32)), n_draft, stops, tokenizer)
        out |= answers.read_group(group, answers.arrays(run.state), stops, stop_ids, tokenizer)
        counts += np.asarray(run.counts)[: len(group)].sum(0)
    return Speculated([out[place] for place in sorted(out)], *map(int, counts))


def _finish(
    decode: Callable[..., _Run],
    asked: Requests,
    run: _Run,
    n_draft: int,
    stops: tuple[str, ...],
    tokenizer: Decodes | None,
) -> _Run:
    """Decodes to the end; with stop strings a few rounds at a time, as `drive.finish` does."""
    room, batch = run.state.tokens.shape[1], run.state.last.shape[0]
    if tokenizer is None or not stops:
        return decode(asked, run, room)
    while (np.asarray(run.state.finished) == decoding.RUNNING).any():
        run = decode(asked, run, max(answers.STRIDE // (n_draft + 1), 1))
        run = run._replace(state=answers.end_at_stops(run.state, [stops] * batch, tokenizer))
    return run


@partial(jax.jit, static_argnames=("n_draft", "max_ngram"), donate_argnames="run")
def _decode(
    cfg: ModelConfig,
    params: Params,
    draft_cfg: ModelConfig | None,
    draft_params: Params | None,
    requests: Requests,
    run: _Run,
    rounds: jax.Array | int,
    *,
    n_draft: int,
    max_ngram: int,
) -> _Run:
    """Up to `rounds` more for every running row. Uses up `run`."""

    def goes_on(carry: tuple[jax.Array, _Run]) -> jax.Array:
        left, run = carry
        return (left > 0) & (run.state.finished == decoding.RUNNING).any()

    def one_round(carry: tuple[jax.Array, _Run]) -> tuple[jax.Array, _Run]:
        left, run = carry
        if draft_cfg is None:
            history = decoding.history(requests, run.state)
            guesses = guess.look_up(history, run.state.cache.length + 1, n_draft, max_ngram)
            return left - 1, _check(cfg, params, requests, run, guesses, None)
        assert draft_params is not None
        assert run.draft is not None
        guesses, q, cache = guess.from_model(draft_cfg, draft_params, requests, run.state, run.draft, n_draft)
        run = _check(cfg, params, requests, run, guesses, q)
        return left - 1, run._replace(draft=cache._replace(length=run.state.cache.length))

    return lax.while_loop(goes_on, one_round, (jnp.asarray(rounds, jnp.int32), run))[1]


def _check(
    cfg: ModelConfig, params: Params, requests: Requests, run: _Run, guesses: jax.Array, q: jax.Array | None
) -> _Run:
    """One pass of the target over the last token and the guesses int32[B, K], and what comes of it."""
    state = run.state
    fed = jnp.concatenate([state.last[:, None], jnp.maximum(guesses, 0)], axis=1)
    hidden, cache = forward(cfg, params, fed, cache=state.cache)
    assert cache is not None
    logits = unembed(cfg, params, hidden)  # [B, K + 1, V]: place i follows i guesses
    with jax.named_scope("accept"):
        adjusted = _adjusted(logits, requests, state, guesses)
        position = state.cache.length[:, None] + 1 + jnp.arange(fed.shape[1])
        drawn, accepted = (
            _as_drawn(requests, position, adjusted, guesses)
            if q is None
            else _as_weighed(requests, position, adjusted, guesses, q)
        )
        after = decoding.extend(requests, state, cache, logits, drawn, accepted)
    running = state.finished == decoding.RUNNING
    proposed = jnp.where(running, (guesses >= 0).sum(-1, dtype=jnp.int32), 0)
    taken = jnp.minimum(after.n_new - state.n_new, jnp.where(running, accepted, 0))
    counts = run.counts + jnp.stack([running.astype(jnp.int32), proposed, taken], axis=1)
    return run._replace(state=after, counts=counts)


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
    token = draw_kept(guess.keys_at(requests.key, where, guess.REST), jnp.log(rest))
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
    return {name: jnp.broadcast_to(option[:, None], shape) for name, option in decoding.filters_of(requests).items()}
