"""The flows by name, and serving all of them from one process. prefect.yaml is for work pools."""

from __future__ import annotations

import os
from typing import Any

from prefect import Flow, serve
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.deployments.runner import RunnerDeployment

from flows import server
from flows.parts import evaluate, prepare, pretrain, sft
from flows.pipeline import pipeline
from flows.sweep import sweep
from jaxlm.errors import InputError, UnavailableError

FLOWS: dict[str, Flow[..., dict[str, Any]]] = {
    "prepare": prepare,
    "pretrain": pretrain,
    "sft": sft,
    "evaluate": evaluate,
    "pipeline": pipeline,
    "sweep": sweep,
}


def deployments() -> list[RunnerDeployment]:
    """A deployment of each flow. Two runs of one that trains wait for each other: an accelerator has one owner."""
    made = []
    for name, flow in FLOWS.items():
        limit = None
        if name != "prepare":
            limit = ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.ENQUEUE)
        deployment = flow.to_deployment(
            name=name,
            description=(flow.description or "").partition("\n\n")[0],
            tags=["jaxlm"],
            concurrency_limit=limit,
        )
        assert isinstance(deployment, RunnerDeployment)  # and no coroutine: nothing here is async
        made.append(deployment)
    return made


def serve_all(*, limit: int) -> None:
    """Serves the flows until the process is told to end.

    Raises:
        InputError: no server is configured.
        UnavailableError: it does not answer.
    """
    from prefect.settings import get_current_settings

    if get_current_settings().api.url is None:
        raise InputError(
            "PREFECT_API_URL: not set, and flows are served to a server; start one with `prefect server start`, then "
            "`export PREFECT_API_URL=http://127.0.0.1:4200/api`."
        )
    if server.away():
        raise UnavailableError(
            f"{server.api_url()}: Prefect's API does not answer; start it with prefect server start."
        )
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    with server.temporary_folder():
        serve(*deployments(), limit=limit)
