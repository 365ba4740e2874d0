"""A request in other batches. Compiled with all optimizations, which is where XLA treats rows differently."""

from __future__ import annotations

import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.sample import Sampling, generate, prepare

V = 60
# D = 256: XLA computes a one-row product differently from a row of several only from D = 128 on.
CFG = ModelConfig(vocab_size=V, n_layers=1, d_model=256, n_heads=4, n_kv_heads=2, max_seq_len=64, tie_embeddings=False)


def test_a_request_is_the_same_alone_in_any_slot_with_any_neighbours(random_params):
    params = prepare(CFG, random_params(CFG, 0.1))
    rng = np.random.default_rng(1)
    prompt, *others = [rng.integers(0, V, n).tolist() for n in (11, 3, 16, 7, 1, 12, 9)]
    mine = Sampling(temperature=0.9, top_p=0.95, typical_p=0.95, no_repeat_ngram=3, seed=5)

    def at(slot, neighbours, options):
        batch = [*neighbours[:slot], prompt, *neighbours[slot:]]
        sampling = [options] * slot + [mine] + [options] * (len(neighbours) - slot)
        return generate(CFG, params, batch, sampling=sampling, max_new_tokens=16, slots=4)[slot]

    alone = at(0, [], Sampling(0))
    assert len(set(alone.tokens)) > 4  # a real draw
    for slot, neighbours, options in (
        (3, others[:3], Sampling(0)),
        (1, others[2:5], Sampling()),
        (5, others, Sampling(top_k=3, repetition_penalty=1.5)),
    ):
        assert at(slot, neighbours, options) == alone  # tokens and the bits of their log-probabilities
