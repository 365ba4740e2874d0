"""How positions enter: rotary angles (with the `llama3` stretching) and the fixed sinusoidal table."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import ModelConfig


def rotary_frequencies(cfg: ModelConfig) -> np.ndarray:
    """Angular frequency of each rotary pair, float32[h/2], radians per position.

    Source: Su et al., RoFormer (arXiv 2104.09864), eq. 15; the `llama3` stretching is that of the Llama 3.1 release:
    long wavelengths are divided by `factor`, short ones kept, those between interpolated.
    """
    h = cfg.d_head
    freqs = 1.0 / cfg.rope_theta ** (np.arange(0, h, 2, dtype=np.float64) / h)
    if cfg.rope_scaling is not None:
        s = cfg.rope_scaling
        wavelength = 2 * math.pi / freqs
        smooth = (s.original_max_len / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
        smooth = np.clip(smooth, 0.0, 1.0)
        freqs = (1 - smooth) * freqs / s.factor + smooth * freqs
    return freqs.astype(np.float32)


def rotary_tables(cfg: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines for `positions` int32[B, T], each float32[B, 1, T, h/2] (the 1 stands for the heads)."""
    angles = positions[:, None, :, None].astype(jnp.float32) * rotary_frequencies(cfg)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns x [B, H, T, h] by its positions, in the rotate-half form: pair i is (x[i], x[i + h/2])."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def sinusoidal(positions: jax.Array, d_model: int) -> jax.Array:
    """Fixed position vectors for `positions` int32[B, T] -> float32[B, T, D], sine and cosine interleaved.

    Source: Vaswani et al. (arXiv 1706.03762), section 3.5.
    """
    freqs = np.exp(np.arange(0, d_model, 2, dtype=np.float64) * (-math.log(10000.0) / d_model)).astype(np.float32)
    angles = positions[..., None].astype(jnp.float32) * freqs
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*positions.shape, d_model)
