"""Sampling and decoding: logit filters, the draw, penalties, and `generate` over a key/value cache."""

from jaxlm.sample.decode import prepare
from jaxlm.sample.filters import filter_logits
from jaxlm.sample.generate import Generation, generate
from jaxlm.sample.options import Sampling
from jaxlm.sample.sampler import sample_token

__all__ = ["Generation", "Sampling", "filter_logits", "generate", "prepare", "sample_token"]
