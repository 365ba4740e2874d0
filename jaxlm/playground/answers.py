"""An answer, token by token, with what there is to say of each: the events behind the page and the panel."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

from jaxlm import chat
from jaxlm.errors import InputError
from jaxlm.loading import Loaded, start_ids
from jaxlm.playground.explain import Token, Told, read
from jaxlm.playground.settings import EXAMPLES, Settings
from jaxlm.playground.steps import capacity, take_steps
from jaxlm.sample import beam_search
from jaxlm.tokenizers import Tokenizer


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


def can_chat(model: Loaded) -> bool:
    """Whether the model has a form to put questions in."""
    return getattr(model.tokenizer, "chat_template", None) is not None or model.template is not None


def example_prompt(models: Iterable[Loaded]) -> str:
    """The first of EXAMPLES in which all models know every piece; else the first."""

    def known(tokenizer: Tokenizer, text: str) -> bool:
        try:
            return not _unknown(tokenizer, tokenizer.encode(text))
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
        stopped: asked before each `steps.CHUNK` tokens of the prompt and before each new one, and by a beam search as
            it says; True, which it then has to stay, ends the answer there.

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
    pieces = model.tokenizer.encode(prompt)
    if n := _unknown(model.tokenizer, pieces):
        yield Note(f"this model does not know {n} of the prompt's {len(pieces)} pieces", lasts=True)


def _unknown(tokenizer: Tokenizer, pieces: list[int]) -> int:
    """How many of a text's ids stand for what is no token."""
    unknown = tokenizer.unk_id
    # Some have one token for this and the end of a text, and know every text.
    return 0 if unknown is None or unknown == tokenizer.eot_id else pieces.count(unknown)


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


class _Clock:
    """Seconds of an answer's own, from now on: it stands while others do their work."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self._start

    @contextmanager
    def stopped(self) -> Iterator[None]:
        left = time.perf_counter()
        yield
        self._start += time.perf_counter() - left


def _events(model: Loaded, ids: list[int], settings: Settings, stopped: Callable[[], bool]) -> Iterator[Event]:
    clock = _Clock()
    forced: tuple[int, ...] = ()
    if settings.strategy == "beam":
        with clock.stopped():
            yield Note(f"searching with {settings.beams} beams")
        best = beam_search(
            model.cfg, model.params, ids, n_beams=settings.beams, max_new_tokens=settings.max_new_tokens,
            stop_ids=model.stop_ids, tokenizer=model.tokenizer, stopped=stopped,
        )[0]  # fmt: skip
        forced = tuple(best.tokens)
        if not forced:
            yield End("stopped" if stopped() else "error", 0, math.nan, clock.seconds(), math.nan)
            return
    untold: list[Told] = []
    seen: list[float] = []  # surprise of each token
    first_s, rest, reason = math.nan, "", ""  # there is a reason as soon as all tokens have come

    def new_ids() -> Iterator[int]:
        nonlocal reason
        for told in take_steps(model, ids, settings, forced, stopped):
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
                first_s = clock.seconds()
            last = i == len(untold) - 1
            token = int(told.token)
            shown = read(told, text if last else "", model.tokenizer, before, ends=token in model.stop_ids)
            before = token
            seen.append(-float(told.log_prob))
            with clock.stopped():
                yield shown
        untold.clear()
    for told in untold:  # a stop token after which the tokenizer had nothing left to say
        seen.append(-float(told.log_prob))
        first_s = clock.seconds() if math.isnan(first_s) else first_s
        yield read(told, "", model.tokenizer, before, ends=True)
    perplexity = math.exp(min(sum(seen) / len(seen), 700)) if seen else math.nan
    yield End(reason, len(seen), first_s, clock.seconds(), perplexity, rest)
