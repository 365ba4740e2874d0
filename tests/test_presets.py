"""Presets: every one is valid, and the published shapes have the published number of parameters."""

from __future__ import annotations

import math

import pytest

from jaxlm.config import ModelConfig
from jaxlm.errors import InputError
from jaxlm.presets import PRESETS, preset

# Parameters, a tied head counted once. The first seven are those of the published checkpoints, as their safetensors
# headers and transformers' `num_parameters()` give them; the others follow by hand from the published config files.
PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "smollm2-135m": 134_515_008,
    "qwen1.5-1.8b": 1_836_828_672,
    "qwen2.5-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920,
    "llama-3.2-1b": 1_235_814_400,
    # V D + T D + L (12 D^2 + 13 D) + 2 D, with V = 50257, T = 1024
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    # 49152 * 960 + 32 (2 * 960^2 + 2 * 960 * 320 + 3 * 960 * 2560 + 2 * 960) + 960
    "smollm2-360m": 361_821_120,
    # 49152 * 2048 + 24 (4 * 2048^2 + 3 * 2048 * 8192 + 2 * 2048) + 2048
    "smollm2-1.7b": 1_711_376_384,
    # 151936 * 1024 + 24 (4 * 1024^2 + 3 * 1024 + 3 * 1024 * 2816 + 2 * 1024) + 1024
    "qwen1.5-0.5b": 463_987_712,
}


@pytest.fixture(scope="module")
def n_parameters(parameter_shapes):
    return lambda cfg: sum(map(math.prod, parameter_shapes(cfg).values()))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_the_published_one(name, n_parameters):
    assert n_parameters(preset(name)) == PUBLISHED[name]


def test_parameter_counts_of_our_own_shapes(n_parameters):
    """By hand, for V = 50."""
    assert n_parameters(preset("bigram", vocab_size=50)) == 50 * 50
    # torch.nn.TransformerEncoderLayer(D, 4, F) has 4 D^2 + 4 D (attention), 2 D F + F + D (MLP), 4 D (norms).
    d, f = 128, 2048
    layer = 4 * d * d + 4 * d + 2 * d * f + f + d + 4 * d
    ends = 50 * d + d * 50 + 50
    assert n_parameters(preset("lesson_learned", vocab_size=50)) == ends + 64 * d + 2 * layer + 2 * d
    d = 512
    layer = 4 * d * d + 4 * d + 2 * d * f + f + d + 4 * d
    assert n_parameters(preset("lesson_sinusoidal", vocab_size=50)) == 50 * d + d * 50 + 50 + 6 * layer


def test_families_keep_their_marks():
    """Traits that a count does not show, from the papers and config.json files."""
    gpt2, llama, qwen3 = preset("gpt2"), preset("llama-3.2-1b"), preset("qwen3-0.6b")
    assert (gpt2.norm, gpt2.position, gpt2.mlp, gpt2.tie_embeddings) == ("layer", "learned", "gelu_tanh", True)
    assert (llama.norm, llama.mlp, llama.kv_heads, llama.d_head) == ("rms", "swiglu", 8, 64)
    assert llama.rope_scaling is not None
    assert (llama.rope_theta, llama.rope_scaling.factor, llama.rope_scaling.original_max_len) == (500_000.0, 32.0, 8192)
    assert (qwen3.d_head, qwen3.n_heads * qwen3.d_head, qwen3.d_model, qwen3.qk_norm) == (128, 2048, 1024, True)
    assert preset("qwen2.5-0.5b").attn_bias
    assert not preset("qwen1.5-1.8b").tie_embeddings
    for name in ("lesson_learned", "lesson_sinusoidal"):
        assert (preset(name).norm_position, preset(name).mlp) == ("post", "relu")
    assert preset("lesson_sinusoidal").embed_scale == "sqrt_d"


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_valid_and_takes_overrides(name):
    assert isinstance(preset(name), ModelConfig)
    assert preset(name, vocab_size=7).vocab_size == 7


def test_overrides_are_validated_together():
    assert preset("gpt2", d_model=64, n_heads=4).d_head == 16  # 12 heads would not divide 64
    with pytest.raises(InputError, match=r"preset gpt2: n_heads=12 must divide d_model=64"):
        preset("gpt2", d_model=64)
    with pytest.raises(InputError, match=r"did you mean n_layers\?"):
        preset("gpt2", n_layer=3)


def test_unknown_preset():
    with pytest.raises(InputError, match=r"unknown preset 'lama-3.2-1b'; did you mean llama-3.2-1b\?"):
        preset("lama-3.2-1b")
    with pytest.raises(InputError, match="known presets: bigram, nano"):
        preset("zzz")
