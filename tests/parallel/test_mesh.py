"""Layouts, and a step on two devices against the same step on one. conftest.py sees to the two devices."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from jaxlm.config import ModelConfig, TrainConfig
from jaxlm.parallel import layout_for, use_all_cores
from jaxlm.train import init_state, train_step

QUICK_COMPILE = True


@pytest.fixture(autouse=True)
def _two_devices():
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices: JAX_NUM_CPU_DEVICES=2")


@pytest.mark.parametrize(("rows", "devices"), [(4, 2), (6, 2), (3, 1), (1, 1)])
def test_layout_takes_as_many_devices_as_divide_the_rows(rows, devices):
    layout = layout_for(rows)
    assert layout.devices == devices
    assert list(layout.mesh.devices.flat) == jax.devices()[:devices]


def state_of(n_layers: int, optimizer: str = "muon") -> tuple[TrainConfig, Any]:
    model = ModelConfig(
        vocab_size=11, n_layers=n_layers, d_model=8, n_heads=2, d_ff=12, max_seq_len=8, mlp="relu", position="none",
        norm_scale=False, final_norm=False,
    )  # fmt: skip
    cfg = TrainConfig(model=model, optimizer=optimizer, batch_size=4, learning_rate=0.05, weight_decay=0.1)
    return cfg, jax.eval_shape(lambda: init_state(cfg, 0))


def placed(state: Any) -> dict[str, bool]:
    """Path -> whether the leaf is split over the devices."""
    flat = jax.tree_util.tree_flatten_with_path(layout_for(4).of_state(state))[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): not s.is_fully_replicated for path, s in flat}


def test_parameters_are_whole_and_the_optimizers_matrices_split_by_layer():
    split = placed(state_of(2)[1])
    assert not any(is_split for path, is_split in split.items() if not path.startswith("opt_state"))
    matrices = [path for path in split if path.startswith("opt_state") and path.endswith("q/kernel")]
    assert matrices
    assert all(split[path] for path in matrices)
    assert not any(is_split for path, is_split in split.items() if "embed" in path or "count" in path)


def test_layers_that_do_not_divide_stay_whole():
    assert not any(placed(state_of(3)[1]).values())


def test_batches_are_split_by_rows():
    layout = layout_for(4)
    batch = layout.put_batch({"tokens": np.arange(12).reshape(4, 3)})
    shards = sorted(batch["tokens"].addressable_shards, key=lambda shard: shard.index[0].start)
    np.testing.assert_array_equal(shards[1].data, np.arange(6, 12).reshape(2, 3))


@pytest.mark.parametrize(
    ("kind", "optimizer"),
    [
        ("bigram", "adamw"),
        pytest.param("transformer", "adamw", marks=pytest.mark.slow),
        pytest.param("transformer", "muon", marks=pytest.mark.slow),
    ],
)
def test_two_devices_compute_what_one_does(kind, optimizer):
    cfg, _ = state_of(2, optimizer)
    cfg = cfg.replace(model=cfg.model.replace(kind=kind))
    shapes = jax.eval_shape(lambda: init_state(cfg, 0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32) * 0.4, shapes.params)
    state = init_state(cfg, 0, params=params)
    tokens = rng.integers(0, 11, (4, 8)).astype(np.int32)
    mask = (np.arange(8) < np.array([8, 3, 1, 6])[:, None]).astype(np.float32)
    batch = {"tokens": tokens, "targets": (tokens * 3 + 1) % 11, "loss_mask": mask}

    layout = layout_for(4)
    shardings = layout.of_state(state)
    split_step = jax.jit(train_step, out_shardings=(shardings, layout.whole))
    split, split_metrics = split_step(cfg, jax.device_put(state, shardings), layout.put_batch(batch))
    assert all(len(leaf.sharding.device_set) == 2 for leaf in jax.tree.leaves(split))
    one, metrics = jax.jit(train_step)(cfg, state, batch)
    for found, expected in ((split, one), (split_metrics, metrics)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-5),
            found, expected,
        )  # fmt: skip
    assert int(metrics["tokens"]) == 18
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b).max(), one.params, params)
    assert min(jax.tree.leaves(moved)) > 1e-3


def test_asking_for_all_cores_once_jax_is_in_use_changes_nothing():
    before = jax.devices()
    use_all_cores()
    assert jax.devices() == before
