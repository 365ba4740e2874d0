from __future__ import annotations

import math

import numpy as np
import pytest

from jaxlm import analysis
from jaxlm.errors import InputError

pytest.importorskip("sklearn", reason="needs the extra `analysis`")
QUICK_COMPILE = True


def test_labels_are_tokens_some_places_on():
    tokens = np.array([[1, 2, 3], [4, 5, 6]])
    found = analysis.token_labels(tokens, {"input": 0, "next": 1, "two back": -2, "far": 9})
    assert found["input"].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert found["next"].tolist() == [[2, 3, -1], [5, 6, -1]]
    assert found["two back"].tolist() == [[-1, -1, 1], [-1, -1, 4]]
    assert found["far"].tolist() == [[-1] * 3] * 2
    assert list(analysis.token_labels(tokens)) == ["input", "next"]


@pytest.mark.slow
def test_embeddings_know_their_own_token_and_no_other(models, weights):
    """Independent uniform tokens: the input's entropy is log 11, and nothing tells the next one."""
    cfg = models["gpt2"].replace(d_model=32, max_seq_len=8)
    tokens = np.random.default_rng(0).integers(0, 11, (300, 8))
    found = analysis.information_by_layer(cfg, weights(cfg), tokens, max_samples=1500)
    assert found.names == ("embed", "blocks.0.out", "blocks.1.out")
    assert found.entropy["input"] == pytest.approx(math.log(11), rel=0.02)
    assert found.nats["input"][0] == pytest.approx(math.log(11), rel=0.05)
    assert (np.abs(found.nats["next"]) < 0.15).all()
    assert (found.standard_error["input"] < 0.1).all()


def test_attention_brings_what_came_before(models, weights):
    cfg = models["nano"]
    params = weights(cfg)
    tokens = np.random.default_rng(0).integers(0, 11, (300, 8))
    labels = analysis.token_labels(tokens, {"previous": -1})
    plain = {**params, "embed": {**params["embed"], "mix": 0 * params["embed"]["mix"]}}
    found = analysis.information_by_layer(
        cfg, plain, tokens, labels=labels, names=("embed", "blocks.0.attention.out"), max_samples=1500
    )
    before, after = found.nats["previous"]
    assert before < 0.05
    assert after > 0.15


def test_activations_that_are_not_by_place_are_refused(models, weights, tokens):
    with pytest.raises(InputError, match=r"attention\.probs has shape"):
        analysis.information_by_layer(models["gpt2"], weights(models["gpt2"]), tokens, names="blocks.0.attention.probs")


def test_labels_may_be_texts(models, weights):
    cfg = models["nano"]
    tokens = np.random.default_rng(0).integers(0, 11, (40, 6))
    odd = np.where(tokens == 3, -1, tokens % 2)
    texts = np.array(["even", "odd", ""])[odd]  # -1, no label, reads the last
    found = analysis.information_by_layer(
        cfg, weights(cfg), tokens, labels={"number": odd, "text": texts}, names="embed"
    )
    assert found.nats["text"] == found.nats["number"]
    assert found.entropy["text"] == found.entropy["number"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": {"kind": np.full((2, 6), 0.5)}}, r"labels\['kind'\]: expected whole .* found float64"),
        ({"labels": {"kind": np.full((2, 6), -1)}}, r"labels\['kind'\]: expected a label at some place"),
        ({"labels": {"kind": np.full((2, 6), "")}}, r"labels\['kind'\]: expected a label at some place"),
        (
            {
                "tokens": np.arange(24).reshape(4, 6) % 11,
                "labels": {"good": np.arange(24).reshape(4, 6) % 2, "constant": np.ones((4, 6), int)},
            },
            r"labels\['constant'\]: expected at least 2 kinds in at least 4 groups, found 1 in 4",
        ),
        ({"labels": {"kind": np.arange(12).reshape(2, 6)}}, r"labels\['kind'\]: .* found 12 in 2"),
        ({"labels": [np.ones((2, 6), int)]}, r"labels: expected a dict, names to arrays \[B, T\], found list"),
        ({"tokens": np.full((4, 6), 11)}, "tokens: id 11 is outside the vocabulary of 11 tokens"),
        ({"tokens": np.full((4, 6), 2**32)}, f"tokens: id {2**32} is outside the vocabulary"),
        ({"max_samples": 9.5}, r"max_samples: must be an integer, found 9\.5"),
        ({"max_samples": 0}, "max_samples: must be at least 1, found 0"),
        ({"names": ()}, "names: expected at least one, found none"),
        ({"positions": np.zeros(6, int)}, r"positions: .* shape \(2, 6\), found \(6,\)"),
        ({"tokens": np.zeros((2, 6))}, "tokens: expected whole numbers, found float64"),
        ({"broken": True}, "params: embed has NaN"),
    ],
)
def test_questions_that_cannot_be_asked(models, weights, tokens, options, message):
    params = weights(models["gpt2"])
    options = dict(options)
    if options.pop("broken", False):
        params["embed"]["tokens"] = params["embed"]["tokens"] * np.nan
    with pytest.raises(InputError, match=message):
        analysis.information_by_layer(models["gpt2"], params, **{"tokens": tokens, "names": "embed", **options})


@pytest.mark.parametrize("tokens", [[1, 2, 3], [[1, 2], [3]], [[0.5]]])
def test_labels_of_no_batch_are_refused(tokens):
    with pytest.raises(InputError, match="tokens: expected"):
        analysis.token_labels(tokens)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [({"half": 0.5}, r"offsets\['half'\]: must be an integer, found 0\.5"), ([1], "offsets: expected a dict")],
)
def test_offsets_that_are_no_places(offsets, message):
    with pytest.raises(InputError, match=message):
        analysis.token_labels([[1, 2, 3]], offsets)


def test_labels_of_another_shape_are_refused(models, weights, tokens):
    with pytest.raises(InputError, match=r"labels\['kind'\].*\(2, 6\), found \(2, 5\)"):
        analysis.information_by_layer(
            models["gpt2"], weights(models["gpt2"]), tokens, labels={"kind": tokens[:, 1:]}, names="embed"
        )
