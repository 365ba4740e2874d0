"""Configurations and name tables, both ways, against the published models' own config.json and parameter counts."""

from __future__ import annotations

import math

import pytest

from jaxlm.errors import InputError
from jaxlm.interop.families import FAMILIES, canonical, family_of, read_config, unpublished
from jaxlm.interop.placing import wanted
from jaxlm.presets import PRESETS, preset

# Fields of the models' config.json files, as far as they decide the computation. GPT-2's are openai-community/gpt2 and
# its sizes; SmolLM2's HuggingFaceTB/SmolLM2-{135M,360M,1.7B}; Llama's meta-llama/Llama-2-7b-hf and Llama-3.2-1B; Qwen's
# Qwen/Qwen1.5-{0.5B,1.8B}, Qwen2.5-0.5B and Qwen3-0.6B. Compared with copies of the files in public repositories (of
# GPT-2's larger sizes and Qwen1.5-1.8B, of their sizes). The parameter counts below bear them out.
_GPT2 = dict(
    activation_function="gelu_new", architectures=["GPT2LMHeadModel"], attn_pdrop=0.1, embd_pdrop=0.1,
    initializer_range=0.02, layer_norm_epsilon=1e-05, model_type="gpt2", n_ctx=1024, n_positions=1024, resid_pdrop=0.1,
    vocab_size=50257,
)  # fmt: skip
_QWEN = dict(
    hidden_act="silu", initializer_range=0.02, rms_norm_eps=1e-06, rope_theta=1000000.0, use_sliding_window=False
)
_SMOLLM2 = dict(
    model_type="llama",
    attention_bias=False,
    hidden_act="silu",
    max_position_embeddings=8192,
    mlp_bias=False,
    pretraining_tp=1,
    rms_norm_eps=1e-05,
    rope_scaling=None,
    tie_word_embeddings=True,
    vocab_size=49152,
)
PUBLISHED = {
    "gpt2": _GPT2 | dict(n_embd=768, n_head=12, n_layer=12),
    "gpt2-medium": _GPT2 | dict(n_embd=1024, n_head=16, n_layer=24, n_special=0, predict_special_tokens=True),
    "gpt2-large": _GPT2 | dict(n_embd=1280, n_head=20, n_layer=36),
    "gpt2-xl": _GPT2 | dict(n_embd=1600, n_head=25, n_layer=48, output_past=True),
    "smollm2-135m": _SMOLLM2 | dict(
        hidden_size=576, initializer_range=0.041666666666666664, intermediate_size=1536, is_llama_config=True,
        num_attention_heads=9, num_hidden_layers=30, num_key_value_heads=3, rope_interleaved=False, rope_theta=100000,
    ),
    "smollm2-360m": _SMOLLM2 | dict(
        hidden_size=960, intermediate_size=2560, num_attention_heads=15, num_hidden_layers=32, num_key_value_heads=5,
        rope_theta=100000,
    ),
    "smollm2-1.7b": _SMOLLM2 | dict(
        hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_hidden_layers=24, num_key_value_heads=32,
        rope_theta=130000,
    ),
    "llama-3.2-1b": dict(
        model_type="llama", attention_bias=False, head_dim=64, hidden_act="silu", hidden_size=2048,
        intermediate_size=8192, max_position_embeddings=131072, mlp_bias=False, num_attention_heads=32,
        num_hidden_layers=16, num_key_value_heads=8, rms_norm_eps=1e-05, rope_theta=500000.0, vocab_size=128256,
        rope_scaling=dict(
            factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0, original_max_position_embeddings=8192,
            rope_type="llama3",
        ),
        tie_word_embeddings=True,
    ),
    "qwen1.5-0.5b": _QWEN | dict(
        model_type="qwen2", hidden_size=1024, intermediate_size=2816, max_position_embeddings=32768,
        max_window_layers=21, num_attention_heads=16, num_hidden_layers=24, num_key_value_heads=16,
        sliding_window=32768, tie_word_embeddings=True, vocab_size=151936,
    ),
    "qwen1.5-1.8b": _QWEN | dict(
        model_type="qwen2", hidden_size=2048, intermediate_size=5504, max_position_embeddings=32768,
        max_window_layers=21, num_attention_heads=16, num_hidden_layers=24, num_key_value_heads=16,
        sliding_window=32768, tie_word_embeddings=False, vocab_size=151936,
    ),
    "qwen2.5-0.5b": _QWEN | dict(
        model_type="qwen2", hidden_size=896, intermediate_size=4864, max_position_embeddings=32768,
        max_window_layers=24, num_attention_heads=14, num_hidden_layers=24, num_key_value_heads=2,
        sliding_window=32768, tie_word_embeddings=True, vocab_size=151936,
    ),
    "qwen3-0.6b": _QWEN | dict(
        model_type="qwen3", attention_bias=False, head_dim=128, hidden_size=1024, intermediate_size=3072,
        max_position_embeddings=40960, max_window_layers=28, num_attention_heads=16, num_hidden_layers=28,
        num_key_value_heads=8, rope_scaling=None, sliding_window=None, tie_word_embeddings=True, vocab_size=151936,
    ),
}  # fmt: skip

# Parameters (a tied head counted once) as the models' pages or papers give them.
PARAMETERS = {
    "gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200,
    "smollm2-135m": 134_515_008, "smollm2-360m": 361_821_120, "smollm2-1.7b": 1_711_376_384,
    "llama-3.2-1b": 1_235_814_400, "qwen1.5-0.5b": 463_987_712,
    "qwen1.5-1.8b": 1_836_828_672, "qwen2.5-0.5b": 494_032_768, "qwen3-0.6b": 596_049_920,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_its_preset(name):
    family, cfg = read_config(PUBLISHED[name], "config.json")
    assert canonical(cfg) == canonical(preset(name))
    assert family is family_of(preset(name))
    assert canonical(family.config_from_hf(family.config_to_hf(cfg))) == canonical(cfg)


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_tensors_are_all_there(name):
    cfg = preset(name)
    items = [item for row in wanted(cfg, family_of(cfg)) for item in row]
    assert sum(math.prod(item.shape) for item in items) == PARAMETERS[name]
    assert len({item.name for item in items}) == len(items)


def test_llama_2():
    """Of which there is no preset: its config.json says nothing of the rotary base."""
    raw = dict(
        model_type="llama", hidden_act="silu", hidden_size=4096, initializer_range=0.02, intermediate_size=11008,
        max_position_embeddings=4096, num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32,
        pretraining_tp=1, rms_norm_eps=1e-05, rope_scaling=None, tie_word_embeddings=False, vocab_size=32000,
    )  # fmt: skip
    family, cfg = read_config(raw, "config.json")
    assert (cfg.rope_theta, cfg.d_head, cfg.norm_eps, cfg.tie_embeddings) == (10_000.0, 128, 1e-5, False)
    items = [item for row in wanted(cfg, family) for item in row]
    assert sum(math.prod(item.shape) for item in items) == 6_738_415_616  # Llama 2's "7B", as its page counts it
    assert unpublished(cfg) == ()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("nano", {"norm_scale", "mlp", "embed_mix", "key_offset", "logit_softcap"}),
        ("lesson_learned", {"norm_position", "head_bias"}),
        ("qwen3-0.6b", set()),
    ],
)
def test_what_keeps_a_model_from_being_of_a_published_family(name, options):
    found = unpublished(preset(name))
    assert options <= set(found)
    assert bool(found) == (family_of(preset(name)).architecture == "")
    known = preset(name).model_dump()
    assert not {"vocab_size", "n_layers", "d_model", "dropout"} & set(found)
    assert set(found) <= set(known)


def test_names_and_shapes_of_gpt2_and_llama():
    """As in the published files: GPT-2 is [in, out] with q, k and v side by side; Llama is [out, in]."""
    cfg = preset("gpt2")
    found = {item.name: item.shape for row in wanted(cfg, FAMILIES["gpt2"]) for item in row}
    assert len(found) == 148
    assert found["transformer.h.11.attn.c_attn.weight"] == (768, 2304)
    assert found["transformer.h.0.mlp.c_fc.weight"] == (768, 3072)
    found = {item.name: item.shape for row in wanted(preset("llama-3.2-1b"), FAMILIES["llama"]) for item in row}
    assert len(found) == 146
    assert found["model.layers.15.self_attn.k_proj.weight"] == (512, 2048)
    assert found["model.layers.0.mlp.down_proj.weight"] == (2048, 8192)


@pytest.mark.parametrize("name", PRESETS)
def test_every_weight_has_one_name_in_its_family(name, parameter_shapes):
    """Both ways: each weight of the model is in the table, and each row's names lead back to it alone."""
    cfg = preset(name)
    family = family_of(cfg)
    rows = wanted(cfg, family)
    covered = [path for row in rows for path in row[0].rule.paths]
    assert sorted(covered) == sorted(parameter_shapes(cfg))
    assert all(len(row) == (cfg.n_layers if "{i}" in row[0].rule.name else 1) for row in rows)


def test_every_row_of_a_table_belongs_to_a_model(parameter_shapes):
    untied = [preset(name, tie_embeddings=False) for name in ("gpt2", "llama-3.2-1b")]
    biased = preset("llama-3.2-1b", attn_bias=True, attn_out_bias=True, mlp_bias=True)
    models = [*map(preset, PRESETS), *untied, biased]
    for family in FAMILIES.values():
        if family.model_type != "jaxlm":
            used = {path for cfg in models for path in parameter_shapes(cfg)}
            assert {path for rule in family.table for path in rule.paths} <= used


@pytest.mark.parametrize(
    ("name", "family", "changes"),
    [
        ("gpt2", "gpt2", dict(mlp="relu2", dropout=0.1, compute_dtype="bfloat16", d_ff=100, tie_embeddings=False)),
        ("gpt2", "jaxlm", dict(head_bias=True)),
        ("gpt2", "jaxlm", dict(norm_position="post")),
        ("gpt2", "jaxlm", dict(n_kv_heads=4)),
        ("gpt2", "jaxlm", dict(mlp="swiglu")),
        ("llama-3.2-1b", "qwen2", dict(attn_bias=True)),
        ("llama-3.2-1b", "llama", dict(attn_bias=True, attn_out_bias=True, mlp_bias=True)),
        ("llama-3.2-1b", "jaxlm", dict(logit_softcap=15.0)),
        ("llama-3.2-1b", "jaxlm", dict(embed_scale="sqrt_d")),
        ("qwen3-0.6b", "qwen3", dict(rope_scaling=dict(factor=2.0), init_scheme="fan_in", zero_init_out=True)),
        ("qwen3-0.6b", "jaxlm", dict(qk_norm_scale=False)),
        ("qwen3-0.6b", "jaxlm", dict(key_offset=True)),
        ("nano", "jaxlm", {}),
        ("lesson_sinusoidal", "jaxlm", {}),
        ("bigram", "jaxlm", {}),
    ],
)
def test_a_configuration_finds_the_family_that_expresses_it(name, family, changes):
    cfg = preset(name, **changes)
    found = family_of(cfg)
    assert found.model_type == family
    assert canonical(found.config_from_hf(found.config_to_hf(cfg))) == canonical(cfg)


def test_our_own_options_count_while_the_rest_agrees():
    """They are the options of training; somebody else's edit of the family's fields comes first."""
    cfg = preset("gpt2", dropout=0.3, scan_layers=True, init_scheme="fan_in")
    raw = {"model_type": "gpt2", **FAMILIES["gpt2"].config_to_hf(cfg), "jaxlm": cfg.model_dump(mode="json")}
    assert read_config(raw, "config.json")[1] == cfg
    edited = read_config(raw | {"layer_norm_epsilon": 1e-6}, "config.json")[1]
    assert edited.norm_eps == 1e-6
    assert not edited.scan_layers


def test_fields_that_say_the_same_in_another_way():
    raw = PUBLISHED["llama-3.2-1b"]
    cfg = read_config(raw, "config.json")[1]
    for changes in (
        {"hidden_act": "swish"}, {"rope_parameters": raw["rope_scaling"]}, {"layer_types": ["full_attention"] * 16},
    ):  # fmt: skip
        assert read_config(raw | changes, "config.json")[1] == cfg


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gpt2", {"model_type": "mamba"}, "field model_type: 'mamba' is not supported; jaxlm reads gpt2, llama"),
        ("gpt2", {"model_type": None}, "field model_type: None"),
        ("gpt2", {"model_type": ["llama"]}, "field model_type: ['llama'] is not supported"),
        ("gpt2", {"activation_function": "mish"}, "field activation_function: 'mish' is not supported"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "field scale_attn_by_inverse_layer_idx: True"),
        ("gpt2", {"n_layer": "12"}, "field n_layer: expected a whole number, found '12'"),
        ("gpt2", {"n_layer": 0}, "n_layers: input should be greater than 0, found 0"),
        ("gpt2", {"n_embd": None}, "field n_embd: missing"),
        ("gpt2", {"n_head": True}, "field n_head: expected a whole number, found True"),
        ("gpt2", {"quantization_config": {"bits": 4}}, "field quantization_config: quantized weights"),
        ("llama-3.2-1b", {"hidden_act": "gelu"}, "field hidden_act: 'gelu' is not supported, only silu"),
        ("llama-3.2-1b", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rotary type 'yarn' is not supported"),
        ("llama-3.2-1b", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rotary type 'dynamic'"),
        ("llama-3.2-1b", {"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling: field factor: missing"),
        ("llama-3.2-1b", {"rope_parameters": "default"}, "field rope_parameters: expected an object"),
        ("llama-3.2-1b", {"rope_parameters": {"rope_type": "default"}}, "field rope_scaling: says something else"),
        (
            "qwen3-0.6b",
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
            "field full_attention: rotary emb",
        ),
        ("qwen3-0.6b", {"rope_scaling": {"factor": 4.0}}, "rope_scaling: field rope_type: missing, though there is"),
        ("qwen3-0.6b", {"rope_scaling": {"rope_type": "default", "type": "linear"}}, "'default' and type 'linear' con"),
        ("qwen3-0.6b", {"rope_theta": 0}, "rope_theta: input should be greater than 0, found 0"),
        ("qwen3-0.6b", {"rope_parameters": {"rope_theta": 0.0}}, "rope_theta: input should be greater than 0"),
        ("llama-3.2-1b", {"partial_rotary_factor": 0.5}, "field partial_rotary_factor: 0.5 is not supported"),
        ("qwen2.5-0.5b", {"use_sliding_window": True, "max_window_layers": 10}, "sliding window is not supported"),
        ("qwen3-0.6b", {"layer_types": ["sliding_attention"]}, "field layer_types: only full_attention is supported"),
        ("llama-3.2-1b", {"layer_types": ["chunked_attention"]}, "field layer_types: only full_attention is supported"),
        ("llama-3.2-1b", {"layer_types": 3}, "field layer_types: only full_attention is supported, found 3"),
        # Of 48 layers those from transformers' default of 28 on would have a window.
        (
            "qwen2.5-0.5b",
            {"use_sliding_window": True, "max_window_layers": None, "num_hidden_layers": 48},
            "sliding window is not supported",
        ),
    ],
)
def test_what_the_model_does_not_have_is_refused(name, changes, message):
    with pytest.raises(InputError) as caught:
        read_config(PUBLISHED[name] | changes, "some/config.json")
    text = str(caught.value)
    assert text.startswith("some/config.json")
    assert message in text
    assert "\n" not in text
