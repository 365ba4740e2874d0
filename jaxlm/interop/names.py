"""The names of tensors in files of each family, and our weights that they stand for. Read both ways.

Sources: the tensor names of the published models.
"""

from __future__ import annotations

from typing import NamedTuple


class Rule(NamedTuple):
    """One row of a name table.

    Attributes:
        name: the tensor in the file, `{i}` standing for the layer.
        paths: the weights in our tree, e.g. `("blocks/attn/q/kernel",)`, where layers are stacked on axis 0. Several:
            the tensor holds them side by side along the last axis of ours.
        transpose: the file has [out, in] where ours is [in, out].
    """

    name: str
    paths: tuple[str, ...]
    transpose: bool = False


def gpt2_rules() -> tuple[Rule, ...]:
    """Its matrices ("Conv1D") are [in, out] like ours; q, k and v are one matrix."""

    def pair(name: str, path: str, matrix: bool) -> list[Rule]:
        weight = "kernel" if matrix else "scale"
        return [Rule(f"{name}.weight", (f"{path}/{weight}",)), Rule(f"{name}.bias", (f"{path}/bias",))]

    h = "transformer.h.{i}"
    fused = [
        Rule(f"{h}.attn.c_attn.{theirs}", tuple(f"blocks/attn/{x}/{ours}" for x in "qkv"))
        for theirs, ours in (("weight", "kernel"), ("bias", "bias"))
    ]
    return (
        Rule("transformer.wte.weight", ("embed/tokens",)),
        Rule("transformer.wpe.weight", ("embed/positions",)),
        *pair(f"{h}.ln_1", "blocks/norm1", False),
        *fused,
        *pair(f"{h}.attn.c_proj", "blocks/attn/o", True),
        *pair(f"{h}.ln_2", "blocks/norm2", False),
        *pair(f"{h}.mlp.c_fc", "blocks/mlp/up", True),
        *pair(f"{h}.mlp.c_proj", "blocks/mlp/down", True),
        *pair("transformer.ln_f", "final_norm", False),
        Rule("lm_head.weight", ("head/kernel",), transpose=True),
    )


def llama_rules() -> tuple[Rule, ...]:
    """The names that Llama, Qwen2 and Qwen3 share; torch's Linear is [out, in]."""
    layer = "model.layers.{i}"
    linear = {"self_attn.q_proj": "attn/q", "self_attn.k_proj": "attn/k", "self_attn.v_proj": "attn/v",
              "self_attn.o_proj": "attn/o", "mlp.gate_proj": "mlp/gate", "mlp.up_proj": "mlp/up",
              "mlp.down_proj": "mlp/down"}  # fmt: skip
    norms = {"input_layernorm": "norm1", "self_attn.q_norm": "attn/q_norm", "self_attn.k_norm": "attn/k_norm",
             "post_attention_layernorm": "norm2"}  # fmt: skip
    return (
        Rule("model.embed_tokens.weight", ("embed/tokens",)),
        *(Rule(f"{layer}.{theirs}.weight", (f"blocks/{ours}/scale",)) for theirs, ours in norms.items()),
        *(Rule(f"{layer}.{theirs}.weight", (f"blocks/{ours}/kernel",), True) for theirs, ours in linear.items()),
        *(Rule(f"{layer}.{theirs}.bias", (f"blocks/{ours}/bias",)) for theirs, ours in linear.items()),
        Rule("model.norm.weight", ("final_norm/scale",)),
        Rule("lm_head.weight", ("head/kernel",), True),
    )
