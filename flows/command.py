"""Running a flow for a person at a terminal: bad input before anything starts, failures in one sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect import Flow
from prefect.exceptions import TerminationSignal

from flows import environment, server, status
from flows.chain import configured, specs_of, summary
from jaxlm.config import RunConfig
from jaxlm.errors import JaxlmError, Preempted, UnavailableError
from jaxlm.stages.process import Terminated
from jaxlm.stages.runner import preempted_when_stopped, say, stopped_sentence
from jaxlm.stages.store import find

HEADLINES = ("val_loss", "floor", "perplexity", "bits_per_byte", "accuracy_before", "accuracy_after")
_NAME_LENGTH = 80


def run_name() -> str:
    """The name of a flow run: which flow, on what, with which overrides."""
    from prefect.context import FlowRunContext
    from prefect.runtime import flow_run

    given, context = flow_run.parameters or {}, FlowRunContext.get()
    if context is not None and context.flow is not None:
        given = status.with_defaults(context.flow, given)
    words = [str(flow_run.flow_name or "").removeprefix("jaxlm-"), Path(str(given.get("config", ""))).stem]
    words += [str(given["name"])] if given.get("name") else []
    words += [*(given.get("overrides") or []), *(given.get("grid") or [])]
    name = " ".join(word for word in words if word)
    return name if len(name) <= _NAME_LENGTH else name[: _NAME_LENGTH - 1] + "…"


def run(
    config_path: str | Path,
    overrides: Sequence[str] = (),
    root: str | Path = ".",
    *,
    flow: Flow[..., dict[str, Any]] | None = None,
    last: str = "evaluate",
    **parameters: Any,
) -> dict[str, Any]:
    """Runs a flow for a person at a terminal: what failed is told in one sentence, and no process is left behind.

    Args:
        config_path: a YAML file, or the name of one in configs/.
        overrides: strings such as `train.steps=500`.
        root: the directory that holds store/ and runs/; "." takes the configuration's own.
        flow: with the parameters config, overrides and root; None: the pipeline.
        last: the stage that the flow ends with.
        parameters: further ones of the flow's.

    Returns:
        What the flow returns.

    Raises:
        JaxlmError: the configuration is wrong, a stage failed, or the run was stopped (`Preempted`).
    """
    if flow is None:
        from flows.pipeline import pipeline

        flow = pipeline
    cfg = configured(config_path, overrides, root)
    specs = specs_of(cfg, last)  # bad input is told before a server is started
    server.seconds_to_wait()
    before = {spec.stage: find(spec) is not None for spec in specs}
    given = {"config": str(config_path), "overrides": list(overrides), "root": str(root), **parameters}
    name, more = flow.name.removeprefix("jaxlm-"), status.options(parameters)
    again = status.command(name, str(config_path), list(overrides), str(root), more)
    status.write(cfg, "running", "the flow is being started", again)  # from here on the state is of this flow
    try:
        with server.of_a_command(), preempted_when_stopped(), environment.one_sentence_errors(), server.ends_with_us():
            out = flow(**given)
    except JaxlmError as error:
        if isinstance(error, Preempted) and status.state_of(cfg) != "completed":
            status.write(cfg, "cancelled", str(error), again)
        raise
    except (Exception, TerminationSignal) as error:
        if _was_stopped(error):
            if status.state_of(cfg) != "completed":
                status.write(cfg, "cancelled", stopped_sentence(error), again)
            raise Preempted(stopped_sentence(error)) from None
        if not server.about_the_api(error):
            raise
        if status.state_of(cfg) != "completed":
            sentence = (
                f"Prefect's API is away ({' '.join(str(error).split())[:200]}); run the same command to continue."
            )
            status.write(cfg, "failed", sentence, again)
            raise UnavailableError(sentence) from None
        say("Prefect's API went away before the flow could report; every stage is done all the same.")
        out = _outcome_of_sweep(cfg) if parameters.get("grid") else summary(cfg, specs, before)
    tell(out)
    return out


def _outcome_of_sweep(cfg: RunConfig) -> dict[str, Any]:
    from flows import sweep  # which imports this module

    return sweep.outcome(cfg)


def tell(out: Mapping[str, Any]) -> None:
    """Prints the figures of a finished flow and where its report is."""
    results = out.get("results", {})
    figures = [f"{name} {results[name]:.4g}" for name in HEADLINES if _is_number(results.get(name))]
    if figures:
        say("  ".join(figures))
    if out.get("report"):
        say(f"report: {out['report']}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _was_stopped(error: BaseException) -> bool:
    """Ctrl-C in a terminal stops Prefect's server as well, so that the flow may end with a failed request."""
    return any(isinstance(link, KeyboardInterrupt | Terminated | TerminationSignal) for link in server.links(error))
