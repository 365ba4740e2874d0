"""The launcher that a run's configuration asks for."""

from __future__ import annotations

from jaxlm.launch.kubernetes import KubernetesLauncher
from jaxlm.launch.local import LocalLauncher
from jaxlm.launch.protocol import Launcher
from jaxlm.launch.slurm import SlurmLauncher
from jaxlm.launch_config import LaunchConfig

TOGETHER = ("pretrain",)  # the stages that N processes do together


def for_stage(cfg: LaunchConfig, stage: str) -> Launcher:
    """A new launcher for one job of `stage`."""
    if cfg.kind == "slurm" and stage in cfg.stages:
        return SlurmLauncher(cfg.slurm)
    if cfg.kind == "kubernetes" and stage in cfg.stages:
        return KubernetesLauncher(cfg.kubernetes, grace=cfg.grace_seconds)
    return LocalLauncher()


def processes(cfg: LaunchConfig, stage: str) -> int:
    """How many processes do `stage` together."""
    return cfg.processes if stage in TOGETHER else 1
