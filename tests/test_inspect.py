from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import apply, init, init_cache, inspect_model, preset
from jaxlm.cli import main
from jaxlm.config import ModelConfig
from jaxlm.errors import InputError
from jaxlm.interop import save_hf
from jaxlm.loading import read_shape
from jaxlm.stages import saved

try:
    import gguf
except ImportError:  # an extra
    gguf = None

QUICK_COMPILE = True

LLAMA = ModelConfig(
    vocab_size=512, n_layers=2, d_model=128, n_heads=4, n_kv_heads=2, d_ff=384, max_seq_len=64, mlp="swiglu",
    tie_embeddings=False,
)  # fmt: skip
GPT = ModelConfig(
    vocab_size=512, n_layers=2, d_model=128, n_heads=4, max_seq_len=64, norm="layer", norm_bias=True,
    position="learned", mlp="relu", attn_bias=True, attn_out_bias=True, mlp_bias=True,
)  # fmt: skip


def test_the_tree_by_hand() -> None:
    rows = {row.path: row for row in inspect_model.tree(preset("gpt2"))}
    # 124,439,808: the published number of GPT-2's parameters (Radford et al.'s 117M counts otherwise; the model card).
    assert sum(row.size for row in rows.values()) == 124_439_808
    q = rows["blocks/attn/q/kernel"]
    assert (q.shape, q.size, q.bytes) == ((12, 768, 768), 12 * 768 * 768, 4 * 12 * 768 * 768)
    assert q.meaning == "what each position looks for"
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), init(GPT, jax.random.key(0)))
    assert sum(r.bytes for r in inspect_model.tree(GPT, half)) == 2 * sum(r.size for r in inspect_model.tree(GPT))


def test_flops_by_hand() -> None:
    # GPT-2 124M: 12 blocks of 4 D^2 + 8 D^2 numbers, and the head: 12 * 12 * 768^2 + 768 * 50257 = 123,532,032.
    gpt2 = preset("gpt2")
    assert inspect_model.matrix_params(gpt2) == 123_532_032
    # One token after 1024: 2 * 123,532,032 + 4 * 12 * 768 * 1024; 8 rows of 1024 tokens are 8192 times that.
    token = 247_064_064 + 37_748_736
    assert inspect_model.forward_flops(gpt2, 8, 1024) == 8192 * token
    assert inspect_model.step_flops(gpt2, 8, 1024) == 3 * 8192 * token
    not_again = 2 * 8192 * (768 * 50257 + 12 * 3072 * 768)  # the head, and the last product of each block
    assert inspect_model.step_flops(gpt2.replace(remat=True), 8, 1024) == 4 * 8192 * token - not_again
    one = inspect_model.decoding(gpt2, 1024)
    # Keys and values: 2 * 12 layers * 768 numbers * 4 bytes.
    assert (one.flops, one.cache_bytes_per_token) == (token, 73_728)
    # Everything but the positions that are not looked at is read: 124,439,808 - 1023 * 768 numbers, since the head is
    # the embedding, whose row for the token is read twice.
    assert one.weight_bytes == 4 * (124_439_808 - 1023 * 768 + 768)
    assert one.read_bytes == one.weight_bytes + 1024 * 73_728
    # Eight rows read the matrices once, and eight rows of the two tables; each has its own cache.
    eight = inspect_model.decoding(gpt2, 1024, batch=8)
    assert (eight.flops, eight.weight_bytes) == (8 * token, one.weight_bytes + 4 * 7 * 2 * 768)
    assert eight.read_bytes == eight.weight_bytes + 8 * 1024 * 73_728
    half = inspect_model.decoding(gpt2.replace(compute_dtype="bfloat16"), 1024)  # as sample.prepare lays it out
    assert (2 * half.weight_bytes, 2 * half.read_bytes) == (one.weight_bytes, one.read_bytes)


@pytest.mark.parametrize("cfg", [LLAMA, GPT, GPT.replace(remat=True)], ids=["llama", "gpt", "remat"])
def test_flops_are_xlas(cfg: ModelConfig) -> None:
    # XLA also counts norms, softmax and the like: a few per cent at this width, so ours is below by no more than 8 %.
    b, t = 4, 64
    params = jax.eval_shape(lambda: init(cfg, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((b, t), jnp.int32)

    def loss(params, tokens):  # type: ignore[no-untyped-def]
        return -jnp.mean(jax.nn.log_softmax(apply(cfg, params, tokens))[..., 0])

    forward = jax.jit(apply, static_argnums=0).lower(cfg, params, tokens).cost_analysis()["flops"]
    step = jax.jit(jax.grad(loss)).lower(params, tokens).cost_analysis()["flops"]
    assert 0.92 * forward < inspect_model.forward_flops(cfg, b, t) < forward
    assert 0.90 * step < inspect_model.step_flops(cfg, b, t) < 1.02 * step


def test_memory_is_that_of_the_arrays() -> None:
    cost = inspect_model.training(LLAMA, 4, 64)
    params = jax.eval_shape(lambda: init(LLAMA, jax.random.key(0)))
    n_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    state = jax.eval_shape(optax.adamw(1e-3).init, params)
    moments = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert (cost.params_bytes, cost.gradient_bytes, cost.optimizer_bytes) == (n_bytes, n_bytes, moments)
    assert cost.logit_bytes == 2 * 4 * 64 * 512 * 4
    assert inspect_model.training(LLAMA, 4, 64, loss_chunk=32).logit_bytes == 2 * 32 * 512 * 4
    caches = [jax.eval_shape(lambda n=n: init_cache(LLAMA, 1, n)) for n in (10, 11)]
    sizes = [sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)) for cache in caches]
    assert inspect_model.decoding(LLAMA, 11).cache_bytes_per_token == sizes[1] - sizes[0]


def test_activations_by_hand() -> None:
    # By the formula's words for GPT: 4 D + 2 D + 2 D + 2 * 4 D = 16 D numbers a token and block, 2 H T of scores.
    block = 256 * (4 * 16 * 128 + 8 * 4 * 64)
    assert inspect_model.activation_bytes(GPT, 4, 64) == 2 * block
    assert inspect_model.activation_bytes(GPT.replace(remat=True), 4, 64) == block + 2 * 256 * 128 * 4
    # bfloat16 halves all but the float32 scores: 2 bytes of a probability, 4 of a score.
    assert inspect_model.activation_bytes(GPT.replace(compute_dtype="bfloat16"), 4, 64) == 2 * 256 * (
        2 * 16 * 128 + 6 * 4 * 64
    )


def test_the_report_says_it_all() -> None:
    text = inspect_model.report(preset("smollm2-135m"), batch=2, length=16)
    assert "134,515,008" in text  # the model card's number
    assert "46,080 bytes a token" in text  # 2 * 30 * 3 * 64 * 4
    assert "what each position looks for" in text
    assert "a training step of 2 x 16 tokens" in text
    assert "decoding one token for each of 2 rows after 16" in text
    assert "65,536" in inspect_model.report(preset("bigram"))


@pytest.mark.parametrize("name", ["nano", "gpt2", "qwen3-0.6b", "lesson_sinusoidal"])
def test_a_block(name: str) -> None:
    cfg = preset(name)
    text = inspect_model.block_report(cfg, 0)
    assert f"block 0 of {cfg.n_layers}: [2, 4, {cfg.d_model}] -> [2, 4, {cfg.d_model}] float32" in text
    assert f"attn/q/kernel        [{cfg.d_model}, {cfg.n_heads * cfg.d_head}]" in text
    assert "[]" not in text
    for wrong in (-1, cfg.n_layers):
        with pytest.raises(InputError, match=f"--block {wrong}: this model has {cfg.n_layers} blocks"):
            inspect_model.block_report(cfg, wrong)
    with pytest.raises(InputError, match="this model has 0 blocks"):
        inspect_model.block_report(preset("bigram"), 0)


@pytest.fixture
def sources(tiny_run: Any, tmp_path: Path) -> dict[str, tuple[str, ModelConfig]]:
    """What a person may name, of every kind, and the shape that it has."""
    llama = preset("llama-3.2-1b", vocab_size=64, n_layers=2, d_model=32, n_heads=2, n_kv_heads=1, head_dim=16, d_ff=48)
    nano = preset("nano", vocab_size=64, n_layers=1, d_model=32, n_heads=2)
    found = {"preset": ("gpt2", preset("gpt2"))}
    for name, cfg in (("llama", llama), ("ours", nano)):
        save_hf(tmp_path / name, cfg, init(cfg, jax.random.key(0)))
        found[name] = (str(tmp_path / name), cfg)
    (tmp_path / "llama" / "model.safetensors").unlink()  # nobody asks for the weights
    stage = tiny_run.manifests["sft"].directory
    run = saved.read_config(stage)
    found |= {"run": ("tiny", run), "stage": (str(stage), run), "checkpoint": (str(stage / "checkpoints" / "12"), run)}
    if gguf is not None:
        writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
        for name, value in {
            "block_count": 2, "context_length": 131072, "embedding_length": 32, "feed_forward_length": 48,
            "attention.head_count": 2, "attention.head_count_kv": 1, "attention.key_length": 16,
        }.items():  # fmt: skip
            writer.add_uint32(f"llama.{name}", value)
        writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
        writer.add_float32("llama.rope.freq_base", 500_000.0)
        writer.add_tensor("token_embd.weight", np.zeros((64, 32), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        found["gguf"] = (str(tmp_path / "x.gguf"), llama.replace(rope_scaling=None))
    return found


def test_every_kind_of_source(sources: dict[str, tuple[str, ModelConfig]], tiny_run: Any, capsys: Any) -> None:
    for kind, (name, cfg) in sources.items():
        if kind != "preset":
            assert read_shape(name, tiny_run.root) == cfg, kind
        for options in ([], ["--block", "0"]):
            with pytest.raises(SystemExit) as ended:
                main(["inspect", name, "--root", str(tiny_run.root), "--length", "8", *options])
            assert ended.value.code == 0
            out = capsys.readouterr().out
            expected = inspect_model.block_report(cfg, 0, batch=1, length=8)
            assert out == (expected if options else inspect_model.report(cfg, length=8)) + "\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gtp2"], "gtp2: no such run, stage or directory; did you mean the preset gpt2?"),
        (["zzz"], "zzz: no such run, stage or directory; the presets are bigram, nano, "),
        (["quickstart"], "quickstart: no such run, stage or directory; it is a configuration, whose run is made by"),
        (["gpt2", "--block", "12"], "--block 12: this model has 12 blocks, counted from 0."),
        (["bigram", "--block", "0"], "this model has 0 blocks"),
        (["gpt2", "--batch", "0"], "--batch 0"),
        (["gpt2", "--length", "-3"], "--length -3"),
        (["gpt2", "--length", "1025"], "--length 1025: exceeds the model's context of 1024"),
        (["gpt2", "--block", "0", "--length", "1025"], "--length 1025: exceeds the model's context of 1024"),
        (["absent.gguf"], "absent.gguf: no such file; give the path of a .gguf file."),
        (["some.safetensors"], "give the directory that holds it and its config.json"),
        (["notes.txt"], "this is a file, and one that may hold a pickle"),
        (["empty"], "empty: holds no model (neither model.json nor config.json); give a run"),
        (["download"], "download: holds no model (neither model.json nor config.json); give its tiny.gguf."),
        (["broken"], "config.json: field model_type: 'bert' is not supported; jaxlm reads gpt2, llama"),
    ],
)
def test_what_cannot_be_inspected_is_one_sentence(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for name in ("empty", "download", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "download" / "tiny.gguf").write_bytes(b"GGUF")
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "bert"}')
    for name in ("some.safetensors", "notes.txt"):
        (tmp_path / name).write_text("x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["inspect", *arguments])
    captured = capsys.readouterr()
    assert (ended.value.code, captured.out) == (65, "")
    assert captured.err.startswith("jaxlm: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err


def test_a_slip_that_is_near_a_run_and_a_preset_names_both(tmp_path: Path, capsys: Any) -> None:
    for run in ("nana", "letters"):
        (tmp_path / "runs" / run).mkdir(parents=True)
    for command in (["inspect"], ["bench", "decode"]):
        for name, hint in (("nanu", "did you mean the preset nano or nana?"), ("lettres", "did you mean letters?")):
            with pytest.raises(SystemExit) as ended:
                main([*command, name, "--root", str(tmp_path)])
            assert ended.value.code == 65
            assert capsys.readouterr().err == f"jaxlm: {name}: no such run, stage or directory; {hint}\n"
