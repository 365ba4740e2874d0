"""A stage as a Prefect task. The manifest is the only cache; Prefect keeps no result of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, State
from prefect.tasks import MaterializingTask

from flows import lineage, server
from flows.artifacts import StageArtifacts
from jaxlm.config import RunConfig
from jaxlm.errors import JaxlmError, Preempted, UnavailableError
from jaxlm.launch_config import LaunchConfig
from jaxlm.stages.runner import CancelledError, Launcher, run_stage, say
from jaxlm.stages.spec import Spec
from jaxlm.stages.store import find

AWAY = 4  # times in a row that a stage is tried again while a service is away
CONTINUATIONS = 100  # of a stage that is stopped again and again, as by the time limit of its jobs
DELAYS = [2.0, 4.0, 8.0, 16.0]  # seconds; the last one from then on

ACCELERATED = ("pretrain", "sft", "evaluate")  # tagged so: their number at a time can be limited


def worth_a_retry() -> Callable[[Any, Any, State], bool]:
    """Made for one run of a stage and asked after each failure: a service was away, which is waited for `AWAY` times in
    a row; or the stage's process was stopped, by its time limit or with its machine: it continues from its checkpoint.

    Not when somebody cancelled its job. When the flow itself is stopped, a BaseException ends the task, and Prefect
    does not ask.
    """
    away = 0

    def asked(task: Any, task_run: Any, state: State) -> bool:
        nonlocal away
        away = away + 1 if isinstance(state.data, UnavailableError) else 0
        stopped = isinstance(state.data, Preempted) and not isinstance(state.data, CancelledError)
        return stopped or 0 < away <= AWAY

    return asked


def worth_a_retry_inline(task: Any, task_run: Any, state: State) -> bool:
    """In the flow's own process, a stage that was stopped means that the flow was. With `AWAY` retries."""
    return isinstance(state.data, UnavailableError)


@task(name="stage", cache_policy=NO_CACHE, persist_result=False)
def stage(spec: Spec, run: str, launcher: Launcher = "process", launch: LaunchConfig | None = None) -> State[None]:
    """Runs a stage, or finds that its result is there: the state is then named Cached.

    Called directly, not submitted: a signal then reaches the code that waits for the stage.
    """
    artifacts = StageArtifacts(run, spec)
    manifest, cached = run_stage(spec, launcher=launcher, launch=launch, on_metrics=artifacts)
    artifacts.finished()
    if "report.md" in manifest.outputs:
        artifacts.report(manifest.path("report.md"))
    if cached:
        return Completed(name="Cached", message=f"already done: {manifest.directory}")
    return Completed(message=f"done in {manifest.seconds:.1f} s: {manifest.directory}")


def run(spec: Spec, cfg: RunConfig) -> bool:
    """Runs a stage as a task. Returns whether its result was there already.

    With the API away the stage runs all the same: the task asks for nothing then, and what Prefect fails with when the
    API goes away in between does not count.

    Raises:
        JaxlmError: the stage failed.
    """
    cached = find(spec) is not None
    try:
        for_stage(spec, cfg, online=not server.away())(spec, cfg.name, cfg.launcher, cfg.launch)
    except JaxlmError:
        raise
    except Exception as error:
        if not server.about_the_api(error):
            raise
        say(f"{spec.stage}: Prefect's API is away; the stage goes on without it")
        run_stage(spec, launcher=cfg.launcher, launch=cfg.launch)
    return cached


def for_stage(spec: Spec, cfg: RunConfig, *, online: bool = True) -> Any:
    """The task under the stage's name, for the UI, with the retries that suit the launcher.

    Tags are what concurrency limits go by, so Prefect asks the server for a place before a task that has some starts:
    without the server (`online` false) the task has none.
    """
    kind = "accelerator" if spec.stage in ACCELERATED else "cpu"
    options: dict[str, Any] = {
        "name": spec.stage,
        "task_run_name": f"{spec.name} for {cfg.name}",
        "tags": ["jaxlm", f"jaxlm-{kind}", spec.stage] if online else [],
        "retries": CONTINUATIONS if cfg.launcher == "process" else AWAY,
        "retry_condition_fn": worth_a_retry() if cfg.launcher == "process" else worth_a_retry_inline,
        "retry_delay_seconds": DELAYS,
        "retry_jitter_factor": 1.0,
    }
    if not (online and server.has_assets()):
        return stage.with_options(**options)
    made, read = lineage.assets_of(spec)
    return MaterializingTask(
        fn=stage.fn,
        assets=[made],
        materialized_by="jaxlm",
        asset_deps=list(read),
        cache_policy=NO_CACHE,
        persist_result=False,
        **options,
    )
