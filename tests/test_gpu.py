"""On a GPU: the same figures as on the CPU of the same process, the same bits from one run to the next.

`pytest -m gpu`, with the extra `cuda`. The other tests run there too: `pytest -m 'not parity'`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import model
from jaxlm.checkpoint import Checkpointer, restore
from jaxlm.config import ModelConfig, TrainConfig
from jaxlm.sample import Sampling, generate, prepare, sample_token
from jaxlm.train import init_state, train_step

pytestmark = pytest.mark.gpu

V = 500
CFG = ModelConfig(vocab_size=V, n_layers=2, d_model=256, n_heads=4, n_kv_heads=2, max_seq_len=64)
TRAIN = TrainConfig(model=CFG, steps=10, batch_size=4, learning_rate=1e-3, schedule="constant")


@pytest.fixture(scope="module")
def gpu():
    try:
        return jax.devices("gpu")[0]
    except RuntimeError as error:
        pytest.skip(f"needs a GPU that jax can use ({str(error).splitlines()[0]})")


@pytest.fixture(scope="module")
def cpu():
    return jax.devices("cpu")[0]


@pytest.fixture(scope="module")
def params(cpu):
    with jax.default_device(cpu):
        return jax.device_get(model.init(CFG, jax.random.key(0)))


@pytest.fixture(scope="module")
def batch():
    tokens = np.random.default_rng(0).integers(0, V, (4, 33)).astype(np.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}


def on(device, function, *args):
    """What a function returns on a device, in full float32 (a GPU's own default multiplies in TF32)."""
    with jax.default_matmul_precision("highest"), jax.default_device(device):
        return jax.device_get(function(*jax.device_put(args, device)))


def test_logits_are_those_of_the_cpu(gpu, cpu, params, batch):
    def logits(params, tokens):
        return model.apply(CFG, params, tokens)

    here, there = (on(device, jax.jit(logits), params, batch["tokens"]) for device in (gpu, cpu))
    assert np.abs(here - there).max() <= 1e-4 * np.abs(there).max()


@pytest.mark.parametrize(
    "options",
    [{"top_k": 50, "top_p": 0.9}, {"top_p": 0.9}, {"min_p": 0.02, "temperature": 1.5}, {"typical_p": 0.9}, {}],
    ids=str,
)
def test_draws_are_those_of_the_cpu(gpu, cpu, options):
    """Of the same logits; the sums of the sampler are exact, but exp may differ in its last bit."""

    def draw(logits, numbers):
        return sample_token(jax.random.split(jax.random.key(numbers), 256), logits, **options)

    logits = np.random.default_rng(1).normal(0, 3, (256, 5000)).astype(np.float32)
    here, there = (on(device, draw, logits, np.int32(7)) for device in (gpu, cpu))
    assert (here != there).sum() <= 2
    assert np.array_equal(here, on(gpu, draw, logits, np.int32(7)))


def test_greedy_tokens_are_those_of_the_cpu(gpu, cpu, params):
    prompts = [[5, 17, 3], [9] * 11, list(range(20))]

    def greedy(params):
        found = generate(CFG, prepare(CFG, params), prompts, sampling=Sampling(temperature=0), max_new_tokens=24)
        return [answer.tokens for answer in found]

    assert on(gpu, greedy, params) == on(cpu, greedy, params)


def test_a_request_is_the_same_with_any_neighbours(gpu, params):
    def answers(params, prompts):
        made = generate(
            CFG, prepare(CFG, params), prompts, sampling=Sampling(top_p=0.95, seed=3), max_new_tokens=24, slots=4
        )
        return made[0]

    with jax.default_device(gpu):
        placed = jax.device_put(params, gpu)
        alone = answers(placed, [[5, 17, 3]])
        assert len(set(alone.tokens)) > 4
        assert answers(placed, [[5, 17, 3], [9] * 11, [4, 4], [1]]) == alone


def steps(params, batch, n=3):
    state, losses = init_state(TRAIN, 0, params=params), []
    step = jax.jit(train_step, static_argnums=0)
    for _ in range(n):
        state, metrics = step(TRAIN, state, batch)
        losses.append(metrics["loss"])
    return jnp.stack(losses), state


def test_training_follows_the_cpu_and_repeats_itself(gpu, cpu, params, batch):
    (here, state), (there, _) = (on(device, steps, params, batch) for device in (gpu, cpu))
    np.testing.assert_allclose(here, there, rtol=1e-4)
    assert here[-1] < here[0]
    again, same = on(gpu, steps, params, batch)
    assert again.tobytes() == here.tobytes()
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(same), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_a_state_of_the_gpu_is_restored_bit_for_bit(gpu, params, tmp_path):
    placed = jax.device_put(params, gpu)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"params": placed}, meta={})
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), placed)
    back = restore(tmp_path, {"params": like}).items["params"]
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(jax.device_get(back)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
