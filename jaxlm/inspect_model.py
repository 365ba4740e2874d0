"""`jaxlm inspect`: what a model is made of, and what training and decoding it cost, by formulas anyone can check.

Counts are of the dense operations that hardware spends its time on: a product of [m, k] and [k, n] is 2 m k n FLOPs.
Norms, activations, softmax and the optimizer are left out; they are below a few per cent for any model worth its name.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax

from jaxlm import model
from jaxlm.config import ModelConfig
from jaxlm.errors import InputError
from jaxlm.model.weights import path_of, weight

MIB = 2**20


class Row(NamedTuple):
    """One weight of the tree (for block weights: of all layers together)."""

    path: str
    shape: tuple[int, ...]
    size: int  # numbers
    bytes: int
    meaning: str


class Training(NamedTuple):
    """One step on `tokens` = batch x length tokens.

    Attributes:
        forward_flops: of the forward pass.
        step_flops: forward and backward, with the recomputation where `remat` is on.
        params_bytes: the parameters.
        gradient_bytes: their gradients, at their peak.
        optimizer_bytes: AdamW's two moments in float32 (Kingma and Ba, arXiv 1412.6980, algorithm 1).
        activation_bytes: what the backward pass keeps of the forward pass (an estimate; see `activation_bytes`).
        logit_bytes: float32 logits and their gradient.
    """

    forward_flops: int
    step_flops: int
    params_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    logit_bytes: int

    @property
    def total_bytes(self) -> int:
        """Memory of a step, everything together."""
        parts = (self.params_bytes, self.gradient_bytes, self.optimizer_bytes, self.activation_bytes, self.logit_bytes)
        return sum(parts)


class Decoding(NamedTuple):
    """One new token for each row of a batch, all with `length` tokens in their cache.

    Attributes:
        flops: of the step.
        weight_bytes: read once a step: every matrix, whatever the batch, and a row of the embedding for each token.
        cache_bytes_per_token: keys and values that each token adds to its row: 2 L K h numbers.
        read_bytes: all that is read: weights and the caches so far. Divided by the memory's bandwidth it is the least
            time that a step can take (Pope et al., arXiv 2211.05102, section 2).
    """

    flops: int
    weight_bytes: int
    cache_bytes_per_token: int
    read_bytes: int


def tree(cfg: ModelConfig, params: Any = None) -> list[Row]:
    """Every weight with its shape, number, bytes and purpose (`jaxlm.model.weights.TABLE`).

    Args:
        cfg: the model.
        params: its parameters, for their types; float32 when empty. No array is made.
    """
    leaves = _abstract(cfg) if params is None else params
    return [
        Row(
            path_of(path),
            tuple(leaf.shape),
            math.prod(leaf.shape),
            math.prod(leaf.shape) * leaf.dtype.itemsize,
            weight(path_of(path)).meaning,
        )
        for path, leaf in jax.tree_util.tree_flatten_with_path(leaves)[0]
    ]


def _abstract(cfg: ModelConfig) -> Any:
    return jax.eval_shape(lambda: model.init(cfg, jax.random.key(0)))


def matrix_params(cfg: ModelConfig) -> int:
    """Numbers in the matrices that every token is multiplied with: the blocks' kernels and the head.

    Per block D H h (queries) + 2 D K h (keys, values) + H h D (output) + 2 D F (MLP; 3 D F with a gate); the head D V,
    tied or not. The embedding is a look-up and costs no product.
    """
    if cfg.kind == "bigram":
        return 0
    d, h = cfg.d_model, cfg.d_head
    attention = 2 * d * cfg.n_heads * h + 2 * d * cfg.kv_heads * h
    mlp = (3 if cfg.mlp == "swiglu" else 2) * d * cfg.ff
    return cfg.n_layers * (attention + mlp) + d * cfg.vocab_size


def forward_flops(cfg: ModelConfig, batch: int, length: int) -> int:
    """FLOPs of `apply` on int32[batch, length].

    2 per number of the matrices and token, and for attention 4 L H h T per token: 2 T for the scores and 2 T for the
    mixing, over H heads of h (Kaplan et al., arXiv 2001.08361, section 2.1; Hoffmann et al., arXiv 2203.15556,
    appendix F). The masked half of the scores counts, because it is computed.
    """
    if cfg.kind == "bigram":
        return 0
    attention = 4 * cfg.n_layers * cfg.n_heads * cfg.d_head * length
    return batch * length * (2 * matrix_params(cfg) + attention)


def step_flops(cfg: ModelConfig, batch: int, length: int) -> int:
    """FLOPs of a training step: each product has two in the backward pass, so 3 times the forward pass.

    With `remat` the blocks run once more (Chen et al., arXiv 1604.06174), but for the last product of each, 2 D F a
    token, whose result only a norm after the sum would need: XLA removes it.
    """
    if cfg.kind == "bigram":
        return 0
    forward = forward_flops(cfg, batch, length)
    head = 2 * batch * length * cfg.d_model * cfg.vocab_size
    last = 2 * batch * length * cfg.d_model * cfg.ff * cfg.n_layers if cfg.norm_position == "pre" else 0
    return 3 * forward + (forward - head - last if cfg.remat else 0)


def activation_bytes(cfg: ModelConfig, batch: int, length: int) -> int:
    """Bytes that the backward pass keeps of the blocks, in the compute type; scores and probabilities in float32.

    Per token and block: the inputs of each product and norm. x, its norm, the sum after attention, its norm: 4 D. q and
    the mix of the heads: 2 H h. k and v: 2 K h. The MLP: up and what goes down, 2 F; with a gate 4 F. And the scores
    and probabilities, H T each. With `remat` only each block's input x is kept, D, beside one block's working set
    (Korthikanti et al., arXiv 2205.05198, section 4, counts GPT so). An estimate: a compiler keeps some of these,
    recomputes others, and adds buffers of its own.
    """
    if cfg.kind == "bigram":
        return 0
    size = 2 if cfg.compute_dtype == "bfloat16" else 4
    d, tokens = cfg.d_model, batch * length
    dense = 4 * d + 2 * cfg.n_heads * cfg.d_head + 2 * cfg.kv_heads * cfg.d_head
    dense += (4 if cfg.mlp == "swiglu" else 2) * cfg.ff
    block = tokens * (size * dense + (size + 4) * cfg.n_heads * length)
    return tokens * d * size * cfg.n_layers + block if cfg.remat else block * cfg.n_layers


def training(cfg: ModelConfig, batch: int, length: int, *, loss_chunk: int = 0) -> Training:
    """What a training step with AdamW costs.

    Args:
        cfg: the model.
        batch: rows of a microbatch.
        length: tokens a row.
        loss_chunk: tokens whose logits exist at one time; 0: all.
    """
    n_bytes = sum(row.bytes for row in tree(cfg))
    at_once = min(loss_chunk or batch * length, batch * length)
    return Training(
        forward_flops(cfg, batch, length),
        step_flops(cfg, batch, length),
        params_bytes=n_bytes,
        gradient_bytes=n_bytes,
        optimizer_bytes=2 * n_bytes,
        activation_bytes=activation_bytes(cfg, batch, length),
        logit_bytes=2 * 4 * at_once * cfg.vocab_size,
    )


def decoding(cfg: ModelConfig, length: int, *, batch: int = 1) -> Decoding:
    """What one more token costs each row with `length` tokens, the new one included.

    Weights and caches have the compute type, which `sample.prepare` gives them; those few that it leaves in float32
    (norms) are counted as if it did.

    Args:
        cfg: the model.
        length: tokens whose keys are looked at.
        batch: rows.
    """
    if cfg.kind == "bigram":
        row = 4 * cfg.vocab_size * batch  # of its one table, which keeps its type
        return Decoding(0, row, 0, row)
    size = 2 if cfg.compute_dtype == "bfloat16" else 4
    per_token = 2 * cfg.n_layers * cfg.kv_heads * cfg.d_head * size
    vectors = sum(row.size for row in tree(cfg) if "embed/" not in row.path and not row.path.endswith("kernel"))
    tables = (1 + (cfg.position == "learned") + cfg.embed_mix) * cfg.d_model  # a row of each, and the mixed-in ones
    weights = (matrix_params(cfg) + vectors + batch * tables) * size
    flops = batch * (2 * matrix_params(cfg) + 4 * cfg.n_layers * cfg.n_heads * cfg.d_head * length)
    return Decoding(flops, weights, per_token, weights + batch * per_token * length)


def report(cfg: ModelConfig, params: Any = None, *, batch: int = 1, length: int | None = None) -> str:
    """The tree and the estimates as text.

    Args:
        cfg: the model.
        params: its parameters, for their types.
        batch: rows of a training step, and rows that decode together.
        length: tokens a row, and tokens in the cache; by default the model's context, at most 1024.

    Raises:
        InputError: the model's context is shorter than `length`.
    """
    _check_length(cfg, length)
    rows = tree(cfg, params)
    length = min(cfg.max_seq_len, 1024) if length is None else length
    width = max(len(row.path) for row in rows)
    shapes = [str(list(row.shape)) for row in rows]
    wide = max(map(len, shapes))
    lines = [
        f"{row.path:<{width}}  {shape:<{wide}}  {row.size:>13,}  {row.bytes / MIB:>9.2f} MiB  {row.meaning}"
        for row, shape in zip(rows, shapes, strict=True)
    ]
    total, n_bytes = sum(row.size for row in rows), sum(row.bytes for row in rows)
    blocks = sum(row.size for row in rows if row.path.startswith("blocks/"))
    lines += [
        f"{'total':<{width}}  {'':<{wide}}  {total:>13,}  {n_bytes / MIB:>9.2f} MiB",
    ]
    if blocks:
        each = blocks // cfg.n_layers
        lines.append(f"{'of which blocks':<{width}}  {'':<{wide}}  {blocks:>13,}  ({each:,} each)")
    step = training(cfg, batch, length)
    one = decoding(cfg, length, batch=batch)
    lines += [
        "",
        f"a training step of {batch} x {length} tokens (AdamW, float32 state, remat {'on' if cfg.remat else 'off'})",
        f"  forward             {_flops(step.forward_flops)}",
        f"  forward + backward  {_flops(step.step_flops)}",
        f"  parameters          {step.params_bytes / MIB:,.1f} MiB",
        f"  gradients           {step.gradient_bytes / MIB:,.1f} MiB",
        f"  optimizer moments   {step.optimizer_bytes / MIB:,.1f} MiB",
        f"  activations         {step.activation_bytes / MIB:,.1f} MiB (estimate)",
        f"  logits              {step.logit_bytes / MIB:,.1f} MiB",
        f"  together            {step.total_bytes / MIB:,.1f} MiB",
        "",
        f"decoding one token{f' for each of {batch} rows' if batch > 1 else ''} after {length}",
        f"  work                {_flops(one.flops)}",
        f"  cache               {one.cache_bytes_per_token:,} bytes a token, "
        f"{one.cache_bytes_per_token * length / MIB:,.1f} MiB a row",
        f"  read                {one.read_bytes / MIB:,.1f} MiB (weights {one.weight_bytes / MIB:,.1f})",
    ]
    return "\n".join(lines)


def block_report(cfg: ModelConfig, index: int, *, batch: int = 2, length: int = 4) -> str:
    """One block: its weights, and the shapes on the way of an input [batch, length, D] through its submodules.

    Raises:
        InputError: the model has no such block, or a shorter context than `length`.
    """
    from flax import linen as nn

    from jaxlm.model.blocks import Block, Context
    from jaxlm.model.positions import rotary_tables

    n_blocks = 0 if cfg.kind == "bigram" else cfg.n_layers
    if not 0 <= index < n_blocks:
        raise InputError(f"--block {index}: this model has {n_blocks} blocks, counted from 0.")

    _check_length(cfg, length)

    def run(x: jax.Array) -> Any:
        positions = jax.numpy.zeros((batch, length), jax.numpy.int32)
        rotary = rotary_tables(cfg, positions) if cfg.position == "rotary" else None
        mask = jax.numpy.ones((1, length, length), bool)
        ctx = Context(mask, rotary, jax.numpy.ones((batch, length), bool), None, None)
        bound = nn.unbox(Block(cfg).init(jax.random.key(0), x, ctx))
        (y, _), seen = Block(cfg).apply(bound, x, ctx, capture_intermediates=True, mutable=["intermediates"])
        return bound["params"], y, seen["intermediates"]

    dtype = jax.numpy.dtype(cfg.compute_dtype)
    params, y, seen = jax.eval_shape(run, jax.ShapeDtypeStruct((batch, length, cfg.d_model), dtype))
    outputs: dict[str, tuple[int, ...]] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(seen)[0]:
        place = path_of(path)
        if "__call__" in place:
            outputs.setdefault(place.split("__call__")[0].strip("/"), tuple(leaf.shape))
    lines = [f"block {index} of {cfg.n_layers}: [{batch}, {length}, {cfg.d_model}] -> {list(y.shape)} {y.dtype}"]
    for name in ("norm1", "attn", "norm2", "mlp"):
        lines.append(f"  {name:<12} -> {list(outputs.get(name, ()))}")
        for path, leaf in jax.tree_util.tree_flatten_with_path(params.get(name, {}))[0]:
            place = f"{name}/{path_of(path)}"
            lines.append(f"    {place:<20} {list(leaf.shape)!s:<16} {weight(f'blocks/{place}').meaning}")
    return "\n".join(lines)


def _check_length(cfg: ModelConfig, length: int | None) -> None:
    if length is not None and length > cfg.max_seq_len:
        raise InputError(f"--length {length}: exceeds the model's context of {cfg.max_seq_len}; ask for no more.")


def _flops(n: int) -> str:
    for size, unit in ((10**15, "PFLOP"), (10**12, "TFLOP"), (10**9, "GFLOP"), (10**6, "MFLOP")):
        if n >= size:
            return f"{n / size:,.2f} {unit}"
    return f"{n:,} FLOP"
