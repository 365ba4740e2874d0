"""The parts of the flows that need no server."""

from __future__ import annotations

import base64
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from jaxlm.config import RunConfig
from jaxlm.stages.plan import plan


@pytest.fixture
def python(checkout):
    def run(code: str, **env: str) -> str:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "DO_NOT_"))}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env={**clean, **env}, cwd=checkout, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    return run


def test_the_flows_leave_jax_out(python):
    code = "import sys, flows.pipeline; print([name for name in ('jax', 'jaxlib', 'orbax') if name in sys.modules])"
    assert python(code) == "[]"


def test_settings_come_before_prefect_and_the_users_stay(python):
    code = (
        "import flows, sys; assert 'prefect' not in sys.modules;"
        "import os; print(os.environ['PREFECT_LOGGING_LEVEL'], os.environ['DO_NOT_TRACK'],"
        "os.environ['PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS'], flows.environment.LEVEL_IS_OURS)"
    )
    assert python(code) == "WARNING 1 120 True"
    assert python(code, PREFECT_LOGGING_LEVEL="DEBUG") == "DEBUG 1 120 False"


def test_bad_input_is_told_before_prefect_starts(tmp_path, checkout):
    done = subprocess.run(
        [sys.executable, "-m", "flows.pipeline", "nosuch.yaml"],
        env={**os.environ, "PREFECT_HOME": str(tmp_path / "home")},
        cwd=checkout,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 65
    assert done.stderr.startswith("nosuch.yaml: no such configuration file; ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "home" / "prefect.db").exists()


def test_the_guard_ends_what_its_owner_leaves_behind(checkout, processes):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(999)"])
    guard = subprocess.Popen(
        [sys.executable, "-I", "-S", checkout / "flows" / "guard.py"], stdin=subprocess.PIPE, text=True
    )
    try:
        guard.stdin.write(f"{child.pid}\n")
        guard.stdin.flush()
        time.sleep(0.5)
        assert processes.running(child.pid)
        guard.stdin.close()  # as the system does when the owner dies
        assert processes.wait_until(lambda: not processes.running(child.pid), processes.patience)
        child.wait()
        assert guard.wait(processes.patience) == 0
    finally:
        for process in (child, guard):
            process.kill()
            process.wait()


class Server:
    """In place of Prefect's temporary server, whose first process dies."""

    server_process = None
    starts = 0

    def _run_uvicorn_command(self):
        self.starts += 1
        return subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(999)"])


def test_a_server_that_died_is_started_once(processes, monkeypatch):
    from flows import server

    made, told = Server(), []
    theirs = SimpleNamespace(SubprocessASGIServer=lambda: made)  # the real module takes seconds to import
    monkeypatch.setitem(sys.modules, "prefect.server.api.server", theirs)
    monkeypatch.setattr(server, "_guard", lambda: SimpleNamespace(write=told.append))
    try:
        with server.ends_with_us(), server.ends_with_us(), server.ends_with_us():  # a command, a sweep, a chain
            assert [thread.name for thread in threading.enumerate()].count("server guard") == 1
            made.server_process = subprocess.Popen([sys.executable, "-S", "-c", "raise SystemExit(1)"])
            first = made.server_process.pid
            assert processes.wait_until(lambda: len(told) == 2, processes.patience)
    finally:
        made.server_process.kill()
        made.server_process.wait()
    assert (made.starts, told) == (1, [f"{first}\n".encode(), f"{made.server_process.pid}\n".encode()])
    with server.ends_with_us():  # and the next one watches again
        assert [thread.name for thread in threading.enumerate()].count("server guard") == 1


@pytest.mark.parametrize(("deployment", "seconds"), [(None, 60), (7, 600)])
def test_the_wait_for_a_server_asks_it_nothing(deployment, seconds, monkeypatch):
    from prefect.context import FlowRunContext
    from prefect.runtime import deployment as theirs

    from flows import server

    answers, said = iter([True, True, False]), []
    monkeypatch.delenv("JAXLM_REPORT_SECONDS", raising=False)
    monkeypatch.setattr(server, "away", lambda: next(answers))
    monkeypatch.setattr(server.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(theirs, "_get_flow_run", lambda run_id: pytest.fail("it is away"))
    with FlowRunContext.model_construct(flow_run=SimpleNamespace(id=1, deployment_id=deployment)):
        assert server.wait_until_back(said.append)
    assert f"waiting up to {seconds} s" in said[0]


@pytest.mark.parametrize("text", ["soon", "-1", "nan"])
def test_a_wait_that_is_no_number_is_told_at_once(text, monkeypatch):
    from flows import command, server
    from jaxlm.errors import InputError

    monkeypatch.setenv("JAXLM_REPORT_SECONDS", "2.5")
    assert server.seconds_to_wait() == 2.5
    monkeypatch.setenv("JAXLM_REPORT_SECONDS", text)
    with pytest.raises(InputError, match=f"^JAXLM_REPORT_SECONDS={text}: expected a number of seconds"):
        command.run("quickstart", flow=SimpleNamespace(name="jaxlm-pipeline"))


@pytest.fixture
def artifacts(monkeypatch):
    from flows import artifacts as module
    from flows import server

    made = []
    kinds = (
        "create_progress_artifact",
        "update_progress_artifact",
        "create_markdown_artifact",
        "create_table_artifact",
    )
    for name in kinds:
        monkeypatch.setattr(module, name, lambda *args, _name=name, **kwargs: made.append((_name, args, kwargs)))
    monkeypatch.setattr(server, "away", lambda: False)
    pretrain = plan(RunConfig().replace(name="My.run_1"))[3]
    return module, module.StageArtifacts("My.run_1", pretrain), made


def test_artifacts_while_a_stage_runs(artifacts):
    _, stage, made = artifacts
    stage({"step": 500, "split": "train", "loss": 2.5, "tokens": 1024000, "lr": 0.001})
    ((name, (percent,), kwargs),) = made
    assert (name, percent, kwargs["key"]) == ("create_progress_artifact", 50.0, "my-run-1-pretrain-progress")
    made.clear()
    stage({"step": 500, "split": "val", "loss": 2.75})
    ((name, (cells,), kwargs),) = made  # one point is no curve yet
    assert (name, kwargs["key"]) == ("create_table_artifact", "my-run-1-pretrain-metrics")
    assert cells == [{"step": "500", "tokens": "1,024,000", "loss": "2.5", "val_loss": "2.75", "lr": "0.001"}]
    made.clear()
    stage({"event": "sample", "step": 500, "text": "Once\n# upon"})
    ((name, (page,), kwargs),) = made
    assert kwargs["key"] == "my-run-1-pretrain-sample"
    assert page.endswith("After step 500:\n\n    Once\n    # upon\n")
    made.clear()
    stage({"step": 1000, "split": "train", "loss": 2.0})
    stage({"step": 1000, "split": "val", "loss": 2.25})
    pages = {kwargs["key"]: args[0] for name, args, kwargs in made if name == "create_markdown_artifact"}
    image = base64.b64decode(pages["my-run-1-pretrain-loss"].partition("base64,")[2].split(")")[0]).decode()
    assert ElementTree.fromstring(image).tag.endswith("svg")
    assert "validation 2.250" in image


def test_a_curve_by_hand():
    from flows.curve import loss_svg

    rows = [{"step": 0, "loss": 3.0}, {"step": 50, "loss": math.nan}, {"step": 100, "loss": 1.0, "val_loss": 2.0}]
    drawing = ElementTree.fromstring(loss_svg(rows))
    (line, val) = [item.get("points") for item in drawing.iter() if item.tag.endswith("polyline")]
    # From the upper left corner of the axes, (56, 28), to the lower right, (640 - 12, 320 - 34); 2.0 is half-way down.
    assert line == "56.0,28.0 628.0,286.0"
    assert val == "628.0,157.0"
    assert loss_svg(rows[:1]) == loss_svg([]) == ""
    assert loss_svg([{"step": n, "loss": 1.0} for n in range(5000)]).count(",") < 1000


def test_an_api_that_is_away_is_left_alone(artifacts, monkeypatch):
    from flows import server

    _, stage, made = artifacts
    asked = []
    monkeypatch.setattr(server, "away", lambda: asked.append(1) or True)
    for step in range(5):
        stage({"step": step, "split": "val", "loss": 1.0})
    stage.report(Path("/nosuch/report.md"))
    assert (len(asked), made) == (1, [])


def test_an_artifact_that_cannot_be_made_is_told_and_costs_nothing(artifacts, monkeypatch, capsys):
    module, stage, made = artifacts

    def refused(*args, **kwargs):
        made.append(1)
        raise ValueError("no such field")

    monkeypatch.setattr(module, "create_table_artifact", refused)
    for step in range(3):  # the next try is a minute later
        stage({"step": step, "split": "val", "loss": 1.0})
    told = capsys.readouterr()
    assert (told.out + told.err).count("My.run_1/pretrain: not shown in Prefect (ValueError: no such field)") == 1
    assert made == [1]


def test_tags_and_assets_go_with_a_server(monkeypatch):
    from flows import server, tasks

    cfg = RunConfig(name="probe")
    specs = plan(cfg)
    monkeypatch.setattr(server, "has_assets", lambda: True)
    made = tasks.for_stage(specs[1], cfg)
    assert made.tags == {"jaxlm", "jaxlm-cpu", "tokenize"}
    assert made.task_run_name == f"{specs[1].name} for probe"
    assert [asset.key for asset in made.assets] == [f"jaxlm://store/{specs[1].name}"]
    assert [asset.key for asset in made.asset_deps] == [f"jaxlm://store/{specs[0].name}"]
    assert (made.retries, made.retry_delay_seconds, made.retry_jitter_factor) == (100, [2, 4, 8, 16], 1.0)
    assert tasks.for_stage(specs[1], cfg.replace(launcher="inline")).retries == 4
    # Without one a tag would fail the task: Prefect asks the server for a place under the tag's limit.
    offline = tasks.for_stage(specs[3], cfg, online=False)
    assert offline.tags == set()
    assert not hasattr(offline, "assets")
    assert "jaxlm-accelerator" in tasks.for_stage(specs[3], cfg).tags


def test_what_is_worth_a_retry():
    from prefect.states import Failed

    from flows.tasks import worth_a_retry, worth_a_retry_inline
    from jaxlm.errors import InputError, Preempted, UnavailableError
    from jaxlm.stages.runner import CancelledError, StageTimeoutError

    def asked(condition, error):
        return condition(None, None, Failed(data=error))

    condition = worth_a_retry()
    away = [UnavailableError("x")] * 4
    for error in [Preempted("x")] * 20 + away + [Preempted("x")] + away:
        assert asked(condition, error)
    assert not asked(condition, away[0])  # the fifth in a row
    for error in (InputError("x"), CancelledError("x"), StageTimeoutError("x"), RuntimeError("x")):
        assert not asked(worth_a_retry(), error)
    assert asked(worth_a_retry_inline, UnavailableError("x"))
    assert not asked(worth_a_retry_inline, Preempted("x"))
