"""The model as pure functions over a nested dict of arrays."""

from jaxlm.model.cache import Cache, init_cache
from jaxlm.model.loss import token_nll
from jaxlm.model.transformer import Params, apply, forward, init, logical_axes, unembed, unstack
from jaxlm.model.weights import TABLE, Weight, count, decay_mask, weight

__all__ = [
    "TABLE", "Cache", "Params", "Weight", "apply", "count", "decay_mask", "forward", "init", "init_cache",
    "logical_axes", "token_nll", "unembed", "unstack", "weight",
]  # fmt: skip
