"""Trying models by hand: a local web page, and the same controls in a notebook, with every token's rivals."""

from jaxlm.playground.answers import End, Note, answer, side_by_side
from jaxlm.playground.explain import Rival, Token, Told, read, tell
from jaxlm.playground.find import open_models, smollm2
from jaxlm.playground.markup import tokens_html
from jaxlm.playground.settings import Settings
from jaxlm.playground.steps import warm

__all__ = [
    "End", "Note", "Rival", "Settings", "Token", "Told", "answer", "open_models", "read", "side_by_side", "smollm2",
    "tell", "tokens_html", "warm",
]  # fmt: skip
