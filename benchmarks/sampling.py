"""Filter and draw beside transformers' warpers with `torch.multinomial`, and beside JAX code that sorts, in one run.

Each case draws one token for each of 8 rows of float32 logits (3 times normal, without ties). The three take turns, so
that a drift of the machine's speed meets all of them, and the table gives medians. All three keep the same tokens, but
for rounding at the boundary, which is checked first.

- jaxlm: `sample_token`, compiled once for all cases, whose options are data.
- transformers: the warpers that the options ask for, softmax, `torch.multinomial`. A warper has one option for the
  whole batch, so rows of mixed options go through it one by one.
- sorting: the same rules in JAX over `jax.lax.sort`, in the way of most samplers; compiled, options as data.

`draw` is jaxlm's draw over all of the vocabulary from logits already filtered, without any filter: what the case would
cost if its filters were free. Its share is of jaxlm's time for the case.

Usage (needs the `bench` extra):

    python benchmarks/sampling.py [--repetitions 30] [--vocab 50257 151936]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.sample import filter_logits, sample_token

B = 8
OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
CASES: dict[str, dict[str, Any]] = {
    "k=50, p=0.9": {"top_k": [50] * B, "top_p": [0.9] * B},
    "p=0.9": {"top_p": [0.9] * B},
    "p=0.999": {"top_p": [0.999] * B},
    "mixed rows": {
        "temperature": [1.0, 0.7, 1.3, 1.0, 0.8, 1.0, 1.0, 0.9],
        "top_k": [50, 0, 0, 1000, 0, 40, 0, 200],
        "top_p": [0.9, 0.9, 0.95, 1.0, 0.999, 0.5, 1.0, 0.8],
        "min_p": [0.0, 0.0, 0.02, 0.0, 0.0, 0.0, 0.1, 0.05],
    },
}


def options_of(case: str) -> dict[str, np.ndarray]:
    """All four options, one entry a row."""
    types = {"top_k": np.int32}
    return {
        name: np.broadcast_to(np.asarray(CASES[case].get(name, off), types.get(name, np.float32)), B)
        for name, off in OFF.items()
    }


@jax.jit
def sorted_filter(logits: jax.Array, o: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Kept logits most likely first, others at -inf, and the tokens that they belong to."""
    y = logits / o["temperature"][:, None]
    places = jnp.broadcast_to(jnp.arange(y.shape[1]), y.shape)
    negative, token = jax.lax.sort((-y, places), dimension=1, num_keys=1)
    y, rank = -negative, jnp.arange(y.shape[1])
    y = jnp.where((o["top_k"][:, None] > 0) & (rank >= o["top_k"][:, None]), -jnp.inf, y)
    prob = jax.nn.softmax(y, axis=-1)
    before = jnp.cumsum(prob, axis=-1) - prob
    y = jnp.where((before >= o["top_p"][:, None]) & (o["top_p"][:, None] < 1) & (rank > 0), -jnp.inf, y)
    return jnp.where(prob < o["min_p"][:, None] * prob[:, :1], -jnp.inf, y), token


@jax.jit
def sorted_sample(keys: jax.Array, logits: jax.Array, o: dict[str, jax.Array]) -> jax.Array:
    """One token a row, by the inverse of the cumulative distribution over the sorted tokens."""
    y, token = sorted_filter(logits, o)
    cumulative = jnp.cumsum(jax.nn.softmax(y, axis=-1), axis=-1)
    u = jax.vmap(jax.random.uniform)(keys) * cumulative[:, -1]
    place = (cumulative <= u[:, None]).sum(-1)
    return jnp.take_along_axis(token, jnp.minimum(place, y.shape[1] - 1)[:, None], axis=1)[:, 0]


def torch_groups(case: str) -> list[tuple[slice, Any]]:
    """Rows that share their options, and the warpers for them."""
    import transformers as hf

    o = options_of(case)
    same = all((value == value[0]).all() for value in o.values())
    groups = []
    for rows in [slice(0, B)] if same else [slice(i, i + 1) for i in range(B)]:
        t, k, p, floor = (value[rows][0].item() for value in o.values())
        warpers = hf.LogitsProcessorList()
        if t != 1:
            warpers.append(hf.TemperatureLogitsWarper(t))
        if k:
            warpers.append(hf.TopKLogitsWarper(k))
        if p < 1:
            warpers.append(hf.TopPLogitsWarper(p))
        if floor:
            warpers.append(hf.MinPLogitsWarper(floor))
        groups.append((rows, warpers))
    return groups


def interleaved(contenders: dict[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """Median milliseconds of each, taken in turns after two to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for repetition in range(-2, repetitions):
        for name, run in contenders.items():
            started = time.perf_counter()
            run()
            if repetition >= 0:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) * 1e3 for name, times in seconds.items()}


def measure(case: str, vocab: int, repetitions: int) -> dict[str, float]:
    """Median milliseconds of each contender, and of the draw alone."""
    import torch

    grid = np.random.default_rng(vocab).permutation(8 * vocab)[: B * vocab].reshape(B, vocab) / (8 * vocab)
    x = np.asarray(jax.scipy.stats.norm.ppf(jnp.asarray((grid + 0.5 / vocab) / (1 + 1 / vocab)))) * np.float32(3)
    o, keys = options_of(case), jax.random.split(jax.random.key(0), B)
    logits, ids = torch.from_numpy(x.copy()), torch.zeros(B, 1, dtype=torch.int64)
    groups, device_x = torch_groups(case), jnp.asarray(x)
    filtered = filter_logits(device_x, **o)

    def torch_warp() -> list[torch.Tensor]:
        return [warpers(ids[rows], logits[rows]) for rows, warpers in groups]

    def torch_sample() -> list[torch.Tensor]:
        return [torch.multinomial(torch.softmax(scores, dim=-1), 1) for scores in torch_warp()]

    ours = np.isfinite(filtered).sum(-1)
    sorting = np.isfinite(sorted_filter(device_x, o)[0]).sum(-1)
    theirs = np.concatenate([torch.isfinite(scores).sum(-1).numpy() for scores in torch_warp()])
    for name, kept in (("sorting", sorting), ("transformers", theirs)):
        assert (np.abs(kept - ours) <= 1 + ours // 200).all(), f"{name} keeps {kept} tokens, jaxlm {ours}"

    draw = partial(sample_token, keys)
    return interleaved(
        {
            "jaxlm": lambda: draw(device_x, **o).block_until_ready(),
            "transformers": torch_sample,
            "sorting": lambda: sorted_sample(keys, device_x, o).block_until_ready(),
            "draw": lambda: draw(filtered).block_until_ready(),
        },
        repetitions,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=30, help="timed turns of each")
    parser.add_argument("--vocab", type=int, nargs="+", default=[50257, 151936])
    asked = parser.parse_args()
    print(f"{'logits':>12}  {'case':<12} {'jaxlm':>9} {'transformers':>13} {'sorting':>9}   times faster than    draw")
    print(f"{'':>12}  {'':<12} {'ms':>9} {'ms':>13} {'ms':>9}   them   sorting   share")
    for vocab in asked.vocab:
        for case in CASES:
            ms = measure(case, vocab, asked.repetitions)
            against = ms["transformers"] / ms["jaxlm"], ms["sorting"] / ms["jaxlm"]
            print(
                f"{f'[{B}, {vocab}]':>12}  {case:<12} {ms['jaxlm']:>9.2f} {ms['transformers']:>13.2f} "
                f"{ms['sorting']:>9.2f}   {against[0]:>4.1f}   {against[1]:>7.1f}   {ms['draw'] / ms['jaxlm']:>5.0%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
