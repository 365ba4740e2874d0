"""A training that was stopped, however it was stopped, ends in the very bits of one that never was."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm import model, train
from jaxlm.checkpoint import restore
from jaxlm.config import ModelConfig, RunConfig, TrainConfig, validated
from jaxlm.data import RowSet, write_stream
from jaxlm.errors import Preempted
from jaxlm.metrics_log import history
from jaxlm.stages import fitting, process
from jaxlm.stages.plan import plan
from jaxlm.stages.runner import run_chain
from jaxlm.stages.spec import Spec
from jaxlm.stages.store import write_spec
from jaxlm.tokenizers import char
from jaxlm.train import loop
from jaxlm.train.stopping import Stop

QUICK_COMPILE = True


def train_lines(directory: Path) -> list[tuple[int, str, str, int]]:
    """(step, loss in hex, gradient norm in hex, tokens) of each training record, as they stand in the file."""
    return [
        (record["step"], record["loss"].hex(), record["grad_norm"].hex(), record["tokens"])
        for record in history(directory)
        if record.get("split") == "train"
    ]


def val_lines(directory: Path) -> list[tuple[int, str]]:
    return [(r["step"], r["loss"].hex()) for r in history(directory) if r.get("split") == "val"]


def digests(directory: Path, cfg: TrainConfig) -> tuple[int, dict[str, str]]:
    """Step and digest of every leaf of the newest checkpoint: parameters, moments, counters."""
    shapes = loop.items(jax.eval_shape(lambda: train.init_state(cfg, 0)))
    found = restore(directory / "checkpoints", shapes)
    assert found is not None
    flat = jax.tree_util.tree_flatten_with_path(found.items)[0]
    return found.step, {
        jax.tree_util.keystr(path): hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest() for path, leaf in flat
    }


# In this process: stops at chosen steps

CFG = TrainConfig(
    model=ModelConfig(vocab_size=8, n_layers=1, d_model=8, n_heads=2, d_ff=12, max_seq_len=8, mlp="relu", dropout=0.2),
    steps=9, batch_size=4, grad_accum_steps=2, warmup_steps=2, learning_rate=0.02, log_every=1, eval_every=4,
    checkpoint_every=3, keep_checkpoints=1, sample_tokens=0,
)  # fmt: skip


class Fitting:
    """A whole fitting stage but its process, on 6 rows: batches of 4 straddle the ends of epochs."""

    def __init__(self, data: Path) -> None:
        self.tokenizer = char("abcdefgh")
        ids = np.random.default_rng(0).integers(0, 8, 8 * 6 + 1)
        index = write_stream(
            data, ids, name="train", seq_len=8, vocab_size=8, tokenizer_fingerprint=self.tokenizer.fingerprint
        )
        self.data = (data, index)
        shapes = jax.eval_shape(lambda: model.init(CFG.model, jax.random.key(0)))
        rng = np.random.default_rng(1)
        self.params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) * 0.2, shapes)

    def spec(self, root: Path) -> Spec:
        return Spec(stage="pretrain", version=1, config={}, root=str(root))

    def __call__(self, root: Path, *, stop_after: int | None = None, signal_at: int = 0) -> dict[str, Any]:
        """Trains in `root`, from where it stands there.

        Args:
            root: of a store.
            stop_after: the step after which it finds that it has been asked to stop.
            signal_at: the step, counted from where it starts, in which it gets a SIGTERM.
        """
        spec = self.spec(root)
        spec.directory.mkdir(parents=True, exist_ok=True)
        done = max((r["step"] for r in history(spec.directory) if r.get("split") == "train"), default=0)
        rows = Telling(*self.data, signal_at=signal_at)
        stop = Stop(lambda: done + rows.read == stop_after)
        with pytest.MonkeyPatch.context() as patch:
            if not signal_at:
                patch.setattr(fitting, "stop_requested", lambda directory: nullcontext(stop))
            return fitting.fit_stage(
                spec, CFG, seed=5, tokenizer=self.tokenizer, val_rows=RowSet(*self.data), prompt="", rows=rows,
                start=lambda cfg: train.init_state(cfg, 5, params=self.params),
            )  # fmt: skip


@pytest.fixture(scope="module")
def fit_in(tmp_path_factory) -> Fitting:
    return Fitting(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def unbroken(fit_in, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("unbroken")
    results = fit_in(root)
    (directory,) = root.glob("store/pretrain-*")
    return directory, results


def same_end(directory: Path, results: dict[str, Any], unbroken: tuple[Path, dict[str, Any]]) -> None:
    expected, expected_results = unbroken
    assert digests(directory, CFG) == digests(expected, CFG)
    assert train_lines(directory) == train_lines(expected)
    assert val_lines(directory) == val_lines(expected)
    for key in ("steps", "tokens", "train_loss", "val_loss", "skipped", "devices"):
        assert results[key] == expected_results[key], key


def test_the_unbroken_run_is_what_the_others_should_be(unbroken):
    directory, results = unbroken
    assert [line[0] for line in train_lines(directory)] == list(range(1, 10))
    assert [line[0] for line in val_lines(directory)] == [4, 8, 9]
    assert results["steps"] == 9
    assert results["tokens"] == 9 * 4 * 8
    assert digests(directory, CFG)[0] == 9


@pytest.mark.parametrize("stops", [[1, 4, 5], [3, 8, 9]], ids=str)
def test_stopped_and_continued(fit_in, unbroken, tmp_path, stops):
    """After the first step, at an evaluation, at a checkpoint, in mid-epoch, and after the last step of all."""
    for step in stops:
        with pytest.raises(Preempted, match=f"after step {step} of 9, saved"):
            fit_in(tmp_path, stop_after=step)
        (directory,) = tmp_path.glob("store/pretrain-*")
        assert digests(directory, CFG)[0] == step
    same_end(directory, fit_in(tmp_path), unbroken)


class Telling(RowSet):
    """Rows that count the batches read, and send a signal to this very process at a chosen one."""

    def __init__(self, *args: Any, signal_at: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.signal_at, self.read = signal_at, 0

    def batch(self, indices: Any) -> Any:
        self.read += 1
        if self.read == self.signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().batch(indices)


def test_sigterm_ends_with_code_75_and_everything_saved(fit_in, unbroken, tmp_path, capfd, monkeypatch):
    """The frame of a stage's process, with a real signal, in this process."""
    spec = fit_in.spec(tmp_path)
    write_spec(spec)
    monkeypatch.delenv(process.PARENT, raising=False)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            process.main(lambda spec, inputs: fit_in(tmp_path, signal_at=6), [str(spec.directory)])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 75  # EX_TEMPFAIL, which flows retry
    assert "after step 6 of 9, saved; run the same command again." in capfd.readouterr().err
    assert digests(spec.directory, CFG)[0] == 6
    assert not (spec.directory / "manifest.json").exists()
    same_end(spec.directory, fit_in(tmp_path), unbroken)


# For real: processes and signals

CONFIG: dict[str, Any] = {
    "name": "killed",
    "data": {"n_stories": 60, "n_val_stories": 4, "seq_len": 32},
    "model": {"kind": "bigram"},  # starts in a moment; what a signal meets is the same for every model
    "train": {
        "steps": 24, "batch_size": 4, "grad_accum_steps": 2, "learning_rate": 0.01, "log_every": 1, "eval_every": 10,
        "eval_rows": 4, "checkpoint_every": 2, "sample_tokens": 0,
    },
}  # fmt: skip


TRANSFORMER = {"preset": "nano", "n_layers": 2, "d_model": 32, "n_heads": 2, "max_seq_len": 32, "dropout": 0.1}


class Stage:
    """The pretrain stage of CONFIG in a store of its own, and its processes."""

    def __init__(self, root: Path, prepared: Path, env: dict[str, str], *, model: Any = None, **options: Any) -> None:
        changes = {"root": str(root), "model": model or CONFIG["model"], "train": CONFIG["train"] | options}
        self.cfg = validated(RunConfig, CONFIG | changes)
        (root / "store").mkdir()
        for done in prepared.glob("store/*"):
            (root / "store" / done.name).symlink_to(done, target_is_directory=True)
        self.spec = next(spec for spec in plan(self.cfg) if spec.stage == "pretrain")
        self.directory = write_spec(self.spec)
        self.env = env
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> subprocess.Popen[str]:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jaxlm.stages.pretrain", str(self.directory)],
            cwd=Path(__file__).parent.parent, env=self.env, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        return self.process

    def steps(self) -> list[int]:
        return sorted(int(p.name) for p in self.directory.glob("checkpoints/*") if p.name.isdecimal())

    def wait_for_a_checkpoint(self) -> int:
        """Waits until the process has saved one that was not there when this was called; returns its step."""
        assert self.process is not None
        before = max(self.steps(), default=0)
        end = time.monotonic() + 120
        while max(self.steps(), default=0) <= before:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < end
            time.sleep(0.005)
        return max(self.steps())

    def end(self) -> tuple[int, str]:
        assert self.process is not None
        error = self.process.communicate(timeout=200)[1]
        return self.process.returncode, error

    def outcome(self) -> tuple[Any, ...]:
        options = TrainConfig(
            model=ModelConfig(**json.loads((self.directory / "model.json").read_text())), **self.cfg.train.model_dump()
        )
        return digests(self.directory, options), train_lines(self.directory), val_lines(self.directory)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A store with the text and the tokens."""
    root = tmp_path_factory.mktemp("prepared")
    cfg = validated(RunConfig, CONFIG | {"root": str(root), "launcher": "inline"})
    run_chain(cfg, last="tokenize", echo=lambda line: None)
    return root


@pytest.fixture
def make_stage(prepared, tmp_path):
    made = []

    def make(name: str, env: dict[str, str], **options: Any) -> Stage:
        (tmp_path / name).mkdir()
        made.append(Stage(tmp_path / name, prepared, env, **options))
        return made[-1]

    yield make
    for stage in made:
        if stage.process is not None and stage.process.poll() is None:
            stage.process.kill()
            stage.process.communicate()


@pytest.fixture(scope="session")
def quick_env(tmp_path_factory) -> dict[str, str]:
    """For processes: as they are run for tests, and each program compiled once for all of them."""
    return os.environ | {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }


def test_a_killed_process_continues_to_the_same_bits(make_stage, quick_env):
    # How often it saves decides nothing: the unbroken run saves once.
    whole, broken = make_stage("whole", quick_env, checkpoint_every=0), make_stage("broken", quick_env)
    assert whole.spec.id == broken.spec.id
    whole.start()
    assert whole.end() == (0, "")

    process = broken.start()
    broken.wait_for_a_checkpoint()
    time.sleep(random.uniform(0, 0.3))
    process.kill()
    assert broken.end()[0] == -signal.SIGKILL
    assert 0 < max(broken.steps()) < 24
    assert not (broken.directory / "manifest.json").exists()

    broken.start()
    assert broken.end() == (0, "")
    assert broken.outcome() == whole.outcome()
    assert [line[0] for line in train_lines(broken.directory)] == list(range(1, 25))


@pytest.mark.slow
def test_killed_and_terminated_as_compiled_by_users(make_stage):
    """A transformer, compiled in each process anew; killed at any moment, compilation and saving included."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    options = {"model": TRANSFORMER, "optimizer": "muon"}
    whole, broken = make_stage("whole", plain, **options), make_stage("broken", plain, **options)
    begun = time.monotonic()
    whole.start()
    assert whole.end() == (0, "")
    typical = time.monotonic() - begun
    process = broken.start()
    time.sleep(random.uniform(0.1, 1.0) * typical)
    if process.poll() is None:
        process.kill()
    assert broken.end()[0] in (0, -signal.SIGKILL)
    shutil.rmtree(broken.directory / "checkpoints", ignore_errors=True)  # from the start again, lest it be done already
    (broken.directory / "manifest.json").unlink(missing_ok=True)
    process = broken.start()
    stopped_at = broken.wait_for_a_checkpoint()
    process.send_signal(signal.SIGTERM)
    code, error = broken.end()
    assert code == 75, error
    assert "saved; run the same command again" in error
    assert "Traceback" not in error
    assert stopped_at <= max(broken.steps()) < 24
    broken.start()
    assert broken.end() == (0, "")
    assert broken.outcome() == whole.outcome()
