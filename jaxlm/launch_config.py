"""Options of a run that decide where its stages run and what happens to their result. Loads no jax.

None of them decides what is computed, so none is part of a stage's identity.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import field_validator

from jaxlm._frozen import Frozen, NonNegative, Positive, cosmetic

BOUND = re.compile(r"\s*([A-Za-z0-9_.]+)\s*(<=|>=|<|>)\s*([-+0-9.eE]+)\s*")


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
    image: str = cosmetic("", description="the container image with jaxlm in it")
    volume_claim: str = cosmetic("", description="the shared volume (ReadWriteMany) that holds the store")
    mount_path: str = cosmetic("/jaxlm", pattern=r"^/", description="where the volume is, here and in the pods")
    cpu: str = cosmetic("4", description="cores for each process")
    memory: str = cosmetic("16Gi", description="memory for each process")
    accelerator: str = cosmetic("", description="resource name, such as nvidia.com/gpu or google.com/tpu")
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


class LaunchConfig(Frozen):
    """Where the processes of the stages run."""

    kind: Literal["local", "slurm", "kubernetes"] = cosmetic("local", description="what starts the stages' processes")
    stages: tuple[str, ...] = cosmetic(
        ("pretrain", "sft", "evaluate"), description="stages that go to the cluster; the others run where the flow does"
    )
    processes: Positive = cosmetic(1, gt=0, description="processes that pretrain together, data-parallel")
    grace_seconds: float = cosmetic(
        25.0, gt=0, description="for saving, between asking a stage to end and ending it (Prefect's own grace: 30)"
    )
    timeout_hours: float = cosmetic(0.0, ge=0, description="longest time of one stage; 0: no limit")
    slurm: SlurmConfig = cosmetic(SlurmConfig(), description="with kind=slurm")
    kubernetes: KubernetesConfig = cosmetic(KubernetesConfig(), description="with kind=kubernetes")


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
        return bounds


class PublishConfig(Frozen):
    """Where a finished run is exported to."""

    to: str | None = cosmetic(None, description="a directory or bucket (file, s3://…, gs://…); empty: not published")
    form: Literal["jaxlm", "hf"] = cosmetic(
        "jaxlm", description="jaxlm: the model's stage as it is; hf: safetensors with config.json and tokenizer"
    )


class FlowOptions(Frozen):
    """The sections of a run that only the flows and launchers read."""

    launch: LaunchConfig = cosmetic(LaunchConfig(), description="where the stages run")
    gate: GateConfig = cosmetic(GateConfig(), description="bounds before publishing")
    publish: PublishConfig = cosmetic(PublishConfig(), description="where the result goes")
