"""How the figures of reports and of analysis look: colours, and settings for `matplotlib.rc_context`. Loads no jax."""

from __future__ import annotations

from typing import Any

# name -> (on a light page, on a dark page). The light ones are drawn and must all differ: `inline_svg` finds them.
COLORS: dict[str, tuple[str, str]] = {
    "paper": ("#fefefe", "#1b1f24"),
    "ink": ("#1f2430", "#e4e7eb"),
    "muted": ("#5d6675", "#9aa4b2"),
    "grid": ("#e3e6ea", "#333a43"),
    "train": ("#8fa8c8", "#57718f"),
    "val": ("#1859b5", "#6cabff"),
    "floor": ("#0f8a5f", "#3ecf97"),
    "baseline": ("#c2570c", "#ff9d57"),
    "before": ("#b9c0ca", "#5b6572"),
    "after": ("#5b93e6", "#3f78cf"),
}
LIGHT = {name: light for name, (light, _) in COLORS.items()}

STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.edgecolor": LIGHT["muted"],
    "axes.labelcolor": LIGHT["ink"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": LIGHT["paper"],
    "figure.facecolor": LIGHT["paper"],
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.labelcolor": LIGHT["ink"],
    "text.color": LIGHT["ink"],
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "svg.fonttype": "none",  # text stays text: it can be read aloud, searched and copied
    "svg.hashsalt": "jaxlm",  # the same figure gives the same file
}
