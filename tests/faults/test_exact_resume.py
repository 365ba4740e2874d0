"""A training that is broken off at random points, and continued each time, is the unbroken one: to the bit."""

from __future__ import annotations

import random
from collections import Counter
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import harness
import jax
import numpy as np
import pytest

from jaxlm import model, train
from jaxlm.config import ModelConfig, TrainConfig
from jaxlm.data import RowSet, pack_examples, write_rows, write_stream
from jaxlm.errors import DivergedError, InputError, Preempted
from jaxlm.guards_config import GuardOptions
from jaxlm.stages import fitting
from jaxlm.stages.spec import Spec
from jaxlm.tokenizers import char
from jaxlm.train import loop
from jaxlm.train.stopping import Stop

QUICK_COMPILE = True

T = 8
CFG = TrainConfig(
    model=ModelConfig(vocab_size=9, n_layers=1, d_model=8, n_heads=2, d_ff=12, max_seq_len=T, mlp="relu", dropout=0.2),
    steps=17, batch_size=4, grad_accum_steps=2, warmup_steps=2, learning_rate=0.02, log_every=1, eval_every=5,
    checkpoint_every=3, keep_checkpoints=1, sample_tokens=0,
)  # fmt: skip


class Recorded(RowSet):
    """Rows that note which of them are read."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.seen: list[list[int]] = []

    def batch(self, indices: Any) -> Any:
        self.seen.append([int(i) for i in indices])
        return super().batch(indices)


class Training:
    """A fitting stage but for its process, on so few rows that batches straddle the ends of epochs."""

    def __init__(self, kind: str, data: Path) -> None:
        self.kind, self.tokenizer = kind, char("abcdefgh", eot=True)
        named = {"vocab_size": 9, "tokenizer_fingerprint": self.tokenizer.fingerprint}
        rng = np.random.default_rng(0)
        if kind == "pretrain":
            index = write_stream(data, rng.integers(0, 9, T * 6 + 1), name="train", seq_len=T, **named)
        else:  # packed rows: prompts that do not count, segments, padding
            examples = [rng.integers(1, 9, n) for n in (3, 4, 5, 6, 7, 8, 4, 5, 3, 6)]
            masks = [np.arange(len(ids)) >= len(ids) // 2 for ids in examples]
            rows = pack_examples([ids.astype(np.int32) for ids in examples], [m.astype(np.uint8) for m in masks],
                                 seq_len=T)  # fmt: skip
            index = write_rows(data, rows, name="train", **named)
        self.data = (data, index)
        shapes = jax.eval_shape(lambda: model.init(CFG.model, jax.random.key(0)))
        rng = np.random.default_rng(1)
        self.params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) * 0.2, shapes)

    def spec(self, root: Path) -> Spec:
        return Spec(stage=self.kind, version=1, config={}, root=str(root))

    def __call__(self, root: Path, *, stop_at: int | None = None, cfg: TrainConfig = CFG) -> tuple[Any, dict[int, Any]]:
        """Trains in `root` from where it stands there; (results, rows by step). Asked to stop in step `stop_at`."""
        spec = self.spec(root)
        spec.directory.mkdir(parents=True, exist_ok=True)
        rows = Recorded(*self.data)
        done = max(harness.saved_steps(spec.directory), default=0)
        stop = Stop(lambda: stop_at is not None and done + len(rows.seen) >= stop_at)
        results: Any = None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fitting, "stop_requested", lambda directory: nullcontext(stop))
            with suppress(Preempted):
                results = fitting.fit_stage(
                    spec, cfg, seed=5, tokenizer=self.tokenizer, rows=rows, val_rows=RowSet(*self.data), prompt="",
                    start=lambda cfg: train.init_state(cfg, 5, params=self.params),
                )  # fmt: skip
        return results, {done + i + 1: seen for i, seen in enumerate(rows.seen)}

    def outcome(self, root: Path) -> dict[str, Any]:
        directory = self.spec(root).directory
        return harness.training(directory) | harness.state_digests(directory)


@pytest.fixture(scope="module", params=["pretrain", "sft"])
def whole(request, tmp_path_factory) -> tuple[Training, dict[str, Any], Any, dict[int, Any]]:
    """A training and what it comes to when nobody breaks it off."""
    training, root = Training(request.param, tmp_path_factory.mktemp("rows")), tmp_path_factory.mktemp("unbroken")
    results, seen = training(root)
    return training, training.outcome(root), results, seen


def test_the_unbroken_run_sees_every_row_once_an_epoch(whole):
    training, outcome, _, seen = whole
    n_rows = RowSet(*training.data).n_rows
    assert n_rows % CFG.batch_size  # so that batches straddle epochs
    flat = [row for step in range(1, CFG.steps + 1) for row in seen[step]]
    for start in range(0, len(flat) - n_rows + 1, n_rows):
        assert sorted(flat[start : start + n_rows]) == list(range(n_rows))
    assert len(flat) > 2 * n_rows
    assert [key for key in outcome if key.startswith("train ")] == [f"train {s}" for s in range(1, CFG.steps + 1)]
    assert [key for key in outcome if key.startswith("val ")] == ["val 5", "val 10", "val 15", "val 17"]


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 6))]
)  # fmt: skip
def test_broken_off_at_random_points(whole, tmp_path, seed):
    training, outcome, unbroken_results, unbroken_rows = whole
    points = sorted(random.Random(seed).sample(range(1, CFG.steps + 1), random.Random(seed).randint(2, 6)))
    rows: dict[int, Any] = {}
    for point in points:
        results, seen = training(tmp_path, stop_at=point)
        assert results is None, points
        assert harness.saved_steps(training.spec(tmp_path).directory)[-1] == point, points
        assert not rows.keys() & seen.keys(), points  # no step is done twice
        rows |= seen
    results, seen = training(tmp_path)
    rows |= seen
    assert rows == unbroken_rows, points
    flat = Counter(row for seen in rows.values() for row in seen)
    assert flat == Counter(row for seen in unbroken_rows.values() for row in seen)
    assert training.outcome(tmp_path) == outcome, points
    same = ("steps", "tokens", "train_loss", "val_loss", "skipped")
    assert {key: results[key] for key in same} == {key: unbroken_results[key] for key in same}


def test_rows_of_another_tokenizer_are_refused(tmp_path):
    """One letter is another: as many ids, and other meanings."""
    (tmp_path / "rows").mkdir()
    training = Training("pretrain", tmp_path / "rows")
    training.tokenizer = char("abcdefgi", eot=True)
    with pytest.raises(InputError) as caught:
        training(tmp_path)
    name = training.spec(tmp_path).name
    assert str(caught.value) == f"{name}: its rows were made by another tokenizer; delete the store and run again."


def test_a_step_saved_without_its_loss_gets_it_after_the_evaluation(whole, tmp_path):
    """Stopped before the evaluation of step 5: the continued run evaluates, and the checkpoint counts as the best."""
    from jaxlm.checkpoint import best_step

    training, outcome, _, _ = whole
    training(tmp_path, stop_at=5)
    checkpoints = training.spec(tmp_path).directory / "checkpoints"
    assert best_step(checkpoints) is None
    training(tmp_path, stop_at=6)
    assert best_step(checkpoints) == 5
    loss = float.fromhex(outcome["val 5"][0])
    from jaxlm._digests import Manifest, read_manifest

    manifest = read_manifest(checkpoints / "5", 5)
    assert isinstance(manifest, Manifest)
    assert manifest.metric == loss


@pytest.mark.parametrize("broken", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_spike_ends_the_run_and_does_so_again(whole, tmp_path, monkeypatch, broken):
    """The loss of step 8 is told a thousand times too high; interrupted before or not, the same step ends the run."""
    training, *_ = whole
    original = loop.train_step

    def leaping(cfg, state, batch):
        new, metrics = original(cfg, state, batch)
        return new, metrics | {"loss": jax.numpy.where(state.step == 7, 1000 * metrics["loss"], metrics["loss"])}

    monkeypatch.setattr(loop, "train_step", leaping)
    guarded = CFG.replace(guards=GuardOptions(spike_factor=3, spike_window=5))
    if broken:
        training(tmp_path, stop_at=7, cfg=guarded)
    for _ in range(2):
        with pytest.raises(DivergedError) as caught:
            training(tmp_path, cfg=guarded)
        assert "stopped after the update of step 8: loss" in str(caught.value)
        assert f"the last good checkpoint is step {7 if broken else 6} in" in str(caught.value)
        assert "train.guards.spike_factor" in str(caught.value)
    results, _ = training(tmp_path)  # without the guard it goes on
    assert results["steps"] == CFG.steps
