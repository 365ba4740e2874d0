"""Questions: right answers by a reader that shares no code with the generator, and baselines by hand."""

from __future__ import annotations

import re

import pytest

from jaxlm.data.storyworld import Question, World, baselines, questions, vocabulary
from jaxlm.data.storyworld.grammar import State
from jaxlm.data.storyworld.story import read_sentence, sentences_of, split_of, words_of


def _facts(story: str) -> dict[str, dict[str, str]]:
    """Reads a story with patterns of its own: the last place, holder, colour and mood told of each."""
    at: dict[str, str] = {}
    holder: dict[str, str] = {}
    got: dict[str, str] = {}
    colour: dict[str, str] = {}
    mood: dict[str, str] = {}
    last = ""
    for sentence in sentences_of(story):
        text = re.sub(r"^(Then|Later) ", "", sentence)
        text = re.sub(r"^(She|He)\b", last, text)
        last = text.split()[0]
        if found := re.match(r"(?!The )(\w+) .*\b(?:in|to) the (\w+)\.$", text):
            at[found[1]] = found[2]
        if found := re.match(r"A (\w+) belonged to (\w+); the (\w+) first looked (\w+)\.$", text):
            assert found[1] == found[3]
            holder[found[1]], colour[found[1]] = found[2], found[4]
        gave = r"\w+ (?:gave|sent|passed|handed) the (\w+) (?:away|off|over|on) to (\w+); "
        gave += r"\2 (?:gladly|soon) took the \1\.$"
        if found := re.match(gave, text):
            holder[found[1]], got[found[2]] = found[2], found[1]
        if found := re.match(r"Thanks to \w+ the (\w+) now looked (\w+)\.$", text):
            colour[found[1]] = found[2]
        if found := re.match(r"(\w+) (?:now|suddenly|still) felt (\w+)\.$", text):
            mood[found[1]] = found[2]
    return {"at": at, "holder": holder, "got": got, "colour": colour, "mood": mood}


def test_answers_are_right(asked: list[Question]) -> None:
    for question in asked:
        facts = _facts(question.story)
        text = question.prompt.removeprefix(question.story + " Question: ")
        if found := re.fullmatch(r"Where was ([A-Z]\w+)\?", text):
            expected = f"{found[1]} was in the {facts['at'][found[1]]}."
        elif found := re.fullmatch(r"Where was the (\w+)\?", text):
            who = facts["holder"][found[1]]
            expected = f"The {found[1]} stayed with {who} over in the {facts['at'][who]}."
        elif found := re.fullmatch(r"Who did the (\w+) belong to\?", text):
            expected = f"The {found[1]} belonged to {facts['holder'][found[1]]}."
        elif found := re.fullmatch(r"How did the (\w+) look\?", text):
            expected = f"The {found[1]} still looked {facts['colour'][found[1]]}."
        elif found := re.fullmatch(r"How did ([A-Z]\w+) feel\?", text):
            expected = f"{found[1]} still felt {facts['mood'][found[1]]}."
        else:
            found = re.fullmatch(r"What did (\w+) get last\?", text)
            assert found, text
            expected = f"{found[1]} last got the {facts['got'][found[1]]}."
        assert question.answer == expected, question.prompt


def test_form(world: World, asked: list[Question]) -> None:
    words, longest = set(vocabulary(world)), {"small": 17, "rich": 19}[world.name]
    assert {"Question", "Answer", ":", "?"} <= words
    for index, question in enumerate(asked):
        assert question.type == world.questions[index % len(world.questions)]
        assert question.prompt.startswith(question.story + " Question: ")
        assert question.prompt.endswith("?")
        assert "Answer" not in question.prompt
        assert question.answer in question.candidates
        assert len(set(question.candidates)) == len(question.candidates) >= world.min_candidates
        assert set(words_of(question.prompt + " ".join(question.candidates))) <= words
        assert len(words_of(f"{question.prompt} Answer: {question.answer}")) - len(words_of(question.story)) <= longest


def test_answers_are_sentences_that_stories_tell(world: World, asked: list[Question]) -> None:
    """Only the right answer could be told next: telling stories already teaches how to answer."""
    for question in asked[:200]:
        state = State()
        for sentence in sentences_of(question.story):
            step = read_sentence(world, state, sentence)
            assert step is not None
            state = step[1]
        state = state._replace(told=(), n_body=0)  # a question may repeat the last sentence, and follow a last one
        for candidate in question.candidates:
            can_follow = read_sentence(world, state, candidate) is not None
            assert can_follow == (candidate == question.answer)


def test_candidates_are_what_the_story_names(asked: list[Question]) -> None:
    for question in asked:
        if question.type == "with":
            people = set(_facts(question.story)["at"])
            expected = {f"{question.answer.rsplit(' ', 1)[0]} {who}." for who in people}
            assert set(question.candidates) == expected


def test_questions_are_a_function_of_seed_split_and_index(world: World) -> None:
    several = list(questions(world, 3, "train", 9))
    assert list(questions(world, 3, "train", 4, start=5)) == several[5:]


def test_stories_are_of_the_split(world: World, asked: list[Question]) -> None:
    held_out = list(questions(world, 7, "test", 8))
    assert all(split_of(world, question.story) == "test" for question in held_out)
    assert not {question.story for question in held_out} & {question.story for question in asked}
    assert len({question.story for question in asked}) == len(asked)


def test_no_trivial_strategy_answers_half(world: World, asked: list[Question]) -> None:
    # The most frequent answers are counted on other questions: with a hundred a type and 32 names to draw on, counts of
    # the very questions asked would remember some of their answers.
    others = list(questions(world, 8, "train", len(asked)))
    for kind, scores in baselines(others, asked).items():
        assert max(scores.values()) <= 0.5, (kind, scores)


def test_baselines_by_hand() -> None:
    def where(story: str, who: str, truth: str, *places: str) -> Question:
        answers = {place: f"{who} was in the {place}." for place in places}
        return Question("where", story, f"{story} Question: Where was {who}?", answers[truth], tuple(answers.values()))

    train = [where("Ann was in the barn. Bob was in the mill.", "Ann", "barn", "barn", "mill")]
    test = [
        # The barn is first, the mill last, and the mill again is right.
        where("Ann was in the barn. Bob was in the mill.", "Bob", "mill", "barn", "mill"),
        # The mill is first and last, the cave is right; the barn, the most frequent in training, is not among them.
        where("Ann was in the mill. Bob was in the cave. Cy was in the park. Ann was in the mill.", "Bob", "cave",
              "mill", "cave", "park", "hall"),
        where("Ann was in the barn. Bob was in the cave. Ann was in the cave. Bob was in the barn.", "Bob", "barn",
              "cave", "barn"),
    ]  # fmt: skip
    scores = baselines(train, test)["where"]
    assert scores["last mention"] == pytest.approx(2 / 3)
    assert scores["first mention"] == pytest.approx(1 / 3)
    assert scores["random"] == pytest.approx((1 / 2 + 1 / 4 + 1 / 2) / 3)
    # "barn" for the first and the third; of the unseen words of the second the last in the alphabet, "park".
    assert scores["most frequent"] == pytest.approx(1 / 3)
