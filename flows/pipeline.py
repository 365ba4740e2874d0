"""The whole chain as a flow: download → tokenize → pretrain → SFT → evaluate.

`python -m flows.pipeline CONFIG [--set section.field=value …] [--root DIR]`, or `jaxlm pipeline CONFIG`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import httpx
from prefect import Flow, flow
from prefect.exceptions import TerminationSignal

from flows import environment, server, tasks
from jaxlm.config import RunConfig, load
from jaxlm.errors import JaxlmError, Preempted, UnavailableError
from jaxlm.stages import runs
from jaxlm.stages.plan import plan
from jaxlm.stages.process import Terminated
from jaxlm.stages.runner import preempted_when_stopped, say, stopped_sentence, summary_line
from jaxlm.stages.spec import Manifest, Spec
from jaxlm.stages.store import find, read_manifest

HEADLINES = ("val_loss", "floor", "perplexity", "bits_per_byte", "accuracy_before", "accuracy_after")


@flow(name="jaxlm-pipeline", persist_result=False)
def pipeline(
    config: str = "configs/quickstart.yaml",
    overrides: list[str] = [],  # noqa: B006 (Prefect shows the default in its form; nothing changes it)
    root: str = ".",
) -> dict[str, Any]:
    """Trains, fine-tunes and evaluates a model from a configuration file. Stages that are done are not done again.

    Args:
        config: a YAML file, or the name of one in configs/.
        overrides: settings that replace those of the file, such as train.steps=500.
        root: the directory that holds store/ and runs/; "." takes the configuration's own.

    Returns:
        `run`, the run's directory; `stages`, by name their `id`, `directory`, `cached` and `seconds`; `results`, what
        the evaluation measured; `report`, the path of the report.

    Raises:
        JaxlmError: the configuration is wrong, or a stage failed.
    """
    return chain(configured(config, overrides, root), config)


def configured(config: str | Path, overrides: Sequence[str], root: str | Path) -> RunConfig:
    """The configuration with its overrides.

    Raises:
        InputError: it is wrong.
    """
    cfg = load(config, tuple(overrides))
    return cfg if str(root) == "." else cfg.replace(root=str(root))


def chain(cfg: RunConfig, config_name: str = "", *, modules: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Runs the stages of `cfg` as tasks, one after another; to be called in a flow.

    Args:
        cfg: the run.
        config_name: for run.json.
        modules: stage -> Python module, for stages other than the built-in ones.

    Returns:
        See `pipeline`.
    """
    specs = plan(cfg, modules=modules)
    cached: dict[str, bool] = {}
    with server.ends_with_us():
        for spec in specs:
            state = tasks.for_stage(spec, cfg.launcher)(spec, cfg.name, cfg.launcher)
            cached[spec.stage] = state.name == "Cached"
            manifest = read_manifest(spec.directory)
            runs.record(cfg, config_name, manifest)
            say(summary_line(manifest, cached[spec.stage]))
    return summary(cfg, specs, cached)


def summary(cfg: RunConfig, specs: Sequence[Spec], cached: Mapping[str, bool]) -> dict[str, Any]:
    """What `pipeline` returns, from the manifests on the disk."""
    done: list[Manifest] = [read_manifest(spec.directory) for spec in specs]
    folder = runs.directory(cfg)
    reports = [folder / name for name in runs.REPORT_FILES if (folder / name).exists()]
    return {
        "run": str(folder),
        "stages": {
            manifest.stage: {
                "id": manifest.id,
                "directory": str(manifest.directory),
                "cached": cached[manifest.stage],
                "seconds": manifest.seconds,
            }
            for manifest in done
        },
        "results": dict(done[-1].results),
        "report": str(reports[0]) if reports else None,
    }


def run(
    config_path: str | Path,
    overrides: Sequence[str] = (),
    root: str | Path = ".",
    *,
    flow: Flow[..., dict[str, Any]] = pipeline,
) -> dict[str, Any]:
    """Runs the pipeline for a person at a terminal: what failed is told in one sentence, and no process is left behind.

    Args:
        config_path: a YAML file, or the name of one in configs/.
        overrides: strings such as `train.steps=500`.
        root: see `pipeline`.
        flow: another flow with the parameters of `pipeline`.

    Returns:
        See `pipeline`.

    Raises:
        JaxlmError: the configuration is wrong, a stage failed, or the run was stopped (`Preempted`).
    """
    cfg = configured(config_path, overrides, root)
    specs = plan(cfg)  # bad input is told before a server is started
    before = {spec.stage: find(spec) is not None for spec in specs}
    try:
        with preempted_when_stopped(), environment.one_sentence_errors(), server.ends_with_us():
            out = flow(config=str(config_path), overrides=list(overrides), root=str(root))
    except JaxlmError:
        raise
    except (Exception, TerminationSignal) as error:
        if _was_stopped(error):
            raise Preempted(stopped_sentence(error)) from None
        if not _is_about_the_api(error):
            raise
        if not all(find(spec) for spec in specs):
            raise UnavailableError(
                f"Prefect's API is away ({' '.join(str(error).split())[:200]}); run the same command to continue."
            ) from None
        say("Prefect's API went away before the flow could report; every stage is done all the same.")
        out = summary(cfg, specs, before)
    tell(out)
    return out


def tell(out: Mapping[str, Any]) -> None:
    """Prints the figures of a finished pipeline and where its report is."""
    figures = [f"{name} {out['results'][name]:.4g}" for name in HEADLINES if _is_number(out["results"].get(name))]
    if figures:
        say("  ".join(figures))
    if out["report"]:
        say(f"report: {out['report']}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _links(error: BaseException | None) -> list[BaseException]:
    """An exception and those that were being handled when it was raised."""
    links: list[BaseException] = []
    while error is not None and error not in links:
        links.append(error)
        error = error.__cause__ or error.__context__
    return links


def _was_stopped(error: BaseException) -> bool:
    """Ctrl-C in a terminal stops Prefect's server as well, so that the flow may end with a failed request."""
    return any(isinstance(link, KeyboardInterrupt | Terminated | TerminationSignal) for link in _links(error))


def _is_about_the_api(error: BaseException) -> bool:
    return any(isinstance(link, httpx.HTTPError) or "ephemeral" in str(link).lower() for link in _links(error))


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The command line of this module; `jaxlm pipeline` does the same."""
    parser = argparse.ArgumentParser(prog="python -m flows.pipeline", description="Runs the whole pipeline.")
    parser.add_argument("config", help="a YAML file, or the name of one in configs/")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="replaces a setting")
    parser.add_argument("--root", default=".", help="the directory that holds store/ and runs/")
    arguments = parser.parse_args(argv)
    try:
        run(arguments.config, arguments.set, arguments.root)
    except JaxlmError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    sys.exit(0)


if __name__ == "__main__":
    main()
