"""The built-in corpus: short stories of a small world in which every choice's probability is known."""

from jaxlm.data.storyworld.question import Question, baselines, questions, vocabulary
from jaxlm.data.storyworld.story import Story, floor, log_prob, stories
from jaxlm.data.storyworld.world import WORLDS, World

__all__ = [
    "WORLDS",
    "Question",
    "Story",
    "World",
    "baselines",
    "floor",
    "log_prob",
    "questions",
    "stories",
    "vocabulary",
]
