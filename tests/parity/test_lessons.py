"""The presets of the two lessons against the torch modules that the lessons are written with."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm.presets import preset

pytestmark = pytest.mark.parity
QUICK_COMPILE = True

V, T, D, HEADS, FF = 61, 24, 32, 4, 48

LESSON = {
    "embed/tokens": "embed.weight",
    "embed/positions": "positions_embed.weight",
    "blocks/attn/q/kernel": "encoder.layers.{}.self_attn.q.weight",  # q, k and v are cut from in_proj
    "blocks/attn/q/bias": "encoder.layers.{}.self_attn.q.bias",
    "blocks/attn/k/kernel": "encoder.layers.{}.self_attn.k.weight",
    "blocks/attn/k/bias": "encoder.layers.{}.self_attn.k.bias",
    "blocks/attn/v/kernel": "encoder.layers.{}.self_attn.v.weight",
    "blocks/attn/v/bias": "encoder.layers.{}.self_attn.v.bias",
    "blocks/attn/o/kernel": "encoder.layers.{}.self_attn.out_proj.weight",
    "blocks/attn/o/bias": "encoder.layers.{}.self_attn.out_proj.bias",
    "blocks/norm1/scale": "encoder.layers.{}.norm1.weight",
    "blocks/norm1/bias": "encoder.layers.{}.norm1.bias",
    "blocks/mlp/up/kernel": "encoder.layers.{}.linear1.weight",
    "blocks/mlp/up/bias": "encoder.layers.{}.linear1.bias",
    "blocks/mlp/down/kernel": "encoder.layers.{}.linear2.weight",
    "blocks/mlp/down/bias": "encoder.layers.{}.linear2.bias",
    "blocks/norm2/scale": "encoder.layers.{}.norm2.weight",
    "blocks/norm2/bias": "encoder.layers.{}.norm2.bias",
    "final_norm/scale": "norm.weight",
    "final_norm/bias": "norm.bias",
    "head/kernel": "out.weight",
    "head/bias": "out.bias",
}


def lesson_model(torch: Any, name: str, layers: int) -> Any:
    """Embedding, positions, encoder layers as torch makes them by default, and a linear head."""
    nn = torch.nn
    model = nn.Module()
    model.embed = nn.Embedding(V, D)
    layer = nn.TransformerEncoderLayer(D, HEADS, FF, batch_first=True)
    model.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    model.out = nn.Linear(D, V)
    if name == "lesson_learned":
        model.positions_embed, model.norm = nn.Embedding(T, D), nn.LayerNorm(D)
    return model.eval()


def lesson_logits(torch: Any, model: Any, name: str, tokens: np.ndarray) -> np.ndarray:
    ids = torch.from_numpy(tokens)
    causal = torch.nn.Transformer.generate_square_subsequent_mask(T)
    if name == "lesson_learned":
        x = model.encoder(model.embed(ids) + model.positions_embed(torch.arange(T)), mask=causal)
        return model.out(model.norm(x)).numpy()
    table = np.zeros((T, D), np.float32)  # Vaswani et al. (arXiv 1706.03762), section 3.5
    for place in range(T):
        for i in range(0, D, 2):
            angle = place / 10000 ** (i / D)
            table[place, i : i + 2] = math.sin(angle), math.cos(angle)
    x = model.embed(ids) * math.sqrt(D) + torch.from_numpy(table)
    return model.out(model.encoder(x, mask=causal)).numpy()


@pytest.mark.parametrize(("name", "layers"), [("lesson_learned", 2), ("lesson_sinusoidal", 3)])
def test_logits_are_those_of_the_lessons_torch_model(torch, randomize, as_params, name, layers):
    model = lesson_model(torch, name, layers)
    weights = randomize(model, seed=layers)
    for i in range(layers):
        for part in ("weight", "bias"):
            cut = np.split(weights.pop(f"encoder.layers.{i}.self_attn.in_proj_{part}"), 3)
            weights |= {f"encoder.layers.{i}.self_attn.{x}.{part}": w for x, w in zip("qkv", cut, strict=True)}
    cfg = preset(name, vocab_size=V, n_layers=layers, d_model=D, n_heads=HEADS, d_ff=FF, max_seq_len=T)
    params = as_params(cfg, weights, LESSON, transpose=True)
    tokens = np.random.default_rng(0).integers(0, V, (2, T))
    with torch.no_grad():
        expected = lesson_logits(torch, model, name, tokens)
    got = jax.jit(jaxlm.apply)(cfg, params, tokens.astype(np.int32))
    assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()
