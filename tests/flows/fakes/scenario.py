"""The real flow code over fake stages: scenario.py ROOT CONFIG STEP [STEP …], in one process, with one Prefect start.

A step is JSON: {"do": {stage: what}, "set": [override, …]}. Each leaves one JSON line on standard output, after a tab.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from flows import pipeline  # isort: skip (before Prefect reads its settings)
from prefect import flow

from jaxlm.errors import JaxlmError
from jaxlm.stages.plan import VERSIONS

FAKES = dict.fromkeys(VERSIONS, "fake_stage")


@flow(name="probe")
def probe(config: str, overrides: list[str], root: str) -> dict[str, Any]:
    return pipeline.chain(pipeline.configured(config, overrides, root), config, modules=FAKES)


def main() -> None:
    root, config, *steps = sys.argv[1:]
    for step in map(json.loads, steps):
        os.environ["FAKE_DO"] = json.dumps(step.get("do", {}))
        try:
            out = {"out": pipeline.run(config, step.get("set", []), root, flow=probe), "jax": "jax" in sys.modules}
        except JaxlmError as error:
            print(error, file=sys.stderr)
            out = {"exit_code": error.exit_code, "message": str(error)}
        print("\t" + json.dumps(out), flush=True)
    sys.exit(out.get("exit_code", 0))


if __name__ == "__main__":
    main()
