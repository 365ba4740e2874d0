"""Any value on the way through the model, by name, as a pure function.

| name | shape | what it is |
|---|---|---|
| `embed` | [B, T, D] | what enters the first block: embeddings, positions in them where the model adds positions |
| `blocks.0.attention.q` | [B, H, T, h] | queries, normed and turned |
| `blocks.0.attention.k` | [B, K, T, h] | keys likewise, as the queries meet them (with `key_offset`: a token late) |
| `blocks.0.attention.v` | [B, K, T, h] | values |
| `blocks.0.attention.probs` | float32[B, H, T, T] | what query t (axis 2) reads from token s (axis 3); rows sum to 1 |
| `blocks.0.attention.heads` | [B, H, T, h] | what each head read |
| `blocks.0.attention.out` | [B, T, D] | what attention adds to the residual stream |
| `blocks.0.mid` | [B, T, D] | the stream between attention and MLP |
| `blocks.0.mlp.hidden` | [B, T, F] | the MLP's features, after the activation |
| `blocks.0.mlp.out` | [B, T, D] | what the MLP adds to the stream |
| `blocks.0.out` | [B, T, D] | the stream after the block |
| `final_norm` | [B, T, D] | what the head sees, in models with a final norm |
| `logits` | float32[B, T, V] | the result of `jaxlm.apply` |

Activations have the compute type. The model marks these values with `jax.ad_checkpoint.checkpoint_name`, which computes
nothing: the compiled program of a model with marks is the one without. `capture` traces the model, turns the marked
values into the trace's results, and XLA leaves out what they do not need.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, jaxpr_as_fun

from jaxlm.analysis import _checks
from jaxlm.config import ModelConfig
from jaxlm.errors import InputError
from jaxlm.model import Params, apply, init, unstack

_PER_BLOCK = "blocks."  # marks that every block has


def capture(
    cfg: ModelConfig,
    params: Params,
    tokens: jax.Array,
    names: str | Sequence[str],
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Runs the model and returns the named intermediates.

    Jit it with the names static: `jax.jit(capture, static_argnames="names")(cfg, params, tokens, ("embed",))`. The
    layers are unrolled even where `cfg.scan_layers` scans them, which can change the last bits.

    Args:
        cfg: the model.
        params: its parameters, stacked or from `jaxlm.sample.prepare`.
        tokens: int32[B, T], or lists of as many ids each.
        names: of the table above. A `*` stands for anything between two dots: `blocks.*.out` is the stream after
            every block, `blocks.*.attention.*` all that attention does.
        positions: as for `jaxlm.forward`.
        segment_ids: as for `jaxlm.forward`.

    Returns:
        name -> array, in the order in which the model computes them; from a jitted call sorted by name, as jax sorts
        every dict that it returns.

    Raises:
        InputError: the model has no such intermediate (the message lists the nearest names); tokens, positions or
            segment_ids of another shape or type; or parameters of another configuration. All are seen in shapes and
            types, so under `jit` while it traces; outside `jit`, tokens that the model does not have are refused too.
    """
    wanted = select(cfg, names)
    tokens = _checks.tokens(tokens)
    positions = _checks.by_token("positions", positions, tokens.shape)
    segment_ids = _checks.by_token("segment_ids", segment_ids, tokens.shape)
    _checks.in_vocabulary(cfg, tokens)
    _checks.params(cfg, params)
    # The marks inside a scan or a rematerialised block are out of reach, so neither is used.
    cfg = cfg.replace(remat=False) if cfg.remat else cfg
    if cfg.kind == "transformer" and not isinstance(params["blocks"], tuple):
        params = {**params, "blocks": unstack(params["blocks"], cfg.n_layers)}
    args = (params, tokens, positions, segment_ids)
    traced = jax.make_jaxpr(lambda p, x, pos, seg: apply(cfg, p, x, positions=pos, segment_ids=seg))(*args)
    marked = _marked(traced.jaxpr)
    program = traced.replace(jaxpr=traced.jaxpr.replace(outvars=[marked[name] for name in wanted]))
    values = jaxpr_as_fun(program)(*jax.tree.leaves(args))
    return {name: _by_head(name, value) for name, value in zip(wanted, values, strict=True)}


def names(cfg: ModelConfig) -> tuple[str, ...]:
    """The names that `capture` knows for a model, in the order in which it computes them.

    Raises:
        InputError: no configuration.
    """
    _checks.config(cfg)
    return _names(cfg)


@lru_cache(maxsize=64)
def _names(cfg: ModelConfig) -> tuple[str, ...]:
    # All blocks are alike: one tells the names of every other.
    one = cfg.replace(n_layers=1, scan_layers=False, remat=False)
    params = jax.eval_shape(lambda: init(one, jax.random.key(0)))
    traced = jax.make_jaxpr(lambda p, x: apply(one, p, x))(params, jax.ShapeDtypeStruct((1, 1), jnp.int32))
    found = list(_marked(traced.jaxpr))
    parts = [name.removeprefix("blocks.0.") for name in found if name.startswith(_PER_BLOCK)]
    blocks = [f"blocks.{i}.{part}" for i in range(cfg.n_layers if parts else 0) for part in parts]
    before = [name for name in found if name == "embed"]
    after = [name for name in found if name not in before and not name.startswith(_PER_BLOCK)]
    return (*before, *blocks, *after)


def select(cfg: ModelConfig, patterns: str | Sequence[str]) -> tuple[str, ...]:
    """The model's names that match, each once, in the model's order; patterns and errors as for `capture`."""
    several = isinstance(patterns, Iterable) and not isinstance(patterns, str)
    known = names(cfg)
    chosen: set[str] = set()
    for pattern in patterns if several else (patterns,):
        if not isinstance(pattern, str):
            raise InputError(f"names: expected a text or several, found {pattern!r}; analysis.names(cfg) lists all.")
        matches = {name for name in known if _matches(name, pattern)}
        if not matches:
            near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.0)
            raise InputError(
                f"names: this model has no intermediate {pattern!r}; the nearest of its {len(known)} are "
                f"{', '.join(near)}, and analysis.names(cfg) lists all."
            )
        chosen |= matches
    return tuple(name for name in known if name in chosen)


def _matches(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _marked(jaxpr: Jaxpr) -> dict[str, Any]:
    """Name -> variable; the i-th mark of a name that every block has belongs to block i."""
    seen: Counter[str] = Counter()
    found: dict[str, Any] = {}
    for equation in jaxpr.eqns:
        if equation.primitive.name != "name":  # the primitive of checkpoint_name
            continue
        name = equation.params["name"]
        if name.startswith(_PER_BLOCK):
            part, index = name.removeprefix(_PER_BLOCK), seen[name]
            seen[name] += 1
            name = f"{_PER_BLOCK}{index}.{part}"
        found[name] = equation.outvars[0]
    return found


def _by_head(name: str, value: jax.Array) -> jax.Array:
    """Attention is computed by groups of query heads, [B, K, H / K, T, S]; it is handed out by head, [B, H, T, S]."""
    if not name.endswith(".attention.probs"):
        return value
    return value.reshape(value.shape[0], -1, *value.shape[-2:])
