"""Damaged and foreign files: one sentence that names the file and the tensor, before anything else happens."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxlm import tokenizers
from jaxlm.errors import InputError
from jaxlm.interop import load_hf
from jaxlm.loading import load_model

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00002.safetensors"


def refused(directory: Path | str, *words: str, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        load_hf(directory, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    for word in words:
        assert word in text, text
    return text


def edit_header(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Replaces the header by what `change` makes of it (in place, or by returning text); the data stays."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    text = change(header)
    text = text if isinstance(text, str) else json.dumps(header)
    file.write_bytes(struct.pack("<Q", len(text)) + text.encode() + raw[8 + length :])


@pytest.fixture
def model(stored: Callable[..., Path]) -> Path:
    """A sound model of one file."""
    return stored("qwen3")


def by_offset(header: dict[str, Any]) -> list[str]:
    return sorted((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])


def test_a_file_that_is_cut_off_names_the_first_tensor_that_is_not_whole(model):
    file = model / FILE
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    last = by_offset(header)[-1]
    middle = by_offset(header)[9]
    for cut, tensor in ((len(raw) - 1, last), (8 + length + header[middle]["data_offsets"][0] + 1, middle)):
        file.write_bytes(raw[:cut])
        refused(model, f"{file}: tensor {tensor}: the file is cut off", f"{cut:,} bytes where {len(raw):,}")
    for cut in (0, 5, 8, 100):
        file.write_bytes(raw[:cut])
        refused(model, f"{file}: the file is cut off")


def test_tensors_that_overlap_or_leave_gaps(model):
    file = model / FILE
    raw = file.read_bytes()

    def shift(by: int) -> Callable[[dict[str, Any]], str]:
        def change(header: dict[str, Any]) -> str:
            names.extend(by_offset(header)[3:5])
            for name in by_offset(header)[4:]:
                header[name]["data_offsets"] = [x + by for x in header[name]["data_offsets"]]
            return json.dumps(header)

        return change

    names: list[str] = []
    edit_header(file, shift(-4))
    refused(model, f"{file}: tensor {names[1]} overlaps {names[0]}")
    file.write_bytes(raw)
    edit_header(file, shift(4))
    refused(model, f"{file}: bytes before tensor {names[1]} belong to no tensor")
    file.write_bytes(raw + b"\0\0\0")
    refused(model, f"{file}: 3 bytes after the last tensor")


NORM = "model.norm.weight"
HEADERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no JSON": (lambda h: "{not json", "the header is not JSON"),
    "a list": (lambda h: "[]", "the header lists no tensors"),
    "twice": (lambda h: f'{json.dumps(h)[:-1]}, "{NORM}": {{}}}}', f"tensor {NORM} is there twice"),
    "shape": (lambda h: h[NORM].update(shape=[23]), f"tensor {NORM}: 96 bytes do not hold F32 of shape [23]"),
    "type": (lambda h: h[NORM].update(dtype="Q4"), f"tensor {NORM}: type 'Q4' is not supported"),
    "negative": (lambda h: h[NORM].update(data_offsets=[-96, 0]), f"tensor {NORM}: its entry in the header"),
    "text": (lambda h: h[NORM].update(shape="24"), f"tensor {NORM}: its entry in the header"),
    "type list": (lambda h: h[NORM].update(dtype=["F32"]), f"tensor {NORM}: its entry in the header"),
    "nothing": (lambda h: h.update({NORM: None}), f"tensor {NORM}: its entry in the header is None"),
    "huge": (lambda h: h[NORM].update(shape=[2**70]), f"tensor {NORM}: 96 bytes do not hold"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_make_no_sense(name, model):
    change, message = HEADERS[name]
    edit_header(model / FILE, change)
    refused(model, f"{model / FILE}: ", message)


def test_missing_extra_and_misshapen_tensors(stored):
    k = "model.layers.1.self_attn.k_proj.weight"
    model = stored("qwen3", without=[k])
    refused(model, f"{model / FILE}: tensor {k} is missing.")
    model = stored("qwen3", without=[k, NORM])
    refused(model, f"tensor {k} is missing (and 1 more).")
    model = stored("qwen3", tensors={"score.weight": np.ones((2, 24), np.float32)})
    refused(model, f"{model / FILE}: tensor score.weight has no place in a qwen3 model")
    model = stored("qwen3", tensors={k: np.ones((24, 20), np.float32)})
    refused(model, f"{model / FILE}: tensor {k} has shape [24, 20]", "asks for [20, 24]")
    model = stored("qwen3", config={"tie_word_embeddings": False})
    refused(model, "tensor lm_head.weight is missing")
    model = stored("qwen3", tensors={"lm_head.weight": np.ones((61, 24), np.float32)})
    refused(model, "tensor lm_head.weight differs from model.embed_tokens.weight", "tie_word_embeddings")


@pytest.mark.parametrize("kind", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(kind, value, stored):
    weight = np.full((40, 24), 0.5, kind)
    weight[39, 23] = value
    name = "model.layers.1.mlp.up_proj.weight"
    model = stored("qwen3", tensors={name: weight})
    refused(model, f"{model / FILE}: tensor {name} holds NaN or infinite numbers")


def test_types_that_do_not_fit(stored):
    model = stored("qwen3", tensors={NORM: np.ones(24, np.int8)})
    refused(model, f"{model / FILE}: tensor {NORM} holds int8; quantized weights are not supported")
    for kind in (np.float32, ml_dtypes.bfloat16):
        model = stored("qwen3", tensors={NORM: np.full(24, 1e6, kind)})
        refused(model, f"{model / FILE}: tensor {NORM} has numbers beyond float16", dtype="float16")
    for dtype in ("int8", "float8", np.float64, "half a float"):
        refused(model, "dtype: parameters are float32, bfloat16, float16, found", dtype=dtype)


def test_an_index_that_does_not_fit_its_shards(stored, tensors_of):
    model = stored("qwen3", shards=2)
    load_hf(model)
    index = json.loads((model / INDEX).read_text())
    first = next(name for name, shard in index["weight_map"].items() if shard == SHARD)
    (model / SHARD).rename(model / "kept")
    refused(model, f"{model / INDEX}: shard {SHARD}, which holds tensor {first}, is missing")
    (model / SHARD).write_bytes((model / "kept").read_bytes()[:-1])
    refused(model, f"{model / SHARD}: tensor ", "cut off")
    (model / "kept").rename(model / SHARD)

    def with_map(weight_map: Any) -> Path:
        (model / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        return model

    swapped = index["weight_map"] | {first: "model-00001-of-00002.safetensors"}
    refused(with_map(swapped), f"model-00001-of-00002.safetensors: tensor {first} is missing, but {INDEX} says")
    outside = index["weight_map"] | {first: "../model.safetensors"}
    refused(with_map(outside), f"tensor {first}: shard '../model.safetensors' is not a file of this directory")
    for shard in ("", "..", "folder"):
        (model / "folder").mkdir(exist_ok=True)
        refused(with_map(index["weight_map"] | {first: shard}), f"tensor {first}" if shard != "folder" else "missing")
    # What the index does not list counts all the same, where it is.
    load_hf(with_map({name: shard for name, shard in index["weight_map"].items() if name != first}))
    save_file({"score.weight": np.ones(2, np.float32), **load_file(model / SHARD)}, model / SHARD)
    refused(with_map(index["weight_map"]), f"{model / SHARD}: tensor score.weight has no place in a qwen3 model")
    refused(with_map(["a"]), f"{model / INDEX}: field weight_map: expected")
    (model / INDEX).write_text("{")
    refused(model, f"{model / INDEX}: not readable as JSON")


class Trap:
    """A pickle that leaves a file behind when somebody opens it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_pickles_are_never_opened(model, tmp_path):
    sprung = tmp_path / "sprung"
    trap = pickle.dumps(Trap(sprung))
    (model / FILE).write_bytes(trap)
    refused(model, f"{model / FILE}: this is a pickle", "never opened")
    with zipfile.ZipFile(model / FILE, "w") as archive:  # the form of torch.save
        archive.writestr("archive/data.pkl", trap)
    refused(model, f"{model / FILE}: this is a zip archive as torch.save writes it", "never opened")
    (model / FILE).unlink()
    for name in ("pytorch_model.bin", "consolidated.00.pth", "model.pt"):
        (model / name).write_bytes(trap)
        refused(model, f"{model}: there is {name} where {FILE} was expected", "never opened")
        refused(model / name, f"{model / name}: ", "never opened")
        (model / name).unlink()
    assert not sprung.exists()
    pickle.loads(trap)
    assert sprung.exists()  # so the trap works


def test_a_shard_that_is_a_pickle_is_not_opened(stored, tmp_path):
    model, sprung = stored("qwen3", shards=2), tmp_path / "sprung"
    (model / SHARD).write_bytes(pickle.dumps(Trap(sprung)))
    refused(model, f"{model / SHARD}: this is a pickle", "never opened")
    assert not sprung.exists()


def test_files_that_are_something_else(model):
    (model / FILE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(model, f"{model / FILE}: this is a Git LFS pointer")
    (model / FILE).rename(model / "other.safetensors")
    refused(model, f"{model}: there is neither {FILE} nor {INDEX}, only other.safetensors")
    (model / "other.safetensors").rename(model / "model.gguf")
    refused(model / "model.gguf", "load_gguf")
    refused(model / "config.json", f"give the directory that holds it and its config.json: {model}.")


def test_a_config_that_is_not_one(model):
    config = model / "config.json"
    for text, message in (("{", "not readable as JSON"), ("[]", "expected a JSON object, found list")):
        config.write_text(text)
        refused(model, f"{config}: {message}")
    config.write_text(json.dumps({"model_type": "mamba2"}))
    refused(model, f"{config}: field model_type: 'mamba2' is not supported")
    config.unlink()
    refused(model, f"{config}: no such file; take the one that belongs to the weights.")


def test_a_rotary_type_that_is_not_known(stored):
    model = stored("qwen3", config={"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}})
    refused(model, f"{model / 'config.json'}: rope_parameters: rotary type 'yarn' is not supported")


def test_a_tokenizer_larger_than_the_embedding(model):
    tokenizers.char([chr(i) for i in range(0x4E00, 0x4E00 + 62)]).save(model)
    refused(model, f"{model}: the tokenizer has 62 entries, but tensor model.embed_tokens.weight has rows for 61")


def test_places_that_are_no_model(tmp_path):
    refused(tmp_path / "no" / "such", f"{tmp_path / 'no' / 'such'}: there is no such directory")
    refused(tmp_path, "revision: ", "is a directory and has none", revision="main")
    refused(tmp_path, f"{tmp_path / 'config.json'}: no such file")
    for wrong in (None, [tmp_path], ""):
        refused(wrong, "dir_or_repo_id: expected a directory or owner/name, found")
    refused("owner/model", "revision: expected a commit, tag or branch, found 5", revision=5)
    assert len(refused("a" * 5000, "aaa: there is no such directory")) < 400
    with pytest.raises(InputError, match=r"name: aaa.* is too long"):
        load_model("a" * 5000)
