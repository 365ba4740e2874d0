"""A stage as a Prefect task. The manifest is the only cache; Prefect keeps no result of its own."""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, State
from prefect.tasks import exponential_backoff

from flows.artifacts import StageArtifacts
from jaxlm.errors import Preempted, UnavailableError
from jaxlm.stages.runner import Launcher, run_stage
from jaxlm.stages.spec import Spec


def worth_a_retry(task: Any, task_run: Any, state: State) -> bool:
    """A service was away, or somebody stopped the stage's process: it continues from its checkpoint.

    When the flow itself is stopped, a BaseException ends the task, and Prefect does not ask.
    """
    return isinstance(state.data, UnavailableError | Preempted)


def worth_a_retry_inline(task: Any, task_run: Any, state: State) -> bool:
    """In the flow's own process, a stage that was stopped means that the flow was."""
    return isinstance(state.data, UnavailableError)


@task(
    name="stage",
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=4,
    retry_delay_seconds=exponential_backoff(2),
    retry_jitter_factor=1.0,
    retry_condition_fn=worth_a_retry,
)
def stage(spec: Spec, run: str, launcher: Launcher = "process") -> State[None]:
    """Runs a stage, or finds that its result is there: the state is then named Cached.

    Called directly, not submitted: a signal then reaches the code that waits for the stage.
    """
    artifacts = StageArtifacts(run, spec)
    manifest, cached = run_stage(spec, launcher=launcher, on_metrics=artifacts)
    artifacts.finished()
    if "report.md" in manifest.outputs:
        artifacts.report(manifest.path("report.md"))
    if cached:
        return Completed(name="Cached", message=f"already done: {manifest.directory}")
    return Completed(message=f"done in {manifest.seconds:.1f} s: {manifest.directory}")


def for_stage(spec: Spec, launcher: Launcher) -> Any:
    """The task under the stage's name, for the UI, with the retries that suit the launcher."""
    return stage.with_options(
        name=spec.stage,
        task_run_name=spec.name,
        retry_condition_fn=worth_a_retry if launcher == "process" else worth_a_retry_inline,
    )
