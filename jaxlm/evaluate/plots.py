"""The figures of a report. Each takes plain records and returns a matplotlib `Figure`, or None with nothing to show.

Figures are made without pyplot, so no window system is involved. `save_png` writes one to a file; `inline_svg` makes
one part of a web page, where colours follow the page (light or dark) through CSS variables. Loads no jax.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm._style import LIGHT, STYLE
from jaxlm.evaluate.accuracy import TypeAccuracy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_POINTS = 400  # a longer training curve is averaged down to this

Record = Mapping[str, Any]


def loss_figure(
    history: Sequence[Record],
    *,
    floor: float | None = None,
    order5: float | None = None,
    split_name: str = "validation",
) -> Figure | None:
    """Training and validation loss by tokens seen.

    Args:
        history: records of `metrics.jsonl`; those with a split, tokens and a finite loss (nats per token) are drawn.
        floor: the lowest loss that any model can reach on the validation text, where it is known.
        order5: the validation loss of an order-5 model.
        split_name: what the legend calls the validation curve.
    """
    return _curves(history, lambda loss: loss, "loss (nats per token)", floor, order5, split_name, zoom=False)


def perplexity_figure(
    history: Sequence[Record], *, floor: float | None = None, order5: float | None = None
) -> Figure | None:
    """exp(loss) by tokens seen, cut above so that the last part can be read; arguments as for `loss_figure`."""
    return _curves(history, _exp, "perplexity (per token)", floor, order5, "validation", zoom=True)


def accuracy_figure(table: Mapping[str, TypeAccuracy]) -> Figure | None:
    """Accuracy by question type before and after fine-tuning, with every trivial baseline as a marker."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    kinds = list(table)
    if not kinds:
        return None
    bars = [name for name in ("before", "after") if any(row[name] is not None for row in table.values())]
    strategies = sorted({name for row in table.values() for name in row["baselines"]})
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.4, 1.3 + 0.6 * len(kinds)), layout="constrained")
        axes = figure.add_subplot()
        thickness = 0.36 if len(bars) == 2 else 0.5
        for place, kind in enumerate(kinds):
            row = table[kind]
            for index, name in enumerate(bars):
                value = row[name]  # type: ignore[literal-required]
                if value is None:
                    continue
                y = place + (index - (len(bars) - 1) / 2) * thickness
                label = f"{name} fine-tuning" if place == 0 else None
                axes.barh(y, 100 * value, height=0.92 * thickness, color=LIGHT[name], label=label)
                if name == bars[-1] and row["interval"] is not None:
                    low, high = (100 * bound for bound in row["interval"])
                    axes.plot([low, high], [y, y], color=LIGHT["ink"], linewidth=1.1, solid_capstyle="butt")
                    axes.annotate(
                        f"{100 * value:.0f} %",
                        (1.01, y),
                        xycoords=("axes fraction", "data"),
                        va="center",
                        color=LIGHT["ink"],
                    )
        for index, strategy in enumerate(strategies):
            points = [
                (100 * row["baselines"][strategy], place)
                for place, row in enumerate(table.values())
                if strategy in row["baselines"]
            ]
            axes.plot(
                *zip(*points, strict=True),
                linestyle="none", marker="oD^sv"[index % 5], markersize=5.5, markerfacecolor=LIGHT["paper"],
                markeredgecolor=LIGHT["baseline"], markeredgewidth=1.5, label=strategy, clip_on=False, zorder=4,
            )  # fmt: skip
        axes.set_yticks(range(len(kinds)), [f"{kind}\n(n = {table[kind]['n']})" for kind in kinds])
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_xlabel("exact match (% of questions)")
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0, labelcolor=LIGHT["ink"])
        handles, names = axes.get_legend_handles_labels()
        bars_first = sorted(range(len(names)), key=lambda index: names[index] in strategies)
        figure.legend(
            [handles[index] for index in bars_first], [names[index] for index in bars_first],
            loc="outside upper left", ncols=3, handlelength=1.4, columnspacing=1.4,
        )  # fmt: skip
    return figure


def _curves(
    history: Sequence[Record],
    scale: Callable[[float], float],
    label: str,
    floor: float | None,
    order5: float | None,
    split_name: str,
    *,
    zoom: bool,
) -> Figure | None:
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    train = [(x, scale(y)) for x, y in _thin(_points(history, "train"))]
    val = [(x, scale(y)) for x, y in _points(history, "val")]
    if not train and not val:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.4, 3.7), layout="constrained")
        axes = figure.add_subplot()
        if train:
            marker = "." if len(train) == 1 else ""
            axes.plot(*zip(*train, strict=True), color=LIGHT["train"], linewidth=1.2, marker=marker, label="training")
        if val:
            marker = "o" if len(val) <= 40 else ""
            axes.plot(
                *zip(*val, strict=True),
                color=LIGHT["val"],
                linewidth=1.8,
                marker=marker,
                markersize=3.5,
                label=split_name,
            )
        lines = (("order-5 model", order5, "baseline", (0, (4, 2, 1, 2))), ("floor", floor, "floor", (0, (5, 2))))
        for name, loss, color, style in lines:
            if loss is not None:
                y = scale(loss)
                axes.axhline(
                    y,
                    color=LIGHT[color],
                    linewidth=1.6,
                    linestyle=style,
                    label=f"{name}  {y:.2f}" if y < 100 else f"{name}  {y:.3g}",
                )
        if zoom:
            _zoom(axes, val or train, [scale(loss) for loss in (order5, floor) if loss is not None])
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
        axes.set_xlabel("tokens seen")
        axes.set_ylabel(label)
        figure.legend(loc="outside upper left", ncols=2, handlelength=2.4, columnspacing=2.0)
    return figure


def _zoom(axes: Axes, points: Sequence[tuple[float, float]], levels: Sequence[float]) -> None:
    """Limits the y axis to where the curve ends: up to 2.5 times its lowest value, or just above the highest level."""
    low = min(y for _, y in points)
    highest = max(y for _, y in points)
    top = min(max([2.5 * low, *(1.15 * level for level in levels)]), 1.05 * max([highest, *levels]))
    bottom = min([low, *levels])
    margin = 0.06 * (top - bottom) or 0.05 * top
    axes.set_ylim(bottom - margin, top + margin)


def _points(history: Iterable[Record], split: str) -> list[tuple[float, float]]:
    """(tokens seen, loss) of the split's records that hold both."""
    chosen = (record for record in history if record.get("split") == split)
    pairs = ((record.get("tokens"), record.get("loss")) for record in chosen)
    return [(float(x), float(y)) for x, y in pairs if x is not None and y is not None and math.isfinite(y)]


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means of equal runs of points, at most MAX_POINTS of them."""
    run = -(-len(points) // MAX_POINTS)
    if run <= 1:
        return points
    groups = [points[start : start + run] for start in range(0, len(points), run)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # e**710 is no float any more


def save_png(figure: Figure, path: str | Path, *, dpi: int = 150) -> None:
    """Writes `figure` as a PNG file in the light colours."""
    figure.savefig(path, format="png", dpi=dpi)


def inline_svg(figure: Figure, name: str, title: str) -> str:
    """The figure as an `<svg>` element for a web page.

    Args:
        figure: from one of the functions above.
        name: put before every id, so that several figures can live in one page.
        title: read aloud in place of the picture.

    Returns:
        Markup that needs nothing else. Colours are `var(--plot-NAME, light colour)` for each NAME of `COLORS`.
    """
    import html
    import io

    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'xlink:href="#', f'href="#{name}-', svg)
    svg = re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{html.escape(title)}">', svg, count=1
    )
    svg = svg.replace("'DejaVu Sans'", "system-ui, sans-serif")
    for color, light in LIGHT.items():
        svg = svg.replace(light, f"var(--plot-{color}, {light})")
    return svg.strip()
