from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import tokenizers
from jaxlm.playground.explain import Rival, Token, read, tell, texts_after
from jaxlm.playground.markup import describe, percent, tokens_html, visible
from jaxlm.sample import filter_logits

# Chosen so that every figure can be had by hand.
PROBS = [0.125, 0.5, 0.25, 0.125]
LOGITS = jnp.log(jnp.array(PROBS)) + 3.0  # a constant changes no probability


def test_figures_of_a_token_by_hand():
    kept = jnp.where(jnp.array([False, True, True, False]), LOGITS, -jnp.inf)  # 2/3 and 1/3 are left
    told = tell(LOGITS, kept, jnp.int32(2), 3)
    assert int(told.token) == 2
    assert float(jnp.exp(told.log_prob)) == pytest.approx(0.25, abs=1e-6)
    assert float(jnp.exp(told.kept_log_prob)) == pytest.approx(1 / 3, abs=1e-6)
    assert int(told.rank) == 1
    assert told.top_tokens.tolist() == [1, 2, 0]
    np.testing.assert_allclose(jnp.exp(told.top_log_probs), [0.5, 0.25, 0.125], atol=1e-6)
    np.testing.assert_allclose(jnp.exp(told.top_kept_log_probs), [2 / 3, 1 / 3, 0], atol=1e-6)


def test_rows_are_told_as_each_alone():
    rows, tokens = jnp.stack([LOGITS, LOGITS[::-1]]), jnp.array([0, 2])
    both = tell(rows, rows, tokens, 2)
    for i in range(2):
        alone = tell(rows[i], rows[i], tokens[i], 2)
        for got, expected in zip(both, alone, strict=True):
            np.testing.assert_array_equal(got[i], expected)


def test_temperature_sharpens_what_is_kept_and_not_what_the_model_holds():
    # At temperature 1/2 probabilities are squared: 1/4 of 1/64 + 1/4 + 1/16 + 1/64 = 22/64.
    told = tell(LOGITS, filter_logits(LOGITS, temperature=0.5), jnp.int32(1), 1)
    assert float(jnp.exp(told.log_prob)) == pytest.approx(0.5, abs=1e-6)
    assert float(jnp.exp(told.kept_log_prob)) == pytest.approx(16 / 22, abs=1e-6)


def test_a_token_that_the_filters_dropped_is_told_as_such():
    told = tell(LOGITS, filter_logits(LOGITS, top_k=1), jnp.int32(3), 2)
    shown = read(told, "d", tokenizers.char("abcd"), 0)
    assert shown.kept == 0
    assert shown.prob == pytest.approx(0.125, abs=1e-6)
    assert shown.surprise == pytest.approx(np.log(8), abs=1e-5)
    assert shown.rivals[0] == Rival("b", 1, pytest.approx(0.5, abs=1e-6), pytest.approx(1.0))
    assert [rival.kept > 0 for rival in shown.rivals] == [True, False]


def test_a_rival_is_written_as_it_would_have_stood_there():
    words = tokenizers.word("red green .", split="punctuation", lower=False)
    red, green, stop = words.encode("red green .")
    assert texts_after(words, red, [green, stop]) == [" green", "."]
    assert texts_after(words, None, [green]) == ["green"]


TOKEN = Token(" <b>", 7, 0.5, 1.0, 0, (Rival(" <b>", 7, 0.5, 1.0), Rival("\n", 2, 0.25, 0.0)))


def test_markup_escapes_what_the_model_says():
    shown = tokens_html([TOKEN], prompt="<script>", title="a & b")
    assert "<b>" not in shown
    assert "<script>" not in shown
    assert "a &amp; b" in shown
    assert "http" not in shown  # nothing to fetch


def test_tokens_are_described_with_their_rivals():
    lines = describe(TOKEN).splitlines()
    assert lines[0] == "␣<b>  id 7  rank 1  model 50.0 %  after settings 100.0 %"
    assert lines[1:] == ["▸ ␣<b>  50.0 %", "  ↵  25.0 %  (dropped)"]


@pytest.mark.parametrize(("p", "shown"), [(1, "100.0 %"), (0.043, "4.3 %"), (0.0004, "0.04 %"), (0, "0 %")])
def test_percent(p, shown):
    assert percent(p) == shown


def test_blanks_can_be_seen():
    assert [visible(text) for text in ("", " a", "a b ", "\n", " ")] == ["∅", "␣a", "a b␣", "↵", "␣"]
