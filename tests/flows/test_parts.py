"""The parts of the flows that need no server."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

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


@pytest.mark.parametrize(
    ("override", "sentence"),
    [("train.stepz=3", "did you mean steps?"), ("pretrain.init_from=gone", "gone: no such run, stage or directory")],
)
def test_bad_settings_are_one_sentence(checkout, tmp_path, override, sentence):
    # In a process of its own: what Prefect does to the streams at import has no place in this one.
    (tmp_path / "a.yaml").write_text("")
    command = [
        sys.executable,
        "-m",
        "flows.pipeline",
        str(tmp_path / "a.yaml"),
        "--root",
        str(tmp_path),
        "--set",
        override,
    ]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 65
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_guard_ends_what_its_owner_leaves_behind(checkout, processes):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    guard = subprocess.Popen(
        [sys.executable, "-I", "-S", checkout / "flows" / "server.py"], stdin=subprocess.PIPE, text=True
    )
    try:
        guard.stdin.write(f"{child.pid}\n")
        guard.stdin.flush()
        time.sleep(0.5)
        assert processes.running(child.pid)
        guard.stdin.close()  # as the system does when the owner dies
        assert processes.wait_until(lambda: not processes.running(child.pid), 5)
        child.wait()
        assert guard.wait(10) == 0
    finally:
        for process in (child, guard):
            process.kill()
            process.wait()


def test_prefect_yaml_is_one_deployment_that_loads(checkout):
    from prefect.cli.deploy._models import PrefectYamlModel
    from prefect.flows import load_flow_from_entrypoint

    values = yaml.safe_load((checkout / "prefect.yaml").read_text())
    model = PrefectYamlModel.model_validate(values)
    (deployment,) = model.deployments
    here = Path.cwd()
    try:
        os.chdir(checkout)
        flow = load_flow_from_entrypoint(deployment.entrypoint)
    finally:
        os.chdir(here)
    assert flow.name == "jaxlm-pipeline"
    assert flow.validate_parameters(deployment.parameters) == deployment.parameters
    fields = flow.parameters.properties
    assert list(fields) == ["config", "overrides", "root"]
    assert all(field["title"] and field["description"] for field in fields.values())


@pytest.fixture
def artifacts(monkeypatch):
    from flows import artifacts as module

    made = []
    for name in ("create_progress_artifact", "update_progress_artifact", "create_markdown_artifact"):
        monkeypatch.setattr(module, name, lambda *args, _name=name, **kwargs: made.append((_name, args, kwargs)))
    pretrain = plan(RunConfig().replace(name="My.run_1"))[3]
    return module, module.StageArtifacts("My.run_1", pretrain), made


def test_a_table_of_the_evaluations(artifacts):
    module, stage, made = artifacts
    stage({"step": 500, "split": "train", "loss": 2.5, "tokens": 1024000, "lr": 0.001})
    stage({"event": "sample", "step": 500, "text": "Once"})
    stage({"step": 500, "split": "val", "loss": 2.75})
    stage({"step": 600, "split": "train", "loss": 2.25})
    (name, (percent,), kwargs), table = made
    assert (name, percent, kwargs["key"]) == ("create_progress_artifact", 50.0, "my-run-1-pretrain-progress")
    assert table[2]["key"] == "my-run-1-pretrain-metrics"
    assert table[1][0].splitlines()[2:] == [
        "| step | tokens | loss | val_loss | lr |",
        "| ---: | ---: | ---: | ---: | ---: |",
        "| 500 | 1,024,000 | 2.5 | 2.75 | 0.001 |",
    ]
    assert module.table([{"step": 1, "val_loss": None}]) == "| step |\n| ---: |\n| 1 |\n"


def test_an_api_that_is_away_is_left_alone(artifacts, monkeypatch):
    module, stage, _ = artifacts
    calls = []

    def away(*args, **kwargs):
        calls.append(args)
        raise ConnectionError("no route")

    monkeypatch.setattr(module, "create_markdown_artifact", away)
    for step in range(5):
        stage({"step": step, "split": "val", "loss": 1.0})
    stage.report(Path("/nosuch/report.md"))
    assert len(calls) == 1
