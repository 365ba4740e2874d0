"""The two programs that make an answer: one takes tokens into the cache, one makes the next token and its figures.

They serve every prompt and every setting. Once both are compiled, nothing that a person does waits for the compiler,
but for beam search, whose result is then read through the second of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from jax.typing import ArrayLike

from jaxlm.config import ModelConfig
from jaxlm.loading import Loaded
from jaxlm.model import Cache, Params, forward, init_cache, unembed
from jaxlm.playground.explain import Told, tell
from jaxlm.playground.settings import Settings
from jaxlm.sample import filter_logits, sample_token

CHUNK = 32  # tokens of a prompt that are taken in together
CONTEXT = 1024  # prompt and answer together, unless the model's own context is shorter
N_RIVALS = 8


class Options(NamedTuple):
    """The filters as data, so that no value compiles anything; each a scalar."""

    temperature: ArrayLike  # float32
    top_k: ArrayLike  # int32
    top_p: ArrayLike  # float32


@partial(jax.jit, donate_argnames="cache")
def _take_in(cfg: ModelConfig, params: Params, cache: Cache, tokens: jax.Array, n: jax.Array) -> Cache:
    """The cache with the first `n` of tokens int32[1, CHUNK]; places after them hold nothing that is looked at."""
    _, filled = forward(cfg, params, tokens, cache=cache)
    assert filled is not None
    return filled._replace(length=cache.length + n)


@partial(jax.jit, donate_argnames="cache", static_argnames="n_rivals")
def _next(
    cfg: ModelConfig,
    params: Params,
    cache: Cache,
    last: jax.Array,
    key: jax.Array,
    options: Options,
    forced: jax.Array,
    n_vocab: jax.Array,
    n_rivals: int,
) -> tuple[Cache, Told]:
    """The token after `last` int32[], which is not in the cache yet: drawn, or `forced` where that is not -1.

    Position p is drawn with fold_in(key, p), as `generate` does.
    """
    position = cache.length + 1
    hidden, cache_after = forward(cfg, params, last[None, None], cache=cache)
    assert cache_after is not None
    logits = unembed(cfg, params, hidden[:, 0])
    logits = jnp.where(jnp.arange(logits.shape[-1]) < n_vocab, logits, -jnp.inf)
    drawn = sample_token(jax.vmap(jax.random.fold_in, (None, 0))(key, position), logits, **options._asdict())
    kept = filter_logits(logits, **options._asdict())
    token = jnp.where(forced >= 0, forced, drawn)
    return cache_after, jax.tree.map(lambda x: x[0], tell(logits, kept, token, n_rivals))


def capacity(cfg: ModelConfig) -> int:
    """Tokens of prompt and answer together that the playground has room for."""
    return min(cfg.max_seq_len, CONTEXT)


def warm(model: Loaded) -> float:
    """Compiles what answers need; returns the seconds that it took."""
    start = time.perf_counter()
    ids = [0] * min(2, capacity(model.cfg) - 1)
    for _ in take_steps(model, ids, Settings(max_new_tokens=1), (), lambda: False):
        pass
    return time.perf_counter() - start


def take_steps(
    model: Loaded, ids: list[int], settings: Settings, forced: tuple[int, ...], stopped: Callable[[], bool]
) -> Iterator[Told | None]:
    """The figures of each new token, on the host: max_new_tokens of them, or the forced ones; None when stopped."""
    cfg, params = model.cfg, model.params
    cache = init_cache(cfg, 1, capacity(cfg), stacked=False)
    # Bound to the parameters' device from the start, as it is after a step: else the first step compiles for itself.
    if isinstance(where := jax.tree.leaves(params)[0].sharding, SingleDeviceSharding):
        cache = jax.device_put(cache, where)
    held = ids[:-1]
    for place in range(0, len(held), CHUNK):
        jax.block_until_ready(cache)  # else all chunks would be on their way before anyone could stop them
        if stopped():
            yield None
            return
        part = held[place : place + CHUNK]
        padded = np.zeros((1, CHUNK), np.int32)
        padded[0, : len(part)] = part
        cache = _take_in(cfg, params, cache, padded, np.int32(len(part)))
    options = _options(settings)
    key = jax.random.fold_in(jax.random.key(np.uint32(settings.seed)), 0)
    n_vocab = np.int32(min(cfg.vocab_size, model.tokenizer.vocab_size))
    n_rivals = min(N_RIVALS, cfg.vocab_size)
    last = np.int32(ids[-1])
    for i in range(len(forced) or settings.max_new_tokens):
        if stopped():
            yield None
            return
        wanted = np.int32(forced[i] if forced else -1)
        cache, told = _next(cfg, params, cache, last, key, options, wanted, n_vocab, n_rivals=n_rivals)
        told = jax.device_get(told)
        yield told
        last = np.int32(told.token)


def _options(settings: Settings) -> Options:
    if settings.strategy == "greedy":
        return Options(np.float32(0), np.int32(0), np.float32(1))
    if settings.strategy == "beam":  # beams are ranked by the model's own distribution
        return Options(np.float32(1), np.int32(0), np.float32(1))
    return Options(np.float32(settings.temperature), np.int32(settings.top_k), np.float32(settings.top_p))
