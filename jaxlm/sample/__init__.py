"""Sampling and decoding: filters, the draw, `generate`, streams, beams, slots and speculation over a cache."""

from jaxlm.sample.answers import Generation
from jaxlm.sample.beam import Hypothesis, beam_search, beam_searches
from jaxlm.sample.decode import prepare
from jaxlm.sample.filters import filter_logits
from jaxlm.sample.generate import generate
from jaxlm.sample.options import Sampling
from jaxlm.sample.requests import Request
from jaxlm.sample.sampler import sample_token
from jaxlm.sample.serve import serve
from jaxlm.sample.speculative import Speculated, speculate
from jaxlm.sample.stream import Piece, stream

__all__ = [
    "Generation", "Hypothesis", "Piece", "Request", "Sampling", "Speculated", "beam_search", "beam_searches",
    "filter_logits", "generate", "prepare", "sample_token", "serve", "speculate", "stream",
]  # fmt: skip
