"""Models of transformers with random weights: the same logits and the same greedy answers."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm.config import ModelConfig, RopeScaling
from jaxlm.presets import preset
from jaxlm.sample import Sampling

pytestmark = pytest.mark.parity
QUICK_COMPILE = True

V, T, LAYERS = 97, 64, 2

GPT2 = {
    "embed/tokens": "transformer.wte.weight",
    "embed/positions": "transformer.wpe.weight",
    "blocks/norm1/scale": "transformer.h.{}.ln_1.weight",
    "blocks/norm1/bias": "transformer.h.{}.ln_1.bias",
    "blocks/attn/q/kernel": "transformer.h.{}.attn.q.weight",  # q, k and v are cut from c_attn
    "blocks/attn/q/bias": "transformer.h.{}.attn.q.bias",
    "blocks/attn/k/kernel": "transformer.h.{}.attn.k.weight",
    "blocks/attn/k/bias": "transformer.h.{}.attn.k.bias",
    "blocks/attn/v/kernel": "transformer.h.{}.attn.v.weight",
    "blocks/attn/v/bias": "transformer.h.{}.attn.v.bias",
    "blocks/attn/o/kernel": "transformer.h.{}.attn.c_proj.weight",
    "blocks/attn/o/bias": "transformer.h.{}.attn.c_proj.bias",
    "blocks/norm2/scale": "transformer.h.{}.ln_2.weight",
    "blocks/norm2/bias": "transformer.h.{}.ln_2.bias",
    "blocks/mlp/up/kernel": "transformer.h.{}.mlp.c_fc.weight",
    "blocks/mlp/up/bias": "transformer.h.{}.mlp.c_fc.bias",
    "blocks/mlp/down/kernel": "transformer.h.{}.mlp.c_proj.weight",
    "blocks/mlp/down/bias": "transformer.h.{}.mlp.c_proj.bias",
    "final_norm/scale": "transformer.ln_f.weight",
    "final_norm/bias": "transformer.ln_f.bias",
}
LLAMA = {  # and Qwen
    "embed/tokens": "model.embed_tokens.weight",
    "blocks/norm1/scale": "model.layers.{}.input_layernorm.weight",
    "blocks/attn/q/kernel": "model.layers.{}.self_attn.q_proj.weight",
    "blocks/attn/q/bias": "model.layers.{}.self_attn.q_proj.bias",
    "blocks/attn/q_norm/scale": "model.layers.{}.self_attn.q_norm.weight",
    "blocks/attn/k/kernel": "model.layers.{}.self_attn.k_proj.weight",
    "blocks/attn/k/bias": "model.layers.{}.self_attn.k_proj.bias",
    "blocks/attn/k_norm/scale": "model.layers.{}.self_attn.k_norm.weight",
    "blocks/attn/v/kernel": "model.layers.{}.self_attn.v_proj.weight",
    "blocks/attn/v/bias": "model.layers.{}.self_attn.v_proj.bias",
    "blocks/attn/o/kernel": "model.layers.{}.self_attn.o_proj.weight",
    "blocks/norm2/scale": "model.layers.{}.post_attention_layernorm.weight",
    "blocks/mlp/gate/kernel": "model.layers.{}.mlp.gate_proj.weight",
    "blocks/mlp/up/kernel": "model.layers.{}.mlp.up_proj.weight",
    "blocks/mlp/down/kernel": "model.layers.{}.mlp.down_proj.weight",
    "final_norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
}

_OURS: dict[str, Any] = {"vocab_size": V, "n_layers": LAYERS, "d_model": 32, "n_heads": 4, "max_seq_len": T}
_THEIRS: dict[str, Any] = {
    "vocab_size": V, "num_hidden_layers": LAYERS, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": T,
}  # fmt: skip


class Case(NamedTuple):
    """A preset cut down, beside the same model in transformers' words, whose values are those published."""

    cfg: ModelConfig
    family: str
    options: dict[str, Any]


CASES: dict[str, Case] = {
    "gpt2": Case(
        preset("gpt2", **_OURS),
        "GPT2",
        {"vocab_size": V, "n_layer": LAYERS, "n_embd": 32, "n_head": 4, "n_positions": T},
    ),
    "llama tied, stretched": Case(
        # With theta 500,000 and h = 16 the eight wavelengths are 6, 32, 167, 861 ... positions. A first length of 256
        # keeps those below 64, divides those above 256 by 32, and leaves one between.
        preset(
            "llama-3.2-1b", **_OURS, n_kv_heads=2, head_dim=16, d_ff=48,
            rope_scaling=RopeScaling(factor=32.0, original_max_len=256),
        ),
        "Llama",
        {
            **_THEIRS, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
            "max_position_embeddings": 512,
            "rope_theta": 500_000.0,
            "rope_scaling": {
                "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 256,
            },
        },
    ),
    "llama untied": Case(
        preset("smollm2-135m", **_OURS, n_kv_heads=1, d_ff=48, tie_embeddings=False),
        "Llama",
        {
            **_THEIRS, "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
            "rope_theta": 100_000.0,
        },
    ),
    "qwen2.5 tied": Case(
        preset("qwen2.5-0.5b", **_OURS, n_kv_heads=2, d_ff=48),
        "Qwen2",
        {**_THEIRS, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "rope_theta": 1e6},
    ),
    "qwen1.5 untied": Case(
        preset("qwen1.5-1.8b", **_OURS, n_kv_heads=4, d_ff=48),
        "Qwen2",
        {**_THEIRS, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 1e6},
    ),
    "qwen3": Case(
        preset("qwen3-0.6b", **_OURS, n_kv_heads=2, head_dim=12, d_ff=48),
        "Qwen3",
        {
            **_THEIRS, "num_key_value_heads": 2, "head_dim": 12, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
            "rope_theta": 1e6,
        },
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def pair(transformers, randomize, as_params):
    """pair(name) -> the peer's model and our parameters, with the same weights."""

    def make(name: str) -> tuple[Any, Any]:
        case = CASES[name]
        config = getattr(transformers, f"{case.family}Config")(**case.options, bos_token_id=None, eos_token_id=None)
        peer = getattr(transformers, f"{case.family}ForCausalLM" if case.family != "GPT2" else "GPT2LMHeadModel")
        peer = peer(config).eval()
        weights = randomize(peer, seed=len(name))
        if case.family != "GPT2":
            return peer, as_params(case.cfg, weights, LLAMA, transpose=True)
        for i in range(LAYERS):
            for part in ("weight", "bias"):
                cut = np.split(weights.pop(f"transformer.h.{i}.attn.c_attn.{part}"), 3, axis=-1)
                weights |= {f"transformer.h.{i}.attn.{x}.{part}": w for x, w in zip("qkv", cut, strict=True)}
        return peer, as_params(case.cfg, weights, GPT2, transpose=False)  # its Conv1D is [in, out]

    return make


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(torch, pair, name):
    peer, params = pair(name)
    tokens = np.random.default_rng(0).integers(0, V, (2, T))
    with torch.no_grad():
        expected = peer(torch.from_numpy(tokens)).logits.numpy()
    got = jax.jit(jaxlm.apply)(CASES[name].cfg, params, tokens.astype(np.int32))
    assert expected.dtype == got.dtype == np.float32
    assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["gpt2", "llama tied, stretched"])
def test_greedy_continuations_are_those_of_transformers(torch, pair, name):
    peer, params = pair(name)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, V, n).tolist() for n in (3, 9, 14)]
    got = jaxlm.generate(CASES[name].cfg, params, prompts, sampling=Sampling(temperature=0.0), max_new_tokens=24)
    for prompt, ours in zip(prompts, got, strict=True):
        theirs = peer.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), max_new_tokens=24,
            do_sample=False, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        tokens = theirs.sequences[0, len(prompt) :].tolist()
        assert ours.tokens == tokens
        log_probs = torch.log_softmax(torch.cat(theirs.logits), -1)[range(24), tokens].numpy()
        np.testing.assert_allclose(ours.log_probs, log_probs, atol=1e-4)
