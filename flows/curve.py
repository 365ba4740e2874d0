"""A loss curve as a small SVG picture: the flow's process has no plotting library, and loads none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH, HEIGHT = 640, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 28, 34
_MAX_POINTS = 400
_TRAIN, _VAL, _INK, _GRID = "#8fa8c8", "#1859b5", "#5d6675", "#e3e6ea"


def loss_svg(rows: Sequence[Mapping[str, Any]]) -> str:
    """Training and validation loss by step.

    Args:
        rows: with `step`, and `loss` or `val_loss` (nats per token), by step.

    Returns:
        An `<svg>` element; empty when there are no two points of a curve.
    """
    train, val = _points(rows, "loss"), _points(rows, "val_loss")
    every = train + val
    if max(len(train), len(val)) < 2:
        return ""
    x0, x1 = min(x for x, _ in every), max(x for x, _ in every)
    y0, y1 = min(y for _, y in every), max(y for _, y in every)
    y1 = y1 if y1 > y0 else y0 + 1.0

    def place(x: float, y: float) -> str:
        across = _LEFT + (x - x0) / max(x1 - x0, 1) * (WIDTH - _LEFT - _RIGHT)
        down = _TOP + (y1 - y) / (y1 - y0) * (HEIGHT - _TOP - _BOTTOM)
        return f"{across:.1f},{down:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="sans-serif" font-size="12" fill="{_INK}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fefefe"/>',
    ]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        level = y0 + share * (y1 - y0)
        across, down = place(x0, level).split(",")
        parts.append(f'<path d="M{across},{down}H{WIDTH - _RIGHT}" stroke="{_GRID}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{float(down) + 4:.1f}" text-anchor="end">{level:.3g}</text>')
    for x, anchor in ((x0, "start"), (x1, "end")):
        across = place(x, y0).split(",")[0]
        parts.append(f'<text x="{across}" y="{HEIGHT - 12}" text-anchor="{anchor}">{x:,.0f}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 12}" text-anchor="middle">step</text>')
    for points, color, width, name, at in ((train, _TRAIN, 1.2, "training", 0), (val, _VAL, 1.8, "validation", 90)):
        if points:
            path = " ".join(place(x, y) for x, y in points)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}"/>')
            parts.append(f'<text x="{_LEFT + at}" y="16" fill="{color}">{name} {points[-1][1]:.3f}</text>')
    return "".join([*parts, "</svg>"])


def _points(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """(step, loss), thinned: the last point always stays."""
    found = [(float(row["step"]), float(row[name])) for row in rows if _finite(row.get(name))]
    stride = -(-len(found) // _MAX_POINTS) or 1
    return found[::-1][::stride][::-1]


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
