"""Questions on how things stand at the end of a story, each with one right answer, and how trivial strategies do."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from jaxlm.data.storyworld.grammar import State
from jaxlm.data.storyworld.story import keyed_rng, tell_for, words_of
from jaxlm.data.storyworld.world import World


class Question(NamedTuple):
    """A question on a story's last state. Every text is on one line.

    Attributes:
        type: one of `world.questions`.
        story: the story.
        prompt: the story and the question, to its question mark.
        answer: the right answer, worded exactly like a sentence of stories.
        candidates: the answers of this form that the story makes possible, the right one among them.
    """

    type: str
    story: str
    prompt: str
    answer: str
    candidates: tuple[str, ...]


class _Form(NamedTuple):
    """A type of question: its wording, that of its answer, and what it may be asked about.

    In the wordings {0} is the subject asked about, {1} the value that answers, {2} what `also` says of the subject.
    """

    ask: str
    answer: str
    subjects: Callable[[State], Sequence[str]]
    truth: Callable[[State, str], str]
    options: str  # the class of words that answer it
    also: Callable[[State, str], str] = lambda state, subject: ""


FORMS: dict[str, _Form] = {
    "where": _Form("Where was {0}?", "{0} was in the {1}.", lambda s: s.people, State.place, "places"),
    "with": _Form("Who did the {0} belong to?", "The {0} belonged to {1}.", lambda s: s.things, State.holder, "names"),
    "hue": _Form("How did the {0} look?", "The {0} still looked {1}.", lambda s: s.things, State.colour, "colours"),
    "got": _Form(
        "What did {0} get last?",
        "{0} last got the {1}.",
        lambda s: [who for who in s.people if s.last_got(who)],
        State.last_got,
        "things",
    ),
    "found": _Form(
        "Where was the {0}?",
        "The {0} stayed with {2} over in the {1}.",
        lambda s: s.things,
        lambda s, thing: s.place(s.holder(thing)),
        "places",
        State.holder,
    ),
    "felt": _Form(
        "How did {0} feel?",
        "{0} still felt {1}.",
        lambda s: [who for who in s.people if s.mood(who)],
        State.mood,
        "moods",
    ),
}


def questions(world: World, seed: int, split: str, n: int, *, start: int = 0) -> Iterator[Question]:
    """Yields questions `start` to `start + n - 1`, their types in turn, each on a new story of the split.

    Each is a pure function of (world, seed, split, index). The stories are of the same split as those of
    `stories(world, ..., split, ...)` but drawn apart from them.

    Args:
        world: the world, of `WORLDS` or one of your own.
        seed: any integer.
        split: "train", "val" or "test".
        n: number of questions.
        start: index of the first one.

    Raises:
        InputError: no such split.
    """
    for index in range(start, start + n):
        rng = keyed_rng(seed, split, "question", index)
        kind = world.questions[index % len(world.questions)]
        question = None
        while question is None:
            told, state = tell_for(world, rng, split)
            question = _question(world, rng, kind, told.text, state)
        yield question


def _question(world: World, rng: random.Random, kind: str, story: str, state: State) -> Question | None:
    """A question of this type on the story; None where it has none worth asking."""
    form = FORMS[kind]
    mentions = [word for word in words_of(story) if word in getattr(world, form.options)]
    options, subjects = list(dict.fromkeys(mentions)), form.subjects(state)
    if not subjects or len(options) < world.min_candidates:
        return None
    subject = subjects[int(rng.random() * len(subjects))]
    truth = form.truth(state, subject)
    if truth == mentions[-1] and rng.random() >= world.keep_last:
        return None
    also = form.also(state, subject)
    return Question(
        kind,
        story,
        f"{story} Question: {form.ask.format(subject)}",
        form.answer.format(subject, truth, also),
        tuple(form.answer.format(subject, option, also) for option in options),
    )


def baselines(train: Iterable[Question], test: Iterable[Question]) -> dict[str, dict[str, float]]:
    """The accuracy on `test`, by type of question, of strategies that need no understanding.

    Args:
        train: questions to learn from, for the most frequent answer.
        test: questions to answer.

    Returns:
        For each type in `test` the accuracy of answering with the candidate whose own word the story mentions last
        ("last mention"), or first ("first mention"), or that answers the most questions of this type in `train` ("most
        frequent"), and the expected accuracy of a candidate at random ("random").
    """
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for question in train:
        seen[question.type][_own_words(question)[question.answer]] += 1
    scores: dict[str, list[tuple[float, float, float, float]]] = defaultdict(list)
    for question in test:
        words = _own_words(question)
        right, count = words[question.answer], seen[question.type]
        mentions = [word for word in words_of(question.story) if word in words.values()]
        frequent = max(words.values(), key=lambda word: (count[word], word))
        scores[question.type].append(
            (mentions[-1] == right, mentions[0] == right, frequent == right, 1.0 / len(question.candidates))
        )
    names = ("last mention", "first mention", "most frequent", "random")
    return {
        kind: {name: sum(column) / len(rows) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
        for kind, rows in scores.items()
    }


def _own_words(question: Question) -> dict[str, str]:
    """For each candidate the word that the others have not."""
    columns = list(zip(*map(words_of, question.candidates), strict=True))
    own = next(column for column in columns if len(set(column)) > 1)
    return dict(zip(question.candidates, own, strict=True))


def vocabulary(world: World) -> list[str]:
    """Every word and mark of the world's stories, questions and answers ("Answer:" too), sorted."""
    texts = [wording for _, ways in world.wordings for wording, _ in ways]
    texts += [text for kind in world.questions for text in (FORMS[kind].ask, FORMS[kind].answer)]
    fixed = re.sub(r"{\w+}", " ", " ".join([*texts, "Question: Answer:"]))
    return sorted({*words_of(fixed), *world.class_of})
