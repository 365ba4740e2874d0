"""The shape of a model: the options that `jaxlm.model` reads. Loads no jax."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from jaxlm._frozen import Frozen, Positive


class RopeScaling(Frozen):
    """The `llama3` stretching of rotary frequencies (Llama 3.1 release, `rope_scaling`)."""

    factor: float = Field(8.0, ge=1.0, description="how many times slower the slowest frequencies turn")
    low_freq_factor: float = Field(
        1.0, gt=0, description="wavelengths above original_max_len / this are stretched fully"
    )
    high_freq_factor: float = Field(4.0, gt=0, description="wavelengths below original_max_len / this are left alone")
    original_max_len: Positive = Field(8192, description="context length that the model was first trained with")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("high_freq_factor must be above low_freq_factor")
        return self


class ModelConfig(Frozen):
    """The shape of a decoder-only Transformer (or a bigram table). Defaults are a small modern model."""

    extra_names: ClassVar[tuple[str, ...]] = ("preset",)

    kind: Literal["transformer", "bigram"] = Field(
        "transformer", description="bigram: logits are a row of a [V, V] table"
    )
    vocab_size: Positive = Field(256, description="V; taken from the tokenizer in a run")
    n_layers: Positive = Field(4, description="L")
    d_model: Positive = Field(128, description="D")
    n_heads: Positive = Field(4, description="H, query heads")
    n_kv_heads: Positive | None = Field(None, description="K, key/value heads; empty: H")
    head_dim: Positive | None = Field(None, description="h; empty: D / H")
    d_ff: Positive | None = Field(None, description="F, MLP width; empty: 4 D")
    max_seq_len: Positive = Field(1024, description="longest sequence that positions exist for")

    norm: Literal["layer", "rms"] = Field("rms", description="LayerNorm or RMSNorm")
    norm_position: Literal["pre", "post"] = Field("pre", description="before the sublayer, or after the residual sum")
    norm_eps: float = Field(1e-5, gt=0, description="added to the variance")
    norm_scale: bool = Field(True, description="a learned gain in each norm")
    norm_bias: bool = Field(False, description="a learned bias in each LayerNorm")
    final_norm: bool = Field(True, description="one more norm before the head")
    position: Literal["learned", "sinusoidal", "rotary", "none"] = Field("rotary", description="how positions enter")
    rope_theta: float = Field(10000.0, gt=0, description="base of the rotary wavelengths")
    rope_scaling: RopeScaling | None = Field(None, description="llama3 scaling of the rotary frequencies")
    embed_scale: Literal["none", "sqrt_d"] = Field("none", description="sqrt_d: token embeddings times the root of D")
    embed_mix: int = Field(
        0, ge=0, le=16, description="earlier tokens mixed into each embedding, by a learned gain each"
    )
    key_offset: bool = Field(False, description="attention finds each token by the key of the one before it")
    mlp: Literal["relu", "gelu", "gelu_tanh", "swiglu", "relu2"] = Field("gelu_tanh", description="MLP activation")
    attn_bias: bool = Field(False, description="biases on q, k and v")
    attn_out_bias: bool = Field(False, description="a bias on the attention output")
    mlp_bias: bool = Field(False, description="biases in the MLP")
    head_bias: bool = Field(False, description="a bias on the logits")
    qk_norm: bool = Field(False, description="RMS norm on each head of q and k")
    qk_norm_scale: bool = Field(True, description="a learned gain in the q and k norms")
    tie_embeddings: bool = Field(True, description="the head is the token embedding, transposed")
    logit_softcap: float | None = Field(None, gt=0, description="logits pass through c tanh(x / c)")
    dropout: float = Field(0.0, ge=0, lt=1, description="on embeddings and both residual branches, in training")

    init_std: float = Field(0.02, gt=0, description="standard deviation of embeddings and matrices")
    init_scheme: Literal["normal", "fan_in"] = Field(
        "normal", description="fan_in: matrices get 1/sqrt(inputs) instead"
    )
    tie_qk_init: bool = Field(False, description="keys start as the queries: each token looks for its like")
    zero_init_out: bool = Field(False, description="attention and MLP output matrices start at zero")
    zero_init_head: bool = Field(False, description="an untied head starts at zero")

    compute_dtype: Literal["float32", "bfloat16"] = Field("float32", description="type of activations and products")
    scan_layers: bool = Field(False, description="loop over layers with a scan: compiles sooner, runs slower on CPU")
    remat: bool = Field(False, description="recompute each block in the backward pass to save memory")

    @property
    def kv_heads(self) -> int:
        """K."""
        return self.n_kv_heads or self.n_heads

    @property
    def d_head(self) -> int:
        """h."""
        return self.head_dim or self.d_model // self.n_heads

    @property
    def ff(self) -> int:
        """F."""
        return self.d_ff or 4 * self.d_model

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        if self.kind == "bigram":
            return self
        if self.head_dim is None and self.d_model % self.n_heads:
            raise ValueError(f"n_heads={self.n_heads} must divide d_model={self.d_model}, or set head_dim")
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_kv_heads={self.kv_heads} must divide n_heads={self.n_heads}")
        if self.position == "rotary" and self.d_head % 2:
            raise ValueError(f"rotary positions need an even head_dim, found {self.d_head}")
        if self.position == "sinusoidal" and self.d_model % 2:
            raise ValueError(f"sinusoidal positions need an even d_model, found {self.d_model}")
        if self.norm_bias and self.norm == "rms":
            raise ValueError("norm_bias needs norm=layer: RMSNorm has no bias")
        if self.zero_init_head and self.tie_embeddings:
            raise ValueError("zero_init_head needs tie_embeddings=false: a tied head is the embedding")
        if self.tie_qk_init and self.kv_heads != self.n_heads:
            raise ValueError(f"tie_qk_init needs as many key heads as query heads, found n_kv_heads={self.kv_heads}")
        if self.rope_scaling is not None and self.position != "rotary":
            raise ValueError("rope_scaling needs position=rotary")
        return self
