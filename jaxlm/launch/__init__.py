"""Where the processes of a stage run: on this machine, under Slurm, or as a Kubernetes JobSet. Loads no jax."""

from jaxlm.launch.attach import forget, kept, submit_once
from jaxlm.launch.choose import for_stage
from jaxlm.launch.protocol import Handle, Job, Launcher, Status

__all__ = ["Handle", "Job", "Launcher", "Status", "for_stage", "forget", "kept", "submit_once"]
