from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm.model import init


class Compiled:
    """Counts XLA compilations by the name of the jitted function."""

    def __init__(self) -> None:
        self.names: list[str] = []
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, duration: float, **more: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.names.append(str(more.get("fun_name")))

    def count(self, function: str) -> int:
        return self.names.count(f"jit({function})")


@pytest.fixture(scope="session", autouse=True)
def compiled() -> Compiled:
    return Compiled()


@pytest.fixture(scope="session")
def random_params() -> Callable[..., Any]:
    """random_params(cfg, scale) -> parameters far from uniform. Made by numpy: `init` compiles for seconds."""

    def make(cfg: Any, scale: float = 0.3) -> Any:
        rng = np.random.default_rng(0)
        shapes = jax.eval_shape(lambda: init(cfg, jax.random.key(0)))
        return jax.tree.map(lambda leaf: jax.numpy.asarray(rng.normal(size=leaf.shape) * scale, leaf.dtype), shapes)

    return make
