"""What a run says about its cluster and its gate, refused when the configuration is read."""

from __future__ import annotations

from typing import get_args

import pytest

from jaxlm._frozen import validated
from jaxlm.config import RunConfig
from jaxlm.errors import InputError
from jaxlm.evaluate.accuracy import TypeAccuracy
from jaxlm.evaluate.report import DataInfo, ModelInfo, to_json
from jaxlm.launch_config import FIGURES, OF_A_TYPE, OF_SFT, PARTS, Stage
from jaxlm.stages.plan import VERSIONS

CLUSTER = {"image": "jaxlm:1", "volume_claim": "store"}
TEXT = {"data": {"source": "shakespeare"}, "sft": {"enabled": False}}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"stages": ["pretran"]}, "launch.stages.0: .*'pretrain'.*found 'pretran'"),
        ({"kind": "slurm", "stages": []}, "^launch.stages: empty"),
        (
            {"kind": "slurm", "slurm": {"template": "absent.sbatch"}},
            "^launch.slurm.template=absent.sbatch: no such file",
        ),
        ({"kind": "kubernetes"}, "^launch.kubernetes.image: empty"),
        ({"kind": "kubernetes", "kubernetes": {"image": "jaxlm:1"}}, "^launch.kubernetes.volume_claim: empty"),
        ({"kind": "kubernetes", "kubernetes": CLUSTER | {"template": "absent"}}, "^launch.kubernetes.template=absent"),
        ({"kubernetes": {"image": "my image"}}, "^launch.kubernetes.image: "),
        ({"kubernetes": {"accelerator": "nvidia.com/gpu"}}, "^launch.kubernetes: .*accelerator_count=0 go together"),
        ({"kubernetes": {"accelerator_count": 2}}, "^launch.kubernetes: accelerator='' and accelerator_count=2"),
        ({"kubernetes": {"accelerator": "gpu", "accelerator_count": 1}}, "^launch.kubernetes.accelerator: "),
        ({"kubernetes": {"memory": "16GB"}}, "^launch.kubernetes.memory: .*found '16GB'"),
        ({"kubernetes": {"cpu": "four"}}, "^launch.kubernetes.cpu: .*found 'four'"),
    ],
)
def test_a_launch_that_cannot_work(values, words):
    with pytest.raises(InputError, match=words) as caught:
        validated(RunConfig, {"launch": values})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"kind": "kubernetes", "kubernetes": CLUSTER | {"accelerator": "google.com/tpu", "accelerator_count": 4}},
        {"kubernetes": {"cpu": "500m", "memory": "1.5Gi"}},
        {"kind": "slurm", "stages": ["tokenize", "evaluate"]},
        {"kubernetes": {"template": "absent"}},  # of the launcher that is not used
    ],
)
def test_a_launch_that_can(values):
    validated(RunConfig, {"launch": values})


@pytest.mark.parametrize(
    ("bound", "more", "words"),
    [
        ("val_los<=1", {}, "val_los: no such figure; did you mean val_loss, found"),
        ("quality<=1", {}, "quality: no such figure; the evaluation has val_loss, perplexity"),
        ("val_loss.after<=1", {}, "val_loss.after: no such figure"),
        ("seconds.pretran<=60", {}, r"expected seconds\.<one of download, "),
        ("model.size<=60", {}, r"expected model\.<one of parameters>"),
        ("accuracy_by_type.who<=1", {}, r"expected accuracy_by_type\.<type>\.<one of n, before, after"),
        ("accuracy_by_type.felt.after>0", {}, "the types of question are where, with, hue, got"),  # of the rich world
        ("accuracy_by_type.where.after>0", {"sft": {"source": "instructions"}}, "the types of question are all"),
        ("floor<=1", TEXT, "floor is known of data.source=storyworld alone"),
        ("accuracy_after>0.5", TEXT, r"accuracy_after is measured with sft\.enabled=true"),
    ],
)
def test_a_bound_that_no_evaluation_can_meet(bound, more, words):
    with pytest.raises(InputError, match=rf"^gate\.bounds: .*{words}") as caught:
        validated(RunConfig, {"gate": {"bounds": [bound]}, **more})
    assert "\n" not in str(caught.value)


def test_bounds_on_what_there_is():
    bounds = ["val_loss<=1", "accuracy_by_type.felt.after>0.5", "seconds.pretrain<600", "data.val_tokens>=1000"]
    validated(RunConfig, {"gate": {"bounds": bounds}, "data": {"world": "rich"}})


def test_the_names_are_those_of_the_stages_and_of_the_report():
    """Said twice, so that a configuration loads neither; here they are compared."""
    assert get_args(Stage) == tuple(VERSIONS)
    figures = to_json({"name": "x", "val_loss": 1.0, "perplexity": 2.7})
    others = {"schema", "name", "seconds", "accuracy_by_type"}
    assert set(FIGURES) == set(figures) - others
    assert set(OF_SFT) == {name for name in figures if name.startswith("accuracy")}
    assert set(OF_A_TYPE) == set(TypeAccuracy.__annotations__) - {"interval", "baselines"}  # no numbers
    assert set(PARTS["data"]) == set(DataInfo.__annotations__) - {"source", "tokenizer"}
    assert set(PARTS["model"]) == set(ModelInfo.__annotations__) - {"shape"}
