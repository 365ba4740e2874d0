"""What Prefect costs: a pipeline of stages that do nothing, as a flow and by hand: python benchmarks/orchestration.py

Stages that finish at once leave only the frame: planning, a process per stage, the manifests; and, in the flow,
Prefect's import, its temporary server, and what is told to it. Each is the wall time of a process from start to end.
The first flow on a new PREFECT_HOME makes a database and is told apart; the others find it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
FAKES = CHECKOUT / "tests" / "stages" / "fakes"
BUDGET_SECONDS = 15.0

BY_HAND = """
import sys
from jaxlm.config import load
from jaxlm.stages.plan import VERSIONS
from jaxlm.stages.runner import run_chain
run_chain(load(sys.argv[1]).replace(root=sys.argv[2]), modules=dict.fromkeys(VERSIONS, "fake_stage"))
"""
AS_A_FLOW = """
import sys
from flows import pipeline
from prefect import flow
from jaxlm.stages.plan import VERSIONS

@flow(name="jaxlm-overhead")
def overhead(config: str, overrides: list[str], root: str):
    cfg = pipeline.configured(config, overrides, root)
    return pipeline.chain(cfg, config, modules=dict.fromkeys(VERSIONS, "fake_stage"))

pipeline.run(sys.argv[1], [], sys.argv[2], flow=overhead)
"""


def seconds(code: str, config: Path, root: Path, home: Path) -> float:
    """Wall time of a process that runs `code` on a new store."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    env |= {"PREFECT_HOME": str(home), "PYTHONPATH": os.pathsep.join([str(CHECKOUT), str(FAKES)])}
    env["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"] = "900"  # a busy machine is measured as it is
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code, config, root], env=env, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> int:
    """Prints the figures as JSON. Exits with 1 when the flow costs more than it may."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, of which the median counts")
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        config = place / "overhead.yaml"
        config.write_text("")
        home = place / "prefect"
        cold = seconds(AS_A_FLOW, config, place / "cold", home)
        by_hand = [seconds(BY_HAND, config, place / f"hand-{k}", home) for k in range(repeats)]
        flows = [seconds(AS_A_FLOW, config, place / f"flow-{k}", home) for k in range(repeats)]
    cost = statistics.median(flows) - statistics.median(by_hand)
    figures = {
        "by hand, s": round(statistics.median(by_hand), 2),
        "as a flow, s": round(statistics.median(flows), 2),
        "as a flow on a new PREFECT_HOME, s": round(cold, 2),
        "orchestration, s": round(cost, 2),
        "budget, s": BUDGET_SECONDS,
    }
    print(json.dumps(figures, indent=1))
    return int(cost > BUDGET_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
