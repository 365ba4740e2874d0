"""One optimizer step: what it computes, and what it refuses to do with a loss that is not finite."""

from __future__ import annotations

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import model
from jaxlm.train import init_state, loss_and_grads, train_step

QUICK_COMPILE = True

step = jax.jit(train_step)


def same(a, b) -> bool:
    """Bit for bit, NaN included."""
    leaves = zip(jax.tree.leaves(jax.device_get(a)), jax.tree.leaves(jax.device_get(b)), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in leaves)


# What it computes


def test_a_few_steps_lower_the_loss_of_their_batch(toy, random_params, batch):
    cfg = toy("block", learning_rate=0.01)
    state = init_state(cfg, 0, params=random_params(cfg.model))
    losses = []
    for _ in range(6):
        state, metrics = step(cfg, state, batch)
        losses.append(float(metrics["loss"]))
    assert all(after < before for before, after in pairwise(losses))
    assert int(state.step) == 6
    assert int(metrics["tokens"]) == 48


def test_golden_loss_after_one_step(toy, random_params, batch):
    """Pins the mathematics of model, loss and AdamW together.

    When this fails and you did not mean to change what training computes, you broke it. When you did, raise the version
    of the stages `pretrain` and `sft` in jaxlm/stages/plan.py, so that no result made before is taken for one made now,
    and put the new figures here.
    """
    cfg = toy("block", learning_rate=0.01)  # compiled for the test above
    state, first = step(cfg, init_state(cfg, 0, params=random_params(cfg.model)), batch)
    _, second = step(cfg, state, batch)
    found = [float(first["loss"]), float(first["grad_norm"]), float(second["loss"])]
    np.testing.assert_allclose(found, GOLDEN, rtol=2e-5, err_msg=test_golden_loss_after_one_step.__doc__)


GOLDEN = [2.745347, 0.9955494, 2.636862]  # loss, gradient norm, and the loss after the step


def test_loss_is_the_mean_over_valid_tokens(toy, random_params, masked):
    """A bigram's loss by hand: mean of log-sum-exp(row) - row[target] over the places that count."""
    cfg = toy()
    params = random_params(cfg.model)
    table = np.asarray(params["bigram"]["table"], np.float64)
    rows = table[masked["tokens"]]
    nll = np.log(np.exp(rows).sum(-1)) - np.take_along_axis(rows, masked["targets"][..., None], -1)[..., 0]
    loss, grads, count = jax.jit(loss_and_grads)(cfg, init_state(cfg, 0, params=params), masked)
    assert count == 27  # 6 + 1 + 0 + 3 + 5 + 2 + 6 + 4
    np.testing.assert_allclose(loss, (nll * masked["loss_mask"]).sum() / 27, rtol=1e-5)
    # d loss / d row = (softmax - one-hot) / 27, summed over the places that count.
    expected = np.zeros_like(table)
    for token, target, counts in zip(*(masked[k].ravel() for k in ("tokens", "targets", "loss_mask")), strict=True):
        if counts:
            p = np.exp(table[token]) / np.exp(table[token]).sum()
            expected[token] += (p - np.eye(11)[target]) / 27
    np.testing.assert_allclose(grads["bigram"]["table"], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["bigram", pytest.param("block", marks=pytest.mark.slow)])
@pytest.mark.parametrize("optional", [True, False])
def test_accumulation_changes_nothing_but_memory(toy, random_params, masked, kind, optional):
    """With masks that leave one microbatch more tokens than another: the mean is over all tokens, not over means."""
    whole, parts = toy(kind), toy(kind, grad_accum_steps=4)
    state = init_state(whole, 0, params=random_params(whole.model))
    batch = masked if optional else {key: masked[key] for key in ("tokens", "targets")}
    one, some = (jax.jit(loss_and_grads)(cfg, state, batch) for cfg in (whole, parts))
    np.testing.assert_allclose(some[0], one[0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), some[1], one[1])
    assert some[2] == one[2] == (27 if optional else 48)


@pytest.mark.parametrize("target", [-100, 99])  # what peers write at places to ignore, and an id beyond the table
def test_masked_targets_do_not_matter(toy, random_params, masked, target):
    cfg = toy()
    params = random_params(cfg.model)
    wild = masked | {"targets": np.where(masked["loss_mask"] > 0, masked["targets"], target).astype(np.int32)}
    hidden, _ = model.forward(cfg.model, params, wild["tokens"])
    assert np.isnan(model.token_nll(cfg.model, params, hidden, wild["targets"])).any()  # else this would show nothing
    state = init_state(cfg, 0, params=params)
    first, second = (jax.jit(loss_and_grads)(cfg, state, each) for each in (masked, wild))
    assert same(first, second)
    assert np.isfinite(first[0])


def test_a_batch_without_one_valid_token_changes_nothing(toy, random_params, masked):
    cfg = toy(weight_decay=0.0)
    state = init_state(cfg, 0, params=random_params(cfg.model))
    new, metrics = step(cfg, state, masked | {"loss_mask": np.zeros_like(masked["loss_mask"])})
    assert (metrics["loss"], metrics["tokens"], metrics["grad_norm"]) == (0, 0, 0)
    assert metrics["finite"]
    assert same(new.params, state.params)
    assert new.step == 1


def test_randomness_is_a_function_of_seed_step_and_microbatch(toy, random_params, batch):
    """The key of microbatch i is fold(fold(key(seed), step), i), and rows i, i + n, ... are its rows."""
    cfg = toy("block", grad_accum_steps=2, model={"dropout": 0.5})
    params = random_params(cfg.model)

    @jax.jit
    def one(tokens, targets, key):
        hidden, _ = model.forward(cfg.model, params, tokens, dropout_key=key)
        return model.token_nll(cfg.model, params, hidden, targets).mean()

    def by_hand(seed, number):
        key = jax.random.fold_in(jax.random.key(np.uint32(seed)), number)
        parts = [one(batch["tokens"][i::2], batch["targets"][i::2], jax.random.fold_in(key, i)) for i in (0, 1)]
        return float(np.mean(parts))

    def found(seed, number):
        state = init_state(cfg, seed, params=params)._replace(step=jnp.int32(number))
        return float(jax.jit(loss_and_grads)(cfg, state, batch)[0])

    values = {(seed, number): found(seed, number) for seed, number in [(7, 3), (7, 4), (8, 3)]}
    for (seed, number), value in values.items():
        assert value == pytest.approx(by_hand(seed, number), rel=1e-5)
    assert len(set(values.values())) == 3
    assert found(7, 3) == values[7, 3]


def test_state_of_a_seed(toy):
    cfg = toy("block")
    make = jax.jit(init_state)
    first, again, other = (make(cfg, np.uint32(seed)) for seed in (5, 5, 2**32 - 1))
    assert same(first, again)
    assert not same(first.params, other.params)
    assert first.step == first.skipped == 0
    assert not first.halted
    assert (first.seed.dtype, int(first.seed), int(other.seed)) == (jnp.uint32, 5, 2**32 - 1)
    assert int(init_state(toy(), 2**32 - 1).seed) == 2**32 - 1  # the largest that a configuration may hold


# A loss or gradient that is not finite


def test_infinite_parameters_halt_and_leave_the_state_bit_for_bit(toy, random_params, batch):
    cfg = toy()
    params = random_params(cfg.model)
    params["bigram"]["table"] = params["bigram"]["table"].at[2, 3].set(np.inf)
    state = init_state(cfg, 0, params=params)
    new, metrics = step(cfg, state, batch)
    assert not metrics["finite"]
    assert metrics["halted"]
    assert new.halted
    assert same(new._replace(halted=state.halted), state)


def poisoned(batch):
    """One target outside the vocabulary: its loss is NaN."""
    return batch | {"targets": np.where(np.arange(6) == 2, 99, batch["targets"]).astype(np.int32)}


def test_a_nan_loss_halts_for_good(toy, random_params, batch):
    """Sticky: the step after a bad one, already under way when the host learns of it, changes nothing either."""
    cfg = toy()
    state, _ = step(cfg, init_state(cfg, 0, params=random_params(cfg.model)), batch)
    bad, metrics = step(cfg, state, poisoned(batch))
    assert np.isnan(metrics["loss"])
    after, metrics = step(cfg, bad, batch)
    assert metrics["finite"]
    assert metrics["halted"]
    assert same(after, bad)
    assert same(after._replace(halted=state.halted), state)
    assert after.step == 1


def test_a_gradient_that_overflows_halts_too(toy, random_params, batch):
    """Weights in the mask that cancel in the count, so that loss and gradients are near 1e26: the loss is finite, the
    squares of the gradient are not."""
    cfg = toy()
    state = init_state(cfg, 0, params=random_params(cfg.model))
    weights = np.zeros((8, 6), np.float32)
    weights[:, 0], weights[:, 1] = 1e25, -1e25
    new, metrics = step(cfg, state, batch | {"loss_mask": weights})
    assert np.isfinite(metrics["loss"])
    assert not np.isfinite(metrics["grad_norm"])
    assert metrics["halted"]
    assert same(new.params, state.params)


def test_skipping_goes_on_and_counts_and_ends(toy, random_params, batch):
    cfg = toy(on_nonfinite="skip", max_skips=2, schedule="linear", steps=10, final_lr_ratio=0.0, learning_rate=1e-3)
    start = init_state(cfg, 0, params=random_params(cfg.model))
    state = start
    for n in (1, 2):
        state, metrics = step(cfg, state, poisoned(batch))
        assert (int(state.step), int(state.skipped), bool(metrics["halted"])) == (n, n, False)
        assert same((state.params, state.opt_state), (start.params, start.opt_state))
    state, metrics = step(cfg, state, batch)
    assert (int(state.step), int(state.skipped), bool(metrics["halted"])) == (3, 2, False)
    assert metrics["lr"] == pytest.approx(1e-3)  # the rate of the first update that was made
    assert not same(state.params, start.params)
    last, metrics = step(cfg, state, poisoned(batch))  # the third, one more than max_skips
    assert (int(last.step), bool(metrics["halted"])) == (3, True)
    assert same((last.params, last.opt_state), (state.params, state.opt_state))
    after, _ = step(cfg, last, batch)
    assert same(after, last)


# Elsewhere


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adamw", "grad_accum_steps": 2, "loss_chunk": 16},
        {
            "optimizer": "muon",
            "model": {"compute_dtype": "bfloat16", "scan_layers": True, "dropout": 0.1},
        },
    ],
    ids=lambda options: options["optimizer"],
)
def test_the_step_lowers_for_tpu(toy, masked, options):
    cfg = toy("block", **options)
    state = jax.eval_shape(lambda: init_state(cfg, 0))
    lowered = jax.jit(train_step, donate_argnums=1).trace(cfg, state, masked).lower(lowering_platforms=("tpu",))
    assert "stablehlo.dot_general" in lowered.as_text()
