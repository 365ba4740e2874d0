"""Models out and in again: the same bits; in a directory that appears as a whole."""

from __future__ import annotations

import json
import resource
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxlm import tokenizers
from jaxlm.errors import DiskError, InputError
from jaxlm.interop import load_hf, save_hf
from jaxlm.presets import PRESETS, preset
from jaxlm.sample import prepare

QUICK_COMPILE = True
SMALL: dict[str, Any] = dict(vocab_size=31, n_layers=2, d_model=16, n_heads=4, d_ff=24, max_seq_len=16)
OURS = {"bigram", "nano", "mini", "lesson_learned", "lesson_sinusoidal"}


def small(name: str, **more: Any) -> Any:
    heads = {} if name.startswith("gpt2") or name in OURS else dict(n_kv_heads=2, head_dim=6)
    return preset(name, **(dict(vocab_size=31) if name == "bigram" else SMALL | heads | more))


def same_bits(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y), strict=True), a, b)


@pytest.mark.parametrize("name", PRESETS)
def test_export_then_import_is_the_identity(name, random_params, tmp_path):
    cfg = small(name)
    params = random_params(cfg)
    save_hf(tmp_path / "out", cfg, params)
    loaded = load_hf(tmp_path / "out")
    assert loaded.cfg == cfg
    assert loaded.tokenizer is None
    same_bits(loaded.params, params)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"] == "jaxlm") == (name in OURS)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors",
    }  # fmt: skip


@pytest.mark.parametrize("kind", [ml_dtypes.bfloat16, np.float16])
def test_other_types_come_back_as_they_were(kind, random_params, tmp_path):
    cfg = small("qwen3-0.6b")
    params = jax.tree.map(lambda x: x.astype(kind), random_params(cfg))
    save_hf(tmp_path / "out", cfg, params)
    same_bits(load_hf(tmp_path / "out", dtype=kind).params, params)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == np.dtype(kind).name


def test_the_file_is_one_that_the_safetensors_library_reads(random_params, tmp_path):
    """An independent reader, and GPT-2's layout by hand: q, k and v side by side, inputs first."""
    from safetensors import safe_open

    cfg = small("gpt2", tie_embeddings=False)
    params = random_params(cfg)
    save_hf(tmp_path / "out", cfg, params)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    attn = params["blocks"]["attn"]
    fused = np.concatenate([np.asarray(attn[x]["kernel"][1]) for x in "qkv"], axis=1)
    np.testing.assert_array_equal(found["transformer.h.1.attn.c_attn.weight"], fused)
    np.testing.assert_array_equal(found["transformer.wte.weight"], params["embed"]["tokens"])
    np.testing.assert_array_equal(found["lm_head.weight"], np.asarray(params["head"]["kernel"]).T)
    assert len(found) == 2 + 2 * 12 + 2 + 1


def test_the_tokenizer_goes_along(random_params, tmp_path):
    tokenizer = tokenizers.char("abcdefgh", pad=True, eot=True)
    cfg = small("gpt2", vocab_size=tokenizer.vocab_size)
    save_hf(tmp_path, cfg, random_params(cfg), tokenizer)  # an empty directory that is there already
    assert load_hf(tmp_path).tokenizer.fingerprint == tokenizer.fingerprint
    for file in ("config.json", "generation_config.json"):
        content = json.loads((tmp_path / file).read_text())
        ids = [content[f"{name}_token_id"] for name in ("bos", "eos", "pad")]
        assert ids == [tokenizer.eot_id, tokenizer.eot_id, 0]


@pytest.mark.parametrize(
    ("tokenizer", "text"),
    [
        (tokenizers.char("abcdefgh", pad=True, eot=True), "faced"),
        (tokenizers.word("a cat, a dog.", split="punctuation", lower=False, eot=True), "a dog, a cat."),
        (tokenizers.bpe("a cat and a cat", 262), "a cat, naïve"),
    ],
    ids=["char", "word", "bpe"],
)
def test_a_tokenizer_of_ours_goes_along_twice(tokenizer, text, random_params, tmp_path):
    """As itself, which load_hf takes, and as a tokenizer.json, which it takes where only that is left."""
    cfg = small("llama-3.2-1b", vocab_size=tokenizer.vocab_size)
    save_hf(tmp_path, cfg, random_params(cfg), tokenizer)
    assert load_hf(tmp_path).tokenizer == tokenizer
    (tmp_path / "tokenizer.jaxlm.json").unlink()
    other = load_hf(tmp_path).tokenizer
    assert other.encode(text) == tokenizer.encode(text)
    assert other.decode(other.encode(text)) == text
    assert other.start_ids == other.stop_ids == (tokenizer.eot_id,)
    save_hf(tmp_path, cfg, random_params(cfg))
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}


def test_what_transformers_cannot_have_of_a_tokenizer_is_said(random_params, tmp_path):
    cfg = small("llama-3.2-1b")
    with pytest.warns(
        UserWarning, match=r"out: only jaxlm reads this tokenizer: .* its word 'σας' has a sigma"
    ) as notes:
        save_hf(tmp_path / "out", cfg, random_params(cfg), tokenizers.word("σας"))
    assert len(notes) == 1
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert load_hf(tmp_path / "out").tokenizer.encode("ΣΑΣ") == [2]
    cfg = small("qwen2.5-0.5b")
    with pytest.warns(UserWarning, match=r"every qwen2 model .* PreTrainedTokenizerFast"):
        save_hf(tmp_path / "out", cfg, random_params(cfg), tokenizers.char("ab"))


def test_an_earlier_export_is_replaced_and_anything_else_is_kept(random_params, tmp_path):
    first, second = small("gpt2"), small("llama-3.2-1b")
    out = tmp_path / "out"
    save_hf(out, first, random_params(first), tokenizers.char("ab"))
    save_hf(out, second, random_params(second))
    assert load_hf(out).cfg == second
    assert load_hf(out).tokenizer is None
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"out: holds notes\.txt, which an export would remove"):
        save_hf(out, first, random_params(first))
    assert load_hf(out).cfg == second
    (out / "notes.txt").unlink()
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "jaxlm"}))
    with pytest.raises(InputError, match=r"out: holds config\.json"):  # a model of somebody else's has the same files
        save_hf(out, first, random_params(first))
    assert load_hf(out).cfg.d_model == second.d_model
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_leaves_the_old_export(random_params, tmp_path):
    """A real limit on the size of files (RLIMIT_FSIZE), reached while the weights are written."""
    cfg = small("gpt2")
    params = random_params(cfg)
    save_hf(tmp_path / "out", cfg, params)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(DiskError, match=r"cannot export the model in .*: File too large"):
            save_hf(tmp_path / "out", cfg, jax.tree.map(lambda x: x + 1, params))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    same_bits(load_hf(tmp_path / "out").params, params)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_cannot_be_exported_leaves_nothing(random_params, tmp_path):
    cfg = small("gpt2")
    params = random_params(cfg)
    table = params["embed"]["tokens"]
    broken, shorter = (
        params | {"embed": params["embed"] | {"tokens": x}} for x in (table.at[3, 1].set(np.nan), table[:30])
    )
    cases = [
        (broken, None, "params: embed/tokens holds NaN or infinite"),
        (shorter, None, r"params: embed/tokens: found \[30, 16\], .* \[31, 16\]"),
        (params | {"embed": {"tokens": table}}, None, r"params: embed/positions: found nothing, .* \[16, 16\]"),
        (prepare(cfg, params), None, "params: blocks/.*sample.prepare"),
        (params | {"extra": table}, None, "params: extra: found .*no such weight"),
        (params, tokenizers.char([chr(i) for i in range(0x4E00, 0x4E40)]), "the tokenizer has 64 entries, .* 31"),
    ]
    for bad, tokenizer, message in cases:
        with pytest.raises(InputError, match=message) as caught:
            save_hf(tmp_path / "out", cfg, bad, tokenizer)
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_published_tokenizer_keeps_its_files(random_params, tmp_path):
    """tokenizer.json as the `tokenizers` library wrote it, with a chat template and two stop ids."""
    from tokenizers import Tokenizer, models

    words = ["<s>", "</s>", "<|user|>", "<|end|>", "hello"]
    definition = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<s>"))
    definition.add_special_tokens(words[:4])
    cfg = small("llama-3.2-1b")
    first, second = tmp_path / "first", tmp_path / "second"
    save_hf(first, cfg, random_params(cfg))
    definition.save(str(first / "tokenizer.json"))
    template = "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}"
    (first / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", "chat_template": template})
    )
    (first / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [1, 3]}))
    loaded = load_hf(first)
    save_hf(second, *loaded)
    assert load_hf(second).tokenizer == loaded.tokenizer
    assert json.loads((second / "tokenizer.json").read_text())["model"]["vocab"] == {w: i for i, w in enumerate(words)}
    assert (second / "chat_template.jinja").read_text() == template
    for file in ("generation_config.json", "config.json"):
        content = json.loads((second / file).read_text())
        assert (content["bos_token_id"], content["eos_token_id"]) == (0, [1, 3])


def test_weights_that_are_spread_over_devices_export_as_others(random_params, tmp_path):
    cfg = small("qwen3-0.6b")
    params = random_params(cfg)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("x",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    spread = jax.tree.map(lambda w: jax.device_put(w, split) if w.ndim > 2 else w, params)
    save_hf(tmp_path / "one", cfg, params)
    save_hf(tmp_path / "two", cfg, spread)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
