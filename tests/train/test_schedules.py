"""Learning rates at the steps that matter, by hand."""

from __future__ import annotations

import pytest

from jaxlm.config import TrainOptions
from jaxlm.train.schedules import shape

QUICK_COMPILE = True


def rates(at, **options):
    relative = shape(TrainOptions(**options))
    return [float(relative(step)) for step in at]


def test_warm_up_is_linear_and_its_first_step_already_moves():
    """1/5, 2/5, ... and the peak at step 4, the fifth."""
    found = rates(range(7), steps=20, warmup_steps=4, schedule="constant")
    assert found == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0])


def test_cosine():
    """After 20 steps of warm-up, 80 of half a cosine down to 0.1: 0.1 + 0.9 (1 + cos(pi t / 80)) / 2."""
    found = rates([19, 20, 40, 60, 80, 100], steps=100, warmup_steps=20, schedule="cosine", final_lr_ratio=0.1)
    assert found == pytest.approx([20 / 21, 1.0, 0.868198, 0.55, 0.231802, 0.1], rel=1e-5)


def test_linear():
    found = rates([0, 25, 50, 75, 100, 200], steps=100, schedule="linear", final_lr_ratio=0.2)
    assert found == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.2])
    found = rates([0, 99], steps=100, schedule="linear", final_lr_ratio=0.0)
    assert found == pytest.approx([1.0, 0.01])  # the last step, 99, still moves


def test_warmup_stable_decay():
    """10 up, 72 flat, and the last 18 of the 90 that are left down to 0."""
    options = dict(steps=100, warmup_steps=10, schedule="wsd", decay_fraction=0.2, final_lr_ratio=0.0)
    assert rates([0, 9, 10, 50, 82], **options) == pytest.approx([1 / 11, 10 / 11, 1.0, 1.0, 1.0])
    assert rates([83, 91, 99, 100], **options) == pytest.approx([17 / 18, 0.5, 1 / 18, 0.0])


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "wsd"])
@pytest.mark.parametrize("warmup", [0, 1, 8])
def test_every_schedule_stays_within_zero_and_one_and_never_rises_after_its_peak(schedule, warmup):
    found = rates(range(12), steps=9, warmup_steps=warmup, schedule=schedule)
    assert max(found) == 1.0
    assert min(found) > 0
    assert found.index(1.0) == warmup
    after = found[warmup:]
    assert after == sorted(after, reverse=True)
