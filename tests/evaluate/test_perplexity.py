from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import ModelConfig
from jaxlm.data import RowSet, write_stream
from jaxlm.errors import InputError
from jaxlm.evaluate.perplexity import bits_per_byte, eval_step, perplexity, split_loss
from jaxlm.model import init

V, T = 11, 8
BIGRAM = ModelConfig(kind="bigram", vocab_size=V)
TRANSFORMER = ModelConfig(vocab_size=V, n_layers=1, d_model=16, n_heads=2, max_seq_len=T)


def stream(folder: Path, n_ids: int, seed: int = 0) -> tuple[np.ndarray, RowSet]:
    ids = np.random.default_rng(seed).integers(0, V, n_ids)
    index = write_stream(folder, ids, name="val", seq_len=T, vocab_size=V, tokenizer_fingerprint="f")
    return ids, RowSet(folder, index)


def bigram_params(seed: int = 1) -> Any:
    table = np.random.default_rng(seed).normal(size=(V, V)).astype(np.float32)
    return {"bigram": {"table": jnp.asarray(table)}}


def bigram_nll(params: Any, ids: np.ndarray) -> np.ndarray:
    """float64 by the definition: -log softmax(table[previous])[next] for each neighbouring pair."""
    table = np.asarray(params["bigram"]["table"], np.float64)
    log_probs = table - np.log(np.exp(table).sum(axis=1, keepdims=True))
    return -log_probs[ids[:-1], ids[1:]]


@pytest.mark.parametrize("n_ids", [41, 42, 47, 5])  # whole windows; ragged tails; less than one window
@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
def test_every_target_is_scored_once(tmp_path: Path, n_ids: int, batch_size: int) -> None:
    ids, rows = stream(tmp_path, n_ids)
    params = bigram_params()
    found = split_loss(BIGRAM, params, rows, batch_size)
    expected = bigram_nll(params, ids)
    assert found.tokens == n_ids - 1 == rows.n_targets
    assert found.nats == pytest.approx(expected.sum(), rel=1e-6)
    assert found.loss == pytest.approx(expected.mean(), rel=1e-6)


def test_a_uniform_model_pays_the_log_of_the_vocabulary(tmp_path: Path) -> None:
    _, rows = stream(tmp_path, 60)
    params = jax.tree.map(jnp.zeros_like, init(TRANSFORMER, jax.random.key(0)))
    assert split_loss(TRANSFORMER, params, rows, 3).loss == pytest.approx(math.log(V), rel=1e-6)


def test_the_batch_size_does_not_change_the_figure_of_a_transformer(tmp_path: Path) -> None:
    _, rows = stream(tmp_path, 8 * T + 4)
    params = init(TRANSFORMER, jax.random.key(0))
    losses = [split_loss(TRANSFORMER, params, rows, size).loss for size in (1, 4, 9)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    assert split_loss(TRANSFORMER, params, rows, 4, chunk=5).loss == pytest.approx(losses[0], rel=1e-6)


def test_one_compile_serves_all_batches(tmp_path: Path) -> None:
    _, rows = stream(tmp_path, 7 * T + 1)
    cfg = BIGRAM.replace(max_seq_len=99)  # a configuration that no other test has compiled
    before = eval_step._cache_size()  # type: ignore[attr-defined]
    split_loss(cfg, bigram_params(), rows, 3)  # 7 rows: batches of 3, 3 and 1
    assert eval_step._cache_size() - before == 1  # type: ignore[attr-defined]


def test_masked_targets_do_not_reach_the_sum_even_when_not_finite() -> None:
    params = bigram_params()
    params["bigram"]["table"] = params["bigram"]["table"].at[0].set(jnp.nan)
    batch = {
        "tokens": jnp.array([[1, 2, 0, 0]]),
        "targets": jnp.array([[2, 3, 0, 0]]),
        "loss_mask": jnp.array([[1.0, 1.0, 0.0, 0.0]]),
    }
    nats, count = eval_step(BIGRAM, params, batch)
    assert count == 2
    assert nats == pytest.approx(bigram_nll(params, np.array([1, 2, 3])).sum(), rel=1e-6)


def test_max_rows_spreads_over_the_split(tmp_path: Path) -> None:
    ids, rows = stream(tmp_path, 10 * T + 1)
    params = bigram_params()
    found = split_loss(BIGRAM, params, rows, 2, max_rows=3)
    expected = sum(bigram_nll(params, ids[r * T : r * T + T + 1]).sum() for r in (0, 3, 6))  # floor(i * 10 / 3)
    assert found.tokens == 3 * T
    assert found.nats == pytest.approx(expected, rel=1e-6)
    assert split_loss(BIGRAM, params, rows, 2, max_rows=99).tokens == 10 * T


def test_nothing_to_score_is_an_error() -> None:
    class Empty:
        n_rows = 1

        def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
            shape = (len(indices), T)
            return {
                "tokens": np.zeros(shape, np.int32),
                "targets": np.zeros(shape, np.int32),
                "loss_mask": np.zeros(shape),
            }

    with pytest.raises(InputError, match="no token to score"):
        split_loss(BIGRAM, bigram_params(), Empty(), 4)  # type: ignore[arg-type]


def test_perplexity_and_bits_per_byte() -> None:
    assert perplexity(math.log(50257)) == pytest.approx(50257)
    assert perplexity(1e6) == math.inf
    assert bits_per_byte(math.log(256) * 10, 10) == pytest.approx(8.0)  # a uniform guess of each byte is 8 bits
    with pytest.raises(ValueError, match="found 0"):
        bits_per_byte(1.0, 0)
