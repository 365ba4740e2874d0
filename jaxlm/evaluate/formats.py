"""How figures and texts are written in a report: filters of its templates. A missing figure is a dash."""

from __future__ import annotations

import math


def number(value: float | None) -> str:
    """Four figures that matter: 1.105, 12.35, 50,257."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}" if abs(value) < 1000 else f"{value:,.0f}"


def percent(value: float | None) -> str:
    """0.8125 -> 81.2 %."""
    return "–" if value is None else f"{100 * value:.1f}\u00a0%"


def signed_percent(value: float | None) -> str:
    """0.05 -> +5.0 %."""
    return "–" if value is None else f"{100 * value:+.1f}\u00a0%".replace("-", "\u2212")


def times(value: float | None) -> str:
    """2.5 -> 2.5 times, written with a cross."""
    return "–" if value is None else f"{value:.2f}\u00a0×"


def interval(bounds: tuple[float, float] | list[float] | None) -> str:
    """(0.563, 0.745) -> 56.3 to 74.5 %."""
    return "–" if bounds is None else f"{100 * bounds[0]:.1f} to {100 * bounds[1]:.1f}\u00a0%"


def count(value: float | None) -> str:
    """840123 -> 840,123."""
    return "–" if value is None else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """252.3 -> 4 min 12 s."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f}\u00a0s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}\u00a0h {minutes:02d}\u00a0min" if hours else f"{minutes}\u00a0min {rest:02d}\u00a0s"


def cell(value: object) -> str:
    """Any text as one cell of a Markdown table: markup is escaped, line ends become spaces."""
    text = " ".join(str(value).split())
    for mark in "\\`*_[]|~#":
        text = text.replace(mark, "\\" + mark)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def fenced(text: str) -> str:
    """Any text as a Markdown code block, with a fence longer than any run of back quotes in it."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"
