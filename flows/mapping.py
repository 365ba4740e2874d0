"""Tokenization mapped over shards: the same result as the stage alone, encoded by tasks on any of Prefect's runners.

It pays where the text is large and the tasks run on other machines (Dask, Ray), or where a person wants to see them one
by one. The stage's own process pool serves a single machine as well, so one task is the default.
"""

from __future__ import annotations

import importlib
import os
import threading
from multiprocessing import parent_process
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner
from prefect.tasks import exponential_backoff

from flows.form import Runner
from flows.tasks import worth_a_retry_inline
from jaxlm.errors import InputError, Preempted
from jaxlm.stages.spec import Spec
from jaxlm.stages.store import find, write_spec

_PACKAGES = {"dask": ("prefect_dask", "DaskTaskRunner"), "ray": ("prefect_ray", "RayTaskRunner")}
_SIMPLE: dict[str, Any] = {"cache_policy": NO_CACHE, "persist_result": False}


@task(name="build tokenizer", task_run_name="build tokenizer", **_SIMPLE)
def build_tokenizer(directory: str) -> str:
    """Makes the tokenizer that all shards are encoded with. Returns its fingerprint."""
    from jaxlm.stages import pieces

    return pieces.build_tokenizer(directory)


@task(
    name="encode shard",
    task_run_name="encode shard {shard} of {shards}",
    retries=4,
    retry_delay_seconds=exponential_backoff(2),
    retry_jitter_factor=1.0,
    retry_condition_fn=worth_a_retry_inline,
    **_SIMPLE,
)
def encode_shard(directory: str, shard: int, shards: int) -> int:
    """Encodes one shard of both splits. Returns its tokens."""
    from jaxlm.stages import pieces

    return pieces.encode_shard(directory, shard, shards)


def mapped_tokenization(spec: Spec, shards: int, runner: Runner) -> None:
    """Encodes the splits by `shards` tasks, so that the tokenize stage, which comes next, only joins and packs.

    Raises:
        InputError: the runner's package is not installed.
    """
    chosen = task_runner(runner, shards)
    if find(spec) is not None:
        return
    directory = str(write_spec(spec).resolve())
    with chosen as started:
        started.submit(build_tokenizer, {"directory": directory}).result()
        futures = [
            started.submit(encode_shard, {"directory": directory, "shard": shard, "shards": shards})
            for shard in range(shards)
        ]
        for future in futures:
            future.result()


def task_runner(runner: Runner, shards: int) -> TaskRunner[Any]:
    """A task runner by its name.

    Raises:
        InputError: its package is not installed.
    """
    if runner == "threads":
        return ThreadPoolTaskRunner(max_workers=min(shards, 8))
    if runner == "processes":
        return ProcessPoolTaskRunner(max_workers=min(shards, 8), initializer=end_with_parent)
    module, name = _PACKAGES[runner]
    try:
        made: TaskRunner[Any] = getattr(importlib.import_module(module), name)()
    except ImportError:
        package = module.replace("_", "-")
        raise InputError(f"runner={runner}: the package {package} is not installed; pip install {package}.") from None
    return made


def end_with_parent() -> None:
    """Makes a worker of a process pool end when the flow's process does, also when that was killed: it would wait for
    its next piece of work for ever.
    """
    parent = parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(Preempted.exit_code)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()
