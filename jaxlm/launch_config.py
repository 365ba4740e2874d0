"""Options of a run that decide where its stages run and what happens to their result. Loads no jax.

None of them decides what is computed, so none is part of a stage's identity.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Literal, Self, get_args

from pydantic import field_validator, model_validator

from jaxlm._frozen import Frozen, NonNegative, Positive, cosmetic

BOUND = re.compile(r"\s*([A-Za-z0-9_.]+)\s*(<=|>=|<|>)\s*([-+0-9.eE]+)\s*")

Stage = Literal["download", "tokenize", "tokenize_sft", "pretrain", "sft", "evaluate"]

# What an evaluation measures, by where it is in report.json.
OF_STORYWORLD = ("floor", "above_floor", "order5_loss", "order5_above_floor")
OF_SFT = ("accuracy_before", "accuracy_after", "accuracy_by_type")
FIGURES = ("val_loss", "perplexity", "bits_per_byte", *OF_STORYWORLD, "accuracy_before", "accuracy_after")
PARTS = {
    "seconds": get_args(Stage),
    "model": ("parameters",),
    "data": ("chars", "tokens", "stories", "val_tokens", "val_bytes", "vocab_size"),
}
OF_A_TYPE = ("n", "before", "after", "best_baseline", "ratio")  # accuracy_by_type.<type>.…

# Kubernetes' quantities, such as 500m, 1.5 and 16Gi.
_QUANTITY = r"^\d+(\.\d+)?(m|k|[MGTPE]|[KMGTPE]i)?$"


class SlurmConfig(Frozen):
    """How a stage is asked of Slurm."""

    partition: str = cosmetic("", description="queue; empty: the cluster's default")
    account: str = cosmetic("", description="whom the time is charged to; empty: the default")
    nodes: Positive = cosmetic(1, gt=0, description="machines of one job")
    cpus_per_task: Positive = cosmetic(4, gt=0, description="cores for each process")
    gpus_per_task: NonNegative = cosmetic(0, ge=0, description="accelerators for each process")
    time_limit: str = cosmetic(
        "24:00:00", pattern=r"^(\d+-)?\d+(:\d\d){0,2}$", description="longest time of a job; training then continues"
    )
    warn_seconds: Positive = cosmetic(90, gt=0, description="how long before the limit a training is told to save")
    options: tuple[str, ...] = cosmetic((), description="further #SBATCH lines, such as --constraint=a100")
    setup: tuple[str, ...] = cosmetic((), description="shell lines before the stage, such as . venv/bin/activate")
    template: str | None = cosmetic(None, description="a batch script of your own in place of the built-in template")
    poll_seconds: float = cosmetic(15.0, gt=0, description="time between two looks at a job")
    kill_wait: float = cosmetic(40.0, gt=0, description="seconds that Slurm takes to end a job (its KillWait)")


class KubernetesConfig(Frozen):
    """How a stage is asked of a Kubernetes cluster that has JobSet."""

    api: str = cosmetic("", description="URL, such as that of kubectl proxy; empty: from inside a pod of the cluster")
    namespace: str = cosmetic("default", pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", description="where jobs live")
    image: str = cosmetic("", pattern=r"^\S*$", description="the container image with jaxlm in it")
    volume_claim: str = cosmetic("", description="the shared volume (ReadWriteMany) that holds the store")
    mount_path: str = cosmetic("/jaxlm", pattern=r"^/", description="where the volume is, here and in the pods")
    cpu: str = cosmetic("4", pattern=_QUANTITY, description="cores for each process")
    memory: str = cosmetic("16Gi", pattern=_QUANTITY, description="memory for each process")
    accelerator: str = cosmetic(
        "", pattern=r"^([a-z0-9.-]+/[A-Za-z0-9._-]+)?$", description="resource, such as nvidia.com/gpu, google.com/tpu"
    )
    accelerator_count: NonNegative = cosmetic(0, ge=0, description="accelerators for each process")
    node_selector: tuple[str, ...] = cosmetic((), description="label=value lines that choose the machines")
    queue: str = cosmetic("", description="Kueue's local queue; empty: none")
    service_account: str = cosmetic("", description="of the pods; empty: the namespace's default")
    template: str | None = cosmetic(None, description="a manifest of your own in place of the built-in template")
    poll_seconds: float = cosmetic(5.0, gt=0, description="time between two looks at a job")

    @field_validator("node_selector")
    @classmethod
    def _labels(cls, lines: tuple[str, ...]) -> tuple[str, ...]:
        for line in lines:
            if not line.partition("=")[2]:
                raise ValueError(f"expected label=value, found {line!r}")
        return lines

    @model_validator(mode="after")
    def _accelerator_fits(self) -> Self:
        if bool(self.accelerator) != bool(self.accelerator_count):
            raise ValueError(
                f"accelerator={self.accelerator!r} and accelerator_count={self.accelerator_count} go together; set both"
            )
        return self


class LaunchConfig(Frozen):
    """Where the processes of the stages run."""

    kind: Literal["local", "slurm", "kubernetes"] = cosmetic("local", description="what starts the stages' processes")
    stages: tuple[Stage, ...] = cosmetic(
        ("pretrain", "sft", "evaluate"), description="stages that go to the cluster; the others run where the flow does"
    )
    processes: Positive = cosmetic(1, gt=0, description="processes that pretrain together, data-parallel")
    grace_seconds: float = cosmetic(
        25.0, gt=0, description="for saving, between asking a stage to end and ending it (Prefect's own grace: 30)"
    )
    timeout_hours: float = cosmetic(
        0.0, ge=0, description="longest time of one stage, its wait in a queue included; 0: no limit"
    )
    slurm: SlurmConfig = cosmetic(SlurmConfig(), description="with kind=slurm")
    kubernetes: KubernetesConfig = cosmetic(KubernetesConfig(), description="with kind=kubernetes")

    @model_validator(mode="after")
    def _cluster_is_described(self) -> Self:
        if self.kind == "local":
            return self
        if not self.stages:
            raise ValueError(f"launch.stages: empty, so that nothing would go to launch.kind={self.kind}; name some")
        if self.kind == "kubernetes":
            for field in ("image", "volume_claim"):
                if not getattr(self.kubernetes, field):
                    raise ValueError(f"launch.kubernetes.{field}: empty, and launch.kind=kubernetes needs it; set it")
        template = self.slurm.template if self.kind == "slurm" else self.kubernetes.template
        if template is not None and not Path(template).is_file():
            raise ValueError(f"launch.{self.kind}.template={template}: no such file; correct the path")
        return self


class GateConfig(Frozen):
    """What the evaluation must show before anything is published."""

    bounds: tuple[str, ...] = cosmetic((), description="metric bounds, such as val_loss<=1.6 or accuracy_after>=0.9")

    @field_validator("bounds")
    @classmethod
    def _readable(cls, bounds: tuple[str, ...]) -> tuple[str, ...]:
        for bound in bounds:
            match = BOUND.fullmatch(bound)
            try:
                float(match[3] if match else "")
            except ValueError:
                raise ValueError(f"expected metric<=number (or <, >=, >), found {bound!r}") from None
            _check_figure(figure_of(bound))
        return bounds


class PublishConfig(Frozen):
    """Where a finished run is exported to."""

    to: str | None = cosmetic(None, description="a directory or bucket (file, s3://…, gs://…); empty: not published")
    form: Literal["jaxlm", "hf"] = cosmetic(
        "jaxlm",
        description="of what goes there; jaxlm: the model's stage as it is; hf: safetensors, config.json and tokenizer",
    )


class FlowOptions(Frozen):
    """The sections of a run that only the flows and launchers read."""

    launch: LaunchConfig = cosmetic(LaunchConfig(), description="where the stages run")
    gate: GateConfig = cosmetic(GateConfig(), description="bounds before publishing")
    publish: PublishConfig = cosmetic(PublishConfig(), description="where the result goes")


def figure_of(bound: str) -> str:
    """The dotted name of the figure that a bound is for."""
    return BOUND.fullmatch(bound)[1]  # type: ignore[index]  # GateConfig has checked it


def _check_figure(name: str) -> None:
    head, *rest = name.split(".")
    if head in FIGURES and not rest:
        return
    if head == "accuracy_by_type":
        if len(rest) == 2 and rest[1] in OF_A_TYPE:
            return
        raise ValueError(f"{name}: expected accuracy_by_type.<type>.<one of {', '.join(OF_A_TYPE)}>")
    if head in PARTS:
        if len(rest) == 1 and rest[0] in PARTS[head]:
            return
        raise ValueError(f"{name}: expected {head}.<one of {', '.join(PARTS[head])}>")
    close = difflib.get_close_matches(name, FIGURES, n=1)
    hint = f"did you mean {close[0]}" if close else f"the evaluation has {', '.join(FIGURES)}"
    raise ValueError(f"{name}: no such figure; {hint}")
