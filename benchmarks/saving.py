"""What saving costs the training loop, digests included.

    python benchmarks/saving.py
    python benchmarks/saving.py --config storyworld --directory /the/disk/that/is/meant

The loop of the pretrain stage (the step, its batches, `Checkpointer.save` with its digests in the background) runs in
pairs of equal numbers of steps, one of them with a save in its middle, turn about. The difference of a pair's times is
what one save cost the loop: the blocking copy, and what the background work takes from the steps beside it. Reported
are its median and the share of a minute that it is.

A whole run takes `--pairs` times twice `--seconds` and the compilation: about four minutes with what is given. A half
should be long against the save's background work, a second or less for such models.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from jaxlm import parallel, train
from jaxlm.checkpoint import Checkpointer
from jaxlm.config import TrainConfig, load
from jaxlm.train import loop


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", default="quickstart", help="whose model and training are taken")
    parser.add_argument("--vocab-size", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10.0, help="of a half of a pair, at least")
    parser.add_argument("--directory", default=None, help="where to save: the disk that is meant")
    given = parser.parse_args()
    parallel.use_all_cores()
    run = load(given.config)
    cfg = TrainConfig(model=run.model.replace(vocab_size=given.vocab_size), **run.train.model_dump())
    layout = parallel.layout_for(cfg.batch_size // cfg.grad_accum_steps)
    state = train.init_state(cfg, 0)
    shardings = layout.of_state(state)
    state = jax.device_put(state, shardings)
    step_fn = jax.jit(train.train_step, donate_argnums=1, out_shardings=(shardings, layout.whole))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, given.vocab_size, (64, cfg.batch_size, run.data.seq_len + 1)).astype(np.int32)

    def go(state: train.TrainState, steps: int, save: Checkpointer | None) -> tuple[train.TrainState, float]:
        began, previous = time.perf_counter(), None
        for i in range(steps):
            window = tokens[i % len(tokens)]
            state, metrics = step_fn(
                cfg, state, layout.put_batch({"tokens": window[:, :-1], "targets": window[:, 1:].copy()})
            )
            if previous is not None:
                jax.device_get(previous)  # as the loop does: the metrics of a step while the next one runs
            previous = metrics
            if save is not None and i == steps // 3:
                jax.device_get(previous)
                save.save(int(state.step), loop.items(state), meta={}, metric=None)
        jax.block_until_ready(state)
        return state, time.perf_counter() - began

    state, _ = go(state, 5, None)
    state, spent = go(state, 20, None)
    steps = max(20, round(given.seconds / spent * 20))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(loop.items(state)))
    print(
        f"{size / 1e6:.1f} MB in {len(jax.tree.leaves(state))} leaves; {spent / 20 * 1e3:.1f} ms a step; {steps} a half"
    )
    costs = []
    with tempfile.TemporaryDirectory(dir=given.directory) as folder, Checkpointer(Path(folder) / "c") as checkpointer:
        for pair in range(given.pairs):
            halves = {}
            for saving in (pair % 2 == 0, pair % 2 == 1):
                state, seconds = go(state, steps, checkpointer if saving else None)
                if saving:
                    began = time.perf_counter()
                    checkpointer.wait()
                    late = time.perf_counter() - began
                    seconds += late  # it was not done when the steps were: all of the rest counts
                halves[saving] = seconds
            costs.append(halves[True] - halves[False])
            print(
                f"pair {pair + 1}: {halves[False]:.2f} s without, {halves[True]:.2f} s with a save: {costs[-1]:+.3f} s"
            )
    cost = statistics.median(costs)
    print(f"one save costs the loop {cost:.3f} s in the median: {cost / 60:.2%} of its time at one a minute")


if __name__ == "__main__":
    main()
