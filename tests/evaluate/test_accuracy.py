from __future__ import annotations

import pytest

from jaxlm.evaluate.accuracy import by_type, exact_match, fraction_right, normalize, wilson_interval


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" kitchen\n", "kitchen"),
        ("kitchen<|endoftext|> and more", "kitchen"),
        (" <|endoftext|>kitchen", ""),
        ("Kitchen", "Kitchen"),
        ("the  mill", "the  mill"),
    ],
)
def test_normalize_cuts_at_the_end_of_text_and_strips(text: str, expected: str) -> None:
    assert normalize(text) == expected


def test_exact_match_is_exact() -> None:
    predictions = [" red", "Red", "red.", "red<|endoftext|>blue", "dark red"]
    assert exact_match(predictions, ["red"] * 5) == [True, False, False, True, False]
    with pytest.raises(ValueError, match="zip"):
        exact_match(["red"], [])


def test_fraction_right() -> None:
    assert fraction_right([True, False, False, False]) == 0.25
    assert fraction_right([]) is None


# R. G. Newcombe (1998), Two-sided confidence intervals for the single proportion, Statistics in Medicine 17, table I,
# method 3 (score without continuity correction).
@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_agrees_with_the_published_table(right: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(right, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_is_symmetric_and_stays_inside() -> None:
    low, high = wilson_interval(3, 17)
    assert wilson_interval(14, 17) == pytest.approx((1 - high, 1 - low))
    assert wilson_interval(20, 20)[1] == 1.0
    with pytest.raises(ValueError, match="n_right=5"):
        wilson_interval(5, 4)
    with pytest.raises(ValueError, match="n=0"):
        wilson_interval(0, 0)


def test_by_type_counts_each_type_beside_its_baselines() -> None:
    types = ["who", "where", "who", "where", "who", "who"]
    before = [False, False, True, False, False, False]
    after = [True, True, True, False, False, True]
    baselines = {"who": {"last mention": 0.25, "most frequent": 0.5}, "where": {"random candidate": 0.0}}
    table = by_type(types, before=before, after=after, baselines=baselines)
    assert list(table) == ["where", "who"]
    who, where = table["who"], table["where"]
    assert (who["n"], who["before"], who["after"]) == (4, 0.25, 0.75)
    assert (who["best_baseline"], who["ratio"]) == (0.5, 1.5)
    assert (where["n"], where["before"], where["after"]) == (2, 0.0, 0.5)
    assert where["ratio"] is None  # nothing can be so many times zero
    assert who["interval"] == pytest.approx(wilson_interval(3, 4))


def test_by_type_without_fine_tuning_and_without_baselines() -> None:
    table = by_type(["who", "who"], before=[True, False])
    assert table["who"]["after"] is None
    assert table["who"]["interval"] == pytest.approx(wilson_interval(1, 2))
    assert table["who"]["baselines"] == {}
    assert table["who"]["best_baseline"] is None
    with pytest.raises(ValueError, match="needs the matches"):
        by_type(["who"])
    with pytest.raises(ValueError, match="1 matches for 2"):
        by_type(["who", "who"], after=[True])
