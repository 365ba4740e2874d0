"""Asked to stop, whatever it is doing: everything saved within 20 s, code 75, and the same command continues."""

from __future__ import annotations

import signal
import time

import harness
import pytest

QUICK_COMPILE = True

# A model that is busy for long: the main thread sleeps where a large one compiles, evaluates or writes for a minute.
POINTS = {
    "restore": ("jaxlm.stages.fitting:restore", 1, 60.0),
    "compile": ("jaxlm.train.loop:train_step", 1, 60.0),  # traced once, before it is compiled
    "step": ("jaxlm.data.shards:RowSet.batch", 12, 1.0),
    "evaluation": ("jaxlm.stages.fitting:split_loss", 1, 60.0),
    "save": ("jaxlm._writer:write_manifest", 2, 2.0),
}


def asked(chain, tmp_path, point: str, *signals: signal.Signals) -> tuple[int, str, float]:
    """Holds the stage at a point and asks it there; (code, standard error, seconds until it had ended)."""
    target, call, seconds = POINTS[point]
    marker = tmp_path / f"held at {point} {signals[0].name}"
    hold = harness.Hold(target, marker, seconds if len(signals) == 1 else 60.0, call)
    with chain.process("pretrain", hold=hold) as stage:
        stage.until_held()
        at = stage.send(signals[0])
        for number in signals[1:]:
            time.sleep(0.3)
            at = stage.send(number)
        code, error = stage.end()
        return code, error, time.monotonic() - at


def continues(chain, unbroken) -> None:
    with chain.process("pretrain") as stage:
        assert stage.end() == (0, "")
    assert harness.outcome(chain.directory("pretrain")) == unbroken


def asked_once(chain, tmp_path, point: str, number: signal.Signals) -> None:
    """What is promised of a single request, at one of the points."""
    directory = chain.directory("pretrain")
    before = harness.saved_steps(directory)
    code, error, seconds = asked(chain, tmp_path, point, number)
    assert code == 75, error
    assert seconds < 20
    assert "run the same command again." in error
    assert "Traceback" not in error
    steps = harness.saved_steps(directory)
    if point in ("restore", "compile"):
        assert steps == before  # there was nothing new yet
    else:
        assert steps[-1] == harness.last_step(directory) >= max(before, default=1)
    if point == "evaluation":
        assert steps[-1] % 8 == 0  # the very step it was evaluating
    assert not list(directory.glob("checkpoints/*.unfinished*"))


def test_asked_once(make_chain, unbroken, tmp_path):
    chain = make_chain()
    asked_once(chain, tmp_path, "evaluation", signal.SIGTERM)
    continues(chain, unbroken)


@pytest.mark.slow
def test_asked_again_and_again(make_chain, unbroken, tmp_path):
    """One run, in each phase, by the signals that no other test sends there."""
    chain = make_chain()
    for point, number in (
        ("compile", signal.SIGINT), ("compile", signal.SIGTERM), ("step", signal.SIGINT), ("restore", signal.SIGTERM),
        ("save", signal.SIGTERM), ("evaluation", signal.SIGINT),
    ):  # fmt: skip
        asked_once(chain, tmp_path, point, number)
    continues(chain, unbroken)


@pytest.mark.slow
def test_asked_twice_it_leaves_at_once_without_harm(make_chain, unbroken, tmp_path):
    """In a save that takes a minute."""
    chain = make_chain()
    code, error, seconds = asked(chain, tmp_path, "save", signal.SIGINT, signal.SIGINT)
    assert code == 75, error
    assert seconds < 20  # it has not waited for the save
    assert "stopped at once by a second request" in error
    continues(chain, unbroken)
