"""Language models as pure functions in JAX. Names load on first use, so `import jaxlm` itself brings no jax."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "ModelConfig": "jaxlm.config",
    "TrainConfig": "jaxlm.config",
    "RunConfig": "jaxlm.config",
    "preset": "jaxlm.presets",
    "init": "jaxlm.model",
    "apply": "jaxlm.model",
    "forward": "jaxlm.model",
    "unembed": "jaxlm.model",
    "init_cache": "jaxlm.model",
    "Sampling": "jaxlm.sample",
    "generate": "jaxlm.sample",
    "load_hf": "jaxlm.interop",
    "save_hf": "jaxlm.interop",
    "load_gguf": "jaxlm.interop.gguf",
}
_STATIC = ("ModelConfig", "TrainConfig", "preset")  # what they give is static to jax's transformations
_MODULES = (
    "analysis",
    "checkpoint",
    "config",
    "data",
    "errors",
    "evaluate",
    "interop",
    "loading",
    "model",
    "parallel",
    "playground",
    "presets",
    "sample",
    "stages",
    "tokenizers",
    "train",
)

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _STATIC:
        importlib.import_module("jaxlm._static")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"jaxlm.{name}")
    raise AttributeError(f"module 'jaxlm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, *_MODULES]
