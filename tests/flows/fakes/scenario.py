"""The real flow code over fake stages: scenario.py ROOT CONFIG STEP [STEP …], in one process, with one Prefect start.

A step is JSON: {"do": {stage: what}, "set": [override, …], "last": stage, "grid": [line, …]}. Each leaves one JSON line
on standard output, after a tab.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from flows import pipeline, status, sweep  # isort: skip (before Prefect reads its settings)
from prefect import flow

from flows import server
from flows.command import run_name
from jaxlm.errors import JaxlmError
from jaxlm.stages.plan import VERSIONS

FAKES = dict.fromkeys(VERSIONS, "fake_stage")


@flow(name="jaxlm-probe", flow_run_name=run_name, **status.HOOKS)
def probe(
    config: str,
    overrides: list[str] = [],  # noqa: B006
    root: str = ".",
    until: str = "evaluate",
    grid: list[str] = [],  # noqa: B006
) -> dict[str, Any]:
    again = status.command("probe", config, overrides, root)
    if grid:
        return sweep.run_grid(config, grid, overrides, root, again=again, modules=FAKES)
    cfg = pipeline.configured(config, overrides, root)
    return pipeline.chain(cfg, config, last=until, again=again, modules=FAKES)


def main() -> None:
    root, config, *steps = sys.argv[1:]
    for step in map(json.loads, steps):
        os.environ["FAKE_DO"] = json.dumps(step.get("do", {}))
        more = {"grid": step["grid"]} if "grid" in step else {}
        if "last" in step:
            more |= {"last": step["last"], "until": step["last"]}
        try:
            out = pipeline.run(config, step.get("set", []), root, flow=probe, **more)
            said = {"out": out, "jax": "jax" in sys.modules}
        except JaxlmError as error:
            print(error, file=sys.stderr)
            said = {"exit_code": error.exit_code, "message": str(error)}
        print("\t" + json.dumps(said), flush=True)
    if server.away():
        server.leave(said.get("exit_code", 0))
    sys.exit(said.get("exit_code", 0))


if __name__ == "__main__":
    main()
