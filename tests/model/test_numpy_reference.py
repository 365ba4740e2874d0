"""The models against plain numpy in float64, written from the papers and not from `jaxlm.model`."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import model
from jaxlm.config import ModelConfig, RopeScaling
from jaxlm.model.attention import attend
from jaxlm.model.blocks import Norm
from jaxlm.model.positions import rotary_frequencies, rotary_tables, rotate, sinusoidal

QUICK_COMPILE = True


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def layer_norm(x, scale, bias, eps):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * scale + bias


def rms_norm(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def gelu_tanh(x):  # Hendrycks & Gimpel (arXiv 1606.08415), section 2
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def silu(x):
    return x / (1 + np.exp(-x))


def causal_attention(q, k, v):
    """One head: q, k, v [T, h] -> [T, h]; a loop over places instead of a mask."""
    out = np.zeros_like(q)
    for t in range(len(q)):
        out[t] = softmax(q[t] @ k[: t + 1].T / math.sqrt(q.shape[-1])) @ v[: t + 1]
    return out


def turned(x, theta, frequencies=None):
    """Rotary positions for x [T, h] by complex numbers: pair i is (x[i], x[i + h/2]) (the Llama release's layout)."""
    half = x.shape[-1] // 2
    if frequencies is None:
        frequencies = np.array([theta ** (-2 * i / x.shape[-1]) for i in range(half)])
    z = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * np.arange(len(x))[:, None] * frequencies)
    return np.concatenate([z.real, z.imag], -1)


def heads_of(cfg, p, x, turn=lambda y: y, norm=lambda y, name: y):
    """Every query head attends to the key head of its group; outputs side by side, [T, H h].

    With `key_offset` each token is found by the key of the token before it, the first by zeros.
    """
    h, group = cfg.d_head, cfg.n_heads // cfg.kv_heads

    def project(name):
        return x @ p[name]["kernel"] + p[name].get("bias", 0)

    q, k, v = (project(name) for name in "qkv")
    outs = []
    for i in range(cfg.n_heads):
        j = i // group
        qi, kj, vj = q[:, i * h : (i + 1) * h], k[:, j * h : (j + 1) * h], v[:, j * h : (j + 1) * h]
        kj = turn(norm(kj, "k_norm"))
        if cfg.key_offset:
            kj = np.concatenate([np.zeros_like(kj[:1]), kj[:-1]])
        outs.append(causal_attention(turn(norm(qi, "q_norm")), kj, vj))
    return np.concatenate(outs, -1)


def linear(p, x):
    return x @ p["kernel"] + p.get("bias", 0)


def gpt2(cfg, p, tokens):
    """Radford et al. 2019: pre-norm, learned positions, tied head."""
    x = p["embed"]["tokens"][tokens] + p["embed"]["positions"][: len(tokens)]
    for i in range(cfg.n_layers):
        b = jax.tree.map(lambda w, i=i: w[i], p["blocks"])
        y = layer_norm(x, b["norm1"]["scale"], b["norm1"]["bias"], 1e-5)
        x = x + linear(b["attn"]["o"], heads_of(cfg, b["attn"], y))
        y = layer_norm(x, b["norm2"]["scale"], b["norm2"]["bias"], 1e-5)
        x = x + linear(b["mlp"]["down"], gelu_tanh(linear(b["mlp"]["up"], y)))
    x = layer_norm(x, p["final_norm"]["scale"], p["final_norm"]["bias"], 1e-5)
    return x @ p["embed"]["tokens"].T


def llama(cfg, p, tokens):
    """Touvron et al. (arXiv 2302.13971) with grouped queries; for Qwen3 also an RMS norm on each query and key head."""
    x = p["embed"]["tokens"][tokens]
    frequencies = llama3_frequencies(cfg.d_head, cfg.rope_theta, cfg.rope_scaling) if cfg.rope_scaling else None
    for i in range(cfg.n_layers):
        b = jax.tree.map(lambda w, i=i: w[i], p["blocks"])

        def qk_norm(y, name, attn=b["attn"]):
            return rms_norm(y, attn[name]["scale"], cfg.norm_eps) if cfg.qk_norm else y

        y = rms_norm(x, b["norm1"]["scale"], cfg.norm_eps)
        y = heads_of(cfg, b["attn"], y, lambda z: turned(z, cfg.rope_theta, frequencies), qk_norm)
        x = x + linear(b["attn"]["o"], y)
        y = rms_norm(x, b["norm2"]["scale"], cfg.norm_eps)
        x = x + linear(b["mlp"]["down"], silu(linear(b["mlp"]["gate"], y)) * linear(b["mlp"]["up"], y))
    return rms_norm(x, p["final_norm"]["scale"], cfg.norm_eps) @ p["embed"]["tokens"].T


def lesson(cfg, p, tokens):
    """The source notebooks' model: norms after the sums, ReLU, embeddings times sqrt(D) where positions are fixed."""
    x = p["embed"]["tokens"][tokens]
    if cfg.position == "sinusoidal":
        x = x * math.sqrt(cfg.d_model) + sinusoids(len(tokens), cfg.d_model)
    else:
        x = x + p["embed"]["positions"][: len(tokens)]
    for i in range(cfg.n_layers):
        b = jax.tree.map(lambda w, i=i: w[i], p["blocks"])
        x = x + linear(b["attn"]["o"], heads_of(cfg, b["attn"], x))
        x = layer_norm(x, b["norm1"]["scale"], b["norm1"]["bias"], 1e-5)
        x = x + linear(b["mlp"]["down"], np.maximum(linear(b["mlp"]["up"], x), 0))
        x = layer_norm(x, b["norm2"]["scale"], b["norm2"]["bias"], 1e-5)
    if cfg.final_norm:
        x = layer_norm(x, p["final_norm"]["scale"], p["final_norm"]["bias"], 1e-5)
    return linear(p["head"], x)


def nano(cfg, p, tokens):
    """Squared ReLU, normalised queries and keys, gainless norms, and the embeddings of the tokens before mixed in."""
    table = p["embed"]["tokens"]
    x = table[tokens].copy()
    for j, gain in enumerate(p["embed"]["mix"], start=1):
        x[j:] += gain * table[tokens[:-j]]
    for i in range(cfg.n_layers):
        b = jax.tree.map(lambda w, i=i: w[i], p["blocks"])

        def qk_norm(y, name, attn=b["attn"]):
            return rms_norm(y, attn.get(name, {}).get("scale", 1.0), 1e-5)

        y = heads_of(cfg, b["attn"], rms_norm(x, 1.0, 1e-5), lambda z: turned(z, 10000.0), qk_norm)
        x = x + linear(b["attn"]["o"], y)
        y = np.maximum(linear(b["mlp"]["up"], rms_norm(x, 1.0, 1e-5)), 0) ** 2
        x = x + linear(b["mlp"]["down"], y)
    return 15 * np.tanh(linear(p["head"], rms_norm(x, 1.0, 1e-5)) / 15)


def sinusoids(length, d):
    """Vaswani et al. (arXiv 1706.03762), section 3.5, term by term."""
    table = np.zeros((length, d))
    for position in range(length):
        for i in range(d // 2):
            angle = position / 10000 ** (2 * i / d)
            table[position, 2 * i], table[position, 2 * i + 1] = math.sin(angle), math.cos(angle)
    return table


def llama3_frequencies(h, theta, scaling):
    """The Llama 3.1 release (`apply_scaling`): by wavelength, kept, divided, or between the two."""
    out = []
    for i in range(h // 2):
        f = theta ** (-2 * i / h)
        wavelength = 2 * math.pi / f
        if wavelength < scaling.original_max_len / scaling.high_freq_factor:
            out.append(f)
        elif wavelength > scaling.original_max_len / scaling.low_freq_factor:
            out.append(f / scaling.factor)
        else:
            smooth = (scaling.original_max_len / wavelength - scaling.low_freq_factor) / (
                scaling.high_freq_factor - scaling.low_freq_factor
            )
            out.append((1 - smooth) * f / scaling.factor + smooth * f)
    return np.array(out)


REFERENCES = {
    "gpt2": gpt2, "llama": llama, "qwen3": llama, "nano": nano, "lesson_learned": lesson, "lesson_sinusoidal": lesson,
}  # fmt: skip


@pytest.mark.parametrize("name", REFERENCES)
def test_model_equals_the_reference(models, name, weights, tokens):
    cfg = models[name]
    exact = jax.tree.map(lambda w: np.asarray(w, np.float64), weights(cfg))
    # The very call of test_forward.py, so that it is compiled once for both.
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    out = jax.jit(model.apply)(cfg, weights(cfg), tokens, positions=positions, segment_ids=np.ones_like(tokens))
    expected = np.stack([REFERENCES[name](cfg, exact, row) for row in tokens])
    np.testing.assert_allclose(out, expected, rtol=2e-4, atol=2e-4 * np.abs(expected).max())


def test_bigram_logits_are_the_rows_of_its_table(models, weights, tokens):
    params = weights(models["bigram"])
    np.testing.assert_array_equal(model.apply(models["bigram"], params, tokens), params["bigram"]["table"][tokens])


# The pieces


@pytest.mark.parametrize("scale", [True, False])
def test_norms(scale):
    x = np.random.default_rng(0).normal(2, 3, size=(4, 6)).astype(np.float32)
    gain, shift = np.linspace(0.5, 2, 6), np.linspace(-1, 1, 6)
    params = {"scale": jnp.asarray(gain, jnp.float32)} if scale else {}
    out = Norm("rms", 0.1, scale, False).apply({"params": params}, x)
    np.testing.assert_allclose(out, rms_norm(x, gain if scale else 1, 0.1), rtol=1e-5)
    params |= {"bias": jnp.asarray(shift, jnp.float32)}
    out = Norm("layer", 0.1, scale, True).apply({"params": params}, x)
    np.testing.assert_allclose(out, layer_norm(x, gain if scale else 1, shift, 0.1), rtol=1e-4, atol=1e-5)


def test_norm_of_bfloat16_is_computed_in_float32():
    x = jnp.asarray([[256.0, 257.0, 258.0, 260.0]], jnp.bfloat16)  # 257 rounds to 256: what is left must be exact
    out = Norm("layer", 1e-5, False, False).apply({}, x)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out, layer_norm(np.asarray(x, np.float64), 1, 0, 1e-5), rtol=1 / 128)


def test_grouped_query_attention_against_one_head_at_a_time():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, n, 5, 4)).astype(np.float32) for n in (4, 2, 2))
    out = attend(q, k, v, np.tril(np.ones((1, 5, 5), bool)))
    for b in range(2):
        for i in range(4):
            expected = causal_attention(q[b, i].astype(np.float64), k[b, i // 2], v[b, i // 2])
            np.testing.assert_allclose(out[b, i], expected, rtol=1e-5, atol=1e-6)


def test_a_query_that_sees_nothing_gives_the_mean_and_not_nan():
    v = np.arange(6.0, dtype=np.float32).reshape(1, 1, 3, 2)
    out = attend(v, v, v, np.zeros((1, 3, 3), bool))
    np.testing.assert_allclose(out[0, 0], np.broadcast_to(v[0, 0].mean(0), (3, 2)), rtol=1e-6)


ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0), "gelu": gelu, "gelu_tanh": gelu_tanh, "relu2": lambda x: np.maximum(x, 0) ** 2,
}  # fmt: skip


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_mlp_activations(kind):
    from jaxlm.model.blocks import Mlp

    eye = {"kernel": jnp.eye(5)}
    x = np.linspace(-3, 3, 5, dtype=np.float32)[None]
    out = Mlp(ModelConfig(d_model=5, n_heads=1, d_ff=5, mlp=kind, position="none")).apply(
        {"params": {"up": eye, "down": eye}}, x
    )
    np.testing.assert_allclose(out, ACTIVATIONS[kind](x.astype(np.float64)), rtol=1e-5, atol=1e-6)


def test_exact_and_tanh_gelu_differ():
    """So that the test above could tell them apart."""
    x = np.array([-1.5, 1.5])  # in the grid above
    assert (np.abs(gelu(x) - gelu_tanh(x)) > 1e-4).all()


# Positions


def test_sinusoidal_table_is_the_formula():
    positions = np.array([[0, 1, 2, 3], [100, 7, 4999, 5]], np.int32)
    np.testing.assert_allclose(sinusoidal(positions, 10), sinusoids(5000, 10)[positions], atol=5e-4)
    # By hand, D = 4: sin 1, cos 1, sin 0.01, cos 0.01.
    one = sinusoidal(np.array([[1]], np.int32), 4)[0, 0]
    np.testing.assert_allclose(one, [0.841471, 0.540302, 0.0099998, 0.99995], atol=1e-6)


def test_rotary_frequencies_by_hand():
    """h = 4, theta = 10000: 1 and 1/100."""
    cfg = ModelConfig(d_model=8, n_heads=2)
    np.testing.assert_allclose(rotary_frequencies(cfg), [1.0, 0.01], rtol=1e-6)


def test_llama3_stretching_by_hand():
    """The three cases of the Llama 3.1 formula at theta = 10^8, h = 8, factor 8, original length 8192.

    Frequencies 1, 10^-2, 10^-4, 10^-6; wavelengths 6.28, 628, 62,832, 6,283,185. Those below 8192 / 4 = 2048 are kept,
    those above 8192 divided by 8.
    """
    cfg = ModelConfig(d_model=16, n_heads=2, rope_theta=1e8, rope_scaling=RopeScaling())
    np.testing.assert_allclose(rotary_frequencies(cfg), [1.0, 1e-2, 1.25e-5, 1.25e-7], rtol=1e-6)
    # Between: theta = 4 * 10^6, h = 4 gives 1 and 0.0005, wavelength 12,566; with original length 32768 that is 2.6076
    # of a turn, smooth (2.6076 - 1) / 3 = 0.53586, frequency (0.46414 / 8 + 0.53586) * 0.0005 = 0.00029694.
    cfg = ModelConfig(d_model=8, n_heads=2, rope_theta=4e6, rope_scaling=RopeScaling(original_max_len=32768))
    np.testing.assert_allclose(rotary_frequencies(cfg), [1.0, 0.00029694], rtol=1e-4)


def test_llama3_stretching_of_the_released_shape():
    from jaxlm.presets import preset

    cfg = preset("llama-3.2-1b")
    expected = llama3_frequencies(64, 500_000.0, cfg.rope_scaling)
    np.testing.assert_allclose(rotary_frequencies(cfg), expected, rtol=1e-6)
    plain = rotary_frequencies(cfg.replace(rope_scaling=None))
    ratio = plain / rotary_frequencies(cfg)
    assert ratio[0] == 1
    np.testing.assert_allclose(ratio[-1], 32, rtol=1e-5)
    assert ((ratio > 1.01) & (ratio < 31.9)).any()


def test_rotation_turns_pairs_and_keeps_relative_angles():
    cfg: Any = ModelConfig(d_model=8, n_heads=1)
    x = np.random.default_rng(0).normal(size=(1, 1, 6, 8)).astype(np.float32)
    out = rotate(x, *rotary_tables(cfg, np.arange(6)[None]))
    np.testing.assert_allclose(out[0, 0], turned(x[0, 0].astype(np.float64), 10000.0), rtol=1e-5, atol=1e-5)
    q, k = x[:, :, :1], x[:, :, 1:2]

    def product(m, n):
        at = [rotate(y, *rotary_tables(cfg, np.array([[place]]))) for y, place in ((q, m), (k, n))]
        return float((at[0] * at[1]).sum())

    assert product(3, 1) == pytest.approx(product(103, 101), abs=1e-4)
    assert abs(product(3, 1) - product(3, 2)) > 1e-2
