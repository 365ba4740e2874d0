"""The update and the loss against torch.optim and torch.nn.functional."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import model
from jaxlm.config import TrainConfig, TrainOptions
from jaxlm.presets import preset
from jaxlm.train import optimizers
from jaxlm.train.state import init_state
from jaxlm.train.step import loss_and_grads

pytestmark = pytest.mark.parity
QUICK_COMPILE = True


def test_five_steps_of_adamw_are_those_of_torch(torch):
    """The sum of a (x - c)^2 over weights of which one kind decays; a warm-up of two steps, a cosine over three."""
    cfg = TrainOptions(
        steps=5, warmup_steps=2, schedule="cosine", learning_rate=0.1, final_lr_ratio=0.1, beta1=0.9, beta2=0.95,
        weight_decay=0.1, grad_clip=1.0,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    shapes = {"embed/tokens": (3, 4), "blocks/attn/q/bias": (2, 5), "blocks/attn/q/kernel": (2, 4, 5)}
    factor = {path: 1e-6 if path == "embed/tokens" else 1.0 for path in shapes}  # so small that Adam's epsilon shows
    start = {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    centre = {path: x + rng.choice(np.float32([-0.15, 0.15]), x.shape) for path, x in start.items()}

    theirs = {path: torch.nn.Parameter(torch.tensor(x)) for path, x in start.items()}
    kernel = theirs["blocks/attn/q/kernel"]
    groups = [
        {"params": [kernel], "weight_decay": 0.1},
        {"params": [p for p in theirs.values() if p is not kernel], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.95), eps=1e-8)
    warmup = torch.optim.lr_scheduler.LinearLR(adamw, start_factor=1 / 3, total_iters=2)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adamw, T_max=3, eta_min=0.01)
    rate = torch.optim.lr_scheduler.SequentialLR(adamw, [warmup, cosine], milestones=[2])

    def nested(flat):
        q = {"kernel": flat["blocks/attn/q/kernel"], "bias": flat["blocks/attn/q/bias"]}
        return {"embed": {"tokens": flat["embed/tokens"]}, "blocks": {"attn": {"q": q}}}

    ours, rule = nested({path: jnp.asarray(x) for path, x in start.items()}), optimizers.build(cfg)
    opt_state = rule.init(ours)

    @jax.jit
    def step(params, opt_state):
        grads = jax.tree.map(lambda a, x, c: 2 * a * (x - c), nested(factor), params, nested(centre))
        updates, opt_state = rule.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    norms = []
    for _ in range(5):
        adamw.zero_grad()
        sum((factor[path] * (p - torch.tensor(centre[path])) ** 2).sum() for path, p in theirs.items()).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(list(theirs.values()), 1.0).item())
        adamw.step()
        rate.step()
        ours, opt_state = step(ours, opt_state)
        expected = nested({path: p.detach().numpy() for path, p in theirs.items()})
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6), ours, expected)
    assert min(norms) < 1 < max(norms)  # steps with clipping and steps without


@pytest.mark.parametrize("chunk", [0, 4])
def test_token_nll_is_cross_entropy(torch, chunk):
    cfg = preset("lesson_learned", vocab_size=13, d_model=16)
    rng = np.random.default_rng(0)
    hidden = (10 * rng.normal(size=(2, 5, 16))).astype(np.float32)  # nats from 0 to hundreds
    kernel, bias = (rng.normal(size=shape).astype(np.float32) for shape in ((16, 13), (13,)))
    targets = rng.integers(0, 13, (2, 5))
    logits = torch.from_numpy(hidden) @ torch.from_numpy(kernel) + torch.from_numpy(bias)
    expected = torch.nn.functional.cross_entropy(logits.mT, torch.from_numpy(targets), reduction="none").numpy()
    params = {"head": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}}
    got = model.token_nll(cfg, params, jnp.asarray(hidden), jnp.asarray(targets), chunk=chunk)
    assert expected.max() > 100
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_masked_targets_are_torchs_ignored_ones(torch, microbatches):
    """The mean is over valid targets of the whole batch, however they fall into microbatches; so are the gradients."""
    cfg = TrainConfig(model=preset("bigram", vocab_size=11), batch_size=4, grad_accum_steps=microbatches)
    rng = np.random.default_rng(0)
    table = rng.normal(size=(11, 11)).astype(np.float32)
    tokens, targets = (rng.integers(0, 11, (4, 6)) for _ in range(2))
    valid = rng.random((4, 6)) < 0.6
    valid[0], valid[1] = False, True  # microbatches of unequal counts
    theirs = torch.nn.Parameter(torch.from_numpy(table))
    logits = theirs[torch.from_numpy(tokens)].mT
    expected = torch.nn.functional.cross_entropy(
        logits, torch.from_numpy(np.where(valid, targets, -100)), ignore_index=-100
    )
    expected.backward()

    state = init_state(cfg, 0, params={"bigram": {"table": jnp.asarray(table)}})
    batch = {
        "tokens": jnp.asarray(tokens, jnp.int32),
        "targets": jnp.asarray(targets, jnp.int32),
        "loss_mask": jnp.asarray(valid, jnp.float32),
    }
    loss, grads, count = jax.jit(loss_and_grads)(cfg, state, batch)
    assert 0 < count == valid.sum() < valid.size
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-6)
    np.testing.assert_allclose(grads["bigram"]["table"], theirs.grad.numpy(), rtol=1e-5, atol=1e-7)
