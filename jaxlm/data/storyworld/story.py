"""Stories told at random, their exact probability read back from the text, and every sentence that could come next."""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from jaxlm.data.storyworld.grammar import Slots, State, next_sentence
from jaxlm.data.storyworld.world import PRONOUNS, World
from jaxlm.errors import InputError

SPLITS = ("train", "val", "test")


class Story(NamedTuple):
    """A story on one line, and the natural logarithm of its probability, the choice to end it there included."""

    text: str
    log_prob: float


class Draw:
    """Makes choices at random and keeps the log-probability of those made.

    Only `random.Random.random` is used: its sequence for a seed is documented never to change.
    """

    def __init__(self, rng: random.Random) -> None:
        self._random = rng.random
        self.log_prob = 0.0

    def __call__(self, name: str, options: Sequence[str], weights: Sequence[float] | None = None) -> str:
        if len(options) == 1:
            return options[0]
        if weights is None:
            self.log_prob -= math.log(len(options))
            return options[int(self._random() * len(options))]
        total = sum(weights)
        left, chosen = self._random() * total, 0
        for index, weight in enumerate(weights):
            if weight > 0.0:
                chosen = index  # stays at the last possible one, should rounding leave something over
                left -= weight
                if left < 0.0:
                    break
        self.log_prob += math.log(weights[chosen] / total)
        return options[chosen]


class Replay:
    """Makes the choices given, and keeps their log-probability; one that was impossible raises LookupError."""

    def __init__(self, choices: Slots) -> None:
        self._choices = choices
        self.log_prob = 0.0

    def __call__(self, name: str, options: Sequence[str], weights: Sequence[float] | None = None) -> str:
        value = self._choices[name]
        if value not in options:
            raise LookupError(name)
        if weights is None:
            self.log_prob -= math.log(len(options))
        else:
            weight = weights[options.index(value)]
            if weight <= 0.0:
                raise LookupError(name)
            self.log_prob += math.log(weight / sum(weights))
        return value


class _Listed:
    """Makes the choices of a path of indices, then always the first; `next_path` is the path to try after it."""

    def __init__(self, path: tuple[int, ...]) -> None:
        self._path = path
        self._taken: list[tuple[int, int]] = []  # index chosen, number of options
        self.prob = 1.0

    def __call__(self, name: str, options: Sequence[str], weights: Sequence[float] | None = None) -> str:
        depth = len(self._taken)
        index = self._path[depth] if depth < len(self._path) else 0
        self._taken.append((index, len(options)))
        self.prob *= 1.0 / len(options) if weights is None else weights[index] / sum(weights)
        return options[index]

    def next_path(self) -> tuple[int, ...] | None:
        taken = list(self._taken)
        while taken:
            index, n_options = taken.pop()
            if index + 1 < n_options:
                return (*(i for i, _ in taken), index + 1)
        return None


def tell(world: World, rng: random.Random) -> tuple[Story, State]:
    """Tells one story of `world`, of any split; also returns how things stand at its end."""
    choose, state = Draw(rng), State()
    sentences: list[str] = []
    while True:
        sentence, state = next_sentence(world, state, choose)
        if sentence is None:
            return Story(" ".join(sentences), choose.log_prob), state
        sentences.append(sentence)


def stories(world: World, seed: int, split: str, n: int, *, start: int = 0) -> Iterator[Story]:
    """Yields stories `start` to `start + n - 1` of a split.

    Each is a pure function of (world, seed, split, index), so ranges of indices can be told in separate processes. The
    split of a story is decided by its text alone (`split_of`), so no story is in two splits.

    Args:
        world: the world, of `WORLDS` or one of your own.
        seed: any integer.
        split: "train", "val" or "test".
        n: number of stories.
        start: index of the first one.

    Raises:
        InputError: no such split.
    """
    for index in range(start, start + n):
        yield tell_for(world, keyed_rng(seed, split, "story", index), split)[0]


def tell_for(world: World, rng: random.Random, split: str) -> tuple[Story, State]:
    """Tells stories until one belongs to `split`."""
    if split not in SPLITS:
        raise InputError(f"split is {split!r}: use one of {', '.join(SPLITS)}")
    while True:
        story, state = tell(world, rng)
        if split_of(world, story.text) == split:
            return story, state


def keyed_rng(*key: str | int) -> random.Random:
    """A generator that is a pure function of the key, the same in every process and Python version."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return random.Random(int.from_bytes(digest[:16], "big"))


def split_of(world: World, text: str) -> str:
    """The split that a story belongs to: a function of the SHA-256 of its text."""
    place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
    return "test" if place < world.held_out else "val" if place < 2 * world.held_out else "train"


def sentences_of(text: str) -> list[str]:
    """The sentences of a story, each with its full stop."""
    return re.split(r"(?<=\.) ", text)


def log_prob(world: World, text: str) -> float:
    """The natural logarithm of the probability that `world` tells exactly this story and then ends it.

    Args:
        world: the world.
        text: one story, as `stories` gives it.

    Raises:
        InputError: the text is no story of this world; names the first sentence that could not come there.
    """
    total, state = 0.0, State()
    sentences = sentences_of(text)
    for index, sentence in enumerate(sentences):
        step = read_sentence(world, state, sentence)
        if step is None:
            raise InputError(
                f"sentence {index + 1} of the story, {sentence!r}, cannot come there in the world {world.name!r}: "
                "give a story of this world unchanged"
            )
        total, state = total + step[0], step[1]
    ending = Replay({"end": "end"})
    try:
        next_sentence(world, state, ending)
    except LookupError:
        raise InputError(
            f"the story stops after sentence {len(sentences)}, where the world {world.name!r} always goes on: "
            "give the whole story"
        ) from None
    return total + ending.log_prob


def floor(told: Iterable[Story]) -> float:
    """Total nats of the stories, ends included: what a model that knows the world's probabilities pays for them."""
    return -math.fsum(story.log_prob for story in told)


def read_sentence(world: World, state: State, sentence: str) -> tuple[float, State] | None:
    """Reads the choices back from a sentence: its log-probability and the state after it, None where it cannot come."""
    shape, words = _shape(world, sentence)
    for kind, wording, slots in world.readings.get(shape, ()):
        choices = dict(zip(slots, words, strict=True))
        form = "pronoun" if choices.get("who") in PRONOUNS else "name"
        if form == "pronoun":
            choices["who"] = state.subject
        replay = Replay({"end": "more", "kind": kind, "wording": wording, "form": form, **choices})
        try:
            again, after = next_sentence(world, state, replay)
        except LookupError:
            continue
        if again == sentence:
            return replay.log_prob, after
    return None


def next_sentences(world: World, state: State) -> Iterator[tuple[float, str | None, State]]:
    """Yields every sentence that can come next (None: the story ends), with its probability and the state after it."""
    path: tuple[int, ...] | None = ()
    while path is not None:
        choose = _Listed(path)
        sentence, after = next_sentence(world, state, choose)
        path = choose.next_path()
        if choose.prob > 0.0:
            yield choose.prob, sentence, after


def words_of(text: str) -> list[str]:
    """Words and punctuation marks, case kept: the tokens of a story."""
    return re.findall(r"\w+|[^\w\s]", text)


def _shape(world: World, sentence: str) -> tuple[str, list[str]]:
    """The sentence with the words that fill slots replaced by their classes, and those words."""
    classes = world.class_of
    words = re.split(r"(\w+)", sentence)
    shape = "".join(f"<{classes[word]}>" if word in classes else word for word in words)
    return shape, [word for word in words if word in classes]
