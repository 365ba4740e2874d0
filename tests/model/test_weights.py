"""Initialisation, the weight table and the logical axes."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from jaxlm import model
from jaxlm.config import ModelConfig
from jaxlm.errors import InputError
from jaxlm.model.blocks import matrix_init
from jaxlm.model.weights import TABLE, path_of
from jaxlm.presets import PRESETS, preset

QUICK_COMPILE = True

# Besides the presets: the one weight that none of them has.
GATED = ModelConfig(mlp="swiglu", mlp_bias=True)


@pytest.mark.parametrize("name", PRESETS)
def test_every_weight_of_a_preset_is_in_the_table(name, parameter_shapes):
    missing = [path for path in parameter_shapes(preset(name)) if path not in TABLE]
    assert missing == [], "add these weights to jaxlm.model.weights.TABLE"


def test_every_row_of_the_table_belongs_to_some_model(parameter_shapes):
    used = set().union(*(parameter_shapes(cfg) for cfg in (GATED, *map(preset, PRESETS))))
    assert set(TABLE) - used == set(), "no model has these weights: remove their rows"


@pytest.mark.parametrize("name", ["gpt2", "qwen3-0.6b", "nano", "lesson_learned", "bigram"])
def test_matrices_decay_and_vectors_do_not(name, parameter_shapes):
    for path, shape in parameter_shapes(preset(name)).items():
        kernel = path.startswith("blocks/") and path.endswith("/kernel")
        assert model.weight(path).decay == kernel
        assert (model.weight(path).matrix is not None) == kernel
        if kernel:
            assert len(shape) == 3  # layers, inputs, outputs
            assert model.weight(path).matrix == (1, 2)


def test_an_unknown_weight_is_a_key_error():
    with pytest.raises(InputError, match="blocks/attn/w: no such weight"):
        model.weight("blocks/attn/w")


@pytest.mark.parametrize("name", ["gpt2", "qwen1.5-0.5b", "qwen3-0.6b", "nano", "lesson_learned", "bigram"])
def test_each_dimension_has_a_logical_axis(name, parameter_shapes):
    cfg = preset(name)
    axes = model.logical_axes(cfg)
    is_axes = lambda node: isinstance(node, tuple)  # noqa: E731
    named = {path_of(p): a for p, a in jax.tree_util.tree_flatten_with_path(axes, is_leaf=is_axes)[0]}
    sizes = {
        "vocab": cfg.vocab_size, "vocab_out": cfg.vocab_size, "embed": cfg.d_model, "positions": cfg.max_seq_len,
        "heads": cfg.n_heads * cfg.d_head, "kv": cfg.kv_heads * cfg.d_head, "mlp": cfg.ff, "layers": cfg.n_layers,
        "head_dim": cfg.d_head, None: cfg.embed_mix,
    }  # fmt: skip
    assert named.keys() == parameter_shapes(cfg).keys()
    for path, shape in parameter_shapes(cfg).items():
        assert tuple(sizes[axis] for axis in named[path]) == shape, path
        assert (named[path][0] == "layers") == path.startswith("blocks/")


@pytest.fixture(scope="module")
def fresh() -> Any:
    """A gpt2-like model, wide enough for statistics, with a head of its own that starts at zero; and how it is made."""
    cfg = preset(
        "gpt2", vocab_size=64, n_layers=2, d_model=64, n_heads=4, max_seq_len=32, tie_embeddings=False,
        zero_init_head=True,
    )  # fmt: skip
    make = jax.jit(model.init)
    return jax.device_get(make(cfg, jax.random.key(1))), lambda seed: make(cfg, jax.random.key(seed))


def test_init_is_deterministic_and_depends_on_the_key(fresh):
    first, make = fresh
    jax.tree.map(np.testing.assert_array_equal, first, make(1))
    assert not (first["embed"]["tokens"] == make(2)["embed"]["tokens"]).any()
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(first))


def test_layers_start_different(fresh):
    kernel = fresh[0]["blocks"]["attn"]["q"]["kernel"]
    assert not (kernel[0] == kernel[1]).any()


def test_initial_spread_is_that_of_gpt2(fresh):
    """Radford et al. 2019, section 2.3: 0.02, and 0.02 / sqrt(2 L) for what writes to the residual stream."""
    params, _ = fresh
    block = params["blocks"]
    for kernel in (params["embed"]["tokens"], block["attn"]["q"]["kernel"], block["mlp"]["up"]["kernel"]):
        assert np.std(kernel) == pytest.approx(0.02, rel=0.06)
    for kernel in (block["attn"]["o"]["kernel"], block["mlp"]["down"]["kernel"]):
        assert np.std(kernel) == pytest.approx(0.01, rel=0.06)  # L = 2
    assert (block["norm1"]["scale"] == 1).all()
    for bias in (block["attn"]["q"]["bias"], block["mlp"]["up"]["bias"], params["final_norm"]["bias"]):
        assert (bias == 0).all()
    assert (params["head"]["kernel"] == 0).all()


def test_fan_in_and_zero_starts():
    cfg = preset("nano", n_layers=8)
    key = jax.random.key(0)
    assert np.std(matrix_init(cfg, 400)(key, (64, 64))) == pytest.approx(1 / 20, rel=0.06)
    assert (matrix_init(cfg, 400, output=True)(key, (64, 64)) == 0).all()
    cfg = cfg.replace(zero_init_out=False)
    assert np.std(matrix_init(cfg, 400, output=True)(key, (64, 64))) == pytest.approx(1 / 80, rel=0.06)


def test_keys_may_start_as_the_queries(fresh):
    assert (fresh[0]["blocks"]["attn"]["q"]["kernel"] != fresh[0]["blocks"]["attn"]["k"]["kernel"]).any()
    cfg = preset("nano", vocab_size=8, n_layers=2, d_model=16, n_heads=2)
    assert cfg.tie_qk_init
    attn = model.init(cfg, jax.random.key(0))["blocks"]["attn"]
    np.testing.assert_array_equal(attn["q"]["kernel"], attn["k"]["kernel"])
    assert (attn["q"]["kernel"] != attn["v"]["kernel"]).any()
