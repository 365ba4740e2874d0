"""An answer, token by token, with what there is to say of each: the loop behind the page and the panel.

Two programs serve every prompt and every setting: one takes up to CHUNK tokens into the cache, one makes the next token
and tells its figures. Once both are compiled, nothing that a person does waits for the compiler, but for beam search,
whose result is then read through the same second program.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from jax.typing import ArrayLike

from jaxlm import chat
from jaxlm.config import ModelConfig
from jaxlm.errors import InputError
from jaxlm.loading import Loaded, start_ids
from jaxlm.model import Cache, Params, forward, init_cache, unembed
from jaxlm.playground.explain import Token, Told, read, tell
from jaxlm.playground.settings import EXAMPLES, Settings
from jaxlm.sample import beam_search, filter_logits, sample_token
from jaxlm.tokenizers import Tokenizer

CHUNK = 32  # tokens of a prompt that are taken in together
CONTEXT = 1024  # prompt and answer together, unless the model's own context is shorter
N_RIVALS = 8


@dataclass(frozen=True)
class Note:
    """Something to tell beside an answer.

    Attributes:
        text: part of a sentence.
        lasts: it is true of the whole answer; otherwise it is shown while nothing else comes.
    """

    text: str
    lasts: bool = False


@dataclass(frozen=True)
class End:
    """The end of an answer.

    Attributes:
        reason: stop (the model ended it), length (max_new_tokens), stopped (the person did), or error (the logits left
            nothing to choose).
        tokens: how many there were.
        first_s: seconds of this model's own until the first; seconds: until the last. What another model beside it
            took, and whoever reads the events, is not counted.
        perplexity: exp of the mean surprise of its tokens under the model itself; NaN without any.
        rest: text that only the end completes, as the bytes of a cut character.
    """

    reason: str
    tokens: int
    first_s: float
    seconds: float
    perplexity: float
    rest: str = ""


Event = Token | Note | End


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
    for _ in _steps(model, ids, Settings(max_new_tokens=1), (), lambda: False):
        pass
    return time.perf_counter() - start


def can_chat(model: Loaded) -> bool:
    """Whether the model has a form to put questions in."""
    return getattr(model.tokenizer, "chat_template", None) is not None or model.template is not None


def example_prompt(models: Iterable[Loaded]) -> str:
    """The first of EXAMPLES in which all models know every piece; else the first."""

    def known(tokenizer: Tokenizer, text: str) -> bool:
        try:
            return not _unknown(tokenizer, text)
        except InputError:  # a character tokenizer refuses what it does not know
            return False

    tokenizers = [model.tokenizer for model in models]
    return next((text for text in EXAMPLES if all(known(one, text) for one in tokenizers)), EXAMPLES[0])


def prompt_ids(model: Loaded, prompt: str, settings: Settings) -> list[int]:
    """The ids that an answer continues; a question to a model that cannot chat is a text like any other.

    Raises:
        InputError: an empty prompt that nothing can start, or a prompt without room for an answer.
    """
    if settings.chat and can_chat(model):
        ids = chat.chat_ids(model, [{"role": "user", "content": prompt}])
    else:
        asked = model.tokenizer.encode(prompt)
        ids = start_ids(model.tokenizer, empty=not asked) + asked
    if not ids:
        raise InputError("prompt: it is empty, and this model has no token that starts a text; write something.")
    if len(ids) + settings.max_new_tokens > capacity(model.cfg):
        raise InputError(
            f"prompt: its {len(ids)} tokens and {settings.max_new_tokens} new ones are more than the "
            f"{capacity(model.cfg)} that there is room for; shorten one of them."
        )
    return ids


def answer(
    model: Loaded, prompt: str, settings: Settings | None = None, *, stopped: Callable[[], bool] = lambda: False
) -> Iterator[Event]:
    """What the model says, as it comes.

    Greedy and sampled answers have the tokens of `jaxlm.generate(cfg, params, [ids], key=jax.random.key(seed))` with
    the same options (but where two candidates tie within rounding, since the shapes differ); beam search those of
    `beam_search`, shown when the search has ended.

    Args:
        model: from `jaxlm.loading.load_model`.
        prompt: a text to continue, or with `settings.chat` a question.
        settings: how; the defaults when empty.
        stopped: asked before each CHUNK of the prompt and before each token, and by a beam search as it says; True,
            which it then has to stay, ends the answer there.

    Yields:
        Notes and Tokens, and one End.

    Raises:
        InputError: as `prompt_ids`; at the call, before the first event is asked for.
    """
    settings = Settings() if settings is None else settings
    ids = prompt_ids(model, prompt, settings)
    return chain(_notes(model, prompt, settings), _events(model, ids, settings, stopped))


def _notes(model: Loaded, prompt: str, settings: Settings) -> Iterator[Note]:
    """What the model sees otherwise than it was asked."""
    # Not an error: a model before its fine-tuning is asked beside the one after it, which can chat.
    if settings.chat and not can_chat(model):
        yield Note("no chat template here, so this model goes on with the bare prompt", lasts=True)
    if n := _unknown(model.tokenizer, prompt):
        pieces = len(model.tokenizer.encode(prompt))
        yield Note(f"this model does not know {n} of the prompt's {pieces} pieces", lasts=True)


def _unknown(tokenizer: Tokenizer, text: str) -> int:
    """How many pieces of a text are no token."""
    unknown = tokenizer.unk_id
    if unknown is None or unknown == tokenizer.eot_id:  # some have one token for both, and know every text
        return 0
    return tokenizer.encode(text).count(unknown)


def side_by_side(
    models: Mapping[str, Loaded], prompt: str, settings: Settings | None = None, *,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[str, Event]]:  # fmt: skip
    """The answers of several models, an event of each in turn, with the model's name.

    Raises:
        InputError: as `answer`, of any of them.
    """
    running = {name: answer(model, prompt, settings, stopped=stopped) for name, model in models.items()}
    return _in_turn(running)


def _in_turn(running: dict[str, Iterator[Event]]) -> Iterator[tuple[str, Event]]:
    while running:
        for name in list(running):
            event = next(running[name], None)
            if event is None:
                del running[name]
            else:
                yield name, event


def failed(error: Exception) -> str:
    """One sentence for a person, of an error that nobody foresaw, such as memory that ran out; the log has it whole."""
    logging.getLogger(__name__).error("an answer failed", exc_info=error)
    what = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]]).rstrip(".")
    return f"the answer failed ({what}); if memory ran out, use fewer beams or a shorter answer."


def _events(model: Loaded, ids: list[int], settings: Settings, stopped: Callable[[], bool]) -> Iterator[Event]:
    start = time.perf_counter()
    forced: tuple[int, ...] = ()
    if settings.strategy == "beam":
        left = time.perf_counter()
        yield Note(f"searching with {settings.beams} beams")
        start += time.perf_counter() - left
        best = beam_search(
            model.cfg, model.params, ids, n_beams=settings.beams, max_new_tokens=settings.max_new_tokens,
            stop_ids=model.stop_ids, tokenizer=model.tokenizer, stopped=stopped,
        )[0]  # fmt: skip
        forced = tuple(best.tokens)
        if not forced:
            yield End("stopped" if stopped() else "error", 0, math.nan, time.perf_counter() - start, math.nan)
            return
    untold: list[Told] = []
    seen: list[float] = []  # surprise of each token
    first_s, rest, reason = math.nan, "", ""  # there is a reason as soon as all tokens have come

    def new_ids() -> Iterator[int]:
        nonlocal reason
        for told in _steps(model, ids, settings, forced, stopped):
            if told is None:
                reason = "stopped"
                return
            token = int(told.token)
            if token < 0:
                reason = "error"
                return
            untold.append(told)
            if token in model.stop_ids:
                reason = "stop"
                return
            yield token
        reason = "length"

    before = ids[-1]
    # The prompt goes first, because how a token is written depends on those before it.
    for text in model.tokenizer.pieces(chain(ids, new_ids())):
        if not untold:
            rest = text if reason else ""
            continue
        for i, told in enumerate(untold):
            if not seen:
                first_s = time.perf_counter() - start
            last = i == len(untold) - 1
            token = int(told.token)
            shown = read(told, text if last else "", model.tokenizer, before, ends=token in model.stop_ids)
            before = token
            seen.append(-float(told.log_prob))
            left = time.perf_counter()
            yield shown
            start += time.perf_counter() - left  # what others do meanwhile
        untold.clear()
    for told in untold:  # a stop token after which the tokenizer had nothing left to say
        seen.append(-float(told.log_prob))
        first_s = time.perf_counter() - start if math.isnan(first_s) else first_s
        yield read(told, "", model.tokenizer, before, ends=True)
    perplexity = math.exp(min(sum(seen) / len(seen), 700)) if seen else math.nan
    yield End(reason, len(seen), first_s, time.perf_counter() - start, perplexity, rest)


def _steps(
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
