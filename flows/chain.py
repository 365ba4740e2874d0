"""The stages of a run as tasks, one after another; then the gate and the publication."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flows import lineage, server, status, tasks
from flows.gate import gate
from flows.publish import publish
from jaxlm.config import RunConfig, load
from jaxlm.errors import JaxlmError, Preempted
from jaxlm.stages import runs
from jaxlm.stages.plan import plan, until
from jaxlm.stages.runner import say, stopped_sentence, summary_line
from jaxlm.stages.spec import Manifest, Spec
from jaxlm.stages.store import read_manifest


def configured(config: str | Path, overrides: Sequence[str], root: str | Path) -> RunConfig:
    """The configuration with its overrides.

    Raises:
        InputError: it is wrong.
    """
    cfg = load(config, tuple(overrides))
    return cfg if str(root) == "." else cfg.replace(root=str(root))


def specs_of(cfg: RunConfig, last: str, modules: Mapping[str, str] | None = None) -> list[Spec]:
    """The stages that `last` needs. `prepare` stands for all that comes before training.

    Raises:
        InputError: the configuration names a file that is missing, or has no such stage.
    """
    specs = plan(cfg, modules=modules)
    if last == "prepare":
        last = "tokenize_sft" if cfg.sft.enabled else "tokenize"
    return until(specs, last)


def chain(
    cfg: RunConfig,
    config_name: str = "",
    *,
    last: str = "evaluate",
    deliver: bool = True,
    again: str = "",
    before: Mapping[str, Any] | None = None,
    modules: Mapping[str, str] | None = None,
    alone: bool = True,
) -> dict[str, Any]:
    """Runs the stages of `cfg` as tasks, one after another; to be called in a flow.

    Args:
        cfg: the run.
        config_name: for run.json.
        last: the stage to end with, or `prepare`.
        deliver: after `evaluate`, check the gate and publish.
        again: the command that continues the run, for status.json.
        before: stage -> what is called with its spec just before it runs.
        modules: stage -> Python module, for stages other than the built-in ones.
        alone: whether that is all the flow does; see `reported`.

    Returns:
        See `flows.pipeline.pipeline`.

    Raises:
        JaxlmError: a stage failed, or a figure missed its bound.
    """
    specs = specs_of(cfg, last, modules)
    cached: dict[str, bool] = {}
    with reported(cfg, f"the stages up to {specs[-1].stage} are being made", "every stage is done", again, alone=alone):
        for index, spec in enumerate(specs):
            if before and spec.stage in before:
                before[spec.stage](spec)
            cached[spec.stage] = tasks.run(spec, cfg)
            manifest = read_manifest(spec.directory)
            runs.record(cfg, config_name, manifest)
            lineage.write(cfg, config_name, [read_manifest(each.directory) for each in specs[: index + 1]])
            say(summary_line(manifest, cached[spec.stage]))
        published = _delivered(cfg, specs) if deliver and specs[-1].stage == "evaluate" else None
    return summary(cfg, specs, cached) | ({"published": published} if published else {})


@contextmanager
def reported(cfg: RunConfig, doing: str, done: str, again: str, *, alone: bool = True) -> Iterator[None]:
    """Around the making of a run: keeps its status.json, guards a temporary server, and waits for one that is away.

    Args:
        cfg: the run.
        doing: why its state is `running`, and
        done: why it is `completed`.
        again: the command that continues it.
        alone: False for a combination of a sweep: it neither waits nor ends the process, for there is more to be done.

    Raises:
        InputError: the environment says no number of seconds for the wait.
    """
    server.seconds_to_wait()
    with server.ends_with_us():
        status.write(cfg, "running", doing, again)
        try:
            yield
        except JaxlmError as error:
            status.write(cfg, "failed", str(error), again)
            if alone:
                server.wait_until_back(say)
            raise
        except BaseException as error:
            if not isinstance(error, Exception):  # somebody wants the flow to end
                sentence = stopped_sentence(error)
                status.write(cfg, "cancelled", sentence, again)
                if alone:
                    server.leave_when_away(sentence, Preempted.exit_code)
            raise
        status.write(cfg, "completed", done, "")
        if alone:
            server.wait_until_back(say)


def _delivered(cfg: RunConfig, specs: Sequence[Spec]) -> str | None:
    done = [read_manifest(spec.directory) for spec in specs]
    if cfg.gate.bounds:
        for line in gate(dict(done[-1].results), list(cfg.gate.bounds)):
            say(f"gate: {line}: kept")
    if cfg.publish.to is None:
        return None
    where = publish(cfg, cfg.publish.to, done)
    say(f"published: {where}")
    return str(where)


def summary(cfg: RunConfig, specs: Sequence[Spec], cached: Mapping[str, bool]) -> dict[str, Any]:
    """What a flow returns, from the manifests on the disk."""
    done: list[Manifest] = [read_manifest(spec.directory) for spec in specs]
    folder = runs.directory(cfg)
    evaluated = done[-1].stage == "evaluate"
    reports = [folder / name for name in runs.REPORT_FILES if evaluated and (folder / name).exists()]
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
