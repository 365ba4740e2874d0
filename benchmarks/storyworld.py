"""The figures of docs/storyworld.md: lengths, recaps, floors, an order-5 model, and strategies that need no model.

Prints the rows of its tables for each world, told anew; seed 0. A few minutes of one core; needs no accelerator.

Usage:

    python benchmarks/storyworld.py [--stories 10000] [--questions 600] [--world small rich]
"""

from __future__ import annotations

import argparse
import math
import random
from collections import Counter
from collections.abc import Sequence

from jaxlm.data.storyworld import WORLDS, World, baselines, floor, questions, stories, vocabulary
from jaxlm.data.storyworld.grammar import RECAPS, State, next_sentence
from jaxlm.data.storyworld.ngram import fit
from jaxlm.data.storyworld.story import Draw, words_of

ORDER = 5
N_VALIDATION = 500
N_SENTENCES_FROM = 1500  # stories whose sentences are counted
STRATEGIES = ("last mention", "first mention", "most frequent", "random")


class _Counting(Draw):
    """Draws, and counts the kinds of sentence drawn."""

    def __init__(self, rng: random.Random, kinds: Counter[str]) -> None:
        super().__init__(rng)
        self.kinds = kinds

    def __call__(self, name: str, options: Sequence[str], weights: Sequence[float] | None = None) -> str:
        choice = super().__call__(name, options, weights)
        if name == "kind":
            self.kinds[choice] += 1
        return choice


def share_of_recaps(world: World) -> float:
    """Of all sentences, those that restate a fact: 0 to 1."""
    kinds: Counter[str] = Counter()
    for index in range(N_SENTENCES_FROM):
        state, choose = State(), _Counting(random.Random(index), kinds)
        sentence: str | None = ""
        while sentence is not None:
            sentence, state = next_sentence(world, state, choose)
    return sum(kinds[kind] for kind in RECAPS) / sum(kinds.values())


def describe(world: World, n_stories: int) -> None:
    """Prints lengths and losses of stories."""
    train = [story.text for story in stories(world, 0, "train", n_stories)]
    val = list(stories(world, 0, "val", N_VALIDATION))
    lengths = [len(words_of(text)) for text in train]
    known = floor(val)
    n_tokens = sum(len(words_of(story.text)) + 1 for story in val)
    n_characters = sum(len(story.text) + 1 for story in val)
    per_character = known / n_characters
    print(f"distinct words and marks            {len(vocabulary(world))}")
    print(f"tokens: mean, most seen, bound      {sum(lengths) / n_stories:.0f}, {max(lengths)}, {world.max_tokens}")
    print(f"characters                          {sum(map(len, train)) / n_stories:.0f}")
    print(f"stories that came twice             {n_stories - len(set(train))}")
    print(f"share of recaps                     {share_of_recaps(world):.2f}")
    print(f"floor, nats per token               {known / n_tokens:.3f}")
    print(f"floor, nats; bits per character     {per_character:.3f}; {per_character / math.log(2):.3f}")
    ids = {word: index + 1 for index, word in enumerate(vocabulary(world))}
    coded = [
        [[*(ids[word] for word in words_of(text)), 0] for text in texts] for texts in (train, [s.text for s in val])
    ]
    for n in (n_stories // 2, n_stories):
        peer = fit(coded[0][:n], ORDER, vocab_size=len(ids) + 1).nats(coded[1])
        print(f"order-{ORDER} over the floor, {n:>6} stories  {peer / known:.2f}")


def ask(world: World, n_questions: int) -> None:
    """Prints how often strategies without a model are right."""
    test = list(questions(world, 0, "test", n_questions))
    train = list(questions(world, 0, "train", 5 * n_questions))
    longest = max(len(words_of(f"{q.prompt} Answer: {q.answer}")) - len(words_of(q.story)) for q in test)
    print(f"longest question and answer         {longest}")
    for kind, right in baselines(train, test).items():
        print(f"| {world.name} | {kind} | {' | '.join(f'{right[strategy]:.2f}' for strategy in STRATEGIES)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stories", type=int, default=10_000, help="training stories")
    parser.add_argument("--questions", type=int, default=600, help="test questions")
    parser.add_argument("--world", nargs="+", default=list(WORLDS), choices=list(WORLDS))
    asked = parser.parse_args()
    for name in asked.world:
        print(f"\n{name}")
        describe(WORLDS[name], asked.stories)
        ask(WORLDS[name], asked.questions)


if __name__ == "__main__":
    main()
