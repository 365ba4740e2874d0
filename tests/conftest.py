"""What all tests share: two CPU devices, and quick compilation where a test module asks for it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

# Before anything imports jax: a layout of two devices on every machine, whichever test comes first. Stages run inline
# would otherwise claim the cores of the machine when they find jax not yet in use.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Lets XLA compile without LLVM's optimizations in modules that say `QUICK_COMPILE = True`.

    Programs of a test run for microseconds and compile for seconds: this halves the seconds. A hook and not a fixture,
    because it must come before the session's fixtures.
    """
    quick = getattr(getattr(item, "module", None), "QUICK_COMPILE", False)
    if quick or "jax" in sys.modules:
        import jax

        jax.config.update("jax_disable_most_optimizations", quick)


@pytest.fixture(scope="session")
def parameter_shapes() -> Callable[[Any], dict[str, tuple[int, ...]]]:
    """parameter_shapes(cfg) -> the shape of each parameter by its path, found without making it."""
    import jax

    from jaxlm import model
    from jaxlm.model.weights import path_of

    @cache
    def shapes(cfg: Any) -> dict[str, tuple[int, ...]]:
        tree = jax.eval_shape(lambda: model.init(cfg, jax.random.key(0)))
        return {path_of(path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}

    return shapes
