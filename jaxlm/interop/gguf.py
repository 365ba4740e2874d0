"""GGUF files in: one file that holds a model's shape, its weights, quantized or not, and its tokenizer.

The `gguf` package reads the file and dequantizes each tensor by its own type. Here is what the names and the metadata
mean, and the way of each tensor, a few rows at a time, from the file to its place in the stacked parameters.

References:
    The GGUF specification (ggml, docs/gguf.md); llama.cpp, convert_hf_to_gguf.py (names, llama's permuted q and k).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxlm import model
from jaxlm.config import ModelConfig, RopeScaling, validated
from jaxlm.errors import InputError
from jaxlm.interop.hf import Loaded
from jaxlm.interop.placing import finite, parameter_type
from jaxlm.model.positions import rotary_frequencies
from jaxlm.model.weights import path_of
from jaxlm.tokenizers.gguf_vocab import from_gguf

ROWS = 4096  # of a tensor dequantized at a time: a few megabytes, whatever the size of the vocabulary


# GGUF's name -> our path. Matrices are [outputs, inputs] in the file, and kernels [inputs, outputs] here.
_ENDS = {
    "token_embd.weight": "embed/tokens",
    "position_embd.weight": "embed/positions",
    "output_norm.weight": "final_norm/scale",
    "output_norm.bias": "final_norm/bias",
    "output.weight": "head/kernel",
}
_IN_BLOCK = {
    "attn_norm": "norm1", "attn_q": "attn/q", "attn_k": "attn/k", "attn_v": "attn/v", "attn_output": "attn/o",
    "attn_q_norm": "attn/q_norm", "attn_k_norm": "attn/k_norm", "ffn_norm": "norm2", "ffn_up": "mlp/up",
    "ffn_gate": "mlp/gate", "ffn_down": "mlp/down",
}  # fmt: skip
_FUSED = ("attn/q", "attn/k", "attn/v")  # gpt2's attn_qkv: their outputs one after another
_IGNORED = ("rope_freqs.weight",)  # read by `_rope_scaling`

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": dict(norm="rms", position="rotary", mlp="swiglu"),
    "qwen2": dict(norm="rms", position="rotary", mlp="swiglu"),
    "qwen3": dict(norm="rms", position="rotary", mlp="swiglu"),
    "gpt2": dict(norm="layer", norm_bias=True, position="learned", mlp="gelu_tanh"),
}


def load_gguf(path: str | Path, *, dtype: DTypeLike | None = None) -> Loaded:
    """Reads a model from a GGUF file (architectures llama, qwen2, qwen3 and gpt2).

    Args:
        path: the file.
        dtype: of the parameters: float32 (the default, which holds every dequantized value as it is), bfloat16 or
            float16.

    Returns:
        cfg, params and tokenizer; the tokenizer has the file's chat template and stop ids, and is None when the file
        holds none.

    Raises:
        InputError: the `gguf` package is missing; the file is not a whole GGUF; its architecture, rotary type or
            tokenizer is not known here; a tensor is missing, misshapen, superfluous, of an unknown type or not finite.
    """
    path, kind = Path(path), parameter_type(dtype)
    reader, metadata = _open(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    cfg = _config(path, metadata, tensors)
    if cfg.n_layers > len(tensors):  # before there is a name for each
        raise InputError(f"{path}: its metadata ask for {cfg.n_layers} blocks, but it has {len(tensors)} tensors.")
    permuted = metadata["general.architecture"] == "llama"
    tokenizer = from_gguf(metadata, str(path))
    if tokenizer is not None and tokenizer.vocab_size > cfg.vocab_size:
        raise InputError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, but tensor token_embd.weight only "
            f"{cfg.vocab_size} rows; the file was put together from two models."
        )
    abstract = jax.eval_shape(lambda: model.init(cfg, jax.random.key(0)))
    shapes = {path_of(key): leaf.shape for key, leaf in jax.tree_util.tree_flatten_with_path(abstract)[0]}
    names = {place: parts for place, parts in _names(cfg, metadata["general.architecture"]) if place in shapes}
    assert names.keys() == shapes.keys(), f"no GGUF name for {shapes.keys() - names.keys()}"
    wanted = {name for parts in names.values() for name, _ in parts}
    for name in tensors:
        if name not in wanted and name not in _IGNORED:
            raise InputError(f"{path}: tensor {name}: this architecture has none of that name, so it is not supported.")

    params: model.Params = {}
    for place, parts in names.items():
        shape = shapes[place][1:] if place.startswith("blocks/") else shapes[place]
        for name, share in parts:  # before there is memory of that size
            _check(path, tensors.get(name), name, shape[::-1] if place.endswith("kernel") else shape, share)
        whole = np.empty(shapes[place], kind)
        order = _unpermuted(cfg, place) if permuted else None
        for i, (name, share) in enumerate(parts):
            out = whole[i] if place.startswith("blocks/") else whole
            _read_into(path, tensors[name], out.T if place.endswith("kernel") else out, share, order)
        *parents, leaf = place.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = jnp.asarray(whole)  # now, so that no second copy of the whole model ever is
    return Loaded(cfg, params, tokenizer)


def read_config(path: str | Path) -> ModelConfig:
    """The shape of the model in a GGUF file, from its header alone.

    Raises:
        InputError: as `load_gguf`, for what the header says.
    """
    path = Path(path)
    reader, metadata = _open(path)
    return _config(path, metadata, {tensor.name: tensor for tensor in reader.tensors})


def _check(path: Path, tensor: Any, name: str, shape: tuple[int, ...], share: slice) -> None:
    """Refuses a tensor that is missing, or of which this share does not have this shape."""
    if tensor is None:
        raise InputError(f"{path}: tensor {name}: missing; the file is not whole or not of this architecture.")
    found = tuple(int(n) for n in reversed(tensor.shape))
    expected = (shape[0] if share.stop is None else len(_FUSED) * shape[0], *shape[1:])
    if found != expected:
        raise InputError(f"{path}: tensor {name}: has the shape {found}, but the file's metadata ask for {expected}.")


def _read_into(path: Path, tensor: Any, out: np.ndarray, share: slice, order: np.ndarray | None) -> None:
    """Dequantizes a share of a tensor's rows [outputs, inputs] (or its elements) into `out`, some rows at a time.

    Args:
        path: the file, for errors.
        tensor: the reader's.
        out: [rows, columns] or [rows], possibly a transposed view.
        share: which of the tensor's rows.
        order: int[rows], the place in `out` of each row; None: their own.
    """
    import gguf

    where = f"{path}: tensor {tensor.name}"
    data = tensor.data if out.ndim == 2 else tensor.data[None]  # the package dequantizes rows
    first, n = share.start or 0, out.shape[0]
    for start in range(0, n if out.ndim == 2 else 1, ROWS):
        chosen = slice(first + start, min(first + start + ROWS, first + n)) if out.ndim == 2 else slice(None)
        try:
            part = gguf.dequantize(data[chosen], tensor.tensor_type)
        except NotImplementedError:
            raise InputError(f"{where}: its type {tensor.tensor_type.name} is not supported.") from None
        if not finite(part):
            raise InputError(f"{where}: holds NaN or infinite values; the file is damaged, so download it again.")
        if out.ndim == 1:
            part, places = part[0][first : first + n], slice(0, n)
        else:
            places = slice(start, start + len(part))
        with np.errstate(over="ignore"):  # found by the check that follows
            part = part.astype(out.dtype, copy=False)
        if part.dtype != np.float32 and not finite(part):
            raise InputError(f"{where}: has numbers beyond {out.dtype}; load it as float32.")
        out[places if order is None else order[places]] = part


def _unpermuted(cfg: ModelConfig, place: str) -> np.ndarray | None:
    """Where the rows of llama's q and k belong: the converter put the two halves of each head's pairs side by side.

    The file's row (head, pair, half) is row (head, half, pair) of a rotary embedding in the rotate-half form.
    """
    heads = {"blocks/attn/q": cfg.n_heads, "blocks/attn/k": cfg.kv_heads}.get(place.rpartition("/")[0])
    if heads is None:
        return None
    return np.arange(heads * cfg.d_head).reshape(heads, 2, cfg.d_head // 2).swapaxes(1, 2).ravel()


def _open(path: Path) -> tuple[Any, dict[str, Any]]:
    """The package's reader, and the metadata as Python values."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; give the path of a .gguf file.")
    try:
        import gguf
    except ImportError:
        raise InputError(f"{path}: GGUF files need the gguf package; pip install 'jaxlm[gguf]'.") from None

    class Reader(gguf.GGUFReader):
        """With bounds checked: a slice beyond the end of the file is silently shorter, and its values wrong."""

        def _get(self, offset: int, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
            dtype = np.dtype(dtype)
            end = int(offset) + dtype.itemsize * int(count)
            if not hasattr(self, "_raw"):
                self._raw = np.asarray(self.data)  # a plain array: cutting a memmap is slow
            raw = self._raw
            if end > raw.size:
                raise InputError(
                    f"{path}: is truncated: its header runs on to byte {end} and the file ends at {raw.size}; "
                    "download it again."
                )
            order = self.byte_order if override_order is None else override_order
            return raw[int(offset) : end].view(dtype.newbyteorder(order))

        def _build_tensors(self, start_offs: int, fields: Any) -> None:
            for field in fields:
                dims, kind, offset = (field.parts[i] for i in (3, 4, 5))
                try:
                    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(int(kind[0]))]
                except (ValueError, KeyError):
                    raise InputError(f"{path}: tensor {field.name}: its type {kind[0]} is not known.") from None
                end = start_offs + int(offset[0]) + math.prod(map(int, dims)) * size // block
                if end > self.data.size:
                    raise InputError(
                        f"{path}: tensor {field.name}: is truncated: it ends at byte {end} and the file at "
                        f"{self.data.size}; download it again."
                    )
            super()._build_tensors(start_offs, fields)

    try:
        reader = Reader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, LookupError, OverflowError, TypeError, UnicodeError, OSError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a GGUF file that can be read ({error}); download it again.") from None
    return reader, metadata


def _config(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> ModelConfig:
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise InputError(f"{path}: field general.architecture: {name!r} is not supported; supported are {known}.")

    def value(key: str, default: Any = None, kind: type = int) -> Any:
        found = metadata.get(f"{name}.{key}", default)
        if found is None:
            raise InputError(f"{path}: field {name}.{key}: missing; the file was not made for this architecture.")
        sound = isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found)
        if not sound or (kind is int and found != int(found)):
            what = "one number" if kind is float else "one whole number"
            raise InputError(f"{path}: field {name}.{key}: expected {what}, found {found!r:.60}.")
        # Numbers are float32 in the file: 1e-5 comes back as 9.999999747378752e-06.
        return float(f"{found:.7g}") if kind is float else int(found)

    if value("expert_count", 0):
        raise InputError(f"{path}: field {name}.expert_count: mixtures of experts are not supported.")
    scaling = metadata.get(f"{name}.rope.scaling.type")
    if scaling not in (None, "none") and not (scaling == "llama3" and "rope_freqs.weight" in tensors):
        raise InputError(f"{path}: field {name}.rope.scaling.type: {scaling!r} is not supported.")
    for key in ("rope.scaling.factor", "rope.scale_linear"):  # with no type, llama.cpp divides positions by them
        if scaling is None and value(key, 0.0, float) not in (0, 1):
            raise InputError(f"{path}: field {name}.{key}: linear scaling of positions is not supported.")
    if "token_embd.weight" not in tensors:
        raise InputError(f"{path}: tensor token_embd.weight: missing.")
    fields: dict[str, Any] = dict(
        ARCHITECTURES[name],
        vocab_size=int(tensors["token_embd.weight"].shape[-1]),
        n_layers=value("block_count"),
        d_model=value("embedding_length"),
        n_heads=value("attention.head_count"),
        n_kv_heads=value("attention.head_count_kv", value("attention.head_count")),
        d_ff=value("feed_forward_length"),
        max_seq_len=value("context_length"),
        norm_eps=value(f"attention.layer_norm{'_rms' if name != 'gpt2' else ''}_epsilon", kind=float),
        tie_embeddings="output.weight" not in tensors,
        attn_bias=f"blk.0.attn_{'qkv' if name == 'gpt2' else 'q'}.bias" in tensors,
        attn_out_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
    )
    window = value("attention.sliding_window", 0)
    if window:  # within the window the model is the same as one without
        fields["max_seq_len"] = min(fields["max_seq_len"], window)
    if fields["position"] == "rotary":
        h = value("attention.key_length", fields["d_model"] // max(fields["n_heads"], 1))
        fields |= dict(head_dim=h, rope_theta=value("rope.freq_base", 10000.0, kind=float))
        for key in ("rope.dimension_count", "attention.value_length"):
            if value(key, h) != h:
                raise InputError(f"{path}: field {name}.{key}: {value(key)}, but only the head dim {h} is supported.")
        if "rope_freqs.weight" in tensors:
            fields["rope_scaling"] = _rope_scaling(path, validated(ModelConfig, fields, where=str(path)), tensors)
    return validated(ModelConfig, fields, where=str(path))


def _rope_scaling(path: Path, cfg: ModelConfig, tensors: Mapping[str, Any]) -> RopeScaling:
    """The llama3 settings whose divisors of the rotary frequencies the file holds as a tensor, float32[h/2]."""
    divisors = np.asarray(tensors["rope_freqs.weight"].data, np.float32).ravel()
    scaling = RopeScaling(factor=float(max(1.0, divisors.max(initial=1.0))))
    ours = rotary_frequencies(cfg) / rotary_frequencies(cfg.replace(rope_scaling=scaling))
    if ours.shape != divisors.shape or not np.allclose(ours, divisors, rtol=1e-3):
        raise InputError(
            f"{path}: tensor rope_freqs.weight: not the llama3 scaling by {scaling.factor:g} of a context of "
            f"{scaling.original_max_len}, which is the one that is supported."
        )
    return scaling


def _names(cfg: ModelConfig, architecture: str) -> Iterator[tuple[str, list[tuple[str, slice]]]]:
    """For every parameter that a model may have: the tensor of each layer (or of all), and which of its rows."""
    everything = slice(None)
    for name, place in _ENDS.items():
        yield place, [(name, everything)]
    for name, place in _IN_BLOCK.items():
        for ending, leaf in (("weight", "scale" if "norm" in name else "kernel"), ("bias", "bias")):
            share, stem = everything, name
            if architecture == "gpt2" and place in _FUSED:
                first = _FUSED.index(place) * cfg.d_model
                share, stem = slice(first, first + cfg.d_model), "attn_qkv"
            yield f"blocks/{place}/{leaf}", [(f"blk.{i}.{stem}.{ending}", share) for i in range(cfg.n_layers)]
