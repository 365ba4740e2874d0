"""Named model shapes. Adding a family is a preset here and a name table in `jaxlm.interop`. Loads no jax.

The published shapes are those of the models' own `config.json` files; the two `lesson_*` presets are the models of the
source notebooks (`torch.nn.TransformerEncoderLayer`: norms after the sublayers, ReLU, biases everywhere).
"""

from __future__ import annotations

import difflib
from typing import Any

from jaxlm._frozen import validated
from jaxlm.errors import InputError
from jaxlm.model_config import ModelConfig, RopeScaling


def _gpt2(n_layers: int, d_model: int, n_heads: int) -> dict[str, Any]:
    return dict(
        vocab_size=50257, n_layers=n_layers, d_model=d_model, n_heads=n_heads, max_seq_len=1024, norm="layer",
        norm_bias=True, position="learned", mlp="gelu_tanh", attn_bias=True, attn_out_bias=True, mlp_bias=True,
    )  # fmt: skip


def _llama(vocab: int, layers: int, d: int, heads: int, kv: int, ff: int, context: int, **more: Any) -> dict[str, Any]:
    return dict(
        vocab_size=vocab, n_layers=layers, d_model=d, n_heads=heads, n_kv_heads=kv, d_ff=ff, max_seq_len=context,
        norm="rms", position="rotary", mlp="swiglu", **more,
    )  # fmt: skip


_LESSON = dict(
    norm="layer", norm_position="post", norm_bias=True, mlp="relu", attn_bias=True, attn_out_bias=True, mlp_bias=True,
    tie_embeddings=False, head_bias=True, d_ff=2048,
)  # fmt: skip

# What trains fastest at small sizes on a CPU: docs/recipe.md has the ablation.
_SPEED = dict(
    norm="rms", norm_scale=False, position="rotary", mlp="relu2", qk_norm=True, embed_mix=4, key_offset=True,
    tie_qk_init=True, tie_embeddings=False, zero_init_out=True, zero_init_head=True, logit_softcap=15.0,
    init_scheme="fan_in",
)  # fmt: skip

PRESETS: dict[str, dict[str, Any]] = {
    "bigram": dict(kind="bigram"),
    "nano": dict(n_layers=4, d_model=128, n_heads=4, max_seq_len=1024, **_SPEED),
    "mini": dict(n_layers=6, d_model=256, n_heads=8, max_seq_len=1024, **_SPEED),
    "lesson_learned": dict(n_layers=2, d_model=128, n_heads=4, max_seq_len=64, position="learned", **_LESSON),
    "lesson_sinusoidal": dict(
        n_layers=6, d_model=512, n_heads=8, max_seq_len=5000, position="sinusoidal", embed_scale="sqrt_d",
        final_norm=False, dropout=0.1, **_LESSON,
    ),
    "gpt2": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "gpt2-xl": _gpt2(48, 1600, 25),
    "smollm2-135m": _llama(49152, 30, 576, 9, 3, 1536, 8192, rope_theta=100_000.0),
    "smollm2-360m": _llama(49152, 32, 960, 15, 5, 2560, 8192, rope_theta=100_000.0),
    "smollm2-1.7b": _llama(49152, 24, 2048, 32, 32, 8192, 8192, rope_theta=130_000.0),
    "qwen1.5-0.5b": _llama(151936, 24, 1024, 16, 16, 2816, 32768, rope_theta=1e6, norm_eps=1e-6, attn_bias=True),
    "qwen1.5-1.8b": _llama(
        151936, 24, 2048, 16, 16, 5504, 32768, rope_theta=1e6, norm_eps=1e-6, attn_bias=True, tie_embeddings=False
    ),
    "qwen2.5-0.5b": _llama(151936, 24, 896, 14, 2, 4864, 32768, rope_theta=1e6, norm_eps=1e-6, attn_bias=True),
    "qwen3-0.6b": _llama(
        151936, 28, 1024, 16, 8, 3072, 40960, head_dim=128, rope_theta=1e6, norm_eps=1e-6, qk_norm=True
    ),
    "llama-3.2-1b": _llama(
        128256, 16, 2048, 32, 8, 8192, 131072, head_dim=64, rope_theta=500_000.0,
        rope_scaling=RopeScaling(factor=32.0),
    ),
}  # fmt: skip


def preset(name: str, /, **overrides: Any) -> ModelConfig:
    """The named shape as a `ModelConfig`, with `overrides` applied before validation.

    Raises:
        InputError: an unknown name, or overrides that do not fit.
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known presets: {', '.join(PRESETS)}"
        raise InputError(f"model.preset: unknown preset {name!r}; {hint}")
    return validated(ModelConfig, {**PRESETS[name], **overrides}, where=f"preset {name}")
