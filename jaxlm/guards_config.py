"""What ends a training that goes wrong: the options of the guards. Loads no jax.

A guard changes no result, only whether there is one: none of these options is part of a stage's identity.
"""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from jaxlm._frozen import Frozen, Positive


class GuardOptions(Frozen):
    """When to give up on a run: a loss that leaps, a step that does not come back."""

    spike_factor: float = Field(
        0.0, ge=0, description="end the run at a loss above this many times the median of the last ones; 0: never"
    )
    spike_window: Positive = Field(32, description="how many of the last losses the median is of")
    hang_factor: float = Field(
        50.0, ge=0, description="end the run when a step takes this many times the median step; 0: never"
    )
    hang_seconds: float = Field(300.0, gt=0, description="and no sooner than after this long, for a busy machine")

    @model_validator(mode="after")
    def _above_the_usual(self) -> Self:
        for name in ("spike_factor", "hang_factor"):
            if 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be above 1, or 0 for none")
        return self
