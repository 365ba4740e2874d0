"""Two processes on loopback pretrain together through jax.distributed: the real stage, a table for a model."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from jaxlm.config import load
from jaxlm.errors import InputError, Preempted
from jaxlm.launch_config import LaunchConfig
from jaxlm.metrics_log import history
from jaxlm.stages.plan import plan
from jaxlm.stages.runner import preempted_when_stopped, run_stage

# Of the letters: nine tenths of 1,920 characters are for training, 1,728, and a window is 16 and the target after them:
# the last 15 targets are too few for one. 27 steps of 4 are an epoch and the first row of the next, which comes again.
ROWS = 107
STEPS, BATCH = 27, 4


@pytest.fixture
def pretraining(letters_run, tmp_path, monkeypatch):
    """pretraining(processes, override...) -> spec of the stage in a root of its own, and how to launch it."""
    fakes = str(Path(__file__).parent / "fakes")
    monkeypatch.syspath_prepend(fakes)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [fakes, os.environ.get("PYTHONPATH")])))
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)

    def make(processes, *overrides):
        root = tmp_path / f"with-{processes}"
        shutil.copytree(letters_run.root / "store", root / "store", copy_function=shutil.copy2, dirs_exist_ok=True)
        settings = [
            "launcher=process",
            f"train.steps={STEPS}",
            f"train.batch_size={BATCH}",
            "train.eval_every=9",
            *overrides,
        ]
        cfg = load(letters_run.config, settings).replace(root=str(root), launch=LaunchConfig(processes=processes))
        return plan(cfg, modules={"pretrain": "counting_pretrain"})[2], cfg.launch

    return make


def rows_read(directory, processes):
    return [
        [int(row) for row in (directory / f"rows-{number}.part").read_text().split()] for number in range(processes)
    ]


def by_step(first, second):
    """The rows of both processes in the order of the steps: each reads half of a step's batch."""
    half = BATCH // 2
    return [row for at in range(0, len(first), half) for row in (*first[at : at + half], *second[at : at + half])]


def test_two_processes_see_each_row_once_and_learn_what_one_learns(pretraining):
    spec, launch = pretraining(2)
    together, _ = run_stage(spec, launch=launch, echo=lambda line: None)
    first, second = rows_read(together.directory, 2)
    assert len(first) == len(second) == STEPS * BATCH // 2
    in_order = by_step(first, second)
    assert sorted(in_order[:ROWS]) == list(range(ROWS))
    # Which two rows of a step a process reads follows from its place: the same steps, in the same order, as alone.
    spec, launch = pretraining(1)
    alone, _ = run_stage(spec, launcher="inline", launch=launch)
    (every,) = rows_read(alone.directory, 1)
    assert in_order == every
    assert together.results["tokens"] == alone.results["tokens"] == STEPS * BATCH * 16
    for figure in ("val_loss", "train_loss"):
        # Sums over two devices round in another order: 1e-7 is what two layouts differ by.
        assert together.results[figure] == pytest.approx(alone.results[figure], rel=1e-5)
    steps = [record["step"] for record in history(together.directory) if record.get("split") == "train"]
    assert steps == list(range(1, STEPS + 1))  # one process writes


@pytest.mark.slow
def test_a_batch_that_cannot_be_shared_evenly_is_refused(pretraining):
    spec, launch = pretraining(2, "train.batch_size=3")
    with pytest.raises(InputError, match=r"^launch\.processes=2: their 2 devices do not divide the 3 rows"):
        run_stage(spec, launch=launch, echo=lambda line: None)


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step_and_go_on_from_it(pretraining, monkeypatch):
    def stop(line):
        if line.startswith("pretrain: step 6/"):
            raise KeyboardInterrupt

    spec, launch = pretraining(2)
    monkeypatch.setenv("COUNT_SLEEP", "0.2")
    with pytest.raises(Preempted, match=r"stopped on request after step \d+ of 27, saved"), preempted_when_stopped():
        run_stage(spec, launch=launch, echo=stop)
    before = rows_read(spec.directory, 2)
    assert len(before[0]) == len(before[1]) < STEPS * BATCH // 2
    monkeypatch.setenv("COUNT_SLEEP", "0")
    manifest, _ = run_stage(spec, launch=launch, echo=lambda line: None)
    in_order = by_step(*rows_read(manifest.directory, 2))
    assert len(in_order) == STEPS * BATCH
    assert sorted(in_order[:ROWS]) == list(range(ROWS))
    assert manifest.results["steps"] == STEPS
