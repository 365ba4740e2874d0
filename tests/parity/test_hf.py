"""Models written by transformers, read by us; written by us, read by transformers: the same numbers, both ways.

Beside the logits: greedy continuations by both libraries' own `generate`, token for token.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm.interop import load_hf, save_hf
from jaxlm.presets import preset
from jaxlm.sample import Sampling

pytestmark = pytest.mark.parity
QUICK_COMPILE = True

V, T = 61, 24
GPT2: dict[str, Any] = dict(
    vocab_size=V, n_embd=24, n_layer=2, n_head=4, n_positions=64, bos_token_id=None, eos_token_id=None
)
LLAMA: dict[str, Any] = dict(
    vocab_size=V, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=40, max_position_embeddings=64, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
# With heads of 6 the wavelengths are 6.3, 37 and 215: one is kept (below 48 / 4), one stretched, one between.
STRETCHED = dict(
    rope_type="llama3", rope_theta=200.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=48,
)  # fmt: skip


class Case(NamedTuple):
    """A random model: its class, options, the type it is saved in, and the largest shard."""

    family: str
    options: dict[str, Any]
    dtype: str = "float32"
    shard: str = "1GB"
    greedy: bool = False


CASES = {
    "gpt2": Case("GPT2", GPT2, greedy=True),
    "gpt2, n_inner, untied, exact gelu": Case(
        "GPT2", GPT2 | dict(n_inner=30, tie_word_embeddings=False, activation_function="gelu", layer_norm_epsilon=1e-3)
    ),
    "gpt2, bfloat16, sharded": Case("GPT2", GPT2, dtype="bfloat16", shard="12KB"),
    "llama": Case("Llama", LLAMA | dict(num_key_value_heads=4, rms_norm_eps=1e-3)),
    "llama, grouped, stretched, tied": Case(
        "Llama", LLAMA | dict(rope_parameters=STRETCHED, tie_word_embeddings=True), greedy=True
    ),
    "llama, biases, head_dim, sharded": Case(
        "Llama", LLAMA | dict(attention_bias=True, mlp_bias=True, head_dim=10), shard="12KB"
    ),
    "llama, bfloat16": Case("Llama", LLAMA, dtype="bfloat16"),
    "qwen2": Case("Qwen2", LLAMA, greedy=True),
    "qwen2, tied, float16": Case("Qwen2", LLAMA | dict(tie_word_embeddings=True), dtype="float16"),
    "qwen3, head_dim, tied": Case("Qwen3", LLAMA | dict(head_dim=10, tie_word_embeddings=True), greedy=True),
    "qwen3, biases, bfloat16, sharded": Case(
        "Qwen3", LLAMA | dict(head_dim=8, attention_bias=True), dtype="bfloat16", shard="12KB"
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def directory(case, torch, transformers, randomize, tmp_path):
    """A model as transformers saves it."""
    config = getattr(transformers, f"{case.family}Config")(**case.options)
    peer = transformers.AutoModelForCausalLM.from_config(config)
    randomize(peer, seed=len(str(case)))
    peer.to(getattr(torch, case.dtype)).save_pretrained(tmp_path / "theirs", max_shard_size=case.shard)
    shards = len(list((tmp_path / "theirs").glob("*.safetensors")))
    assert (shards > 1) == (case.shard != "1GB")
    return tmp_path / "theirs"


def logits_of(torch: Any, peer: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return peer.eval()(torch.from_numpy(tokens)).logits.numpy()


def test_both_ways(case, directory, torch, transformers, tmp_path):
    tokens = np.random.default_rng(0).integers(0, V, (2, T))
    read = transformers.AutoModelForCausalLM.from_pretrained
    peer = read(directory, dtype=torch.float32)
    expected = logits_of(torch, peer, tokens)

    cfg, params, _ = load_hf(directory)
    got = np.asarray(jax.jit(jaxlm.apply)(cfg, params, tokens.astype(np.int32)))
    assert expected.dtype == got.dtype == np.float32
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()

    save_hf(tmp_path / "ours", cfg, params)
    again, info = read(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info  # no key missing, unexpected or misshapen
    assert type(again) is type(peer)
    assert again.dtype == torch.float32
    np.testing.assert_array_equal(logits_of(torch, again, tokens), expected)  # the same weights, so the same bits

    if case.greedy:
        rng = np.random.default_rng(1)
        prompts = [rng.integers(0, V, n).tolist() for n in (3, 9, 14)]
        ours = jaxlm.generate(cfg, params, prompts, sampling=Sampling(temperature=0.0), max_new_tokens=24)
        for prompt, out in zip(prompts, ours, strict=True):
            theirs = again.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                do_sample=False, max_new_tokens=24,
            )  # fmt: skip
            assert out.tokens == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", ["gpt2", "smollm2-135m", "llama-3.2-1b", "qwen1.5-0.5b", "qwen3-0.6b"])
def test_models_made_here_load_there(name, torch, transformers, tmp_path):
    """Presets, at a small size, as a training here would leave them (with options that only training has)."""
    heads = {} if name == "gpt2" else dict(n_kv_heads=2, head_dim=8, d_ff=40)
    cfg = preset(
        name, vocab_size=V, n_layers=2, d_model=24, n_heads=4, max_seq_len=64, dropout=0.1, init_scheme="fan_in",
        **heads,
    )  # fmt: skip
    params = jaxlm.init(cfg, jax.random.key(0))
    save_hf(tmp_path / "ours", cfg, params)
    peer, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    tokens = np.random.default_rng(0).integers(0, V, (2, T))
    expected, got = logits_of(torch, peer, tokens), np.asarray(jaxlm.apply(cfg, params, tokens.astype(np.int32)))
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()
    assert load_hf(tmp_path / "ours").cfg == cfg


def test_a_model_that_transformers_saves_again_loads_here(torch, transformers, tmp_path):
    """Our fields in its config.json survive, or are gone; either way the model is the same."""
    cfg = preset("qwen3-0.6b", vocab_size=V, n_layers=2, d_model=24, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40)
    params = jaxlm.init(cfg, jax.random.key(0))
    save_hf(tmp_path / "ours", cfg, params)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    peer.save_pretrained(tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["model_type"] == "qwen3"
    loaded = load_hf(tmp_path / "theirs")
    assert loaded.cfg.replace(max_seq_len=cfg.max_seq_len) == cfg
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)


def test_the_rules_of_generation_go_along(transformers, tmp_path):
    cfg = preset("gpt2", vocab_size=V, n_layers=1, d_model=16, n_heads=2, max_seq_len=32)
    tokenizer = jaxlm.tokenizers.char("abc", pad=True, eot=True)
    save_hf(tmp_path / "ours", cfg, jaxlm.init(cfg, jax.random.key(0)), tokenizer)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    rules = peer.generation_config
    assert (rules.bos_token_id, rules.eos_token_id, rules.pad_token_id) == (4, 4, 0) == (
        peer.config.bos_token_id, peer.config.eos_token_id, peer.config.pad_token_id
    )  # fmt: skip
    assert tokenizer.eot_id == 4


PROSE = 'Anna put the ball in the box. "Where is it?" asked Ben, who hadn\'t seen it (naïve 🚀).\n' * 3
TOKENIZERS = {
    "bpe": jaxlm.tokenizers.bpe(PROSE, 300),
    "char": jaxlm.tokenizers.char(PROSE, pad=True, unk=True, eot=True),
    "word": jaxlm.tokenizers.word(PROSE, split="punctuation", lower=False, eot=True),
    "whitespace": jaxlm.tokenizers.word(PROSE, eot=True),
}
TEXTS = [
    PROSE, "", "Anna\t asked:\r\n\n  where is the (new) ball?  ", "<|endoftext|> [PAD] [UNK]", "e\u0301 日本 \x1c.",
    '""',
]  # fmt: skip


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", ["gpt2", "llama-3.2-1b", "qwen2.5-0.5b", "qwen3-0.6b", "nano"])
@pytest.mark.filterwarnings("ignore:.*PreTrainedTokenizerFast")
def test_our_tokenizers_are_the_same_there(name, kind, transformers, tmp_path):
    """Ids with the start that models trained here expect, and text; whatever the model's family."""
    tokenizer = TOKENIZERS[kind]
    heads = {} if name in ("gpt2", "nano") else dict(n_kv_heads=2, head_dim=8)
    cfg = preset(
        name, vocab_size=tokenizer.vocab_size, n_layers=1, d_model=16, n_heads=2, d_ff=24, max_seq_len=32, **heads
    )
    save_hf(tmp_path, cfg, jaxlm.init(cfg, jax.random.key(0)), tokenizer)
    readers = [transformers.PreTrainedTokenizerFast, transformers.AutoTokenizer]
    # transformers 5 takes the tokenizer of every qwen2 model for Qwen's; save_hf says so.
    for reader in readers[: 1 if name.startswith("qwen2") else 2]:
        peer = reader.from_pretrained(tmp_path)
        assert (peer.bos_token_id, peer.eos_token_id, peer.pad_token_id) == (
            tokenizer.eot_id, tokenizer.eot_id, tokenizer.pad_id,
        )  # fmt: skip
        for text in TEXTS:
            ids = tokenizer.encode(text)
            assert peer(text).input_ids == [tokenizer.eot_id, *ids]
            assert peer(text, add_special_tokens=False).input_ids == ids
            assert peer.decode(ids) == tokenizer.decode(ids)
        batch = peer.batch_decode([tokenizer.encode(text) for text in TEXTS])
        assert batch == [tokenizer.decode(tokenizer.encode(text)) for text in TEXTS]


def test_a_model_of_no_published_family_is_not_loaded_there(transformers, tmp_path):
    """What docs/hugging_face.md says of our own format: transformers names the type that it does not know."""
    cfg = preset("nano", vocab_size=V, n_layers=1, d_model=16, n_heads=2, max_seq_len=32)
    save_hf(tmp_path, cfg, jaxlm.init(cfg, jax.random.key(0)))
    with pytest.raises(ValueError, match="model type `jaxlm`"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert load_hf(tmp_path).cfg == cfg


def test_the_same_text_from_both(torch, transformers, tmp_path):
    """A model trained here with a tokenizer of ours: the prompt's ids and the greedy text of both libraries."""
    tokenizer = TOKENIZERS["bpe"]
    cfg = preset("llama-3.2-1b", vocab_size=300, n_layers=1, d_model=32, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48,
                 max_seq_len=64, rope_scaling=None)  # fmt: skip
    params = jaxlm.init(cfg.replace(init_std=0.3), jax.random.key(0))
    save_hf(tmp_path, cfg, params, tokenizer)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path)
    asked = words("Anna put the", return_tensors="pt")
    theirs = peer.generate(**asked, do_sample=False, max_new_tokens=12)[0].tolist()
    ids = [tokenizer.eot_id, *tokenizer.encode("Anna put the")]
    (ours,) = jaxlm.generate(
        cfg, params, [ids], sampling=Sampling(temperature=0.0), max_new_tokens=12, stop_ids=(tokenizer.eot_id,)
    )
    assert ids + ours.tokens == theirs
    assert words.decode(theirs, skip_special_tokens=False) == tokenizer.decode(theirs)
