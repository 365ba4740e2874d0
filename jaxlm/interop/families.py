"""The families of published models: how their `config.json` maps to a `ModelConfig`.

Read both ways, like the names of the tensors (`names`), so import and export cannot drift apart. A family expresses a
`ModelConfig` when mapping it there and back gives the same: so an option that the family's format has no field for
needs no list of exceptions. The last family, `jaxlm`, is our own format: it expresses everything, and its names are the
paths of our tree.

Sources: the `config.json` files of the published models; Radford et al. (GPT-2, 2019), Touvron et al.
(Llama, arXiv 2302.13971), Qwen Team (arXiv 2309.16609, 2407.10671, 2505.09388).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from jaxlm.config import ModelConfig, RopeScaling, validated
from jaxlm.errors import InputError
from jaxlm.interop.names import Rule, gpt2_rules, llama_rules
from jaxlm.model.weights import TABLE

Raw = Mapping[str, Any]


class Family(NamedTuple):
    """What is known of one `model_type`.

    Attributes:
        model_type: its name in `config.json`.
        architecture: the class that transformers loads it with; empty when there is none.
        prefix: of the body's tensors, which some files leave out.
        config_from_hf: (fields of config.json, its name for errors) -> our configuration.
        config_to_hf: our configuration -> the fields of config.json, for one that the family expresses.
        table: the tensors; those of weights that a configuration does not have are left out.
        ignored: endings of tensors that hold no weight (masks, rotary tables).
    """

    model_type: str
    architecture: str
    prefix: str
    config_from_hf: Callable[..., ModelConfig]
    config_to_hf: Callable[[ModelConfig], dict[str, Any]]
    table: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()


_MISSING: Any = object()
_KINDS: dict[type, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def _field(raw: Raw, where: str, name: str, kind: type, default: Any = _MISSING) -> Any:
    """A field of config.json; null counts as left out."""
    value = raw.get(name)
    if value is None:
        if default is _MISSING:
            raise InputError(f"{where}: field {name}: missing; take the config.json that belongs to the weights.")
        return default
    fits = isinstance(value, (int, float) if kind is float else kind)
    if not fits or (kind is not bool and isinstance(value, bool)):
        raise InputError(f"{where}: field {name}: expected {_KINDS[kind]}, found {value!r}.")
    return value


def _only(raw: Raw, where: str, name: str, *allowed: Any) -> None:
    """Refuses a field whose value changes the computation in a way that this model does not have."""
    if raw.get(name) not in (None, *allowed):
        wanted = " or ".join(str(value) for value in allowed)
        raise InputError(f"{where}: field {name}: {raw[name]!r} is not supported, only {wanted}.")


_GPT2_MLP = {
    "gelu_new": "gelu_tanh", "gelu": "gelu", "relu": "relu", "relu2": "relu2", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}  # fmt: skip


def _gpt2_from_hf(raw: Raw, where: str = "config.json") -> ModelConfig:
    get = partial(_field, raw, where)
    _only(raw, where, "scale_attn_weights", True)
    _only(raw, where, "scale_attn_by_inverse_layer_idx", False)
    _only(raw, where, "add_cross_attention", False)
    activation = get("activation_function", str, "gelu_new")
    _only({"activation_function": activation}, where, "activation_function", *_GPT2_MLP)
    # One rate here stands for two there; a third, on attention, does not exist here: the published models have all
    # three, and are read as having none, like the presets.
    rates = [get(name, float, 0.1) for name in ("embd_pdrop", "resid_pdrop", "attn_pdrop")]
    return validated(ModelConfig, dict(
        vocab_size=get("vocab_size", int), n_layers=get("n_layer", int), d_model=get("n_embd", int),
        n_heads=get("n_head", int), max_seq_len=get("n_positions", int), d_ff=get("n_inner", int, None),
        norm="layer", norm_bias=True, norm_eps=get("layer_norm_epsilon", float, 1e-5), position="learned",
        mlp=_GPT2_MLP[activation], attn_bias=True, attn_out_bias=True, mlp_bias=True,
        tie_embeddings=get("tie_word_embeddings", bool, True), init_std=get("initializer_range", float, 0.02),
        dropout=rates[0] if rates[0] == rates[1] and rates[2] == 0 else 0.0,
    ), where)  # fmt: skip


def _gpt2_to_hf(cfg: ModelConfig) -> dict[str, Any]:
    names = {ours: theirs for theirs, ours in reversed(_GPT2_MLP.items())}
    return dict(
        vocab_size=cfg.vocab_size, n_layer=cfg.n_layers, n_embd=cfg.d_model, n_head=cfg.n_heads,
        n_positions=cfg.max_seq_len, n_ctx=cfg.max_seq_len, n_inner=cfg.ff, layer_norm_epsilon=cfg.norm_eps,
        activation_function=names.get(cfg.mlp, "gelu_new"), tie_word_embeddings=cfg.tie_embeddings,
        initializer_range=cfg.init_std, embd_pdrop=cfg.dropout, resid_pdrop=cfg.dropout, attn_pdrop=0.0,
    )  # fmt: skip


def _rope_from_hf(raw: Raw, where: str) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, from `rope_parameters` (new) or `rope_theta` and `rope_scaling` (old)."""
    name = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    rope = raw.get(name) or {}
    if not isinstance(rope, dict):
        raise InputError(f"{where}: field {name}: expected an object, found {rope!r}.")
    if raw.get("rope_scaling") and raw["rope_scaling"] != rope:
        raise InputError(f"{where}: field rope_scaling: says something else than rope_parameters; keep one of them.")
    if nested := next((key for key, value in rope.items() if isinstance(value, dict)), None):
        raise InputError(f"{where}: {name}: field {nested}: rotary embeddings by layer type are not supported.")
    get = partial(_field, rope, f"{where}: {name}")
    theta = get("rope_theta", float, None)
    theta = _field(raw, where, "rope_theta", float, 10000.0) if theta is None else theta
    _only(rope, f"{where}: {name}", "partial_rotary_factor", 1.0)
    _only(raw, where, "partial_rotary_factor", 1.0)
    found = {key: get(key, str, None) for key in ("rope_type", "type")}
    kinds = set(found.values()) - {None}
    if len(kinds) > 1:
        raise InputError(f"{where}: {name}: rope_type {found['rope_type']!r} and type {found['type']!r} contradict.")
    kind = next(iter(kinds), "default")
    if not kinds and rope.get("factor") is not None:
        raise InputError(f"{where}: {name}: field rope_type: missing, though there is a factor; say which type it is.")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise InputError(f"{where}: {name}: rotary type {kind!r} is not supported, only default and llama3.")
    fields = dict(
        factor=get("factor", float), low_freq_factor=get("low_freq_factor", float),
        high_freq_factor=get("high_freq_factor", float),
        original_max_len=get("original_max_position_embeddings", int),
    )  # fmt: skip
    return theta, validated(RopeScaling, fields, f"{where}: {name}")


def _llama_from_hf(raw: Raw, where: str = "config.json", *, model_type: str) -> ModelConfig:
    get = partial(_field, raw, where)
    _only(raw, where, "hidden_act", "silu", "swish")  # two names of one function
    layers = get("num_hidden_layers", int)
    # 28 is transformers' default, whatever the number of layers.
    if get("use_sliding_window", bool, False) and get("max_window_layers", int, 28) < layers:
        raise InputError(f"{where}: field use_sliding_window: attention in a sliding window is not supported.")
    kinds = raw.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise InputError(f"{where}: field layer_types: only full_attention is supported, found {kinds!r:.80}.")
    qwen2, qwen3 = model_type == "qwen2", model_type == "qwen3"
    theta, scaling = _rope_from_hf(raw, where)
    bias = True if qwen2 else get("attention_bias", bool, False)
    heads = get("num_attention_heads", int)
    return validated(ModelConfig, dict(
        vocab_size=get("vocab_size", int), n_layers=layers, d_model=get("hidden_size", int), n_heads=heads,
        n_kv_heads=get("num_key_value_heads", int, heads), head_dim=get("head_dim", int, 128 if qwen3 else None),
        d_ff=get("intermediate_size", int), max_seq_len=get("max_position_embeddings", int), norm="rms",
        norm_eps=get("rms_norm_eps", float, 1e-6), position="rotary", rope_theta=theta, rope_scaling=scaling,
        mlp="swiglu", attn_bias=bias, attn_out_bias=bias and not qwen2,
        mlp_bias=model_type == "llama" and get("mlp_bias", bool, False), qk_norm=qwen3,
        tie_embeddings=get("tie_word_embeddings", bool, False), init_std=get("initializer_range", float, 0.02),
    ), where)  # fmt: skip


def _llama_to_hf(cfg: ModelConfig, *, model_type: str) -> dict[str, Any]:
    fields: dict[str, Any] = dict(
        vocab_size=cfg.vocab_size, num_hidden_layers=cfg.n_layers, hidden_size=cfg.d_model,
        num_attention_heads=cfg.n_heads, num_key_value_heads=cfg.kv_heads, head_dim=cfg.d_head,
        intermediate_size=cfg.ff, max_position_embeddings=cfg.max_seq_len, hidden_act="silu",
        rms_norm_eps=cfg.norm_eps, rope_theta=cfg.rope_theta, rope_scaling=None, attention_dropout=0.0,
        tie_word_embeddings=cfg.tie_embeddings, initializer_range=cfg.init_std,
    )  # fmt: skip
    if model_type != "qwen2":
        fields["attention_bias"] = cfg.attn_bias
    if model_type == "llama":
        fields["mlp_bias"] = cfg.mlp_bias
    else:
        fields["use_sliding_window"] = False
    if cfg.rope_scaling is not None:
        s = cfg.rope_scaling
        fields["rope_scaling"] = dict(
            rope_type="llama3", factor=s.factor, low_freq_factor=s.low_freq_factor,
            high_freq_factor=s.high_freq_factor, original_max_position_embeddings=s.original_max_len,
        )  # fmt: skip
    return fields


OURS = "jaxlm"  # the key of config.json that holds our configuration, and the model_type of our own format


def _ours_from_hf(raw: Raw, where: str = "config.json") -> ModelConfig:
    if not isinstance(raw.get(OURS), dict):
        raise InputError(f"{where}: field {OURS}: expected the model's options; export the model again.")
    return validated(ModelConfig, raw[OURS], f"{where}: {OURS}")


def _ours_to_hf(cfg: ModelConfig) -> dict[str, Any]:
    return {OURS: cfg.model_dump(mode="json")}


def _llama_family(model_type: str, architecture: str) -> Family:
    return Family(
        model_type, architecture, "model.", partial(_llama_from_hf, model_type=model_type),
        partial(_llama_to_hf, model_type=model_type), llama_rules(), (".rotary_emb.inv_freq",),
    )  # fmt: skip


# In this order families are asked whether they express a configuration.
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "gpt2", "GPT2LMHeadModel", "transformer.", _gpt2_from_hf, _gpt2_to_hf, gpt2_rules(),
            (".attn.bias", ".attn.masked_bias"),
        ),
        _llama_family("llama", "LlamaForCausalLM"),
        _llama_family("qwen2", "Qwen2ForCausalLM"),
        _llama_family("qwen3", "Qwen3ForCausalLM"),
        Family(OURS, "", "", _ours_from_hf, _ours_to_hf, tuple(Rule(path, (path,)) for path in TABLE)),
    )
}  # fmt: skip

# Options that change no logits: no family's format needs a field for them.
_TRAINING = (
    "dropout", "init_std", "init_scheme", "tie_qk_init", "zero_init_out", "zero_init_head", "compute_dtype",
    "scan_layers", "remat",
)  # fmt: skip


def canonical(cfg: ModelConfig) -> ModelConfig:
    """The one form of all configurations that compute the same: sizes spelled out, options of training at default."""
    training = {name: ModelConfig.model_fields[name].default for name in _TRAINING}
    return cfg.replace(n_kv_heads=cfg.kv_heads, head_dim=cfg.d_head, d_ff=cfg.ff, **training)


def family_of(cfg: ModelConfig) -> Family:
    """The first family whose format expresses the configuration; the last one, our own, expresses all."""
    return next(family for family in FAMILIES.values() if _unsaid(cfg, family) == ())


def unpublished(cfg: ModelConfig) -> tuple[str, ...]:
    """The options that keep a configuration from being one of the nearest published family; none if it is."""
    found = [_unsaid(cfg, family) for family in FAMILIES.values() if family.architecture]
    return min((options for options in found if options is not None), key=len, default=())


def _unsaid(cfg: ModelConfig, family: Family) -> tuple[str, ...] | None:
    """The options that a family's format has no field for; None: it cannot express the sizes either."""
    try:
        back = canonical(family.config_from_hf(family.config_to_hf(cfg)))
    except InputError:
        return None
    ours, theirs = canonical(cfg).model_dump(), back.model_dump()
    return tuple(name for name in ours if ours[name] != theirs[name])


def read_config(raw: Raw, where: str) -> tuple[Family, ModelConfig]:
    """The family and the configuration that a config.json stands for.

    Our exports carry our own options beside the family's, under `jaxlm`. They decide the options of training, and
    count only while the rest of the file, which others may edit, says the same.

    Raises:
        InputError: an unknown `model_type`, or a field that is missing or asks for what this model does not have.
    """
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise InputError(f"{where}: field model_type: {model_type!r} is not supported; jaxlm reads {known}.")
    if raw.get("quantization_config"):
        raise InputError(f"{where}: field quantization_config: quantized weights are not supported; take the original.")
    family = FAMILIES[model_type]
    cfg = family.config_from_hf(raw, where)
    if model_type != OURS and OURS in raw:
        ours = _ours_from_hf(raw, where)
        return family, ours if canonical(ours) == canonical(cfg) else cfg
    return family, cfg
