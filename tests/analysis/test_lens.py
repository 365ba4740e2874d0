from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm import analysis
from jaxlm.errors import InputError
from jaxlm.presets import preset

QUICK_COMPILE = True

lens = jax.jit(analysis.logit_lens)
summary = jax.jit(analysis.lens_summary)

SEGMENTS = np.array([[1, 1, 1, 2, 2, 2]] * 2, np.int32)
POSITIONS = np.array([[0, 1, 2, 0, 1, 2]] * 2, np.int32)


# With a final norm, and without.
@pytest.mark.parametrize("name", ["nano", pytest.param("lesson_sinusoidal", marks=pytest.mark.slow)])
def test_the_last_place_is_the_models_own_prediction(models, weights, tokens, name):
    cfg = models[name]
    got = lens(cfg, weights(cfg), tokens)
    assert got.shape == (3, 2, 6, 11)
    assert got.dtype == jnp.float32
    expected = jax.jit(lambda p: jax.nn.log_softmax(jaxlm.apply(cfg, p, tokens)))(weights(cfg))
    np.testing.assert_allclose(got[-1], expected, atol=2e-5)
    np.testing.assert_allclose(np.exp(got).sum(-1), 1, atol=1e-5)
    assert np.abs(got[0] - got[-1]).max() > 0.1  # the blocks do something


def test_blocks_that_add_nothing_change_no_prediction(models, weights, tokens):
    cfg = models["gpt2"]
    params = weights(cfg)
    zero = jax.tree.map(np.zeros_like, params["blocks"])
    attn = {**params["blocks"]["attn"], "o": zero["attn"]["o"]}
    mlp = {**params["blocks"]["mlp"], "down": zero["mlp"]["down"]}
    idle = {**params, "blocks": {**params["blocks"], "attn": attn, "mlp": mlp}}
    got = np.asarray(lens(cfg, idle, tokens, segment_ids=SEGMENTS, positions=POSITIONS))
    np.testing.assert_allclose(got[0], got[2], atol=1e-6)


def test_segments_are_kept_apart(models, weights, tokens):
    """Another first text changes nothing about the second."""
    cfg = models["gpt2"]
    other = np.concatenate([(tokens[:, :3] + 1) % 11, tokens[:, 3:]], axis=1)
    one, two = (lens(cfg, weights(cfg), x, segment_ids=SEGMENTS, positions=POSITIONS) for x in (tokens, other))
    np.testing.assert_array_equal(one[:, :, 3:], two[:, :, 3:])
    assert np.abs(np.asarray(one)[:, :, :3] - np.asarray(two)[:, :, :3]).max() > 0.1


def test_positions_reach_the_model(models, weights, tokens):
    cfg = models["gpt2"]
    one, two = (lens(cfg, weights(cfg), tokens, segment_ids=SEGMENTS, positions=p) for p in (POSITIONS, POSITIONS + 1))
    assert np.abs(np.asarray(one) - np.asarray(two)).max() > 0.1


def test_the_summary_by_hand():
    # Two places of the stream, one text of two tokens, two next tokens possible.
    probs = np.array([[[[0.5, 0.5], [0.9, 0.1]]], [[[0.2, 0.8], [0.75, 0.25]]]], np.float32)
    found = summary(np.log(probs), np.array([[1, 0]]))
    np.testing.assert_allclose(
        found.nats, [-(math.log(0.5) + math.log(0.9)) / 2, -(math.log(0.8) + math.log(0.75)) / 2], rtol=1e-6
    )
    np.testing.assert_allclose(found.agreement, [0.5, 1.0])  # at 0.5 / 0.5 the first counts, and it is not the model's
    first = 0.2 * math.log(0.2 / 0.5) + 0.8 * math.log(0.8 / 0.5)
    second = 0.75 * math.log(0.75 / 0.9) + 0.25 * math.log(0.25 / 0.1)
    np.testing.assert_allclose(found.divergence, [(first + second) / 2, 0], atol=1e-6)
    masked = summary(np.log(probs), np.array([[1, 0]]), np.array([[0, 1]]))
    np.testing.assert_allclose(masked.nats, [-math.log(0.9), -math.log(0.75)], rtol=1e-6)


@pytest.mark.parametrize("none", [-1, 2, 7])
def test_a_target_that_is_no_token_is_not_taken_for_one(none):
    """The last place of a text has no next token: `token_labels` says -1 there, which would index the last one."""
    probs = np.array([[[[0.5, 0.5], [0.9, 0.1]]], [[[0.2, 0.8], [0.75, 0.25]]]], np.float32)
    targets = np.array([[1, none]])
    found = summary(np.log(probs), targets)
    assert np.isnan(found.nats).all()
    np.testing.assert_allclose(found.agreement, [0.5, 1.0])  # of the predictions alone
    for counts in (1, 0.5, -1):  # which do, not how much
        masked = summary(np.log(probs), targets, np.array([[counts, 0]]))
        np.testing.assert_allclose(masked.nats, [-math.log(0.5), -math.log(0.8)], rtol=1e-6)
    assert all(np.isnan(part).all() for part in summary(np.log(probs), targets, np.zeros((1, 2))))  # nor a perfect one


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, t: analysis.lens_summary(x, t[:1]), r"targets: .* shape \(2, 3\), found \(1, 3\)"),
        (lambda x, t: summary(x, t[:1]), r"targets: .* shape \(2, 3\), found \(1, 3\)"),
        (lambda x, t: analysis.lens_summary(x, t, t[:, :1]), r"mask: .* shape \(2, 3\), found \(2, 1\)"),
        (lambda x, t: analysis.lens_summary(x, None), "targets: expected one for each token, found None"),
        (lambda x, t: analysis.lens_summary(x, t * 1.0), "targets: expected whole numbers, found float32"),
        (lambda x, t: analysis.lens_summary(x[0], t), r"log_probs: expected .* found shape \(2, 3, 5\)"),
    ],
)
def test_a_summary_of_what_does_not_fit(call, message):
    with pytest.raises(InputError, match=message):
        call(np.zeros((4, 2, 3, 5), np.float32), np.zeros((2, 3), int))


def test_a_bigram_table_has_no_lens(weights, tokens):
    cfg = preset("bigram", vocab_size=11)
    with pytest.raises(InputError, match="no layers"):
        analysis.logit_lens(cfg, weights(cfg), tokens)
