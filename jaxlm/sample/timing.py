"""What decoding costs: compilation, time to the first token, time between tokens, and the bound that memory sets.

`jaxlm.sample.timing_report` shows the result. Every figure is a median of repetitions that take turns, so that a drift
of the machine's speed falls on all alike.

- *compile*: tracing, lowering and XLA's compilation of one program, before its first run.
- *first token*: from dispatch of one prompt's prefill until its first new token is on the host, compiled before.
- *step*: one decoding step of a batch within the compiled loop, the prompt's prefill not counted.
- *sampling*: penalties, filters, draw and log-probability alone, on the model's own logits.
- *roofline*: the seconds that reading the weights once takes at the read bandwidth measured beside it. A step at
  batch 1 can hardly be faster; keys and values come on top.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.errors import InputError
from jaxlm.model import Params, forward, init, unembed
from jaxlm.sample import arguments
from jaxlm.sample import decode as decoding
from jaxlm.sample import requests as asking
from jaxlm.sample.decode import Requests, State
from jaxlm.sample.options import Sampling

LENGTHS = (16, 128, 512)  # of prompts, where none are named


@dataclass(frozen=True)
class PromptTiming:
    """One prompt length, at batch 1. Times in seconds."""

    prompt_length: int
    padded_length: int
    compile_s: float  # of the prefill
    first_token_s: float


@dataclass(frozen=True)
class BatchTiming:
    """One batch size. Times in seconds."""

    batch: int
    compile_s: float  # of the decoding loop
    step_s: float
    sampling_s: float

    @property
    def tokens_per_s(self) -> float:
        """New tokens a second, all rows together."""
        return self.batch / self.step_s

    @property
    def sampling_share(self) -> float:
        """Of a step, 0 to 1."""
        return self.sampling_s / self.step_s


@dataclass(frozen=True)
class Timings:
    """What `measure` found.

    Attributes:
        name: of the model.
        device: kind of the device, and how many the process sees.
        weight_bytes: read in each step; an untied embedding is not, but for a few rows.
        bytes_per_s: read bandwidth measured beside the rest.
        new_tokens: steps timed together.
        repeats: of every measurement.
        sampling: the options of all rows, which the figures of sampling are for.
        prompts: by prompt length.
        batches: by batch size.
    """

    name: str
    device: str
    weight_bytes: int
    bytes_per_s: float
    new_tokens: int
    repeats: int
    sampling: Sampling
    prompts: tuple[PromptTiming, ...]
    batches: tuple[BatchTiming, ...]

    @property
    def roofline_s(self) -> float:
        """Seconds to read the weights once."""
        return self.weight_bytes / self.bytes_per_s


def weight_bytes(cfg: ModelConfig, params: Params) -> int:
    """Bytes of weights that one decoding step reads: all but tables of which it takes single rows.

    Args:
        cfg: the model.
        params: from `prepare`.
    """
    if cfg.kind == "bigram":
        return cfg.vocab_size * params["bigram"]["table"].dtype.itemsize
    embed = dict(params["embed"])
    embed.pop("positions", None)
    if not cfg.tie_embeddings:
        embed.pop("tokens")
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves({**params, "embed": embed}))


def read_bandwidth(size: int = 1 << 29, repeats: int = 5) -> float:
    """Bytes a second that this machine reads: the best of a sum and a vector-matrix product over `size` bytes.

    Args:
        size: bytes, far more than the caches hold.
        repeats: runs of each.
    """
    width = 2048
    matrix = jnp.ones((max(size // 4 // width, 1), width), jnp.float32)
    vector = jnp.ones((1, matrix.shape[0]), jnp.float32)
    best = float("inf")
    for read in (jax.jit(lambda v, m: m.sum()), jax.jit(lambda v, m: v @ m)):
        jax.block_until_ready(read(vector, matrix))
        best = min(best, *(_seconds(partial(read, vector, matrix)) for _ in range(repeats)))
    return matrix.nbytes / best


def measure(
    cfg: ModelConfig,
    params: Params | None = None,
    *,
    name: str = "model",
    batch_sizes: Sequence[int] = (1, 8),
    prompt_lengths: Sequence[int] | None = None,
    new_tokens: int = 32,
    repeats: int = 5,
    sampling: Sampling | None = None,
    bandwidth_size: int = 1 << 29,
) -> Timings:
    """Times prefill and decoding of a model on this machine.

    Args:
        cfg: the model.
        params: its weights; random ones when empty: time does not depend on them.
        name: shown with the result.
        batch_sizes: rows that decode together; their prompts have the shortest of `prompt_lengths`.
        prompt_lengths: tokens of the prompts whose first token is timed; by default those of 16, 128 and 512 that the
            context has room for.
        new_tokens: steps timed together.
        repeats: of every measurement; the median counts.
        sampling: options of all rows; by default top_k=50 and top_p=0.9.
        bandwidth_size: bytes to read for the bandwidth.

    Raises:
        InputError: a size below 1, a prompt and its new tokens beyond the context, or answers that end too soon to be
            timed, for their logits hold a NaN.
    """
    sizes = [("batch_sizes", n) for n in batch_sizes] + [("prompt_lengths", n) for n in prompt_lengths or ()]
    for field, n in (*sizes, ("new_tokens", new_tokens), ("repeats", repeats), ("bandwidth_size", bandwidth_size)):
        arguments.check_count(field, n)
    if not batch_sizes or (prompt_lengths is not None and not prompt_lengths):
        raise InputError("batch_sizes and prompt_lengths: give at least one of each.")
    prompt_lengths = _lengths(cfg, prompt_lengths, new_tokens)
    sampling = sampling or Sampling(top_k=50, top_p=0.9)
    params = init(cfg, jax.random.key(0)) if params is None else params
    params = jax.block_until_ready(decoding.prepare(cfg, params))

    shortest = min(prompt_lengths)
    shapes = dict.fromkeys([(1, n) for n in prompt_lengths] + [(n, shortest) for n in batch_sizes])
    compiled = {shape: _Run(cfg, params, *shape, new_tokens, sampling) for shape in shapes}
    runs = [compiled[1, n] for n in prompt_lengths]
    batches = [compiled[n, shortest] for n in batch_sizes]
    first: list[list[float]] = [[] for _ in runs]
    steps: list[list[float]] = [[] for _ in batches]
    draws: list[list[float]] = [[] for _ in batches]
    reads = []
    for _ in range(repeats):
        reads.append(read_bandwidth(bandwidth_size, 2))  # in turn with the rest: it changes within a minute
        for seconds, run in zip(first, runs, strict=True):
            seconds.append(run.first_token())
        for seconds, drawn, run in zip(steps, draws, batches, strict=True):
            seconds.append(run.steps() / new_tokens)
            drawn.append(run.draw())
    device = jax.devices()[0]
    return Timings(
        name=name,
        device=f"{device.device_kind} ({jax.device_count()} x {device.platform})",
        weight_bytes=weight_bytes(cfg, params),
        bytes_per_s=statistics.median(reads),
        new_tokens=new_tokens,
        repeats=repeats,
        sampling=sampling,
        prompts=tuple(
            PromptTiming(run.length, run.width, run.prefill_compile_s, statistics.median(seconds))
            for run, seconds in zip(runs, first, strict=True)
        ),
        batches=tuple(
            BatchTiming(run.batch, run.decode_compile_s, statistics.median(seconds), statistics.median(drawn))
            for run, seconds, drawn in zip(batches, steps, draws, strict=True)
        ),
    )


def _lengths(cfg: ModelConfig, asked: Sequence[int] | None, new_tokens: int) -> Sequence[int]:
    """The prompts' lengths: those asked for, or by default those that fit."""
    room = cfg.max_seq_len - new_tokens
    if room < 1:
        raise InputError(
            f"new_tokens: {new_tokens} leave no room for a prompt in the model's context of {cfg.max_seq_len}; take "
            "fewer."
        )
    if asked is None:
        return [n for n in LENGTHS if n <= room] or [room]
    if max(asked) > room:
        raise InputError(
            f"prompt_lengths: {max(asked)} and {new_tokens} new tokens exceed the model's context of "
            f"{cfg.max_seq_len}; take prompts of at most {room}, or fewer new tokens."
        )
    return asked


class _Run:
    """The compiled programs for one batch size and prompt length, and their inputs."""

    def __init__(
        self, cfg: ModelConfig, params: Params, batch: int, length: int, new_tokens: int, sampling: Sampling
    ) -> None:
        ids = np.random.default_rng(0).integers(0, cfg.vocab_size, (batch, length)).tolist()
        group = asking.check(cfg, ids, sampling, new_tokens, "refuse")
        self.batch, self.length, self.width, self.n = batch, length, asking.width(cfg, group[0]), new_tokens
        room = asking.bucket(new_tokens)
        self.asked = asking.pack(group, batch, self.width, jax.random.key(0), (), cfg.vocab_size)
        shapes = {"capacity": asking.capacity(cfg, self.width, room), "n_new": room}
        prefill, self.prefill_compile_s = _compile(decoding.prefill, cfg, params, self.asked.prompt, **shapes)
        self._prefill = partial(prefill, cfg, params, self.asked.prompt)
        state, held = self._prefill(), self._prefill()  # decoding uses up the one
        decode, self.decode_compile_s = _compile(decoding.decode, cfg, params, self.asked, state, np.int32(1))
        self._decode = partial(decode, cfg, params, self.asked)
        done = np.asarray(self._decode(state, np.int32(new_tokens)).n_new)
        if (done < new_tokens).any():
            raise InputError(
                f"model: an answer ends after {done.min()} of {new_tokens} tokens, for the logits hold a NaN or the "
                "options leave nothing to choose; its time would say nothing."
            )
        logits = _logits(cfg, params, held)
        self._sample = partial(_sample, self.asked, held._replace(cache=None), logits)
        jax.block_until_ready(self._sample())

    def first_token(self) -> float:
        """Seconds from a prompt to its first token on the host."""
        return _seconds(lambda: np.asarray(self._decode(self._prefill(), np.int32(1)).tokens))

    def steps(self) -> float:
        """Seconds of all steps."""
        state = jax.block_until_ready(self._prefill())
        return _seconds(lambda: self._decode(state, np.int32(self.n)))

    def draw(self) -> float:
        """Seconds of the sampling of one step."""
        return _seconds(self._sample)


def _compile(function: Any, *args: Any, **static: Any) -> tuple[Callable[..., Any], float]:
    started = time.perf_counter()
    compiled = function.lower(*args, **static).compile()
    return compiled, time.perf_counter() - started


def _seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - started


@jax.jit
def _logits(cfg: ModelConfig, params: Params, state: State) -> jax.Array:
    return unembed(cfg, params, forward(cfg, params, state.last[:, None], cache=state.cache)[0][:, 0])


@jax.jit
def _sample(r: Requests, state: State, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What `decode_step` does between the logits and the token."""
    return decoding.draw(r, state, logits), jax.nn.logsumexp(logits, axis=-1)
