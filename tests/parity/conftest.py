"""The peers, and their weights as jaxlm's parameters. A test whose peer is not installed is skipped.

The peers are fixtures and not imports, because the default run collects this folder too and should not load torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import ModelConfig

_REASON = "a comparison with a peer; install the extra: pip install -e '.[parity]'"


@pytest.fixture(scope="session")
def torch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        # Else its compiler makes a folder in /tmp, which stays.
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("torch")))
        torch = pytest.importorskip("torch", reason=_REASON)
        torch.set_num_threads(1)
        yield torch


@pytest.fixture(scope="session")
def transformers(torch: Any) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")  # read at its first import; every model here is made from a config
        yield pytest.importorskip("transformers", minversion="4.50", reason=_REASON)


@pytest.fixture(scope="session")
def randomize(torch: Any) -> Callable[[Any, int], dict[str, np.ndarray]]:
    """randomize(module, seed): fills a torch module with numbers, and returns them by name, tied ones once.

    Fresh weights would hide faults: their biases are 0 and their gains 1. Embeddings are small, so that the epsilon of
    the first norm shows.
    """

    def fill(module: Any, seed: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        weights = {}
        for name, parameter in module.named_parameters():
            noise = rng.normal(size=tuple(parameter.shape)).astype(np.float32)
            if parameter.ndim == 1 and name.endswith("weight"):
                value = 1 + 0.2 * noise
            else:
                value = (0.02 if any(word in name for word in ("embed", "wte", "wpe")) else 0.2) * noise
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(value))
            weights[name] = value
        return weights

    return fill


@pytest.fixture(scope="session")
def as_params(parameter_shapes: Callable[[ModelConfig], dict[str, tuple[int, ...]]]) -> Callable[..., Any]:
    """as_params(cfg, weights, table, transpose): jaxlm's parameters from a peer's weights by name.

    `table` gives the peer's name of each of our paths, with `{}` for the layer; names that the peer lacks are left out,
    and every shape must then be that of `init` and every weight of the peer be used. torch's Linear is [out, in]:
    `transpose` turns its weights into our kernels.
    """

    def build(cfg: ModelConfig, weights: dict[str, np.ndarray], table: dict[str, str], transpose: bool) -> Any:
        params: dict[str, Any] = {}
        shapes, used = {}, set()
        for path, template in table.items():
            names = [template.format(i) for i in range(cfg.n_layers)] if "{}" in template else [template]
            if names[0] not in weights:
                continue
            parts = [weights[name].T if transpose and path.endswith("kernel") else weights[name] for name in names]
            value = np.stack(parts) if "{}" in template else parts[0]
            *parents, leaf = path.split("/")
            node = params
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf], shapes[path] = jnp.asarray(value), value.shape
            used |= set(names)
        assert used == set(weights)
        assert shapes == parameter_shapes(cfg)
        return params

    return build
