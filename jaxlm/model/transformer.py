"""The model as pure functions: `init`, `forward`, `unembed`, `apply`.

The parameters are a nested dict of float32 arrays:

    embed/tokens [V, D]   embed/positions [T, D] (learned positions)
    blocks/...            every block weight, stacked on a leading axis L
    final_norm/...        head/kernel [D, V], head/bias [V] (untied)

or, for `kind=bigram`, one table `bigram/table` [V, V] of logits. `forward` also takes `blocks` as a tuple of L dicts,
one per layer, which is the layout that `jaxlm.sample.prepare` makes for decoding.
"""

from __future__ import annotations

from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

import jaxlm._static  # noqa: F401  # configurations are no leaves
from jaxlm.config import ModelConfig
from jaxlm.errors import InputError
from jaxlm.model.attention import cache_mask, training_mask
from jaxlm.model.blocks import Block, Context, Norm, declared, dropout, product
from jaxlm.model.cache import Cache
from jaxlm.model.embed import embed, linked
from jaxlm.model.positions import rotary_tables

Params = dict[str, Any]

MIX_STD = 0.5  # of the initial gains of earlier tokens' embeddings, where the token's own gain is 1


class _Ends(nn.Module):
    """Declares the weights before and after the blocks; called only to initialise them."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self) -> None:
        cfg = self.cfg
        v, d = cfg.vocab_size, cfg.d_model
        normal = nn.initializers.normal(cfg.init_std)
        self.param("embed_tokens", declared(normal, "vocab", "embed"), (v, d), jnp.float32)
        if cfg.position == "learned":
            self.param("embed_positions", declared(normal, "positions", "embed"), (cfg.max_seq_len, d), jnp.float32)
        if cfg.embed_mix:
            # Random per channel, so that the same token at different distances looks different from the start.
            init = nn.initializers.normal(MIX_STD)
            self.param("embed_mix", declared(init, None, "embed"), (cfg.embed_mix, d), jnp.float32)
        if cfg.final_norm:
            _final_norm(cfg)(jnp.zeros((1, d)))
        if not cfg.tie_embeddings:
            init = nn.initializers.zeros if cfg.zero_init_head else normal
            self.param("head_kernel", declared(init, "embed", "vocab"), (d, v), jnp.float32)
        if cfg.head_bias:
            self.param("head_bias", declared(nn.initializers.zeros, "vocab"), (v,), jnp.float32)


class _Bigram(nn.Module):
    cfg: ModelConfig

    @nn.compact
    def __call__(self) -> None:
        v = self.cfg.vocab_size
        self.param("table", declared(nn.initializers.zeros, "vocab", "vocab_out"), (v, v), jnp.float32)


def _final_norm(cfg: ModelConfig) -> Norm:
    return Norm(cfg.norm, cfg.norm_eps, cfg.norm_scale, cfg.norm_bias, name="final_norm")


def boxed_init(cfg: ModelConfig, key: jax.Array) -> Params:
    """`init` with each weight still in the Linen box that holds its logical axes (stacked ones lead with `layers`)."""
    if cfg.kind == "bigram":
        return {"bigram": _Bigram(cfg).init(key)["params"]}
    ends_key, blocks_key = jax.random.split(key)
    ends = _Ends(cfg).init(ends_key)["params"]
    params: Params = {"embed": {}, "blocks": {}}
    for name, weight in ends.items():
        if name == "final_norm":
            if weight:
                params["final_norm"] = weight
        else:
            group, _, leaf = name.partition("_")
            params.setdefault(group, {})[leaf] = weight

    ctx = Context(
        mask=jnp.ones((1, 1, 1), bool), rotary=None, linked=jnp.zeros((1, 1), bool), length=None, dropout_key=None
    )
    dummy = jnp.zeros((1, 1, cfg.d_model))

    def one_block(block_key: jax.Array) -> Params:
        return nn.unbox(Block(cfg).init(block_key, dummy, ctx)["params"])

    shapes = jax.eval_shape(lambda: Block(cfg).init(blocks_key, dummy, ctx)["params"])
    stacked = jax.vmap(one_block)(jax.random.split(blocks_key, cfg.n_layers))
    if cfg.tie_qk_init:
        stacked["attn"]["k"] = jax.tree.map(jnp.copy, stacked["attn"]["q"])
    params["blocks"] = jax.tree.map(
        lambda box, value: nn.LogicallyPartitioned(value, ("layers", *box.names)),
        shapes,
        stacked,
        is_leaf=lambda node: isinstance(node, nn.LogicallyPartitioned),
    )
    return params


def init(cfg: ModelConfig, key: jax.Array) -> Params:
    """Fresh parameters, float32.

    Args:
        cfg: the model's shape.
        key: a typed PRNG key; the same key gives the same bits.

    Returns:
        The nested dict described at the top of this module.
    """
    return nn.unbox(boxed_init(cfg, key))


def logical_axes(cfg: ModelConfig) -> Params:
    """For every weight, the names of its dimensions, e.g. `("layers", "embed", "heads")`."""
    boxes = jax.eval_shape(lambda: boxed_init(cfg, jax.random.key(0)))
    return jax.tree.map(
        lambda box: tuple(box.names), boxes, is_leaf=lambda node: isinstance(node, nn.LogicallyPartitioned)
    )


def forward(
    cfg: ModelConfig,
    params: Params,
    tokens: jax.Array,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    cache: Cache | None = None,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, Cache | None]:
    """The hidden states before the head.

    Args:
        cfg: the model.
        params: from `init`, or prepared for decoding.
        tokens: int32[B, T].
        positions: int32[B, T]; by default 0 .. T-1, or on from each row's cache length. Values are data, so none is
            checked: with learned positions, one beyond the table reads its last row.
        segment_ids: int32[B, T]; tokens see only their own segment. Not together with a cache.
        cache: keys and values of earlier tokens; T more are written at each row's own length.
        dropout_key: typed key; None turns dropout off.

    Returns:
        hidden [B, T, D] in the compute type (for a bigram: the tokens' rows, [B, T, V]), and the cache with T more
        tokens a row, or None.

    Raises:
        InputError: segment_ids together with a cache; more tokens than there are learned positions, where no positions
            are given. Both are seen in shapes, so under `jit` while it traces.
    """
    if cache is not None and segment_ids is not None:
        raise InputError("forward: segment_ids and cache do not go together; decode one document a row.")
    t = tokens.shape[1]
    if cfg.kind == "bigram":
        rows = params["bigram"]["table"][tokens]
        return rows, None if cache is None else cache._replace(length=cache.length + t)
    if positions is None:
        if cfg.position == "learned" and cache is None and t > (most := params["embed"]["positions"].shape[0]):
            raise InputError(
                f"tokens: rows of {t} tokens are longer than the {most} positions that this model has learned; shorten "
                "them, or pass positions= that start anew."
            )
        start = jnp.zeros((1,), jnp.int32) if cache is None else cache.length
        positions = jnp.broadcast_to(start[:, None] + jnp.arange(t, dtype=jnp.int32)[None, :], tokens.shape)

    with jax.named_scope("embed"):
        x, history = embed(cfg, params, tokens, positions, segment_ids, cache)
        x = checkpoint_name(x, "embed")
    layer_keys: list[jax.Array] | None = None
    if dropout_key is not None and cfg.dropout > 0:
        embed_key, *layer_keys = jax.random.split(dropout_key, cfg.n_layers + 1)
        x = dropout(x, cfg.dropout, embed_key)

    mask = training_mask(t, segment_ids) if cache is None else cache_mask(cache.length, t, cache.capacity)
    rotary = rotary_tables(cfg, positions) if cfg.position == "rotary" else None
    before = linked(positions, segment_ids, 1)[0] if cfg.key_offset and cache is None else None
    ctx = Context(mask, rotary, before, None if cache is None else cache.length, None)
    x, cache = _blocks(cfg, params["blocks"], x, ctx, cache, layer_keys)
    cache = None if cache is None else cache._replace(tokens=history)
    return normalized(cfg, params, x), cache


def normalized(cfg: ModelConfig, params: Params, x: jax.Array) -> jax.Array:
    """The residual stream [..., D] as the head reads it: after the final norm, where the model has one."""
    if not cfg.final_norm:
        return x
    with jax.named_scope("final_norm"):
        norm = Norm(cfg.norm, cfg.norm_eps, cfg.norm_scale, cfg.norm_bias)
        x = cast(jax.Array, norm.apply({"params": params.get("final_norm", {})}, x))
        return checkpoint_name(x, "final_norm")


def _blocks(
    cfg: ModelConfig,
    blocks: Any,
    x: jax.Array,
    ctx: Context,
    cache: Cache | None,
    layer_keys: list[jax.Array] | None,
) -> tuple[jax.Array, Cache | None]:
    def run(x: jax.Array, layer: Params, cached: Any, key: jax.Array | None) -> tuple[jax.Array, Any]:
        return Block(cfg).apply({"params": layer}, x, ctx._replace(dropout_key=key), cached)

    run = jax.checkpoint(run) if cfg.remat else run
    t = x.shape[1]
    layer_by_layer = isinstance(blocks, tuple) or (cache is not None and isinstance(cache.k, tuple))
    if cfg.scan_layers and not layer_by_layer:
        keys = None if layer_keys is None else jnp.stack(layer_keys)
        held = None if cache is None else (_flat(cache.k), _flat(cache.v))
        x, held = jax.lax.scan(lambda x, layer: run(x, *layer), x, (blocks, held, keys))
        if cache is None or held is None:
            return x, None
        k, v = (_stacked(part, len(cache.length)) for part in held)
        return x, Cache(k, v, cache.length + t)

    layers = blocks if isinstance(blocks, tuple) else unstack(blocks, cfg.n_layers)
    new: list[Any] = []
    for i, layer in enumerate(layers):
        with jax.named_scope(f"block{i}"):
            held = None if cache is None else (cache.k[i], cache.v[i])
            if held is not None and cache is not None and not isinstance(cache.k, tuple):
                held = _flat(held[0]), _flat(held[1])
            x, held = run(x, layer, held, None if layer_keys is None else layer_keys[i])
            new.append(held)
    if cache is None:
        return x, None
    keys_of, values_of = tuple(item[0] for item in new), tuple(item[1] for item in new)
    if isinstance(cache.k, tuple):
        return x, Cache(keys_of, values_of, cache.length + t)
    batch = len(cache.length)
    return x, Cache(_stacked(jnp.stack(keys_of), batch), _stacked(jnp.stack(values_of), batch), cache.length + t)


def _flat(held: Any) -> jax.Array:
    """Keys or values [..., B, S, K, h] as blocks take them, [..., B * K, S, h]."""
    *layers, batch, places, heads, h = held.shape
    return jnp.reshape(held.swapaxes(-3, -2), (*layers, batch * heads, places, h))


def _stacked(held: jax.Array, batch: int) -> jax.Array:
    """The way back, for all layers: [L, B * K, S, h] to [L, B, S, K, h]."""
    layers, _, places, h = held.shape
    return held.reshape(layers, batch, -1, places, h).swapaxes(-3, -2)


def unstack(blocks: Params, n_layers: int) -> tuple[Params, ...]:
    """Stacked block weights as a tuple of one dict per layer."""
    # lax.split, because its gradient is one concatenation; slicing's is a sum of L padded arrays.
    parts = jax.tree.map(lambda w: [p.squeeze(0) for p in jax.lax.split(w, (1,) * n_layers, axis=0)], blocks)
    is_list = lambda node: isinstance(node, list)  # noqa: E731
    return tuple(jax.tree.map(lambda p, i=i: p[i], parts, is_leaf=is_list) for i in range(n_layers))


def unembed(cfg: ModelConfig, params: Params, hidden: jax.Array) -> jax.Array:
    """Logits float32[..., V] of hidden states [..., D]."""
    if cfg.kind == "bigram":
        return hidden.astype(jnp.float32)
    with jax.named_scope("unembed"):
        turned = params.get("head", {}).get("turned")
        if cfg.tie_embeddings and isinstance(params.get("blocks"), tuple):
            turned = params["embed"]["tokens"]
        if turned is not None:  # made for decoding
            logits = product(hidden, turned.astype(hidden.dtype), jnp.float32)
        elif cfg.tie_embeddings:
            kernel = params["embed"]["tokens"].astype(hidden.dtype)
            logits = jnp.einsum("...d,vd->...v", hidden, kernel, preferred_element_type=jnp.float32)
        else:
            kernel = params["head"]["kernel"].astype(hidden.dtype)
            logits = jnp.einsum("...d,dv->...v", hidden, kernel, preferred_element_type=jnp.float32)
        if cfg.head_bias:
            logits = logits + params["head"]["bias"]
        if cfg.logit_softcap is not None:  # Gemma 2 (arXiv 2408.00118), section 2
            logits = cfg.logit_softcap * jnp.tanh(logits / cfg.logit_softcap)
    return logits


def apply(
    cfg: ModelConfig,
    params: Params,
    tokens: jax.Array,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """Next-token logits: int32[B, T] -> float32[B, T, V]. Arguments and errors as in `forward`."""
    hidden, _ = forward(cfg, params, tokens, positions=positions, segment_ids=segment_ids)
    return checkpoint_name(unembed(cfg, params, hidden), "logits")
