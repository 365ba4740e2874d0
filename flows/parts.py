"""The chain in parts: flows that end with the data, the base model, the tuned model, or the evaluation."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows import status
from flows.chain import chain, configured
from flows.command import run_name
from flows.form import (
    Bounds,
    Config,
    Name,
    Overrides,
    Processes,
    PublishTo,
    Root,
    Seed,
    Shards,
    Steps,
    TaskRunnerName,
    merged,
)
from flows.mapping import mapped_tokenization


@flow(name="jaxlm-prepare", flow_run_name=run_name, persist_result=False, **status.HOOKS)
def prepare(
    config: Config = "configs/quickstart.yaml",
    overrides: Overrides = [],  # noqa: B006 (Prefect shows the default in its form; nothing changes it)
    name: Name = None,
    shards: Shards = 1,
    runner: TaskRunnerName = "threads",
    root: Root = ".",
) -> dict[str, Any]:
    """Gets the text and tokenizes it, so that a machine with an accelerator need not wait for that.

    Returns:
        See `flows.pipeline.pipeline`.
    """
    given = merged(overrides, name=name)
    before = {"tokenize": lambda spec: mapped_tokenization(spec, shards, runner)} if shards > 1 else None
    mapped = {"shards": shards, "runner": runner} if before else {}
    again = status.command("prepare", config, given, root, status.options(mapped))
    return chain(configured(config, given, root), config, last="prepare", before=before, again=again)


@flow(name="jaxlm-pretrain", flow_run_name=run_name, persist_result=False, **status.HOOKS)
def pretrain(
    config: Config = "configs/quickstart.yaml",
    overrides: Overrides = [],  # noqa: B006
    name: Name = None,
    steps: Steps = None,
    seed: Seed = None,
    processes: Processes = None,
    root: Root = ".",
) -> dict[str, Any]:
    """Trains the base model, and makes what it needs where that is missing.

    Returns:
        See `flows.pipeline.pipeline`.
    """
    given = merged(overrides, name=name, steps=steps, seed=seed, processes=processes)
    again = status.command("pretrain", config, given, root)
    return chain(configured(config, given, root), config, last="pretrain", again=again)


@flow(name="jaxlm-sft", flow_run_name=run_name, persist_result=False, **status.HOOKS)
def sft(
    config: Config = "configs/quickstart.yaml",
    overrides: Overrides = [],  # noqa: B006
    name: Name = None,
    root: Root = ".",
) -> dict[str, Any]:
    """Fine-tunes the base model, and makes what that needs where it is missing.

    Returns:
        See `flows.pipeline.pipeline`.
    """
    given = merged(overrides, name=name)
    again = status.command("sft", config, given, root)
    return chain(configured(config, given, root), config, last="sft", again=again)


@flow(name="jaxlm-evaluate", flow_run_name=run_name, persist_result=False, **status.HOOKS)
def evaluate(
    config: Config = "configs/quickstart.yaml",
    overrides: Overrides = [],  # noqa: B006
    name: Name = None,
    bounds: Bounds = [],  # noqa: B006
    publish_to: PublishTo = None,
    root: Root = ".",
) -> dict[str, Any]:
    """Measures the models and writes the report, checks the gate and publishes.

    Returns:
        See `flows.pipeline.pipeline`.
    """
    given = merged(overrides, name=name, bounds=bounds, publish_to=publish_to)
    again = status.command("evaluate", config, given, root)
    return chain(configured(config, given, root), config, again=again)
