"""A figure for each analysis. Each function takes plain results and returns a matplotlib `Figure`, made without pyplot.

In a notebook, `%matplotlib inline` makes a figure at the end of a cell show itself; elsewhere `figure.savefig`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from jaxlm._style import LIGHT, STYLE
from jaxlm.analysis.calibration import Calibration
from jaxlm.analysis.layers import LayerInformation
from jaxlm.analysis.lens import LensSummary
from jaxlm.analysis.projection import Projection
from jaxlm.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, MAIN, SECOND = LIGHT["ink"], LIGHT["muted"], LIGHT["val"], LIGHT["baseline"]
# For categories: Okabe and Ito's colours, which people with any colour vision tell apart, and greys.
CATEGORIES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8f8f8f", "#1f2430", "#c7b500")
MARKERS = "osD^vP*Xp"


def attention_maps(probs: ArrayLike, pieces: Sequence[str], *, title: str = "", columns: int = 4) -> Figure:
    """One map for each head: rows are the reading tokens, columns the tokens read.

    Args:
        probs: [H, T, T], one text's `attention.probs`.
        pieces: T token texts.
        title: over all.
        columns: heads side by side.

    Raises:
        InputError: probabilities that are not by head and token twice, or no column.
    """
    maps, texts = np.asarray(probs, np.float32), _labels(pieces)
    if maps.ndim != 3 or maps.shape[1:] != (len(texts), len(texts)) or not maps.size:
        raise InputError(f"probs: expected [heads, {len(texts)}, {len(texts)}] for the tokens, found {maps.shape}.")
    if columns < 1:
        raise InputError(f"columns: must be at least 1, found {columns}.")
    heads, t = maps.shape[:2]
    columns = min(columns, heads)
    rows = -(-heads // columns)
    side = max(1.7, 0.14 * t)
    with _figure(0.7 + side * columns, 0.9 + side * rows) as figure:
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for axes in grid.flat[heads:]:
            axes.remove()
        for head, axes in enumerate(grid.flat[:heads]):
            image = axes.imshow(maps[head], cmap="Blues", vmin=0, vmax=1)
            axes.set_title(f"head {head}", fontsize=8)
            axes.grid(visible=False)
            axes.tick_params(length=0, labelsize=6)
            axes.set_xticks(range(t), texts, rotation=90)
            axes.set_yticks(range(t), texts)
        figure.supxlabel("token read", fontsize=8)
        figure.supylabel("token reading", fontsize=8)
        figure.colorbar(image, ax=list(grid.flat[:heads]), label="share of attention", fraction=0.03, shrink=0.8)
        figure.suptitle(title, fontsize=10)
    return figure


def scatter(projection: Projection, labels: Sequence[str], *, title: str = "") -> Figure:
    """Points on their first two principal components, coloured by a property of their tokens.

    Args:
        projection: from `pca`, with at least two components.
        labels: N, the property of each point; at most nine different ones, coloured in alphabetical order.
        title: over the figure.

    Raises:
        InputError: another number of labels, more kinds of them, or a single component.
    """
    with _figure(5.4, 3.9) as figure:
        _scatter(figure.add_subplot(), projection, labels)
        figure.suptitle(title, fontsize=10)
    return figure


def scatter_grid(projections: Mapping[str, Projection], labels: Sequence[str], *, title: str = "") -> Figure:
    """`scatter` for several activations side by side, under their names, with one legend.

    Args:
        projections: name -> projection, of the same points.
        labels: as for `scatter`.
        title: over the figure.

    Raises:
        InputError: no projection, or as for `scatter`.
    """
    _some("projections", projections)
    with _figure(3.1 * len(projections) + 0.8, 3.1) as figure:
        for axes, (name, projection) in zip(
            figure.subplots(1, len(projections), squeeze=False)[0], projections.items(), strict=True
        ):
            _scatter(axes, projection, labels, legend=axes is figure.axes[len(projections) - 1])
            axes.set_title(name, fontsize=9)
        figure.suptitle(title, fontsize=10)
    return figure


def _scatter(axes: Axes, projection: Projection, labels: Sequence[str], *, legend: bool = True) -> None:
    points, kinds = projection.points, sorted(set(labels))
    if points.shape[1] < 2 or len(labels) != len(points) or len(kinds) > len(CATEGORIES):
        raise InputError(
            f"labels: expected one for each of {len(points)} points, at most {len(CATEGORIES)} different ones, and two "
            f"components, found {len(labels)}, {len(kinds)} and {points.shape[1]}."
        )
    marked = np.asarray(labels)
    for i, kind in enumerate(kinds):
        x, y = points[marked == kind, :2].T
        axes.scatter(x, y, s=9, color=CATEGORIES[i], marker=MARKERS[i], linewidths=0, alpha=0.75, label=kind)
    x_label, y_label = (f"component {i + 1} ({100 * projection.explained[i]:.0f} % of variance)" for i in range(2))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if legend:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), markerscale=1.6, handletextpad=0.2)


def lens_grid(log_probs: ArrayLike, pieces: Sequence[str], decode: Callable[[int], str], *, title: str = "") -> Figure:
    """The likeliest next token at each place of the stream for each token of one text, coloured by its probability.

    Args:
        log_probs: [L + 1, T, V], one text's part of `logit_lens`.
        pieces: T token texts.
        decode: the text of a token id.
        title: over the figure.

    Raises:
        InputError: log-probabilities that are not by layer and token.
    """
    values, texts = np.asarray(log_probs, np.float32), _labels(pieces)
    if values.ndim != 3 or values.shape[1] != len(texts) or not values.size:
        raise InputError(f"log_probs: expected [layers + 1, {len(texts)}, vocabulary], found {values.shape}.")
    layers, t = values.shape[:2]
    best, prob = values.argmax(-1), np.exp(values.max(-1))
    guesses = [_labels([decode(int(token)) for token in row]) for row in best]
    with _figure(1.3 + 0.62 * t, 1.3 + 0.3 * layers) as figure:
        axes = figure.add_subplot()
        image = axes.imshow(prob, cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower")
        for layer in range(layers):
            for place in range(t):
                color = "white" if prob[layer, place] > 0.6 else INK
                axes.text(place, layer, guesses[layer][place], ha="center", va="center", fontsize=7, color=color)
        axes.set_xticks(range(t), texts, rotation=90)
        axes.set_yticks(range(layers), ["embedding", *(f"after block {i}" for i in range(layers - 1))])
        axes.grid(visible=False)
        axes.tick_params(length=0)
        axes.set_xlabel("token read; in the squares, the likeliest to come next")
        figure.colorbar(image, ax=axes, label="its probability", fraction=0.04)
        figure.suptitle(title, fontsize=10)
    return figure


def lens_curves(summary: LensSummary) -> Figure:
    """How the prediction improves from the embedding to the last block.

    Args:
        summary: from `lens_summary`.

    Raises:
        InputError: parts of it that are not one number a layer.
    """
    depth = np.arange(np.size(summary.nats))
    _check_series("summary", summary._asdict(), len(depth))
    names = ("embed", *(f"blocks.{i}.out" for i in depth[:-1]))
    with _figure(6.6, 2.9) as figure:
        left, right = figure.subplots(1, 2)
        left.plot(depth, np.asarray(summary.nats), "o-", color=MAIN, label="loss on the next token")
        left.plot(depth, np.asarray(summary.divergence), "s--", color=SECOND, label="divergence from the last block's")
        left.set_ylabel("nats per token")
        left.set_ylim(bottom=0)
        left.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0))
        right.plot(depth, 100 * np.asarray(summary.agreement), "o-", color=MAIN)
        right.set_ylabel("same first choice as the model (%)")
        right.set_ylim(0, 103)
        for axes in (left, right):
            _depth_axis(axes, names)
    return figure


def information_curves(
    curves: Mapping[str, LayerInformation] | LayerInformation, *, ceilings: bool = True, title: str = ""
) -> Figure:
    """Nats that each layer tells a linear classifier about each kind of label, with two standard errors.

    Args:
        curves: one result, or several by name (a model before and after training), a panel for each, scales shared.
        ceilings: draw each label's entropy as a dotted line.
        title: over the figure.

    Raises:
        InputError: no result, more than nine labels, or another number of values than of layers.
    """
    panels = {"": curves} if isinstance(curves, LayerInformation) else dict(curves)
    _some("curves", panels)
    for name, found in panels.items():
        for part in (found.nats, found.standard_error):
            _check_series(f"curves[{name!r}]" if name else "curves", part, len(found.names))
    with _figure(1.6 + 2.9 * len(panels), 3.2) as figure:
        grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axes, (name, found) in zip(grid, panels.items(), strict=True):
            depth = np.arange(len(found.names))
            for i, (kind, nats) in enumerate(found.nats.items()):
                color = CATEGORIES[i]
                axes.errorbar(
                    depth, nats, 2 * found.standard_error[kind], color=color, marker=MARKERS[i], markersize=4,
                    capsize=2, label=kind,
                )  # fmt: skip
                if ceilings:
                    axes.axhline(found.entropy[kind], color=color, linewidth=1, linestyle=":")
            _depth_axis(axes, found.names)
            axes.set_title(name, fontsize=9)
        grid[0].set_ylabel("information (nats)")
        grid[0].set_ylim(bottom=min(0.0, grid[0].get_ylim()[0]))
        grid[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), title="about the label", title_fontsize=8)
        figure.suptitle(title, fontsize=10)
    return figure


def estimator_check(
    truth: Sequence[float], estimates: Mapping[str, Sequence[float]], *, band: float = 0.05, title: str = ""
) -> Figure:
    """Estimates of information against what is known, with a band of `band` of the truth around the diagonal.

    Args:
        truth: known information, nats.
        estimates: estimator's name -> its estimates, nats, in the same order.
        band: half its width, as a share of the truth.
        title: over the figure.

    Raises:
        InputError: no estimator, more than nine, or another number of estimates than of truths.
    """
    x = np.asarray(truth, float)
    _check_series("estimates", estimates, len(x))
    with _figure(5.4, 3.6) as figure:
        axes = figure.add_subplot()
        end = 1.05 * max(x.max(), *(max(values) for values in estimates.values()))
        axes.plot([0, end], [0, end], color=MUTED, linewidth=1, label="right")
        axes.fill_between(
            [0, end], [0, (1 - band) * end], [0, (1 + band) * end], color=MUTED, alpha=0.2, linewidth=0,
            label=f"within {100 * band:.0f} %",
        )  # fmt: skip
        for i, (name, values) in enumerate(estimates.items()):
            axes.plot(x, values, marker=MARKERS[i], color=CATEGORIES[i], markersize=4, linewidth=1.2, label=name)
        axes.set_xlim(0, end)
        axes.set_ylim(min(0.0, *(min(values) for values in estimates.values())), end)
        axes.set_xlabel("known information (nats)")
        axes.set_ylabel("estimate (nats)")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.suptitle(title, fontsize=10)
    return figure


def reliability_diagram(curves: Mapping[str, Calibration] | Calibration, *, title: str = "") -> Figure:
    """The share that came true against the probability given, and below how many predictions had which.

    Args:
        curves: one result of `calibration` or `reliability`, or several by name, a panel for each.
        title: over the figure.

    Raises:
        InputError: no result.
    """
    panels = {"": curves} if isinstance(curves, Calibration) else dict(curves)
    _some("curves", panels)
    with _figure(0.9 + 2.6 * len(panels), 3.7) as figure:
        grid = figure.subplots(
            2, len(panels), squeeze=False, sharex=True, sharey="row", height_ratios=(3, 1), gridspec_kw={"hspace": 0.05}
        )
        for column, (name, found) in enumerate(panels.items()):
            top, below = grid[:, column]
            error = np.sqrt(np.maximum(found.predicted * (1 - found.predicted), 0) / found.counts)
            top.plot([0, 1], [0, 1], color=MUTED, linewidth=1, label="calibrated")
            top.errorbar(
                found.predicted, found.observed, 2 * error, color=MAIN, marker="o", markersize=4, capsize=2,
                linewidth=1.2, label="model",
            )  # fmt: skip
            top.set_title(
                f"{name}\nerror {found.error:.3f} (by chance {found.error_if_calibrated:.3f})".strip(), fontsize=9
            )
            top.set_ylim(-0.03, 1.03)
            below.bar(found.predicted, found.counts, width=0.02, color=LIGHT["train"])
            below.set_yscale("log")
            below.set_xlim(-0.03, 1.03)
            below.set_xlabel("probability given")
        grid[0, 0].set_ylabel("share that came true")
        grid[1, 0].set_ylabel("predictions")
        grid[0, 0].legend(loc="upper left")
        figure.suptitle(title, fontsize=10)
    return figure


@contextmanager
def _figure(width: float, height: float) -> Iterator[Figure]:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: dict[Any, Any] = STYLE
    with mpl.rc_context(style):
        yield Figure(figsize=(width, height), layout="constrained")


def _some(name: str, panels: Mapping[str, Any]) -> None:
    if not panels:
        raise InputError(f"{name}: expected at least one to draw, found none.")


def _check_series(name: str, series: Mapping[str, Any], length: int) -> None:
    """Curves that can be told apart, of `length` numbers each."""
    if not 1 <= len(series) <= len(CATEGORIES):
        raise InputError(
            f"{name}: expected from 1 to {len(CATEGORIES)} curves, found {len(series)}; draw fewer at once."
        )
    for kind, values in series.items():
        if not length or np.shape(values) != (length,):
            raise InputError(
                f"{name}: expected as many numbers in each curve as places along the axis, and some, found "
                f"{np.shape(values)} in {kind!r} for {length} places."
            )


def _depth_axis(axes: Axes, names: Sequence[str]) -> None:
    """A tick for each activation, by its block's number where that says all; `names` as of `analysis.names`."""
    of_blocks = [name.split(".", 2) for name in names if name.startswith("blocks.")]
    parts = {part for _, _, part in of_blocks}
    short = {f"blocks.{i}.{part}": i if len(parts) == 1 else f"{i}.{part}" for _, i, part in of_blocks}
    short["embed"] = "emb"
    labels = [short.get(name, name) for name in names]
    axes.set_xticks(range(len(names)), labels, rotation=90 if any(len(label) > 3 for label in labels) else 0)
    axes.set_xlabel("after block" if parts == {"out"} else "block" if len(parts) == 1 else "activation")


def _labels(pieces: Sequence[str]) -> list[str]:
    """Token texts with spaces and line ends made visible, and dollars kept from being read as formulas."""
    shown = (piece.replace("\n", "↵").replace(" ", "·").replace("$", r"\$") for piece in pieces)
    return [text if len(text) <= 12 else text[:11] + "…" for text in shown]
