"""Asked to stop, whatever it is doing: everything saved within 20 s, code 75, and the same command continues."""

from __future__ import annotations

import signal
import time

import harness
import pytest

QUICK_COMPILE = True

# A model that is busy for long: the main thread sleeps where a large one compiles, evaluates or writes for a minute.
POINTS = {
    "compile": ("jaxlm.train.loop:train_step", 1, 60.0),  # traced once, before it is compiled
    "step": ("jaxlm.data.shards:RowSet.batch", 12, 1.0),
    "evaluation": ("jaxlm.stages.fitting:split_loss", 1, 60.0),
    "save": ("jaxlm._writer:write_manifest", 2, 2.0),
}


def asked(chain, tmp_path, point: str, *signals: signal.Signals) -> tuple[int, str, float]:
    """Holds the stage at a point and asks it there; (code, standard error, seconds until it had ended)."""
    target, call, seconds = POINTS[point]
    hold = harness.Hold(target, tmp_path / "held", seconds if len(signals) == 1 else 60.0, call)
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


@pytest.mark.parametrize(
    ("point", "number"),
    [
        ("evaluation", signal.SIGTERM),
        pytest.param("compile", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("step", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("save", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("compile", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("step", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("evaluation", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("save", signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_asked_once(make_chain, unbroken, tmp_path, point, number):
    chain = make_chain()
    code, error, seconds = asked(chain, tmp_path, point, number)
    assert code == 75, error
    assert seconds < 20
    assert "run the same command again." in error
    assert "Traceback" not in error
    steps = harness.saved_steps(chain.directory("pretrain"))
    if point == "compile":
        assert steps == []  # there was nothing yet
    elif point == "evaluation":
        assert steps[-1] == 8  # the very step it was evaluating
    else:
        assert steps[-1] == harness.last_step(chain.directory("pretrain"))
    assert not list(chain.directory("pretrain").glob("checkpoints/*.unfinished*"))
    continues(chain, unbroken)


@pytest.mark.parametrize("point", ["save", pytest.param("evaluation", marks=pytest.mark.slow)])
def test_asked_twice_it_leaves_at_once_without_harm(make_chain, unbroken, tmp_path, point):
    chain = make_chain()
    code, error, seconds = asked(chain, tmp_path, point, signal.SIGINT, signal.SIGINT)
    assert code == 75, error
    assert seconds < 20  # it has not waited for the save, which takes a minute
    assert "stopped at once by a second request" in error
    continues(chain, unbroken)
