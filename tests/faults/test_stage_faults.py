"""Stages as processes: a disk that fills up, a step that hangs, a process that is stopped for a while, and kill -9."""

from __future__ import annotations

import re
import signal
import sys
import time
from pathlib import Path

import harness
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

QUICK_COMPILE = True


@pytest.mark.slow
def test_a_disk_that_fills_up(make_chain, unbroken):
    """No file may grow beyond a size: another one fails each time. The sentence, code 74, and then it continues."""
    chain = make_chain()
    for size in (300, 1500, 6000, 10_000):  # at last, the manifest of 13 kB
        with chain.process("pretrain", file_size=size) as stage:
            code, error = stage.end()
        assert code == 74, (size, error)
        assert "Traceback" not in error
        assert error.count("\n") == 1, error
    with chain.process("pretrain") as stage:
        assert stage.end() == (0, "")
    assert harness.outcome(chain.directory("pretrain")) == unbroken


# Where a save, or the end of a stage, is neither here nor there; the second call, so that there is one to go back to.
KILL_POINTS = {
    "data written, digests not": ("jaxlm._writer:write_manifest", 2),
    "digests written, name not given": ("jaxlm._writer:put_in_place", 2),
    "old ones not yet removed": ("jaxlm._writer:Checkpointer._retire", 2),
    "old one half removed": ("jaxlm._steps:shutil.rmtree", 2),
    "trained, without its manifest": ("jaxlm.stages.process:write_manifest", 1),
}


@pytest.mark.slow
def test_killed_at_the_worst_moments(make_chain, unbroken, tmp_path):
    """kill -9 at each named point of one run, one after another."""
    chain = make_chain()
    directory, saved = chain.directory("pretrain"), 0
    for number, (point, (target, call)) in enumerate(KILL_POINTS.items()):
        with chain.process("pretrain", hold=harness.Hold(target, tmp_path / f"held {number}", call=call)) as stage:
            stage.until_held()
            stage.kill()
        # What was whole before is whole, and the run has got on.
        steps = [step for step in harness.saved_steps(directory) if not checkpoint_damage(directory, step)]
        assert steps[-1] > saved, point
        saved = steps[-1]
    with chain.process("pretrain") as stage:
        assert stage.end() == (0, "")
    assert harness.outcome(directory) == unbroken


def checkpoint_damage(directory: Path, step: int) -> bool:
    from jaxlm._digests import check

    return isinstance(check(directory / "checkpoints" / str(step), step), list)


@pytest.mark.slow
def test_a_step_that_hangs_ends_the_run_with_the_stacks(make_chain, unbroken, tmp_path):
    """As when a peer has stopped answering: the main thread waits for ever."""
    chain = make_chain(train={"guards": {"hang_factor": 2, "hang_seconds": 5.0}})
    hold = harness.Hold("jaxlm.train.loop:rows_for_step", tmp_path / "held", 120.0, call=14)
    with chain.process("pretrain", hold=hold) as stage:
        stage.until_held()
        began = time.monotonic()
        code, error = stage.end()
    assert code == 69, error  # away, and worth a retry
    assert time.monotonic() - began < 60
    # Five, or twice the usual step where the machine is slower than that.
    assert re.search(r"has not ended in \d+ s, where the usual step takes", error), error
    stacks = (chain.directory("pretrain") / "stacks.txt").read_text()
    assert "in held" in stacks  # where the main thread was
    assert "loop.py" in stacks
    with chain.process("pretrain") as stage:
        assert stage.end() == (0, "")
    assert harness.outcome(chain.directory("pretrain")) == unbroken


@pytest.mark.slow
def test_a_process_that_is_stopped_for_a_while_is_not_taken_for_one_that_hangs(make_chain, unbroken, tmp_path):
    chain = make_chain(train={"guards": {"hang_factor": 2, "hang_seconds": 5.0}})
    # Held for half a second in a step: stopped there, the step takes far longer than five seconds by the clock.
    hold = harness.Hold("jaxlm.train.loop:rows_for_step", tmp_path / "held", 0.5, call=14)
    with chain.process("pretrain", hold=hold) as stage:
        stage.until_held()
        stage.send(signal.SIGSTOP)
        time.sleep(8)
        stage.send(signal.SIGCONT)
        assert stage.end() == (0, "")
    assert harness.outcome(chain.directory("pretrain")) == unbroken


@pytest.mark.slow
def test_thirty_kills_lose_nothing(tmp_path):
    import kill_everything

    said: list[str] = []
    found = kill_everything.run(tmp_path, kills=30, seed=None, say=said.append)
    assert (found.kills, found.lost, found.silent) == (30, 0, 0), "\n".join(said)
    assert found.cached_programs > 0
    assert found.damaged_programs == [], "\n".join(said)
