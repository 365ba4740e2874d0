"""Greedy decoding of SmolLM2-135M in float32, beside transformers' `generate`, in one run on this machine.

Both continue the same prompts of 16 tokens by 64, prefill included, at each batch size; repetitions take turns, and
each time is the median. A step, the time between tokens, is what the 63 tokens after the first took more. Its
roofline is the time that reading the weights once takes at the read bandwidth, measured in turn with the repetitions;
the median again. With real weights the answers are compared as well: rounding may part them, rarely and late.

Usage (needs the `bench` extra):

    python benchmarks/decode.py MODEL            a Hugging Face directory, or a .gguf file
    python benchmarks/decode.py --random         the same shape with random weights: nothing to download
    python benchmarks/decode.py --random --layers 2 --new-tokens 8 --repeats 1       a quick look that it runs
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxlm
from jaxlm.config import ModelConfig
from jaxlm.sample import Sampling, generate, prepare
from jaxlm.sample.timing import read_bandwidth, weight_bytes

PRESET = "smollm2-135m"
PROMPT_LENGTH = 16

Decoder = Callable[[list[list[int]], int], list[list[int]]]


def ours(source: str | None, layers: int | None) -> tuple[ModelConfig, Any, Decoder]:
    """Shape, prepared weights, and prompts to answers."""
    if source is None:
        cfg = jaxlm.preset(PRESET) if layers is None else jaxlm.preset(PRESET, n_layers=layers)
        params = jaxlm.init(cfg, jax.random.key(0))
    elif source.endswith(".gguf"):
        from jaxlm.interop.gguf import load_gguf

        cfg, params, _ = load_gguf(source)
    else:
        from jaxlm.interop import load_hf

        cfg, params, _ = load_hf(source, dtype="float32")
    cfg = cfg.replace(compute_dtype="float32")
    prepared = prepare(cfg, params)
    del params

    def decode(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        greedy = Sampling(temperature=0)
        out = generate(cfg, prepared, prompts, sampling=greedy, max_new_tokens=new_tokens, slots=len(prompts))
        return [answer.tokens for answer in out]

    return cfg, prepared, decode


def peer(source: str | None, cfg: ModelConfig) -> Decoder:
    """transformers' prompts to answers, by a model of the same shape."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if source is None:
        shape = LlamaConfig(
            vocab_size=cfg.vocab_size, hidden_size=cfg.d_model, intermediate_size=cfg.ff,
            num_hidden_layers=cfg.n_layers, num_attention_heads=cfg.n_heads, num_key_value_heads=cfg.kv_heads,
            max_position_embeddings=cfg.max_seq_len, rms_norm_eps=cfg.norm_eps, rope_theta=cfg.rope_theta,
            tie_word_embeddings=cfg.tie_embeddings,
        )  # fmt: skip
        model = LlamaForCausalLM(shape).float()
    elif source.endswith(".gguf"):
        path = Path(source)
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.eval()
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None  # all answers to the same length

    def decode(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens)
        return out[:, ids.shape[1] :].tolist()

    return decode


def _timed(run: Decoder, prompts: list[list[int]], new_tokens: int) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    run(prompts, new_tokens)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="a Hugging Face directory or a .gguf file")
    parser.add_argument("--random", action="store_true", help=f"random weights in the shape of {PRESET}")
    parser.add_argument("--layers", type=int, help="fewer layers, with --random")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if (args.model is None) != args.random:
        parser.error("give a model, or --random")
    if args.new_tokens < 2:
        parser.error("--new-tokens: at least 2, for a step is the time between tokens")

    cfg, params, decode = ours(args.model, args.layers)
    decoders = {"jaxlm": decode, "transformers": peer(args.model, cfg)}
    size = weight_bytes(cfg, params)
    rng = np.random.default_rng(0)
    for batch in args.batch:
        prompts = rng.integers(0, cfg.vocab_size, (batch, PROMPT_LENGTH)).tolist()
        answers = {}
        for name, run in decoders.items():
            started = time.perf_counter()
            answers[name] = run(prompts, args.new_tokens)  # compiles
            assert all(len(answer) == args.new_tokens for answer in answers[name])
            print(f"batch {batch}  {name:<12}  first call {time.perf_counter() - started:.1f} s")
            run(prompts, 1)
        seconds: dict[str, list[float]] = {name: [] for name in decoders}
        firsts: dict[str, list[float]] = {name: [] for name in decoders}
        bounds = []
        for _ in range(args.repeats):
            for name, run in decoders.items():
                seconds[name].append(_timed(run, prompts, args.new_tokens))
                firsts[name].append(_timed(run, prompts, 1))
            bounds.append(size / read_bandwidth())
        median = {name: statistics.median(times) for name, times in seconds.items()}
        bound = statistics.median(bounds)
        for name, times in seconds.items():
            rate = batch * args.new_tokens / median[name]
            spread = f"{min(times):.2f} to {max(times):.2f} s"
            step = (median[name] - statistics.median(firsts[name])) / (args.new_tokens - 1)
            print(
                f"batch {batch}  {name:<12}  {rate:7.1f} tokens/s  ({spread}); a step {1e3 * step:5.1f} ms, "
                f"{bound / step:.0%} of the roofline"
            )
        print(f"batch {batch}  reading       {size / 1e6:.0f} MB of weights takes {1e3 * bound:.1f} ms here")
        print(f"batch {batch}  ratio         {median['transformers'] / median['jaxlm']:.2f}")
        if args.model is not None:
            same = [a == b for a, b in zip(answers["jaxlm"], answers["transformers"], strict=True)]
            print(f"batch {batch}  answers       {sum(same)} of {len(same)} the same, token for token")


if __name__ == "__main__":
    main()
