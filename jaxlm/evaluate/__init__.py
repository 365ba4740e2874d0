"""Measuring a model and telling people about it.

The loss of a split (`perplexity`), right answers (`accuracy`), pictures (`plots`) and the report of a run (`report`).
Only `perplexity` needs jax; its names are resolved at first use, so that a flow can draw and report without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jaxlm.evaluate.accuracy import TypeAccuracy, by_type, exact_match, fraction_right, normalize, wilson_interval
from jaxlm.evaluate.report import ReportData, ReportPaths, write_report

if TYPE_CHECKING:
    from jaxlm.evaluate.perplexity import SplitLoss, bits_per_byte, eval_step, split_loss

_NEEDS_JAX = ("SplitLoss", "bits_per_byte", "eval_step", "split_loss")

__all__ = [
    "ReportData",
    "ReportPaths",
    "SplitLoss",
    "TypeAccuracy",
    "bits_per_byte",
    "by_type",
    "eval_step",
    "exact_match",
    "fraction_right",
    "normalize",
    "split_loss",
    "wilson_interval",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name in _NEEDS_JAX:
        from jaxlm.evaluate import perplexity as module

        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
