"""GGUF files written here with the `gguf` package, by the names and the permutation of llama.cpp's converter."""

from __future__ import annotations

import pickle
import runpy
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm.config import ModelConfig
from jaxlm.errors import InputError
from jaxlm.interop.gguf import load_gguf, read_config
from jaxlm.model.weights import path_of
from jaxlm.tokenizers.bpe import TO_PRINTABLE

QUICK_COMPILE = True
gguf = pytest.importorskip("gguf", reason="reads GGUF files; install the extra: pip install -e '.[gguf]'")

# The helpers beside this file: as tests are imported, they cannot be.
_HELPERS = runpy.run_path(str(Path(__file__).with_name("gguf_files.py")))
CASES, divisors, filled, tensors_of, write = map(_HELPERS.get, ("CASES", "divisors", "filled", "tensors_of", "write"))


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[str, ModelConfig, Any]:
    architecture, cfg = CASES[request.param]
    return architecture, cfg, filled(cfg)


def same(params: Any, expected: Any) -> None:
    ours, theirs = (
        {path_of(key): np.asarray(leaf) for key, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
        for tree in (params, expected)
    )
    assert ours.keys() == theirs.keys()
    for path in ours:
        np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)


def test_every_tensor_comes_to_its_place(case: tuple[str, ModelConfig, Any], tmp_path: Path) -> None:
    architecture, cfg, params = case
    path = write(tmp_path / "x.gguf", architecture, cfg, tensors_of(architecture, cfg, params))
    loaded = load_gguf(path)
    assert read_config(path) == loaded.cfg
    expected = cfg if architecture != "gpt2" else cfg.replace(n_kv_heads=4)
    assert loaded.cfg == expected.replace(tie_embeddings=cfg.tie_embeddings)
    assert loaded.tokenizer is None
    same(loaded.params, params)
    half = load_gguf(path, dtype="bfloat16").params
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half)} == {"bfloat16"}
    if cfg.rope_scaling is not None:  # some of each: kept, blended, stretched
        assert {1.0, 8.0} < set(divisors(cfg).tolist())


def test_each_tensor_is_dequantized_by_its_own_type(tmp_path: Path) -> None:
    cfg = CASES["llama"][1]
    tensors = tensors_of("llama", cfg, filled(cfg))
    kinds = gguf.GGMLQuantizationType
    mixed = {"ffn_up": kinds.Q4_1, "ffn_down": kinds.Q8_0, "ffn_gate": kinds.F16, "attn_v": kinds.BF16}

    def kind(name: str, array: np.ndarray) -> Any:
        return next((kind for part, kind in mixed.items() if part in name), None)

    loaded = load_gguf(write(tmp_path / "x.gguf", "llama", cfg, tensors, types=kind))
    up = np.asarray(loaded.params["blocks"]["mlp"]["up"]["kernel"][1])
    # Q4_1 by hand (notes of llama.cpp's ggml-quants): 20 bytes for 32 weights, float16 scale and minimum, then 16 bytes
    # of nibbles, the low halves first; w = scale q + minimum.
    raw = np.asarray(gguf.quantize(tensors["blk.1.ffn_up.weight"], kinds.Q4_1)).reshape(-1, 20)
    scale, least = (raw[:, at : at + 2].copy().view(np.float16).astype(np.float32) for at in (0, 2))
    nibbles = np.concatenate([raw[:, 4:] & 15, raw[:, 4:] >> 4], axis=1).astype(np.float32)
    np.testing.assert_allclose(up, (scale * nibbles + least).reshape(cfg.ff, cfg.d_model).T, rtol=1e-6)
    gate = np.asarray(loaded.params["blocks"]["mlp"]["gate"]["kernel"][0])
    np.testing.assert_array_equal(gate, tensors["blk.0.ffn_gate.weight"].astype(np.float16).astype(np.float32).T)
    value = np.asarray(loaded.params["blocks"]["attn"]["v"]["kernel"][0])
    np.testing.assert_allclose(value, tensors["blk.0.attn_v.weight"].T, rtol=2**-8)


def without(name: str) -> Callable[[dict[str, np.ndarray]], Any]:
    return lambda tensors: tensors.pop(name)


def put(name: str, array: np.ndarray) -> Callable[[dict[str, np.ndarray]], Any]:
    return lambda tensors: tensors.update({name: array})


NAN = np.full((32, 64), np.nan, np.float32)


@pytest.mark.parametrize(
    ("change", "fields", "words"),
    [
        (without("blk.1.ffn_up.weight"), {}, "tensor blk.1.ffn_up.weight: missing"),
        (without("token_embd.weight"), {}, "tensor token_embd.weight: missing"),
        (put("blk.1.attn_v.weight", NAN), {}, "tensor blk.1.attn_v.weight: holds NaN"),
        (
            put("blk.0.attn_v.weight", NAN[:16]),
            {},
            r"tensor blk.0.attn_v.weight: has the shape \(16, 64\), .*\(32, 64\)",
        ),
        (put("output_norm.weight", NAN[0, :7]), {}, r"tensor output_norm.weight: has the shape \(7,\)"),
        (put("blk.0.ffn_gate_exps.weight", NAN), {}, "tensor blk.0.ffn_gate_exps.weight: this architecture has none"),
        (put("blk.2.attn_v.weight", NAN), {}, "tensor blk.2.attn_v.weight: this architecture has none"),
        (put("rope_freqs.weight", np.ones(8, np.float32) * [1, 2, 3, 4, 5, 6, 7, 8]), {}, "rope_freqs.weight: not the"),
        (put("token_embd.weight", NAN.astype(np.float64)), {}, "tensor token_embd.weight: its type F64"),
        (without("none"), {"block_count": None}, "field llama.block_count: missing"),
        (without("none"), {"block_count": 0}, "n_layers"),
        (without("none"), {"block_count": 2**31}, "its metadata ask for 2147483648 blocks, but it has 20 tensors"),
        (without("none"), {"block_count": 3}, "tensor blk.2.attn_norm.weight: missing"),
        (without("none"), {"expert_count": 8}, "field llama.expert_count: mixtures"),
        (without("none"), {"rope.scaling.type": "yarn"}, "field llama.rope.scaling.type: 'yarn'"),
        (without("none"), {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, "rope.scaling.type: 'linear'"),
        (without("none"), {"rope.scaling.type": "llama3"}, "field llama.rope.scaling.type: 'llama3' is not supported"),
        (without("none"), {"rope.scaling.factor": 4.0}, "field llama.rope.scaling.factor: linear scaling"),
        (without("none"), {"rope.scale_linear": 4.0}, "field llama.rope.scale_linear: linear scaling"),
        (
            without("none"),
            {"block_count": float("nan")},
            "field llama.block_count: expected one whole number, found nan",
        ),
        (without("none"), {"rope.dimension_count": 8}, "field llama.rope.dimension_count: 8"),
        (
            without("none"),
            {"context_length": "long"},
            "field llama.context_length: expected one whole number, found 'long'",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, change: Callable[[dict[str, np.ndarray]], Any], fields: dict[str, Any], words: str
) -> None:
    cfg = CASES["llama"][1]
    tensors = {"none": NAN} | tensors_of("llama", cfg, filled(cfg))
    change(tensors)
    tensors.pop("none", None)
    path = write(tmp_path / "x.gguf", "llama", cfg, tensors, fields=fields)
    with pytest.raises(InputError, match=words) as caught:
        load_gguf(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_types_that_parameters_may_have(tmp_path: Path) -> None:
    cfg = CASES["llama"][1]
    tensors = tensors_of("llama", cfg, filled(cfg))
    tensors["output_norm.weight"] = np.full(64, 1e6, np.float32)
    path = write(tmp_path / "x.gguf", "llama", cfg, tensors)
    for dtype in ("int8", bool, np.float64, "half a float"):
        with pytest.raises(InputError, match="dtype: parameters are float32, bfloat16, float16, found"):
            load_gguf(path, dtype=dtype)
    with pytest.raises(InputError, match=r"tensor output_norm.weight: has numbers beyond float16; load it as float32"):
        load_gguf(path, dtype="float16")


def test_an_architecture_that_is_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.gguf", "llama", CASES["llama"][1], {})
    monkeypatch.setattr(gguf.ReaderField, "contents", lambda self: ["llama"])
    with pytest.raises(InputError, match=r"general.architecture: \['llama'\] is not supported"):
        read_config(path)


def test_an_unknown_architecture(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", "mamba", CASES["llama"][1], {})
    with pytest.raises(InputError, match=r"general.architecture: 'mamba' is not supported; supported are llama, qwen2"):
        load_gguf(path)


def test_a_sliding_window_is_the_context(tmp_path: Path) -> None:
    _, cfg = CASES["llama"]
    tensors = tensors_of("llama", cfg, filled(cfg))
    path = write(tmp_path / "x.gguf", "llama", cfg, tensors, fields={"attention.sliding_window": 8})
    assert load_gguf(path).cfg.max_seq_len == 8


def test_damaged_files(tmp_path: Path) -> None:
    cfg = CASES["llama"][1].replace(vocab_size=256)
    tensors, tokens = tensors_of("llama", cfg, filled(cfg)), list(TO_PRINTABLE.values())
    path = write(tmp_path / "x.gguf", "llama", cfg, tensors, tokens=[*tokens[:-1], 2 * tokens[0]])
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(
        InputError, match=r"x.gguf: tensor blk.1.ffn_down.weight: is truncated|x.gguf: tensor .* truncated"
    ):
        load_gguf(path)
    rng = np.random.default_rng(0)
    header = whole.index(b"blk.1")
    for cut in [0, 3, 10, 23, 24, 30, *rng.integers(31, header, 20).tolist()]:
        path.write_bytes(whole[:cut])
        with pytest.raises(InputError) as caught:
            load_gguf(path)
        assert str(path) in str(caught.value)
    for at in rng.integers(0, header, 40).tolist():  # a flipped byte is an InputError, or harmless
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        with suppress(InputError):
            load_gguf(path)
    with pytest.raises(InputError, match="no such file"):
        load_gguf(tmp_path / "none.gguf")


def test_a_type_that_nobody_knows(tmp_path: Path) -> None:
    cfg = CASES["llama"][1]
    path = write(tmp_path / "x.gguf", "llama", cfg, tensors_of("llama", cfg, filled(cfg)))
    raw = bytearray(path.read_bytes())
    # The GGUF specification, tensor info: the name, a uint32 number of dimensions, uint64 each, a uint32 type.
    name = b"blk.0.ffn_up.weight"
    at = raw.index(name) + len(name) + 4 + 2 * 8
    assert raw[at : at + 4] == bytes(4)  # F32 is 0
    raw[at : at + 4] = (99).to_bytes(4, "little")
    path.write_bytes(raw)
    with pytest.raises(InputError, match=r"x\.gguf: tensor blk\.0\.ffn_up\.weight: its type 99 is not known"):
        load_gguf(path)


def test_what_is_no_gguf(tmp_path: Path) -> None:
    cfg = CASES["llama"][1]
    path = write(tmp_path / "x.gguf", "llama", cfg, tensors_of("llama", cfg, filled(cfg)))
    whole = path.read_bytes()
    sprung = tmp_path / "sprung"
    trap = pickle.dumps(Trap(sprung))
    for content in (
        b"GGML" + whole[4:],
        trap + bytes(100),
        b"PK\x03\x04" + bytes(100),
        b"version https://git-lfs\n" * 4,
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"x\.gguf: not a GGUF file that can be read .*magic"):
            load_gguf(path)
    assert not sprung.exists()
    path.write_bytes(whole.replace(b"general.architecture", b"general.architectura"))
    with pytest.raises(InputError, match=r"x\.gguf: field general\.architecture: None is not supported"):
        load_gguf(path)


class Trap:
    """A pickle that leaves a file behind when somebody opens it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_tokenizer_larger_than_the_embedding(tmp_path: Path) -> None:
    cfg = CASES["llama"][1]
    tokens = [*TO_PRINTABLE.values(), 2 * next(iter(TO_PRINTABLE.values()))]
    path = write(tmp_path / "x.gguf", "llama", cfg, tensors_of("llama", cfg, filled(cfg)), tokens=tokens)
    with pytest.raises(
        InputError, match=r"x\.gguf: the tokenizer has 257 tokens, but tensor token_embd\.weight only 64"
    ):
        load_gguf(path)


def test_the_package_is_named_when_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"pip install 'jaxlm\[gguf\]'"):
        load_gguf(tmp_path / "x.gguf")
