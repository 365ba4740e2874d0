"""A prepared chain of stages so small that each takes a moment, and the harness on the path."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # harness; the benchmarks do the same

import harness
from harness import CONFIG, Chain

from jaxlm.config import RunConfig, validated
from jaxlm.stages.runner import run_chain


@pytest.fixture(scope="session")
def quick_env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """For processes: quickly compiled, and each program once for all of them."""
    return {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_NUM_CPU_DEVICES": "2",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with the text and the tokens."""
    root = tmp_path_factory.mktemp("prepared")
    cfg = validated(RunConfig, CONFIG | {"root": str(root), "launcher": "inline"})
    run_chain(cfg, last="tokenize", echo=lambda line: None)
    return root


@pytest.fixture
def make_chain(prepared: Path, tmp_path: Path, quick_env: dict[str, str]) -> Callable[..., Chain]:
    """make_chain("name", train={...}) -> a chain whose text and tokens are done."""

    def make(name: str = "chain", **overrides: Any) -> Chain:
        root = tmp_path / name
        shutil.copytree(prepared / "store", root / "store", copy_function=shutil.copy2)
        return Chain(root, quick_env, **overrides)

    return make


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory, prepared: Path, quick_env: dict[str, str]) -> dict[str, Any]:
    """What the pretrain stage ends in when nothing happens to it."""
    root = tmp_path_factory.mktemp("unbroken")
    shutil.copytree(prepared / "store", root / "store", copy_function=shutil.copy2)
    chain = Chain(root, quick_env)
    with chain.process("pretrain") as stage:
        assert stage.end() == (0, "")
    return harness.outcome(chain.directory("pretrain"))
