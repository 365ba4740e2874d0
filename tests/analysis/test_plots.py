from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from jaxlm import analysis
from jaxlm.analysis import plots
from jaxlm.errors import InputError


def texts(figure) -> str:
    """Everything written in a figure."""
    from matplotlib.text import Text

    return "\n".join(item.get_text() for item in figure.findobj(Text))


def drawn(figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def test_attention_maps_show_every_head_with_its_tokens():
    probs = np.tril(np.ones((3, 2, 2))) / [[1], [2]]
    figure = plots.attention_maps(probs, ["a b", "$\n"], title="block 0", columns=2)
    assert drawn(figure).std() > 0
    written = texts(figure)
    for text in ("head 2", "a·b", "token read", "token reading", "share of attention", "block 0"):
        assert text in written
    images = [axes.images[0] for axes in figure.axes if axes.images]
    assert len(images) == 3
    np.testing.assert_allclose(images[0].get_array(), [[1, 0], [0.5, 0.5]])


def test_attention_of_another_length_is_refused():
    with pytest.raises(InputError, match=r"\[heads, 3, 3\]"):
        plots.attention_maps(np.ones((1, 2, 2)), ["a", "b", "c"])


@pytest.fixture
def projection():
    return analysis.Projection(np.arange(8.0).reshape(4, 2), np.array([0.62, 0.2]), np.eye(2), np.zeros(2))


def test_scatter_has_a_colour_and_a_mark_for_each_property(projection):
    figure = plots.scatter(projection, ["x", "y", "x", "z"], title="T")
    drawn(figure)
    (axes,) = figure.axes
    assert axes.get_xlabel() == "component 1 (62 % of variance)"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["x", "y", "z"]
    assert [len(group.get_offsets()) for group in axes.collections] == [2, 1, 1]
    assert len({tuple(group.get_facecolor()[0]) for group in axes.collections}) == 3


def test_scatter_grid_names_its_panels_and_has_one_legend(projection):
    figure = plots.scatter_grid({"embed": projection, "blocks.0.out": projection}, ["x", "y", "x", "z"])
    drawn(figure)
    assert [axes.get_title() for axes in figure.axes] == ["embed", "blocks.0.out"]
    assert [axes.get_legend() is not None for axes in figure.axes] == [False, True]


@pytest.mark.parametrize("labels", [["x"] * 3, list("abcd")])
def test_scatter_refuses_labels_that_do_not_fit(projection, labels):
    wide = projection if len(labels) == 3 else projection._replace(points=np.zeros((4, 1)))
    with pytest.raises(InputError, match="labels: expected one for each of 4 points"):
        plots.scatter(wide, labels)


def test_the_lens_grid_writes_the_likeliest_token_into_each_square():
    log_probs = np.log(np.array([[[0.9, 0.1], [0.4, 0.6]], [[0.2, 0.8], [0.3, 0.7]]]))
    figure = plots.lens_grid(log_probs, ["the", "cat"], {0: "yes", 1: "no"}.__getitem__)
    drawn(figure)
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["yes", "no", "no", "no"]
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.9, 0.6], [0.8, 0.7]], rtol=1e-6)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["embedding", "after block 0"]
    with pytest.raises(InputError, match="expected"):
        plots.lens_grid(log_probs, ["the"], str)


def test_lens_curves_have_units():
    summary = analysis.LensSummary(np.array([3.0, 2.0]), np.array([0.1, 1.0]), np.array([1.0, 0.0]))
    figure = plots.lens_curves(summary)
    drawn(figure)
    left, right = figure.axes
    assert left.get_ylabel() == "nats per token"
    assert list(right.get_lines()[0].get_ydata()) == [10, 100]
    assert [label.get_text() for label in left.get_xticklabels()] == ["emb", "0"]


def test_information_curves_draw_each_label_and_its_ceiling():
    one = analysis.LayerInformation(
        ("embed", "blocks.0.out"), {"input": np.array([2.0, 1.5])}, {"input": np.array([0.1, 0.1])}, {"input": 2.3}
    )
    figure = plots.information_curves({"before": one, "after": one})
    drawn(figure)
    assert [axes.get_title() for axes in figure.axes] == ["before", "after"]
    assert figure.axes[0].get_ylabel() == "information (nats)"
    assert "about the label\ninput" in texts(figure)
    lines = figure.axes[0].get_lines()
    assert any(set(np.asarray(line.get_ydata(), float)) == {2.3} for line in lines)
    without = plots.information_curves(one, ceilings=False)
    assert not any(set(np.asarray(line.get_ydata(), float)) == {2.3} for line in without.axes[0].get_lines())


@pytest.mark.parametrize(
    ("names", "labels", "axis"),
    [
        (("embed", "blocks.1.out", "blocks.3.out"), ["emb", "1", "3"], "after block"),
        (("blocks.0.mlp.out", "blocks.2.mlp.out"), ["0", "2"], "block"),
        (("embed", "blocks.1.mid", "blocks.1.out"), ["emb", "1.mid", "1.out"], "activation"),
        (("blocks.1.out", "final_norm", "logits"), ["1", "final_norm", "logits"], "after block"),
        (("logits",), ["logits"], "activation"),
    ],
)
def test_the_axis_of_depth_says_which_activations(names, labels, axis):
    values = np.arange(float(len(names)))
    one = analysis.LayerInformation(names, {"input": values}, {"input": values}, {"input": 2.3})
    axes = plots.information_curves(one).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == labels
    assert axes.get_xlabel() == axis


def layer_information(kinds, length=2):
    series = {kind: np.zeros(length) for kind in kinds}
    return analysis.LayerInformation(("embed", "blocks.0.out"), series, series, dict.fromkeys(kinds, 1.0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: plots.attention_maps(np.ones((1, 2, 2)), ["a", "b"], columns=0),
            "columns: must be at least 1, found 0",
        ),
        (lambda: plots.attention_maps(np.ones((0, 2, 2)), ["a", "b"]), "probs: expected"),
        (lambda: plots.lens_grid(np.ones((0, 2, 3)), ["a", "b"], str), "log_probs: expected"),
        (lambda: plots.scatter_grid({}, []), "projections: expected at least one to draw"),
        (lambda: plots.information_curves({}), "curves: expected at least one to draw"),
        (lambda: plots.reliability_diagram({}), "curves: expected at least one to draw"),
        (lambda: plots.information_curves(layer_information("abcdefghij")), "curves: expected from 1 to 9 .* found 10"),
        (
            lambda: plots.information_curves({"now": layer_information("a", 3)}),
            r"curves\['now'\]: .* \(3,\) in 'a' for 2",
        ),
        (lambda: plots.estimator_check([1.0, 2.0], {}), "estimates: expected from 1 to 9 curves, found 0"),
        (lambda: plots.estimator_check([1.0], {key: [1.0] for key in "abcdefghij"}), "estimates: .* found 10"),
        (lambda: plots.estimator_check([1.0, 2.0], {"one": [1.0]}), r"estimates: .* \(1,\) in 'one' for 2 places"),
        (lambda: plots.estimator_check([], {"one": []}), r"estimates: .* and some, found \(0,\) in 'one' for 0 places"),
        (
            lambda: plots.lens_curves(analysis.LensSummary(np.ones(2), np.ones(2), np.ones(3))),
            r"summary: .* \(3,\) in 'divergence' for 2 places",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_the_estimator_check_has_a_band():
    figure = plots.estimator_check([1.0, 2.0], {"neighbours": [0.9, 1.7]}, band=0.1)
    drawn(figure)
    assert "within 10 %" in texts(figure)
    assert figure.axes[0].get_xlabel() == "known information (nats)"
    diagonal, curve = figure.axes[0].get_lines()
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata())
    assert list(curve.get_ydata()) == [0.9, 1.7]


def test_the_reliability_diagram_says_both_errors():
    found = analysis.reliability([0.6, 0.6, 0.9, 0.9], [True, False, True, True], n_bins=10)
    figure = plots.reliability_diagram({"trained": found})
    drawn(figure)
    chance = math.sqrt(2 / math.pi) * (math.sqrt(2 * 0.24) + math.sqrt(2 * 0.09)) / 4
    assert figure.axes[0].get_title() == f"trained\nerror 0.100 (by chance {chance:.3f})"
    assert "predictions" in texts(figure)
    assert "share that came true" in texts(figure)
    assert plots.reliability_diagram(found).axes[0].get_title().startswith("error 0.100")
