"""What all tests share: two CPU devices, and quick compilation where a test module asks for it."""

from __future__ import annotations

import os
import sys

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
