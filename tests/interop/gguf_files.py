"""GGUF files written with the `gguf` package, by the names and the permutation of llama.cpp's converter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np

from jaxlm import model
from jaxlm.config import ModelConfig, RopeScaling
from jaxlm.model.weights import path_of

LLAMA: dict[str, Any] = dict(
    vocab_size=64, n_layers=2, d_model=64, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=96, max_seq_len=32, norm="rms",
    position="rotary", mlp="swiglu", rope_theta=5000.0, norm_eps=1e-5,
)  # fmt: skip
CASES: dict[str, tuple[str, ModelConfig]] = {
    "llama": ("llama", ModelConfig(**LLAMA)),
    "llama-untied-biased": ("llama", ModelConfig(**LLAMA, tie_embeddings=False, attn_bias=True, attn_out_bias=True)),
    "llama3-scaled": ("llama", ModelConfig(**LLAMA | {"rope_scaling": RopeScaling(factor=8.0)})),
    "qwen2": ("qwen2", ModelConfig(**LLAMA, attn_bias=True)),
    "qwen3": ("qwen3", ModelConfig(**{**LLAMA, "head_dim": 32}, qk_norm=True)),
    "gpt2": (
        "gpt2",
        ModelConfig(
            vocab_size=64, n_layers=2, d_model=64, n_heads=4, d_ff=128, max_seq_len=32, norm="layer", norm_bias=True,
            position="learned", mlp="gelu_tanh", attn_bias=True, attn_out_bias=True, mlp_bias=True,
        ),
    ),
}  # fmt: skip

# The names as gguf-py's tensor_mapping has them, against ours.
NAMES = {
    "embed/tokens": "token_embd.weight", "embed/positions": "position_embd.weight",
    "final_norm/scale": "output_norm.weight", "final_norm/bias": "output_norm.bias", "head/kernel": "output.weight",
    "norm1": "attn_norm", "norm2": "ffn_norm", "attn/q": "attn_q", "attn/k": "attn_k", "attn/v": "attn_v",
    "attn/o": "attn_output", "attn/q_norm": "attn_q_norm", "attn/k_norm": "attn_k_norm", "mlp/up": "ffn_up",
    "mlp/gate": "ffn_gate", "mlp/down": "ffn_down",
}  # fmt: skip


def tensors_of(architecture: str, cfg: ModelConfig, params: Any) -> dict[str, np.ndarray]:
    """The tensors as the converter writes them: [outputs, inputs], llama's q and k permuted, gpt2's q, k, v in one."""
    out: dict[str, np.ndarray] = {}
    for key, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        path, array = path_of(key), np.asarray(leaf)
        if not path.startswith("blocks/"):
            out[NAMES[path]] = array.T if path == "head/kernel" else array
            continue
        part, _, kind = path.removeprefix("blocks/").rpartition("/")
        for i, layer in enumerate(array):
            w = layer.T if kind == "kernel" else layer
            if architecture == "llama" and part in ("attn/q", "attn/k"):
                heads = cfg.n_heads if part == "attn/q" else cfg.kv_heads
                # convert_hf_to_gguf.py, LlamaModel.permute
                w = w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
            out[f"blk.{i}.{NAMES[part]}.{'bias' if kind == 'bias' else 'weight'}"] = np.ascontiguousarray(w)
    if architecture == "gpt2":
        for i in range(cfg.n_layers):
            for kind in ("weight", "bias"):
                parts = [out.pop(f"blk.{i}.attn_{name}.{kind}") for name in "qkv"]
                out[f"blk.{i}.attn_qkv.{kind}"] = np.concatenate(parts)
    if cfg.rope_scaling is not None:  # llama.cpp keeps what the frequencies are divided by
        out["rope_freqs.weight"] = divisors(cfg)
    return out


def divisors(cfg: ModelConfig) -> np.ndarray:
    """As Llama 3.1 was published: wavelengths over L / 1 are stretched, those under L / 4 kept, and blended between."""
    assert cfg.rope_scaling is not None
    factor, length = cfg.rope_scaling.factor, 8192
    found = []
    for i in range(cfg.d_head // 2):
        wavelength = 2 * np.pi * cfg.rope_theta ** (2 * i / cfg.d_head)
        share = min(max((length / wavelength - 1) / (4 - 1), 0), 1)  # of what is kept
        found.append(1 / (share + (1 - share) / factor))
    return np.array(found, np.float32)


def write(
    path: Path,
    architecture: str,
    cfg: ModelConfig,
    tensors: dict[str, np.ndarray],
    *,
    fields: dict[str, Any] | None = None,
    types: Callable[[str, np.ndarray], Any] = lambda name, array: None,
    tokens: Sequence[str] = (),
) -> Path:
    """A GGUF of these tensors.

    `types` gives the quantization of each, `fields` more metadata or None to leave out, `tokens` a tokenizer's.
    """
    writer = gguf.GGUFWriter(path, architecture)
    norm = "layer_norm_epsilon" if architecture == "gpt2" else "layer_norm_rms_epsilon"
    values: dict[str, Any] = {
        "block_count": cfg.n_layers, "context_length": cfg.max_seq_len, "embedding_length": cfg.d_model,
        "feed_forward_length": cfg.ff, "attention.head_count": cfg.n_heads, f"attention.{norm}": cfg.norm_eps,
    }  # fmt: skip
    if architecture != "gpt2":
        values |= {"attention.head_count_kv": cfg.kv_heads, "rope.freq_base": cfg.rope_theta}
        values |= {"rope.dimension_count": cfg.d_head, "attention.key_length": cfg.d_head}
    for name, value in (values | (fields or {})).items():
        if isinstance(value, float):
            writer.add_float32(f"{architecture}.{name}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"{architecture}.{name}", value)
        elif isinstance(value, str):
            writer.add_string(f"{architecture}.{name}", value)
    if tokens:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(list(tokens))
        writer.add_token_merges([f"{tokens[0]} {tokens[0]}"])
    for name, array in tensors.items():
        kind = types(name, array)
        if kind is None:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def filled(cfg: ModelConfig, seed: int = 0) -> Any:
    """Parameters none of which is 0 or 1."""
    shapes = jax.eval_shape(lambda: model.init(cfg, jax.random.key(0)))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
