"""The n-gram baseline against arithmetic done by hand."""

from __future__ import annotations

import numpy as np
import pytest

from jaxlm.data.storyworld import WORLDS, floor, stories, vocabulary
from jaxlm.data.storyworld.ngram import fit
from jaxlm.data.storyworld.story import words_of
from jaxlm.errors import InputError

# Three tokens; s is the start. Pairs: s0 twice, 01 twice, 12 once, 10 once, so D = 2 / (2 + 2*2) = 1/3. Different
# tokens before 0: {s, 1}; before 1: {0}; before 2: {1}: counts 2, 1, 1, D = 2 / (2 + 2*1) = 1/2, over the uniform 1/3.
_DOCUMENTS = [[0, 1, 2], [0, 1, 0]]
_SINGLE = {0: 1.5 / 4 + 0.5 * 3 / 4 / 3, 1: 0.5 / 4 + 0.5 * 3 / 4 / 3, 2: 0.5 / 4 + 0.5 * 3 / 4 / 3}


def test_probabilities_by_hand() -> None:
    assert list(_SINGLE.values()) == pytest.approx([1 / 2, 1 / 4, 1 / 4])
    model = fit(_DOCUMENTS, 2, vocab_size=3)
    probs = model.probs([[0, 1, 1, 2, 2], [1]])
    expected = [
        (2 - 1 / 3) / 2 + (1 / 3) * 1 / 2 * _SINGLE[0],  # 0 after the start
        (2 - 1 / 3) / 2 + (1 / 3) * 1 / 2 * _SINGLE[1],  # 1 after 0
        0 + (1 / 3) * 2 / 2 * _SINGLE[1],  # 1 after 1
        (1 - 1 / 3) / 2 + (1 / 3) * 2 / 2 * _SINGLE[2],  # 2 after 1
        _SINGLE[2],  # nothing was seen after 2
        (1 / 3) * 1 / 2 * _SINGLE[1],  # 1 after the start of the second document
    ]
    np.testing.assert_allclose(probs, expected, rtol=1e-12)
    assert model.nats([[0, 1, 1, 2, 2], [1]]) == pytest.approx(-np.log(expected).sum())


@pytest.mark.parametrize("order", [1, 3, 5])
def test_probabilities_sum_to_one(order: int) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 6, size=rng.integers(1, 30)).tolist() for _ in range(40)]
    model = fit(documents, order, vocab_size=9)
    for context in ([], [2], [1, 3], [0, 1, 2], [5, 4, 3, 2], [1, 8, 2, 0], *(d[:7] for d in documents[:20])):
        total = sum(model.probs([[*context, token]])[-1] for token in range(9))
        assert total == pytest.approx(1.0, abs=1e-12)


def test_longer_contexts_help_where_they_matter() -> None:
    # After 0 1 comes 2, after 3 1 comes 4: only two tokens back tell.
    documents = [[0, 1, 2], [3, 1, 4]] * 50
    assert fit(documents, 3, vocab_size=5).probs([[0, 1, 2]])[-1] > 0.95
    assert fit(documents, 2, vocab_size=5).probs([[0, 1, 2]])[-1] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("name", sorted(WORLDS))
def test_the_floor_is_far_below_five_tokens_of_context(name: str) -> None:
    world = WORLDS[name]
    ids = {word: index + 1 for index, word in enumerate(vocabulary(world))}
    train = [[*(ids[word] for word in words_of(s.text)), 0] for s in stories(world, 0, "train", 500)]
    held_out = list(stories(world, 0, "val", 40))
    tokens = [[*(ids[word] for word in words_of(s.text)), 0] for s in held_out]
    nats = fit(train, 5, vocab_size=len(ids) + 1).nats(tokens)
    assert nats > 1.25 * floor(held_out)
    assert nats < 3 * floor(held_out)  # it does learn: uniform over the vocabulary is near 6


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match="no tokens"):
        fit([[]], 5, vocab_size=3)
    with pytest.raises(InputError, match=r"ids from 0 to 3: they must lie in \[0, 3\)"):
        fit([[0, 3]], 5, vocab_size=3)
    with pytest.raises(InputError, match="-1"):
        fit([[0, 1]], 5, vocab_size=3).nats([[-1]])
