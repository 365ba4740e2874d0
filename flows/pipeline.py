"""The whole chain as a flow: download → tokenize → pretrain → SFT → evaluate → gate → publish.

`python -m flows.pipeline CONFIG [--set section.field=value …] [--root DIR]`, or `jaxlm flow pipeline CONFIG`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from prefect import flow

from flows import server, status
from flows.chain import chain, configured, summary
from flows.command import run, run_name, tell
from flows.form import Bounds, Config, Name, Overrides, Processes, PublishTo, Root, Seed, Steps, merged
from jaxlm.errors import JaxlmError

__all__ = ["chain", "configured", "pipeline", "run", "summary", "tell"]


@flow(name="jaxlm-pipeline", flow_run_name=run_name, persist_result=False, **status.HOOKS)
def pipeline(
    config: Config = "configs/quickstart.yaml",
    overrides: Overrides = [],  # noqa: B006 (Prefect shows the default in its form; nothing changes it)
    name: Name = None,
    steps: Steps = None,
    seed: Seed = None,
    processes: Processes = None,
    bounds: Bounds = [],  # noqa: B006
    publish_to: PublishTo = None,
    root: Root = ".",
) -> dict[str, Any]:
    """Trains, fine-tunes and evaluates a model from a configuration file. Stages that are done are not done again.

    Returns:
        `run`, the run's directory; `stages`, by name their `id`, `directory`, `cached` and `seconds`; `results`, what
        the evaluation measured; `report`, the path of the report; `published`, where the model is now, if anywhere.

    Raises:
        JaxlmError: the configuration is wrong, a stage failed, or a figure missed its bound.
    """
    given = merged(
        overrides, name=name, steps=steps, seed=seed, processes=processes, bounds=bounds, publish_to=publish_to
    )
    return chain(configured(config, given, root), config, again=status.command("pipeline", config, given, root))


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The command line of this module; `jaxlm pipeline` does the same."""
    parser = argparse.ArgumentParser(prog="python -m flows.pipeline", description="Runs the whole pipeline.")
    parser.add_argument("config", help="a YAML file, or the name of one in configs/")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="replaces a setting")
    parser.add_argument("--root", default=".", help="the directory that holds store/ and runs/")
    arguments = parser.parse_args(argv)
    code = 0
    try:
        run(arguments.config, arguments.set, arguments.root)
    except JaxlmError as error:
        print(error, file=sys.stderr)
        code = error.exit_code
    if server.away():
        server.leave(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
