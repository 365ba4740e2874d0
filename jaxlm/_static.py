"""Configurations travel through jit as part of a tree's structure, not as leaves.

Apart from `jaxlm.config`, which must load no jax: whoever takes a configuration from `jaxlm` itself, or the model, gets
this too.
"""

from __future__ import annotations

import jax

from jaxlm.config import ModelConfig, TrainConfig

for _static in (ModelConfig, TrainConfig):
    jax.tree_util.register_static(_static)
