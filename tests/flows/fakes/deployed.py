"""The flow that the tests deploy: the real chain over fake stages, or over those that DEPLOYED_MODULES names."""

from __future__ import annotations

import json
import os
from typing import Any

from flows import pipeline, status  # isort: skip (before Prefect reads its settings)
from prefect import flow

from flows.command import run_name
from flows.form import Config, Overrides, Root
from jaxlm.stages.plan import VERSIONS


@flow(name="jaxlm-pipeline", flow_run_name=run_name, persist_result=False, **status.HOOKS)
def deployed(config: Config, overrides: Overrides = [], root: Root = ".") -> dict[str, Any]:  # noqa: B006
    """The pipeline over stages that do as they are told.

    Returns:
        See `flows.pipeline.pipeline`.
    """
    cfg = pipeline.configured(config, overrides, root)
    again = status.command("pipeline", config, overrides, root)
    modules = json.loads(os.environ.get("DEPLOYED_MODULES") or "null") or dict.fromkeys(VERSIONS, "fake_stage")
    return pipeline.chain(cfg, config, again=again, modules=modules)
