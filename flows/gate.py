"""The gate: bounds on the evaluation's figures, before anything is published."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from jaxlm.errors import DivergedError, InputError
from jaxlm.launch_config import BOUND

_COMPARE = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}


@task(name="gate", cache_policy=NO_CACHE, persist_result=False, task_run_name="gate: {bounds}")
def gate(results: dict[str, Any], bounds: list[str]) -> list[str]:
    """Checks the figures of an evaluation. Returns one line for each bound, all kept.

    Raises:
        DivergedError: a figure misses its bound (exit code 70). A retry would find the same figure.
        InputError: the evaluation has no such figure.
    """
    return check(results, bounds)


def check(results: Mapping[str, Any], bounds: Sequence[str]) -> list[str]:
    """As `gate`, outside Prefect."""
    kept: list[str] = []
    missed: list[str] = []
    for bound in bounds:
        match = BOUND.fullmatch(bound)
        assert match is not None  # GateConfig has checked it
        name, sign, limit = match.groups()
        value = figure(results, name)
        line = f"{name} is {value:.6g}, and gate.bounds wants {name} {sign} {float(limit):g}"
        # A comparison with NaN is false: such a figure keeps no bound.
        (kept if _COMPARE[sign](value, float(limit)) else missed).append(line)
    if missed:
        raise DivergedError(f"gate: {'; '.join(missed)}; nothing was published; train longer or change the bound.")
    return kept


def figure(results: Mapping[str, Any], name: str) -> float:
    """A figure by its dotted name.

    Raises:
        InputError: there is none.
    """
    value: Any = results
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if not _is_number(value):
        known = sorted(key for key, item in results.items() if _is_number(item))
        raise InputError(f"gate.bounds: the evaluation has no figure {name}; it has {', '.join(known) or 'none'}.")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
