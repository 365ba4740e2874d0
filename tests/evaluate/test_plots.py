from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from jaxlm._style import LIGHT
from jaxlm.evaluate import plots
from jaxlm.evaluate.accuracy import by_type


def test_the_loss_figure_draws_both_curves_and_both_levels(history: list[dict[str, Any]]) -> None:
    figure = plots.loss_figure(history, floor=1.05, order5=1.41)
    assert figure is not None
    (axes,) = figure.axes
    assert axes.get_xlabel() == "tokens seen"
    assert axes.get_ylabel() == "loss (nats per token)"
    train, val, order5, floor = axes.get_lines()
    assert len(train.get_xdata()) == 30
    assert list(val.get_xdata()) == [80 * 1024, 160 * 1024, 240 * 1024]
    assert val.get_ydata()[0] == pytest.approx(1.12 + 4 * math.exp(-2))
    assert set(np.asarray(order5.get_ydata())) == {1.41}
    assert set(np.asarray(floor.get_ydata())) == {1.05}
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["training", "validation", "order-5 model  1.41", "floor  1.05"]


def test_levels_that_are_not_known_are_not_drawn(history: list[dict[str, Any]]) -> None:
    figure = plots.loss_figure(history)
    assert figure is not None
    assert len(figure.axes[0].get_lines()) == 2


@pytest.mark.parametrize(
    "records",
    [
        [],
        [{"event": "sample", "step": 1, "text": "x"}],
        [{"split": "train", "tokens": 5, "loss": None}],
        [{"split": "train", "tokens": 5, "loss": math.nan}],
        [{"split": "train", "loss": 1.0}],
    ],
)
def test_nothing_to_draw_gives_no_figure(records: list[dict[str, Any]]) -> None:
    assert plots.loss_figure(records, floor=1.0) is None
    assert plots.perplexity_figure(records) is None
    assert plots.accuracy_figure({}) is None


def test_one_point_is_visible() -> None:
    figure = plots.loss_figure([{"split": "train", "tokens": 5, "loss": 1.0}])
    assert figure is not None
    assert figure.axes[0].get_lines()[0].get_marker() == "."


def test_the_perplexity_figure_shows_the_end_of_the_curve_and_every_level(history: list[dict[str, Any]]) -> None:
    figure = plots.perplexity_figure(history, floor=1.05, order5=1.8)
    assert figure is not None
    (axes,) = figure.axes
    assert "perplexity" in axes.get_ylabel()
    low, high = axes.get_ylim()
    last = axes.get_lines()[1].get_ydata()[-1]
    assert last == pytest.approx(math.exp(1.12 + 4 * math.exp(-6)))
    for value in (last, math.exp(1.05), math.exp(1.8)):
        assert low < value < high
    assert high < math.exp(history[0]["loss"])  # the first points are cut off


def test_a_loss_beyond_any_float_can_be_drawn() -> None:
    records = [{"split": "val", "tokens": tokens, "loss": loss} for tokens, loss in ((1, 1e4), (2, 1.0))]
    figure = plots.perplexity_figure(records)
    assert figure is not None
    assert figure.axes[0].get_ylim()[1] < 10


def test_a_long_curve_is_averaged_without_losing_its_mean() -> None:
    losses = np.random.default_rng(0).normal(size=10_000)
    records = [{"split": "train", "tokens": step, "loss": float(loss)} for step, loss in enumerate(losses)]
    figure = plots.loss_figure(records)
    assert figure is not None
    drawn = np.asarray(figure.axes[0].get_lines()[0].get_ydata())
    assert len(drawn) == plots.MAX_POINTS
    assert drawn.mean() == pytest.approx(losses.mean())


def test_the_accuracy_figure_has_a_bar_per_model_and_a_marker_per_baseline(full_data: dict[str, Any]) -> None:
    figure = plots.accuracy_figure(full_data["accuracy_by_type"])
    assert figure is not None
    (axes,) = figure.axes
    # in the table's order: where before 50 %, after 50 %; who before 0 %, after 100 %
    assert [bar.get_width() for bar in axes.patches] == [50.0, 50.0, 0.0, 100.0]
    markers = {line.get_label(): list(line.get_xdata()) for line in axes.get_lines() if line.get_linestyle() == "None"}
    assert markers == {"last mention": [12.5, 50.0], "most | frequent": [25.0]}
    assert [text.get_text() for text in axes.get_yticklabels()] == ["where <it> is\n(n = 2)", "who\n(n = 2)"]
    assert "%" in axes.get_xlabel()
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["before fine-tuning", "after fine-tuning", "last mention", "most | frequent"]


def test_without_fine_tuning_there_is_one_bar_a_type() -> None:
    figure = plots.accuracy_figure(by_type(["a", "b"], before=[True, False]))
    assert figure is not None
    assert [bar.get_width() for bar in figure.axes[0].patches] == [100.0, 0.0]


@pytest.mark.parametrize("n_types", [1, 12])
def test_no_text_overlaps_another(n_types: int) -> None:
    types = [f"a rather long type of question {i}" for i in range(n_types)] * 2
    baselines = {kind: dict.fromkeys(("last mention", "most frequent", "random candidate"), 0.2) for kind in types}
    figure = plots.accuracy_figure(
        by_type(types, before=[False] * len(types), after=[True] * len(types), baselines=baselines)
    )
    assert figure is not None
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    axes = figure.axes[0]
    texts = [*axes.get_yticklabels(), *axes.texts, axes.xaxis.label, *figure.legends[0].get_texts()]
    boxes = [text.get_window_extent(renderer) for text in texts]
    clashes = [(i, j) for i in range(len(boxes)) for j in range(i) if boxes[i].overlaps(boxes[j])]
    assert clashes == []
    inside = figure.bbox
    assert all(box.x0 >= inside.x0 - 1 and box.x1 <= inside.x1 + 1 for box in boxes)
    legend = figure.legends[0].get_window_extent(renderer)
    assert not legend.overlaps(axes.get_window_extent(renderer))


def test_the_png_holds_a_picture(history: list[dict[str, Any]], tmp_path: Path) -> None:
    from matplotlib.image import imread

    figure = plots.loss_figure(history, floor=1.05)
    assert figure is not None
    plots.save_png(figure, tmp_path / "loss.png")
    pixels = imread(tmp_path / "loss.png")
    assert pixels.shape[1] == 810  # 5.4 inches at 150 dots
    for name in ("val", "floor"):  # the curve's own colour is there
        color = np.array([int(LIGHT[name][i : i + 2], 16) / 255 for i in (1, 3, 5)])
        assert (np.abs(pixels[..., :3] - color).max(axis=-1) < 0.02).sum() > 100


def test_the_inline_svg_is_well_formed_and_follows_the_page(history: list[dict[str, Any]]) -> None:
    figure = plots.loss_figure(history, floor=1.05)
    assert figure is not None
    svg = plots.inline_svg(figure, "loss", 'Loss "so far" & <more>')
    root = ElementTree.fromstring(svg)
    assert root.get("aria-label") == 'Loss "so far" & <more>'
    assert root.get("viewBox")
    assert "var(--plot-val, " in svg
    assert "var(--plot-floor, " in svg
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    assert all(str(name).startswith("loss-") for name in ids)
    for element in root.iter():  # references lead to ids of this picture
        target = element.get("href")
        assert target is None or target.removeprefix("#") in ids
    assert "tokens seen" in "".join(root.itertext())
    assert svg == plots.inline_svg(figure, "loss", 'Loss "so far" & <more>')


def test_the_colours_can_be_told_apart() -> None:
    light = list(LIGHT.values())
    assert len(set(light)) == len(light)
