"""Models of every family from files: the numbers that transformers gets, stored by make_expected.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxlm
from jaxlm import model, tokenizers
from jaxlm.interop import load_hf

QUICK_COMPILE = True
HERE = Path(__file__).parent
CASES = list(json.loads((HERE / "expected_hf.json").read_text()))
# Each compiles for a second or more, and these add no trait of their own to what the others have together.
_RARE = ("gpt2", "llama", "llama biases bfloat16", "qwen2", "qwen3")


def same_bits(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case in _RARE else ()) for case in CASES]
)
def test_logits_and_greedy_tokens_are_those_of_transformers(case, expected, stored, maker):
    about = expected[case]
    cfg, params, tokenizer = load_hf(stored(case))
    assert tokenizer is None
    assert jax.tree.structure(params) == jax.tree.structure(jax.eval_shape(lambda: model.init(cfg, jax.random.key(0))))
    prompt, greedy = maker.prompt(), about["greedy"]
    fed = np.concatenate([prompt, [greedy[:-1]]], axis=1).astype(np.int32)
    logits = np.asarray(jax.jit(jaxlm.apply)(cfg, params, fed))
    start = prompt.shape[1]
    wanted = about["logits"]
    assert wanted.shape == (1, start, cfg.vocab_size)
    assert np.abs(logits[:, :start] - wanted).max() <= 1e-4 * np.abs(wanted).max()
    # Fed with its own tokens: each is the most likely one, so decoding greedily gives the same.
    assert logits[0, start - 1 :].argmax(-1).tolist() == greedy


def test_cases_are_those_of_the_script(maker):
    assert list(maker.CASES) == CASES, "run tests/interop/make_expected.py"


@pytest.mark.parametrize(("case", "prefix"), [("gpt2", "transformer."), ("qwen3", "model.")])
def test_names_without_their_prefix_and_buffers(case, prefix, stored, tensors_of, write_hf, expected, tmp_path):
    """The published GPT-2 files have no prefix, and masks; old Llama files have rotary tables."""
    with_prefix = load_hf(stored(case)).params
    weights = {name.removeprefix(prefix): w for name, w in tensors_of(case).items()}
    masks = {
        "h.0.attn.bias": np.tril(np.ones((1, 1, 64, 64), np.float32)), "h.1.attn.masked_bias": np.float32(-1e4),
    }  # fmt: skip
    tables = {"layers.0.self_attn.rotary_emb.inv_freq": np.ones(5, np.float32)}
    weights |= {name: np.asarray(x) for name, x in (masks if case == "gpt2" else tables).items()}
    same_bits(load_hf(write_hf(tmp_path / "bare", expected[case]["config"], weights)).params, with_prefix)


def test_a_stored_head_may_repeat_the_embedding_that_it_is_tied_to(stored, tensors_of):
    head = {"lm_head.weight": tensors_of("qwen3")["model.embed_tokens.weight"]}
    loaded = load_hf(stored("qwen3", tensors=head))
    assert loaded.cfg.tie_embeddings
    assert "head" not in loaded.params


def test_rotary_fields_old_and_new(stored, expected):
    """As Llama 3.1 was published, and as transformers 5 writes it."""
    new = expected["llama stretched tied sharded"]["config"]["rope_parameters"]
    old = {key: value for key, value in new.items() if key != "rope_theta"}
    for name in ("rope_type", "type"):
        scaling = {name if key == "rope_type" else key: value for key, value in old.items()}
        changed = {"rope_parameters": None, "rope_theta": new["rope_theta"], "rope_scaling": scaling}
        cfg = load_hf(stored("llama stretched tied sharded", config=changed)).cfg
        assert cfg.rope_theta == 200.0
        assert cfg.rope_scaling.model_dump() == {
            "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_len": 48
        }  # fmt: skip


def test_the_type_of_the_parameters(stored, tensors_of):
    directory = stored("llama biases bfloat16")
    stored_weight = tensors_of("llama biases bfloat16")["model.layers.1.self_attn.q_proj.weight"]
    assert stored_weight.dtype == ml_dtypes.bfloat16
    for dtype, kind in ((None, jnp.float32), ("bfloat16", jnp.bfloat16), (jnp.float16, jnp.float16)):
        params = load_hf(directory, dtype=dtype).params
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(kind)}
        got = np.asarray(params["blocks"]["attn"]["q"]["kernel"][1])
        np.testing.assert_array_equal(got, stored_weight.T.astype(kind))


def test_weights_go_where_they_are_told(stored):
    """jax.Array.sharding says where; the values are those of an ordinary load."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("x",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, "x"))
    directory, asked = stored("qwen3"), []

    def sharding(path: str) -> Any:
        asked.append(path)
        return split if path == "blocks/mlp/up/kernel" else None

    plain, placed = load_hf(directory).params, load_hf(directory, sharding=sharding).params
    assert placed["blocks"]["mlp"]["up"]["kernel"].sharding == split
    assert placed["blocks"]["mlp"]["down"]["kernel"].sharding == plain["embed"]["tokens"].sharding
    assert len(asked) == len(set(asked)) == len(jax.tree.leaves(plain))
    same_bits(placed, plain)


def test_the_tokenizer_comes_along(stored):
    directory = stored("qwen3")
    tokenizers.char("abcdefgh", eot=True).save(directory)
    tokenizer = load_hf(directory).tokenizer
    assert tokenizer.decode(tokenizer.encode("headed".replace("d", "g"))) == "heageg"


MEASURE = """
import json, sys
import jax, numpy as np
from jaxlm import tokenizers
from jaxlm.interop import load_hf
from jaxlm.loading import load_model

def kib(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

def forget_peak():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # proc(5): sets the peak to the present

letters = tokenizers.char("ab")
load_model(sys.argv[1], tokenizer=letters)  # what the libraries themselves need
for directory, most in [(sys.argv[2], 1.25), (sys.argv[3], 1.25), (sys.argv[2], 1.6)]:
    forget_peak()
    before = kib("VmRSS")
    # As sample and chat have it, each stacked weight beside its layers: the largest is a fifth of this model.
    params = load_hf(directory).params if most == 1.25 else load_model(directory, tokenizer=letters).params
    jax.block_until_ready(params)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    print(json.dumps({"copies": (kib("VmHWM") - before) * 1024 / size, "bytes": size, "most": most}))
    del params
    jax.device_put(np.zeros(1)).block_until_ready()  # jax gives memory back on the next call
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to measure memory")
def test_loading_holds_one_copy(stored, write_hf, expected, tmp_path):
    """The peak of resident memory while loading, in copies of the parameters: one file, shards of bfloat16, and laid
    out for decoding."""
    d, f, layers = 256, 1024, 16
    config = expected["llama"]["config"] | dict(
        hidden_size=d, intermediate_size=f, num_hidden_layers=layers, head_dim=d // 4, vocab_size=512
    )  # fmt: skip
    shapes = {"model.embed_tokens.weight": (512, d), "lm_head.weight": (512, d), "model.norm.weight": (d,)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{x}_proj.weight": (d, d) for x in "qkvo"}
        shapes |= {f"{layer}.mlp.{x}_proj.weight": (f, d) for x in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj.weight": (d, f)}
        shapes |= {f"{layer}.{x}_layernorm.weight": (d,) for x in ("input", "post_attention")}
    one = write_hf(tmp_path / "one", config, {n: np.ones(s, np.float32) for n, s in shapes.items()})
    halves = {n: np.ones(s, ml_dtypes.bfloat16) for n, s in shapes.items()}
    three = write_hf(tmp_path / "three", config, halves, shards=3)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(stored("llama")), str(one), str(three)],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},  # so that what one load frees is not there for the next
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3
    for line in done.stdout.splitlines():
        measured = json.loads(line)
        assert measured["bytes"] > 60e6
        assert 0.8 < measured["copies"] < measured["most"], measured
