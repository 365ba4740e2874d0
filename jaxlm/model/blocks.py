"""The Linen layers. Each declares its weights once: shape, initializer and logical axes.

Logical axes name what a dimension is (`embed`, `heads`, `kv`, `mlp`, `vocab`), so that a sharding-rules table can place
every weight without knowing the layers. Nothing outside `jaxlm.model` holds one of these modules.

`checkpoint_name` marks the values that `jaxlm.analysis.capture` hands out. It computes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxlm.config import ModelConfig
from jaxlm.errors import InputError
from jaxlm.model import cache as kv_cache
from jaxlm.model.attention import attend, attend_next
from jaxlm.model.positions import rotate

Init = Callable[..., jax.Array]

QKV, GATE_UP = "qkv", "gate_up"  # weights that `jaxlm.sample.prepare` joins

PARTS = 4  # of the product of one row: 2, 4 and 8 take the same time


class Context(NamedTuple):
    """What every block of one forward pass shares.

    Attributes:
        mask: bool[1 or B, T, S].
        rotary: cosines and sines, each float32[B, 1, T, h/2], or None.
        linked: bool[B or 1, T], True where the token before is of the same document, or None with a cache.
        length: int32[B], tokens held in the cache before this call, or None without a cache.
        dropout_key: a key for this block, or None when dropout is off.
    """

    mask: jax.Array
    rotary: tuple[jax.Array, jax.Array] | None
    linked: jax.Array | None
    length: jax.Array | None
    dropout_key: jax.Array | None


def declared(init: Init, *axes: str | None) -> Any:
    """An initializer that also carries the logical axes of its weight."""
    return nn.with_logical_partitioning(init, axes)


def matrix_init(cfg: ModelConfig, fan_in: int, *, output: bool = False) -> Init:
    """Initializer of a matrix; `output` marks those that write to the residual stream.

    Output matrices shrink by 1/sqrt(2 L), so that the stream's variance does not grow with depth
    (Radford et al., GPT-2, section 2.3).
    """
    if output and cfg.zero_init_out:
        return nn.initializers.zeros
    std = cfg.init_std if cfg.init_scheme == "normal" else fan_in**-0.5
    return nn.initializers.normal(std / math.sqrt(2 * cfg.n_layers) if output else std)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes a share `rate` of x and scales the rest up; the identity when `key` is None or the rate is 0."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last axis, computed in float32 (arXiv 1607.06450, 1910.07467)."""

    kind: str
    eps: float
    use_scale: bool
    use_bias: bool
    axis_name: str = "embed"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        if self.kind == "layer":
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + self.eps)
        if self.use_scale:
            y = y * self.param("scale", declared(nn.initializers.ones, self.axis_name), (x.shape[-1],), jnp.float32)
        if self.use_bias:
            y = y + self.param("bias", declared(nn.initializers.zeros, self.axis_name), (x.shape[-1],), jnp.float32)
        return y.astype(x.dtype)


def product(x: jax.Array, turned: jax.Array, dtype: jnp.dtype | type | None = None) -> jax.Array:
    """x [..., inputs] times a matrix that is kept as [outputs, inputs]: [..., outputs] in `dtype`, by default x's.

    On a CPU, XLA's product of 2 to 64 rows repacks one operand, and reads weights twice as fast when they come first,
    turned round: 16 GB/s, not 8, at 8 rows. One row is 4 % faster as a batch of products of a part of the outputs
    each (docs/decoding.md). The barriers keep XLA from turning the products round.
    """
    rows = x.reshape(-1, x.shape[-1])
    parts = math.gcd(turned.shape[0], PARTS)

    def on_cpu(rows: jax.Array, turned: jax.Array) -> jax.Array:
        if rows.shape[0] != 1 or parts == 1:  # not len: exported, it may be a symbol
            return jax.lax.optimization_barrier(jnp.matmul(turned, rows.T, preferred_element_type=dtype)).T
        each, some = jnp.broadcast_to(rows, (parts, *rows.shape)), turned.reshape(parts, -1, turned.shape[1])
        y = jnp.einsum("gbk,gnk->gbn", each, some, preferred_element_type=dtype)
        return jax.lax.optimization_barrier(y).reshape(1, -1)

    def elsewhere(rows: jax.Array, turned: jax.Array) -> jax.Array:
        return jnp.matmul(rows, turned.T, preferred_element_type=dtype)

    y = jax.lax.platform_dependent(rows, turned, cpu=on_cpu, default=elsewhere)
    return y.reshape(*x.shape[:-1], turned.shape[0])


class Linear(nn.Module):
    """x @ kernel (+ bias); the kernel is [inputs, outputs], or, prepared for decoding, `turned` around."""

    features: int
    axes: tuple[str, str]
    kernel_init: Init
    use_bias: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.has_variable("params", "turned"):
            y = product(x, self.get_variable("params", "turned").astype(x.dtype))
        else:
            shape = (x.shape[-1], self.features)
            kernel = self.param("kernel", declared(self.kernel_init, *self.axes), shape, jnp.float32)
            y = x @ kernel.astype(x.dtype)
        if self.use_bias:
            bias = self.param("bias", declared(nn.initializers.zeros, self.axes[1]), (self.features,), jnp.float32)
            y = y + bias.astype(x.dtype)
        return y


class Joined(nn.Module):
    """Several `Linear`s of one input as one product: x [..., inputs] -> a tuple of [..., features] for each.

    Its weights are never initialised: `jaxlm.sample.prepare` joins them for decoding: with three products less a
    layer a step of SmolLM2-135M is 2 ms faster (docs/decoding.md).
    """

    features: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        turned: jax.Array = self.get_variable("params", "turned").astype(x.dtype)
        if (found := turned.shape[0]) != sum(self.features):
            raise InputError(
                f"params: {self.name} has {found} outputs, but the configuration asks for {sum(self.features)}; give "
                "the configuration that the weights were prepared with."
            )
        y = product(x, turned)
        if self.has_variable("params", "bias"):
            y = y + self.get_variable("params", "bias").astype(x.dtype)
        ends = [sum(self.features[:i]) for i in range(1, len(self.features))]
        return tuple(jnp.split(y, ends, axis=-1))


class Attention(nn.Module):
    """Self-attention over x [B, T, D]; with cached keys and values when given.

    With `key_offset` the key of each token is that of the token before it (zero at a document's start): what matches a
    query then hands over what *followed* the match. So one layer can look up where two are needed otherwise, one to
    copy each token's predecessor and one to find it (Olsson et al., In-context learning and induction heads, arXiv
    2209.11895).
    """

    cfg: ModelConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, ctx: Context, cached: tuple[jax.Array, jax.Array] | None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        cfg = self.cfg
        b, t, d = x.shape
        heads, kv, h = cfg.n_heads, cfg.kv_heads, cfg.d_head

        joined = {}
        if self.has_variable("params", QKV):
            joined = dict(zip("qkv", Joined((heads * h, kv * h, kv * h), name=QKV)(x), strict=True))

        def project(name: str, count: int, axis: str) -> jax.Array:
            y = joined.get(name)
            if y is None:
                y = Linear(count * h, ("embed", axis), matrix_init(cfg, d), cfg.attn_bias, name=name)(x)
            y = y.reshape(b, t, count, h)
            if cfg.qk_norm and name != "v":
                y = Norm("rms", cfg.norm_eps, cfg.qk_norm_scale, False, "head_dim", name=f"{name}_norm")(y)
            return y.swapaxes(1, 2)

        with jax.named_scope("qkv"):
            q, k, v = project("q", heads, "heads"), project("k", kv, "kv"), project("v", kv, "kv")
            if ctx.rotary is not None:
                q, k = rotate(q, *ctx.rotary), rotate(k, *ctx.rotary)
        if cached is not None:
            assert ctx.length is not None
            # With key_offset place s of the cache holds the key of token s - 1; place 0 is never written, so zero.
            cached = (
                kv_cache.write(cached[0], k, ctx.length + int(cfg.key_offset)),
                kv_cache.write(cached[1], v, ctx.length),
            )
            k, v = cached[0].astype(q.dtype), cached[1].astype(q.dtype)
            if t > 1:
                k, v = k.reshape(b, kv, -1, h), v.reshape(b, kv, -1, h)
        elif cfg.key_offset:
            assert ctx.linked is not None
            before = jnp.pad(k, ((0, 0), (0, 0), (1, 0), (0, 0)))[:, :, :t]
            k = jnp.where(ctx.linked[:, None, :, None], before, 0)
        with jax.named_scope("attend"):
            q, k, v = (checkpoint_name(x, f"blocks.attention.{name}") for x, name in ((q, "q"), (k, "k"), (v, "v")))
            one = cached is not None and t == 1
            y = checkpoint_name((attend_next if one else attend)(q, k, v, ctx.mask), "blocks.attention.heads")
        self.sow("intermediates", "out", y)
        y = y.swapaxes(1, 2).reshape(b, t, heads * h)
        init = matrix_init(cfg, heads * h, output=True)
        return Linear(d, ("heads", "embed"), init, cfg.attn_out_bias, name="o")(y), cached


class Mlp(nn.Module):
    """The position-wise network, x [B, T, D] -> [B, T, D]."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg = self.cfg
        d = x.shape[-1]

        def into(name: str) -> jax.Array:
            return Linear(cfg.ff, ("embed", "mlp"), matrix_init(cfg, d), cfg.mlp_bias, name=name)(x)

        if self.has_variable("params", GATE_UP):
            gate, up = Joined((cfg.ff, cfg.ff), name=GATE_UP)(x)
        else:
            up = into("up")
            gate = into("gate") if cfg.mlp == "swiglu" else up
        match cfg.mlp:
            case "relu":
                y = jax.nn.relu(up)
            case "gelu":
                y = jax.nn.gelu(up, approximate=False)
            case "gelu_tanh":
                y = jax.nn.gelu(up, approximate=True)
            case "relu2":  # So et al., Primer (arXiv 2109.08668)
                y = jnp.square(jax.nn.relu(up))
            case "swiglu":  # Shazeer (arXiv 2002.05202)
                y = jax.nn.silu(gate) * up
        y = checkpoint_name(y, "blocks.mlp.hidden")
        init = matrix_init(cfg, cfg.ff, output=True)
        return Linear(d, ("mlp", "embed"), init, cfg.mlp_bias, name="down")(y)


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream; norms before the sublayer or after the sum."""

    cfg: ModelConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, ctx: Context, cached: tuple[jax.Array, jax.Array] | None = None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        cfg = self.cfg
        pre = cfg.norm_position == "pre"
        norm1, norm2 = (Norm(cfg.norm, cfg.norm_eps, cfg.norm_scale, cfg.norm_bias, name=f"norm{i}") for i in (1, 2))
        keys = (None, None) if ctx.dropout_key is None else jax.random.split(ctx.dropout_key)

        with jax.named_scope("attention"):
            y, cached = Attention(cfg, name="attn")(norm1(x) if pre else x, ctx, cached)
            x = x + dropout(checkpoint_name(y, "blocks.attention.out"), cfg.dropout, keys[0])
            x = checkpoint_name(x if pre else norm1(x), "blocks.mid")
        with jax.named_scope("mlp"):
            y = Mlp(cfg, name="mlp")(norm2(x) if pre else x)
            x = x + dropout(checkpoint_name(y, "blocks.mlp.out"), cfg.dropout, keys[1])
            x = checkpoint_name(x if pre else norm2(x), "blocks.out")
        return x, cached
