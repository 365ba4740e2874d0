from __future__ import annotations

import math

import pytest

from jaxlm.errors import InputError
from jaxlm.sample import Sampling


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_k", True),
        ("top_p", 1.01),
        ("top_p", -0.01),
        ("top_p", math.nan),
        ("min_p", 2),
        ("typical_p", 1.5),
        ("typical_p", math.nan),
        ("no_repeat_ngram", -1),
        ("no_repeat_ngram", 2.0),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("presence_penalty", math.inf),
        ("frequency_penalty", None),
        ("min_new_tokens", -1),
        ("seed", -1),
        ("seed", 2**32),
        ("logit_bias", {3: math.nan}),
        ("logit_bias", ((-1, 2.0),)),
        ("banned_ids", (1.5,)),
        ("temperature", 1e39),  # infinite in float32, which they become
        ("temperature", 10**400),
        ("frequency_penalty", -1e39),
        ("logit_bias", {3: 1e39}),
        ("repetition_penalty", 1e-50),  # 0 in float32
    ],
)
def test_a_value_out_of_range_is_named(field, value):
    with pytest.raises(InputError, match=rf"^sampling\.{field}.*found"):
        Sampling(**{field: value})


def test_edges_are_allowed_and_options_are_hashable():
    s = Sampling(temperature=0, top_k=0, top_p=0, min_p=1, seed=0, logit_bias={3: 1.5, 4: -2}, banned_ids=[4, 9])
    assert hash(s) == hash(Sampling(0, 0, 0, 1, logit_bias=((3, 1.5), (4, -2)), banned_ids=(4, 9), seed=0))
    assert s.edits == {3: 1.5, 4: -math.inf, 9: -math.inf}
