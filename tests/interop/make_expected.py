"""Makes expected_hf.json and expected_hf.npz: what transformers computes for small random models of each family.

    python tests/interop/make_expected.py        (needs torch and transformers: pip install -e '.[parity]')

So machines without torch can compare too. The weights are not stored: they come from names by `weight_of`, with
numpy's RandomState, whose numbers numpy promises to keep. Run it again when a case is added, and look at what changes.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

HERE = Path(__file__).parent
V, T, NEW = 61, 14, 12
LLAMA: dict[str, Any] = dict(
    vocab_size=V, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=40, max_position_embeddings=64, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
GPT2: dict[str, Any] = dict(
    vocab_size=V, n_embd=24, n_layer=2, n_head=4, n_positions=64, bos_token_id=None, eos_token_id=None
)
# With heads of 6 the wavelengths are 6.3, 37 and 215: one is kept (below 48 / 4), one stretched, one between.
STRETCHED = dict(
    rope_type="llama3", rope_theta=200.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=48,
)  # fmt: skip

# name: (class, options, type of the file, number of shards)
CASES: dict[str, tuple[str, dict[str, Any], str, int]] = {
    "gpt2": ("GPT2", GPT2, "float32", 1),
    "gpt2 n_inner untied": (
        "GPT2", GPT2 | dict(n_inner=30, tie_word_embeddings=False, activation_function="gelu"), "float32", 1,
    ),
    "llama": ("Llama", LLAMA | dict(num_key_value_heads=4, rope_theta=1e5), "float32", 1),
    "llama stretched tied sharded": (
        "Llama", LLAMA | dict(rope_parameters=STRETCHED, tie_word_embeddings=True), "float32", 3,
    ),
    "llama biases bfloat16": ("Llama", LLAMA | dict(attention_bias=True, mlp_bias=True, head_dim=8), "bfloat16", 1),
    "qwen2": ("Qwen2", LLAMA, "float32", 1),
    "qwen2 tied float16": ("Qwen2", LLAMA | dict(tie_word_embeddings=True), "float16", 2),
    "qwen3": ("Qwen3", LLAMA | dict(head_dim=10, tie_word_embeddings=True), "float32", 1),
    "qwen3 biases bfloat16": ("Qwen3", LLAMA | dict(head_dim=6, attention_bias=True), "bfloat16", 2),
}  # fmt: skip


def weight_of(name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """The weight of a tensor: no gain is 1, no bias 0, and embeddings so small that the epsilon of a norm shows."""
    noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) == 1 and name.endswith("weight"):
        value = 1 + 0.2 * noise
    else:
        value = (0.02 if any(word in name for word in ("embed", "wte", "wpe")) else 0.3) * noise
    return value.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def prompt() -> np.ndarray:
    """int64[1, T]."""
    return np.random.RandomState(0).randint(0, V, (1, T))


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers

    cases, logits = {}, {}
    for name, (family, options, dtype, shards) in CASES.items():
        config = getattr(transformers, f"{family}Config")(**options)
        peer = transformers.AutoModelForCausalLM.from_config(config).eval().float()
        shapes = {n: tuple(p.shape) for n, p in peer.named_parameters()}
        with torch.no_grad():
            for n, p in peer.named_parameters():
                p.copy_(torch.from_numpy(weight_of(n, shapes[n], dtype).astype(np.float32)))
            logits[name] = peer(torch.from_numpy(prompt())).logits.numpy()
            new = peer.generate(
                torch.from_numpy(prompt()), attention_mask=torch.ones(1, T, dtype=torch.int64), do_sample=False,
                max_new_tokens=NEW,
            )[0, T:]  # fmt: skip
        cases[name] = {
            "config": json.loads(config.to_json_string()) | {"architectures": [type(peer).__name__]},
            "dtype": dtype, "shards": shards, "tensors": shapes, "greedy": new.tolist(),
        }  # fmt: skip
    lines = ",\n".join(
        f"{json.dumps(name)}: {json.dumps(case)}" for name, case in cases.items()
    )  # one a line, for diffs
    (HERE / "expected_hf.json").write_text(f"{{\n{lines}\n}}\n")
    np.savez_compressed(HERE / "expected_hf.npz", **logits)


if __name__ == "__main__":
    main()
