"""The real flow over fake stages, on a temporary server that Prefect starts by itself: once for all quick tests."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# All stages: the two steps with a gate, the first run of the sweep. `prepare`, and those with other training steps:
# what is before pretrain; of the fine-tuning's data `pretrain` itself needs none.
CACHED = 3 * 6 + 4 * 3 + 2
STAGES = ["download", "tokenize", "tokenize_sft", "pretrain", "sft", "evaluate"]


@dataclass
class Ended:
    code: int
    out: str
    err: str
    steps: list[dict[str, Any]]
    left: list[int]
    ports: list[int]
    stage_pid: int
    scenario: Any


@pytest.fixture(scope="session")
def ended(make_scenario, processes, tmp_path_factory):
    scenario = make_scenario(tmp_path_factory.mktemp("root"))
    process = scenario.start(
        {"set": ["launcher=inline"], "do": {"download": "unavailable_once"}},
        {"set": ["gate.bounds=[val_loss<=1.6, perplexity<5]", "publish.to=published"]},
        {"set": ["train.steps=3"], "do": {"pretrain": "input_error"}},
        {"set": ["train.steps=3"], "do": {"pretrain": "crash"}},
        {"last": "prepare"},
        {"set": ["gate.bounds=[val_loss<=1.4]", "publish.to=elsewhere"]},
        {"grid": ["seed=0,1"], "set": ["launcher=inline"]},
        {"set": ["train.steps=5"], "do": {"pretrain": "preempted_once"}, "last": "pretrain"},
        {"set": ["train.steps=4"], "do": {"pretrain": "sleep"}},
    )
    try:
        stage_pid = scenario.asleep("pretrain")
        started = processes.descendants(process.pid)
        ports = list(scenario.servers().values())
        os.killpg(process.pid, signal.SIGTERM)  # as a shell, a batch system or a supervisor does
        out, err = process.communicate(timeout=processes.patience)
    finally:
        scenario.end()
    processes.wait_until(lambda: not any(map(processes.running, started)), 60)
    left = [pid for pid in started if processes.running(pid)]
    steps = [json.loads(line) for line in out.splitlines() if line.startswith("\t")]
    return Ended(process.returncode, out, err, steps, left, ports, stage_pid, scenario)


def test_a_pipeline_runs_every_stage_and_reports(ended):
    out = ended.steps[0]["out"]
    assert list(out["stages"]) == STAGES
    assert not any(stage["cached"] for stage in out["stages"].values())
    assert out["results"]["val_loss"] == 1.5
    assert out["report"] == f"{ended.scenario.root}/runs/probe/report.md"
    assert not ended.steps[0]["jax"]
    lines = ended.out.splitlines()
    assert sum(line.startswith("evaluate      done in ") for line in lines) == 2  # and the second run of the sweep
    assert "val_loss 1.5  floor 1.4  perplexity 4.48" in lines
    assert f"report: {ended.scenario.root}/runs/probe/report.md" in lines


def test_again_every_stage_is_cached(ended):
    out = ended.steps[1]["out"]
    assert all(stage["cached"] for stage in out["stages"].values())
    assert sum("already done" in line for line in ended.out.splitlines()) == CACHED
    query = "select count(*) from task_run where state_type = 'COMPLETED' and state_name = 'Cached'"
    assert ended.scenario.rows(query) == [(CACHED,)]


def test_away_and_preempted_are_retried_and_bad_input_is_not(ended):
    states = ended.scenario.rows(
        "select t.name, s.name, count(*) from task_run_state s join task_run t on t.id = s.task_run_id group by 1, 2"
    )
    waited = {name.partition("-")[0] for name, state, _ in states if state == "AwaitingRetry"}
    assert waited == {"download", "pretrain"}
    failed = {name.partition("-")[0].partition(":")[0]: count for name, state, count in states if state == "Failed"}
    assert failed == {"pretrain": 2, "gate": 1}  # pretrain had bad input, and then crashed
    assert len([name for name, state, _ in states if state == "AwaitingRetry"]) == 2


def test_failures_are_one_sentence_each(ended):
    assert ended.steps[2] == {"exit_code": 65, "message": "data.path=x.txt: no such file; give one that exists."}
    assert ended.steps[3]["exit_code"] == 1
    assert "unexpected RuntimeError (a bug); see " in ended.steps[3]["message"]
    assert "Traceback" not in ended.err
    assert [step["message"] for step in ended.steps if "message" in step] == ended.err.splitlines()


def test_prepare_ends_with_the_data(ended):
    assert list(ended.steps[4]["out"]["stages"]) == STAGES[:3]
    assert ended.steps[4]["out"]["report"] is None


def test_a_gate_comes_before_the_publication(ended):
    root = ended.scenario.root
    where = Path(ended.steps[1]["out"]["published"])
    assert where.parent == root / "published"
    assert json.loads((where / "published.json").read_text())["run"] == "probe"
    assert (where / "report" / "report.md").exists()
    assert "gate: val_loss is 1.5, and gate.bounds wants val_loss <= 1.6: kept" in ended.out
    assert ended.steps[5]["exit_code"] == 70
    assert ended.steps[5]["message"].startswith("gate: val_loss is 1.5, and gate.bounds wants val_loss <= 1.4; ")
    assert not (root / "elsewhere").exists()


def test_a_sweep_compares_the_runs_of_a_grid(ended):
    out = ended.steps[6]["out"]
    assert [(row["run"], row["seed"], row["val_loss"]) for row in out["table"]] == [
        ("probe-0", "0", 1.5),
        ("probe-1", "1", 1.5),
    ]
    assert out["best"] == "probe-0"
    table = (ended.scenario.root / "runs" / "probe" / "sweep.md").read_text()
    assert "| probe-1 | 1 | 1.5 |" in table
    assert (ended.scenario.root / "runs" / "probe-1" / "report.md").exists()
    assert ended.scenario.rows("select count(*) from artifact where key = 'probe-sweep'") == [(2,)]


def test_the_status_says_why_and_what_to_do(ended):
    root = ended.scenario.root
    left = json.loads((root / "runs" / "probe" / "status.json").read_text())
    assert left["state"] == "cancelled"
    assert left["reason"] == "saved at step 7; run the same command to continue."
    assert left["command"] == f"jaxlm flow probe {root}/probe.yaml --set train.steps=4 --root {root}"
    assert json.loads((root / "runs" / "probe-1" / "status.json").read_text())["state"] == "completed"


def test_lineage_is_written(ended):
    stages = json.loads((ended.scenario.root / "runs" / "probe-0" / "lineage.json").read_text())["stages"]
    assert [stage["stage"] for stage in stages] == STAGES


def test_runs_are_named_and_tagged(ended):
    names = [name for (name,) in ended.scenario.rows("select name from flow_run order by start_time")]
    assert names[0] == "probe probe launcher=inline"
    assert names[2] == "probe probe train.steps=3"
    tags = ended.scenario.rows("select tags from task_run where name like 'pretrain-%'")
    assert {tuple(sorted(json.loads(each))) for (each,) in tags} == {("jaxlm", "jaxlm-accelerator", "pretrain")}
    assert all(
        name.endswith(" for probe") or " for probe-" in name or name[:4] in ("gate", "publ")
        for (name,) in ended.scenario.rows("select name from task_run")
    )


def test_sigterm_lets_the_stage_save_and_leaves_nothing_behind(ended, processes):
    assert ended.code == 75
    assert ended.steps[8]["message"] == "saved at step 7; run the same command to continue."
    assert ended.left == []
    assert not processes.running(ended.stage_pid)
    assert len(ended.ports) == 1
    assert not processes.listening(ended.ports[0])
    assert list(ended.scenario.temporary.iterdir()) == []
    assert len(list(ended.scenario.root.glob("store/pretrain-*/saved.part"))) == 1
    assert ended.scenario.rows("select state_type from flow_run order by start_time")[-1] == ("CRASHED",)


def test_artifacts_show_progress_and_the_report(ended):
    rows = ended.scenario.rows("select key, type, data from artifact")
    assert ("probe-report", "markdown", json.dumps("# Report\n\nval_loss 1.5\n")) in rows
    progress = {(key, float(data)) for key, kind, data in rows if kind == "progress"}
    assert {("probe-pretrain-progress", 100.0), ("probe-sft-progress", 100.0)} <= progress
    assert "probe-pretrain-loss" in {key for key, _, _ in rows}


@pytest.mark.slow
def test_sigkill_leaves_neither_stage_nor_server(scenario, processes):
    process = scenario.start({"do": {"tokenize": "sleep"}})
    scenario.asleep("tokenize")
    started = processes.descendants(process.pid)
    assert len(started) >= 3  # the stage, the server, its guard
    (port,) = scenario.servers().values()
    process.kill()
    process.communicate()
    assert processes.wait_until(lambda: not any(map(processes.running, started)), processes.patience)
    assert not processes.listening(port)
    assert list(scenario.temporary.iterdir()) == []


@pytest.mark.slow
def test_when_the_server_gets_the_same_sigterm_the_flow_does_not_wait_for_it(scenario, processes):
    """A supervisor that ends every process of a service, in whatever order."""
    process = scenario.start({"do": {"tokenize": "sleep"}})
    scenario.asleep("tokenize")
    started = processes.descendants(process.pid)
    (server,) = scenario.servers()
    os.kill(server, signal.SIGTERM)
    assert processes.wait_until(lambda: not processes.running(server), processes.patience)
    process.send_signal(signal.SIGTERM)
    before = time.monotonic()
    _, err = process.communicate(timeout=processes.patience)
    assert time.monotonic() - before < 180  # it was four minutes
    assert process.returncode == 75
    assert "saved at step 7; run the same command to continue." in err
    assert list(scenario.root.glob("store/tokenize-*/saved.part"))
    assert json.loads((scenario.root / "runs" / "probe" / "status.json").read_text())["state"] == "cancelled"
    assert processes.wait_until(lambda: not any(map(processes.running, started)), processes.patience)


@pytest.mark.slow
def test_a_server_that_dies_neither_fails_nor_delays_the_run(scenario, processes):
    process = scenario.start({"do": {"tokenize": "sleep"}}, FAKE_SECONDS="3")
    scenario.asleep("tokenize")
    (server,) = scenario.servers()
    os.kill(server, signal.SIGKILL)
    started = time.monotonic()
    process.communicate(timeout=processes.patience)
    assert process.returncode == 0
    assert time.monotonic() - started < 180  # it was four minutes, for each event tried its minute alone
    assert (scenario.root / "runs" / "probe" / "report.md").exists()
    assert json.loads((scenario.root / "runs" / "probe" / "status.json").read_text())["state"] == "completed"
    # The temporary server was started again, and has been told the truth.
    assert scenario.rows("select state_type from flow_run order by start_time desc limit 1") == [("COMPLETED",)]
