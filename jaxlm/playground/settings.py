"""What a person sets in the playground, with its ranges: the page and the notebook's panel take both from here."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from jaxlm._frozen import Fraction, Frozen

Strategy = Literal["greedy", "sampling", "beam"]


class Settings(Frozen):
    """How an answer is made. Loads no jax."""

    strategy: Strategy = Field("sampling", description="greedy: the most likely token; beam: the most likely text")
    temperature: float = Field(0.8, ge=0, le=5, description="divides the logits; below 1 sharper, above 1 flatter")
    top_k: int = Field(0, ge=0, le=200, description="keep the k most likely tokens; 0 is off")
    top_p: Fraction = Field(0.95, description="keep the most likely tokens that make up this share; 1 is off")
    seed: int = Field(0, ge=0, lt=2**32, description="the same seed gives the same text")
    beams: int = Field(4, ge=1, le=16, description="candidates that beam search carries along")
    max_new_tokens: int = Field(64, ge=1, le=1000, description="longest answer")
    chat: bool = Field(False, description="put the prompt as a question, in the model's own chat template")


# Which settings a strategy looks at; the others are shown, and cannot be moved.
USED: dict[str, tuple[str, ...]] = {
    "greedy": (),
    "sampling": ("temperature", "top_k", "top_p", "seed"),
    "beam": ("beams",),
}


# Where there is no prompt yet: the first that a model knows whole, since some know only the words of their own world.
EXAMPLES = ("Once upon a time", "Anna lived in the barn.")


def controls() -> dict[str, dict[str, Any]]:
    """Each setting's default, range and meaning, as plain JSON values.

    Returns:
        name -> {"default", "description"}, with "choices" for the strategy and "min" and "max" for numbers.
    """
    out: dict[str, dict[str, Any]] = {}
    for name, schema in Settings.model_json_schema()["properties"].items():
        control = {"default": schema["default"], "description": schema["description"]}
        if "enum" in schema:
            control["choices"] = schema["enum"]
        if "minimum" in schema:
            control["min"] = schema["minimum"]
            control["max"] = schema.get("maximum", schema.get("exclusiveMaximum", 0) - 1)
        out[name] = control
    return out
