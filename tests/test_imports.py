"""What must load without jax, so that a launcher, a flow or a completion of the shell starts at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import jaxlm

ROOT = Path(__file__).parent.parent
LIGHT = [
    "jaxlm", "jaxlm.errors", "jaxlm.config", "jaxlm.presets", "jaxlm.cli", "jaxlm.metrics_log", "jaxlm.data.download",
    "jaxlm.data.storyworld", "jaxlm.data", "jaxlm.tokenizers", "jaxlm.stages.spec", "jaxlm.stages.store",
    "jaxlm.stages.plan", "jaxlm.stages.runner", "jaxlm.stages.runs", "jaxlm.stages.download", "jaxlm.stages.tokenize",
    "jaxlm.stages.tokenize_sft", *sorted(f"flows.{path.stem}" for path in (ROOT / "flows").glob("[!_]*.py")),
]  # fmt: skip
HEAVY = ["jax", "jaxlib", "flax", "optax", "orbax", "torch", "transformers", "matplotlib"]

PROGRAM = """
import importlib, json, sys
light, heavy = json.loads(sys.argv[1])
report = {}
for name in light:
    importlib.import_module(name)
    report[name] = [m for m in [*heavy, *([] if name.startswith("flows") else ["prefect"])] if m in sys.modules]
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def loaded() -> dict[str, list[str]]:
    """For each of LIGHT, in order and in one fresh process, the modules that had come along by then."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([LIGHT, HEAVY])],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", LIGHT)
def test_import_brings_no_heavy_library(loaded, name):
    assert loaded[name] == []


@pytest.mark.parametrize("name", jaxlm.__all__)
def test_public_name_resolves(name):
    assert getattr(jaxlm, name) is not None
    assert name in dir(jaxlm)


def test_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        jaxlm.trian  # noqa: B018


@pytest.mark.parametrize("config", ["jaxlm.preset('nano')", "jaxlm.ModelConfig()", "jaxlm.TrainConfig()"])
def test_a_configuration_is_no_leaf_before_any_model_is_loaded(config):
    program = f"import jax, jaxlm; c = {config}; print(jax.tree.leaves(c), jax.jit(lambda c, x: x + 1)(c, 2))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "[] 3\n", done.stderr
