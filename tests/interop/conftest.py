"""Directories of Hugging Face models, written with the `safetensors` library and not with ours."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm import model
from jaxlm.config import ModelConfig

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def maker() -> ModuleType:
    """The script that made the expected values."""
    spec = importlib.util.spec_from_file_location("make_expected", HERE / "make_expected.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def expected() -> dict[str, dict[str, Any]]:
    """The stored cases: config, tensors (shapes), dtype, shards, greedy and logits float32[1, T, V] of each."""
    cases = json.loads((HERE / "expected_hf.json").read_text())
    with np.load(HERE / "expected_hf.npz") as logits:
        return {name: case | {"logits": logits[name]} for name, case in cases.items()}


@pytest.fixture(scope="session")
def write_hf() -> Callable[..., Path]:
    """write_hf(directory, config, tensors, shards=1): a model as others write it."""
    from safetensors.numpy import save_file

    def write(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], shards: int = 1) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(config))
        if shards == 1:
            save_file(dict(tensors), directory / "model.safetensors", metadata={"format": "pt"})
            return directory
        names, weight_map = list(tensors), {}
        for i in range(shards):
            file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            part = {name: tensors[name] for name in names[i::shards]}
            save_file(part, directory / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return directory

    return write


@pytest.fixture(scope="session")
def tensors_of(maker: ModuleType, expected: dict[str, dict[str, Any]]) -> Callable[[str], dict[str, np.ndarray]]:
    """tensors_of(case): its weights by name."""

    def make(case: str) -> dict[str, np.ndarray]:
        about = expected[case]
        return {name: maker.weight_of(name, tuple(shape), about["dtype"]) for name, shape in about["tensors"].items()}

    return make


@pytest.fixture
def stored(
    tmp_path: Path,
    expected: dict[str, dict[str, Any]],
    write_hf: Callable[..., Path],
    tensors_of: Callable[[str], dict[str, np.ndarray]],
) -> Callable[..., Path]:
    """stored(case, config={}, tensors={}, without=(), shards=None): the directory of a case, with changes."""

    def make(case: str, *, config: Any = (), tensors: Any = (), without: Any = (), shards: int | None = None) -> Path:
        about = expected[case]
        weights = {n: w for n, w in (tensors_of(case) | dict(tensors)).items() if n not in without}
        return write_hf(tmp_path / "model", about["config"] | dict(config), weights, shards or about["shards"])

    return make


@pytest.fixture(scope="session")
def random_params() -> Callable[..., Any]:
    """random_params(cfg): numbers in the tree of `init`, none of them zero."""

    def make(cfg: ModelConfig) -> Any:
        rng = np.random.default_rng(0)
        shapes = jax.eval_shape(lambda: model.init(cfg, jax.random.key(0)))
        return jax.tree.map(lambda leaf: jax.device_put(rng.normal(size=leaf.shape).astype(np.float32)), shapes)

    return make
