from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm.model import init
from jaxlm.sample import cuts

QUICKER = {"xla_cpu_use_fusion_emitters": False}


@cache
def _quicker() -> tuple[Any, Any] | None:
    """A module of jax, and a function for it that asks for XLA's older code generator, twice as quick to compile.

    jax has no setting for it but the variable XLA_FLAGS, which would be for all tests of a session. None in versions
    of jax and XLA that do not have either: the tests then only take longer.
    """
    try:
        from jax._src import compiler

        jax.jit(lambda x: x + 1).lower(1.0).compile(compiler_options=QUICKER)
        plain = compiler.get_compile_options
    except (ImportError, AttributeError, RuntimeError, ValueError):
        return None

    def options(*args: Any, **more: Any) -> Any:
        out = plain(*args, **more)
        out.env_option_overrides = [*out.env_option_overrides, *QUICKER.items()]
        return out

    return compiler, options


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    """Compiles quicker in modules of this folder that say `QUICK_COMPILE = True`: they compare no bits of XLA's."""
    mine = item.path.is_relative_to(Path(__file__).parent)
    quicker = _quicker() if mine and getattr(getattr(item, "module", None), "QUICK_COMPILE", False) else None
    with pytest.MonkeyPatch.context() as patch:
        if quicker is not None:
            patch.setattr(quicker[0], "get_compile_options", quicker[1])
        return (yield)


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
def windows() -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """windows(context, prompt, tokens) -> which tokens each new one comes from, as the docs say of sliding windows.

    int32[n, context] and how many of them count, int[n]: the naive loop, for a full forward pass over all of them.
    """

    def naive(context: int, prompt: list[int], tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
        prompt, begin = prompt if len(prompt) <= context else prompt[-(context // 2) :], 0
        ids, n = prompt + tokens, len(tokens)
        out, lengths = np.zeros((n, context), np.int32), np.zeros(n, int)
        for row, end in enumerate(range(len(prompt), len(prompt) + n)):
            if end - begin > context:
                begin = end - context // 2
            lengths[row] = end - begin
            out[row, : lengths[row]] = ids[begin:end]
        return out, lengths

    return naive


@pytest.fixture(scope="session")
def window_suffices() -> Callable[..., np.ndarray]:
    """window_suffices(logits, width, options) -> bool[B]: a window of `width` tokens holds all that a row keeps."""

    def look(x: Any, option: Any, width: int) -> jax.Array:
        return cuts.look(cuts.as_rows(x, option), width).suffices

    looked = jax.jit(look, static_argnums=2)
    off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}

    def suffices(x: np.ndarray, width: int, options: dict[str, np.ndarray]) -> np.ndarray:
        given = off | options  # in the order of the first
        width = cuts.width(x.shape[-1], width)
        return np.asarray(looked(x, cuts.per_row(jax.numpy.asarray(x), *given.values()), width))

    return suffices


@pytest.fixture(scope="session")
def random_params() -> Callable[..., Any]:
    """random_params(cfg, scale, head) -> parameters far from uniform. Made by numpy: `init` compiles for seconds."""

    def make(cfg: Any, scale: float = 0.3, head: float = 1.0) -> Any:
        rng = np.random.default_rng(0)
        shapes = jax.eval_shape(lambda: init(cfg, jax.random.key(0)))
        params = jax.tree.map(lambda leaf: np.asarray(rng.normal(size=leaf.shape) * scale, leaf.dtype), shapes)
        if head != 1:
            params["head"]["kernel"] *= np.float32(head)
        return jax.tree.map(jax.numpy.asarray, params)

    return make
