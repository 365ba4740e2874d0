from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import pytest

from jaxlm.config import TrainOptions
from jaxlm.errors import InputError
from jaxlm.stages.spec import Spec, canonical


def test_the_id_is_a_sha256_of_text_written_by_hand():
    spec = Spec("s", 2, {"b": 0.1, "a": [1, None, True]}, {"x": {"stage": "t", "id": "abc"}})
    text = '{"config":{"a":[1,null,true],"b":0.1},"inputs":{"x":["t","abc"]},"stage":"s","version":2}'
    assert spec.id == hashlib.sha256(text.encode()).hexdigest()[:12]
    assert spec.directory.as_posix() == f"store/s-{spec.id}"


def test_only_what_decides_enters_the_id():
    base = Spec("s", 1, {"a": 1}, {"x": {"stage": "t", "id": "abc"}})
    same = Spec("s", 1, {"a": 1}, {"x": {"stage": "t", "id": "abc"}}, {"log_every": 3}, "/elsewhere", "some.module")
    assert same.id == base.id
    others = [
        Spec("r", 1, {"a": 1}, {"x": {"stage": "t", "id": "abc"}}),
        Spec("s", 2, {"a": 1}, {"x": {"stage": "t", "id": "abc"}}),
        Spec("s", 1, {"a": 2}, {"x": {"stage": "t", "id": "abc"}}),
        Spec("s", 1, {"a": 1.0}, {"x": {"stage": "t", "id": "abc"}}),
        Spec("s", 1, {"a": 1}, {"y": {"stage": "t", "id": "abc"}}),
        Spec("s", 1, {"a": 1}, {"x": {"stage": "t", "id": "abd"}}),
        Spec("s", 1, {"a": 1}),
    ]
    assert len({spec.id for spec in [base, *others]}) == 1 + len(others)


def test_floats_keep_every_bit_and_order_does_not_matter():
    assert canonical({"b": 0.1 + 0.2, "a": 1e-3}) == '{"a":0.001,"b":0.30000000000000004}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical({"a": float("nan")})


def test_json_round_trip_keeps_the_id_and_finds_its_place():
    spec = Spec("s", 1, {"train": {"steps": 5}}, {}, {"train": {"log_every": 2}})
    again = Spec.from_json(json.loads(json.dumps(spec.to_json())), root="/data")
    assert again.id == spec.id
    assert again.directory.as_posix() == f"/data/store/s-{spec.id}"
    assert again.section("train", TrainOptions) == TrainOptions(steps=5, log_every=2)


def test_a_changed_spec_file_is_refused():
    values = Spec("s", 1, {"a": 1}).to_json()
    with pytest.raises(InputError, match="does not belong to the fields"):
        Spec.from_json(values | {"config": {"a": 2}}, where="spec.json")
    with pytest.raises(InputError, match=r"spec\.json: schema version 99, and this version of jaxlm reads 1"):
        Spec.from_json(values | {"schema": 99}, where="spec.json")
    with pytest.raises(InputError, match="the field 'inputs' is missing"):
        Spec.from_json({key: value for key, value in values.items() if key != "inputs"}, where="spec.json")


def test_the_frame_loads_no_jax_and_no_prefect():
    code = (
        "import sys, jaxlm.stages.runner, jaxlm.stages.plan, jaxlm.stages.process;"
        "print([name for name in ('jax', 'orbax', 'prefect', 'numpy') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
