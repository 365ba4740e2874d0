"""Guards beside the loop: a loss that leaps, a step that does not come back."""

from __future__ import annotations

import threading
import time

import pytest

from jaxlm.config import RunConfig, TrainOptions, validated
from jaxlm.errors import InputError
from jaxlm.guards_config import GuardOptions
from jaxlm.train.guards import MIN_STEPS, SpikeGuard, Watchdog


def test_guards_change_no_result_and_so_no_identity():
    plain = TrainOptions()
    guarded = TrainOptions(guards=GuardOptions(spike_factor=3, spike_window=5, hang_factor=0, hang_seconds=1))
    assert guarded.identity() == plain.identity()
    assert "guards" not in plain.identity()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"spike_factor": 0.5}, "spike_factor=0.5 must be above 1"),
        ({"hang_factor": 1.0}, "hang_factor=1.0 must be above 1"),
        ({"spike_factor": -2}, "spike_factor"),
        ({"spike_window": 0}, "spike_window"),
        ({"hang_seconds": 0}, "hang_seconds"),
        ({"spike_facter": 2}, "did you mean spike_factor?"),
    ],
)
def test_options_that_cannot_be(values, words):
    with pytest.raises(InputError) as caught:
        validated(RunConfig, {"train": {"guards": values}})
    assert str(caught.value).startswith("train.guards")
    assert words in str(caught.value)


def test_a_spike_is_told_by_the_median_of_the_last_losses():
    guard = SpikeGuard(GuardOptions(spike_factor=2, spike_window=3))
    # Nothing to compare with until three have been seen; then medians by hand.
    assert [guard.usual(x) for x in (50.0, 4.0, 3.0)] == [None, None, None]
    assert guard.usual(8.0) is None  # twice the median of (50, 4, 3) is 8, and 8 is not above it
    assert guard.losses == [4.0, 3.0, 8.0]
    assert guard.usual(8.5) == 4.0
    assert guard.losses == [4.0, 3.0, 8.0]  # a spike is not remembered: it would become the usual
    assert guard.usual(7.9) is None


def test_an_interrupted_run_is_judged_as_an_unbroken_one():
    options = GuardOptions(spike_factor=2, spike_window=3)
    whole = SpikeGuard(options)
    for loss in (3.0, 3.1, 2.9, 3.0):
        whole.usual(loss)
    again = SpikeGuard(options, whole.losses)
    assert again.usual(7.0) == whole.usual(7.0) == 3.0


def test_without_a_factor_nothing_is_a_spike_or_kept():
    guard = SpikeGuard(GuardOptions(spike_window=1))
    assert [guard.usual(x) for x in (1.0, 1e30)] == [None, None]
    assert guard.losses == []


class Said(list):
    """What a watchdog said, and an event for it."""

    def __init__(self):
        super().__init__()
        self.event = threading.Event()

    def __call__(self, sentence):
        self.append(sentence)
        self.event.set()


def test_a_step_that_does_not_end_is_told_once():
    said = Said()
    with Watchdog(GuardOptions(hang_factor=10, hang_seconds=0.05), said, poll=0.01) as dog:
        dog.watch(7, [0.02] * MIN_STEPS)  # the limit: 10 * 0.02 = 0.2 s, above hang_seconds
        began = time.monotonic()
        assert said.event.wait(30)
        assert time.monotonic() - began >= 0.19
        time.sleep(0.1)
    assert said == ["step 7 has not ended in 0 s, where the usual step takes 0.02 s"]


@pytest.mark.parametrize("quiet", ["ends", "rests", "few", "off", "least"])
def test_what_is_no_hang(quiet):
    said = Said()
    options = GuardOptions(
        hang_factor=0 if quiet == "off" else 2, hang_seconds=60 if quiet == "least" else 0.01
    )  # fmt: skip
    with Watchdog(options, said, poll=0.005) as dog:
        for step in range(20):
            dog.watch(step, [0.05] * (MIN_STEPS - 1 if quiet == "few" else MIN_STEPS))
            if quiet != "ends":
                break
            time.sleep(0.01)
        if quiet == "rests":
            dog.rest()
        if quiet != "ends":
            time.sleep(0.3)
    assert said == []
