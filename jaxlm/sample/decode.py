"""Prefill and decoding with the key/value cache, as pure functions on one state.

Decoding keeps B rows, each a request of its own: its own length, options, key and end. A prompt of n tokens is
prefilled, and its last token is then fed again as the first decoding step, so that prefilling computes no logits and
every new token comes from one and the same step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxlm.config import ModelConfig
from jaxlm.model import Cache, Params, forward, init_cache, unembed, unstack
from jaxlm.model.blocks import GATE_UP, QKV
from jaxlm.sample import arguments, penalties
from jaxlm.sample.sampler import sample_token

RUNNING, STOP, LENGTH, ERROR = range(4)


class Requests(NamedTuple):
    """What the rows were asked for; constant while they decode.

    Attributes:
        key: typed key [B], one a request; folded with a token's position for its draw.
        prompt: int32[B, T], -1 after the end.
        max_new: int32[B], tokens wanted at most.
        min_new: int32[B], tokens before a stop id may come.
        temperature, top_p, min_p, typical_p: float32[B].
        top_k: int32[B].
        repetition, presence, frequency: float32[B].
        no_repeat_ngram: int32[B].
        edit_ids, edit_values: int32[B, W] and float32[B, W], added to the logits; ids of -1 are padding.
        stop_ids: int32[B, E], -1 is padding.
        n_vocab: int32[], ids from here on are padding of the vocabulary, never produced.
    """

    key: jax.Array
    prompt: jax.Array
    max_new: jax.Array
    min_new: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    typical_p: jax.Array
    repetition: jax.Array
    presence: jax.Array
    frequency: jax.Array
    no_repeat_ngram: jax.Array
    edit_ids: jax.Array
    edit_values: jax.Array
    stop_ids: jax.Array
    n_vocab: jax.Array


class State(NamedTuple):
    """Where the rows stand.

    Attributes:
        cache: keys and values; its length int32[B] is the tokens held, all but the last one of each row.
        last: int32[B], the token to be fed next.
        n_new: int32[B], new tokens so far.
        tokens: int32[B, N], the new tokens, -1 after the end.
        log_probs: float32[B, N], of those tokens under the model itself, before any filter; nats.
        finished: int32[B], RUNNING, STOP, LENGTH or ERROR.
        top_tokens: int32[B, N, M], for each new token the M that were most likely under the model itself, in order.
        top_log_probs: float32[B, N, M], of those; nats.
    """

    cache: Cache
    last: jax.Array
    n_new: jax.Array
    tokens: jax.Array
    log_probs: jax.Array
    finished: jax.Array
    top_tokens: jax.Array
    top_log_probs: jax.Array


def prepare(cfg: ModelConfig, params: Params) -> Params:
    """The parameters laid out for decoding; idempotent, and `forward` gives the same values with either.

    Layers become one dict each: slicing a layer out of stacked weights costs a copy of it at every step (a SmolLM2-135M
    step takes 22 ms this way and 160 ms unrolled over slices on two cores). Matrices are turned, [outputs, inputs],
    and named so: see `jaxlm.model.blocks.product`. Those of one input are joined into one, `qkv` and `gate_up`. They,
    embeddings and the blocks' biases take the compute type, which `forward` would cast them to at every step.

    Raises:
        InputError: `params` are not laid out as a model's weights.
    """
    arguments.check_cfg(cfg)
    arguments.check_params(cfg, params)
    dtype = jnp.dtype(cfg.compute_dtype)

    def cast(path: tuple[jax.tree_util.DictKey, ...], weight: jax.Array) -> jax.Array:
        names = [str(getattr(part, "key", "")) for part in path]
        is_norm = any("norm" in name for name in names)
        used_as_is = is_norm or names[0] == "bigram" or names == ["head", "bias"]
        return weight if used_as_is else weight.astype(dtype)

    out = jax.tree_util.tree_map_with_path(cast, params)
    if cfg.kind == "transformer":
        blocks = out["blocks"] if isinstance(out["blocks"], tuple) else unstack(out["blocks"], cfg.n_layers)
        out["blocks"] = tuple(_joined(_turned(block)) for block in blocks)
        out |= {"head": _turned(out["head"])} if "head" in out else {}
    return out


def _turned(weights: Params) -> Params:
    """Matrices [inputs, outputs] named kernel as [outputs, inputs] named turned, at any depth; the rest as it is."""
    if not isinstance(weights, dict):
        return weights
    named = {("turned" if name == "kernel" else name): weight for name, weight in weights.items()}
    return {name: weight.T if name not in weights else _turned(weight) for name, weight in named.items()}


def _joined(block: Params) -> Params:
    """A block's turned matrices, and their biases, of the same input as one."""
    parts = {"attn": (QKV, ("q", "k", "v")), "mlp": (GATE_UP, ("gate", "up"))}
    out = dict(block)
    for name, (whole, members) in parts.items():
        if all(member in block[name] for member in members):
            rest = {key: weight for key, weight in block[name].items() if key not in members}
            one = jax.tree.map(lambda *each: jnp.concatenate(each), *(block[name][member] for member in members))
            out[name] = rest | {whole: one}
    return out


@partial(jax.jit, static_argnames=("capacity", "n_new", "n_top"))
def prefill(cfg: ModelConfig, params: Params, prompt: jax.Array, *, capacity: int, n_new: int, n_top: int = 0) -> State:
    """The state before the first new token.

    Args:
        cfg: the model.
        params: from `prepare`.
        prompt: int32[B, T], right-padded with -1. A row of padding alone is not in use and finishes at once.
        capacity: S, places in the cache of each row.
        n_new: N, room for new tokens.
        n_top: M, most likely tokens to be noted of each new one.
    """
    held = (prompt >= 0).sum(-1, dtype=jnp.int32)
    state = blank(cfg, prompt.shape[0], capacity=capacity, n_new=n_new, n_top=n_top)
    _, filled = forward(cfg, params, jnp.maximum(prompt, 0), cache=state.cache)
    assert filled is not None
    last = jnp.maximum(held - 1, 0)
    return state._replace(
        cache=filled._replace(length=last),
        last=jnp.maximum(jnp.take_along_axis(prompt, last[:, None], axis=1)[:, 0], 0),
        finished=jnp.where(held > 0, RUNNING, LENGTH).astype(jnp.int32),  # not weakly typed: one signature
    )


def blank(cfg: ModelConfig, batch: int, *, capacity: int, n_new: int, n_top: int) -> State:
    """The state of rows that are not in use. Arguments as of `prefill`."""
    return State(
        cache=init_cache(cfg, batch, capacity, stacked=False),
        last=jnp.zeros(batch, jnp.int32),
        n_new=jnp.zeros(batch, jnp.int32),
        tokens=jnp.full((batch, n_new), -1, jnp.int32),
        log_probs=jnp.zeros((batch, n_new), jnp.float32),
        finished=jnp.full(batch, LENGTH, jnp.int32),
        top_tokens=jnp.full((batch, n_new, n_top), -1, jnp.int32),
        top_log_probs=jnp.zeros((batch, n_new, n_top), jnp.float32),
    )


def decode_step(cfg: ModelConfig, params: Params, requests: Requests, state: State) -> State:
    """One more token for every running row; finished rows keep what they have."""
    hidden, cache = forward(cfg, params, state.last[:, None], cache=state.cache)
    assert cache is not None
    logits = unembed(cfg, params, hidden[:, 0])
    with jax.named_scope("sample"):
        token = draw(requests, state, logits)
        return extend(requests, state, cache, logits[:, None], token[:, None], jnp.zeros_like(token))


def draw(requests: Requests, state: State, logits: jax.Array) -> jax.Array:
    """Each row's next token from float32[B, V]: int32[B], -1 where there is none to choose."""
    position = (requests.prompt >= 0).sum(-1, dtype=jnp.int32) + state.n_new
    keys = jax.vmap(jax.random.fold_in)(requests.key, position)
    return sample_token(keys, adjust(logits, requests, state), **filters_of(requests))


def filters_of(requests: Requests) -> dict[str, Any]:
    """The options of `filter_logits` and `sample_token`, [B] each."""
    return {name: getattr(requests, name) for name in ("temperature", "top_k", "top_p", "min_p", "typical_p")}


def extend(
    requests: Requests, state: State, cache: Cache, logits: jax.Array, tokens: jax.Array, accepted: jax.Array
) -> State:
    """The state with up to W more tokens a row, those that come before its first end.

    Args:
        requests: what the rows were asked for.
        state: before.
        cache: after W tokens were fed; its lengths do not matter.
        logits: float32[B, W, V], of the model itself.
        tokens: int32[B, W], what was chosen at each place; -1 where there was nothing to choose.
        accepted: int32[B]; places 0 .. accepted count. Place `accepted` alone may hold -1.
    """
    batch, width = tokens.shape
    rows, places = jnp.arange(batch)[:, None], jnp.arange(width)
    running = state.finished == RUNNING
    stops = (tokens[:, :, None] == requests.stop_ids[:, None, :]).any(-1)
    stopped_before = jnp.cumsum(stops, axis=1) - stops > 0
    left = (requests.max_new - state.n_new)[:, None]
    emits = running[:, None] & (places <= accepted[:, None]) & (places < left) & (tokens >= 0) & ~stopped_before
    count = emits.sum(-1, dtype=jnp.int32)
    last, n_new, any_new = jnp.maximum(count - 1, 0)[:, None], state.n_new + count, count > 0
    stopped = any_new & jnp.take_along_axis(stops, last, axis=1)[:, 0]
    empty = jnp.where(count <= accepted, ERROR, RUNNING)
    reason = jnp.where(stopped, STOP, jnp.where(n_new >= requests.max_new, LENGTH, empty))

    place = jnp.where(emits, state.n_new[:, None] + places, state.tokens.shape[1])
    log_total = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, jnp.maximum(tokens, 0)[:, :, None], axis=-1)[:, :, 0]
    top_tokens, top_log_probs = state.top_tokens, state.top_log_probs
    if top_tokens.shape[-1]:
        best, best_tokens = lax.top_k(logits, top_tokens.shape[-1])
        top_tokens = top_tokens.at[rows, place].set(best_tokens, mode="drop")
        top_log_probs = top_log_probs.at[rows, place].set(best - log_total[:, :, None], mode="drop")
    return State(
        cache=cache._replace(length=state.cache.length + count),
        last=jnp.where(any_new, jnp.take_along_axis(tokens, last, axis=1)[:, 0], state.last),
        n_new=n_new,
        tokens=state.tokens.at[rows, place].set(tokens, mode="drop"),
        log_probs=state.log_probs.at[rows, place].set(chosen - log_total, mode="drop"),
        finished=jnp.where(running, reason, state.finished),
        top_tokens=top_tokens,
        top_log_probs=top_log_probs,
    )


def adjust(logits: jax.Array, requests: Requests, state: State) -> jax.Array:
    """Penalties, bias and bans, float32[B, V] -> [B, V]. Those that no row asks for are skipped."""
    r, vocab = requests, logits.shape[-1]
    no_ngrams = (r.no_repeat_ngram == 0).all()

    def real(x: jax.Array) -> jax.Array:
        return jnp.where(jnp.arange(vocab) < r.n_vocab, x, -jnp.inf)

    def apply(x: jax.Array) -> jax.Array:
        x = penalties.repetition(x, jnp.concatenate([r.prompt, state.tokens], axis=1), r.repetition)
        x = penalties.presence(x, state.tokens, r.presence)
        x = penalties.frequency(x, state.tokens, r.frequency)
        x = penalties.bias(x, r.edit_ids, r.edit_values)
        x = penalties.min_new_tokens(x, r.stop_ids, state.n_new, r.min_new)
        seen = history(r, state)
        x = lax.cond(no_ngrams, lambda x: x, lambda x: penalties.no_repeat_ngram(x, seen, r.no_repeat_ngram), x)
        return real(x)

    plain = (r.repetition == 1) & (r.presence == 0) & (r.frequency == 0) & (state.n_new >= r.min_new)
    # A branch that returned its argument would copy it: so the one pass that all need is within both.
    return lax.cond((plain & (r.edit_ids < 0).all(-1)).all() & no_ngrams, real, apply, logits)


def history(requests: Requests, state: State) -> jax.Array:
    """Prompt and new tokens without a gap, int32[B, T + N], -1 after the end."""
    place = jnp.arange(requests.prompt.shape[1] + state.tokens.shape[1])
    held = (requests.prompt >= 0).sum(-1, keepdims=True, dtype=jnp.int32)
    old = jnp.take(requests.prompt, place, axis=1, mode="fill", fill_value=-1)
    new = jnp.take_along_axis(state.tokens, jnp.maximum(place - held, 0), axis=1, mode="fill", fill_value=-1)
    return jnp.where(place < held, old, new)


@partial(jax.jit, donate_argnames="state")
def decode(cfg: ModelConfig, params: Params, requests: Requests, state: State, steps: jax.Array | int) -> State:
    """Up to `steps` more tokens for every running row, ending early when none runs. The state's buffers are reused."""
    return loop(cfg, params, requests, state, steps, lambda state: (state.finished == RUNNING).any())


def loop(
    cfg: ModelConfig,
    params: Params,
    requests: Requests,
    state: State,
    steps: jax.Array | int,
    goes_on: Callable[[State], jax.Array],
) -> State:
    """Up to `steps` decoding steps, as long as `goes_on` (State -> bool[])."""

    def more(carry: tuple[jax.Array, State]) -> jax.Array:
        left, state = carry
        return (left > 0) & goes_on(state)

    def body(carry: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
        left, state = carry
        return left - 1, decode_step(cfg, params, requests, state)

    return lax.while_loop(more, body, (jnp.asarray(steps, jnp.int32), state))[1]
