"""The real flow over fake stages, on a temporary server that Prefect starts by itself: once for all quick tests."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from typing import Any

import pytest

STAGES = ["download", "tokenize", "tokenize_sft", "pretrain", "sft", "evaluate"]


@dataclass
class Ended:
    code: int
    out: str
    err: str
    steps: list[dict[str, Any]]
    left: list[int]
    stage_pid: int
    scenario: Any


@pytest.fixture(scope="session")
def ended(make_scenario, processes, tmp_path_factory):
    scenario = make_scenario(tmp_path_factory.mktemp("root"))
    process = scenario.start(
        {"do": {"download": "unavailable_once", "pretrain": "preempted_once"}},
        {},
        {"set": ["train.steps=3"], "do": {"pretrain": "input_error"}},
        {"set": ["train.steps=3"], "do": {"pretrain": "crash"}},
        {"set": ["train.steps=4"], "do": {"pretrain": "sleep"}},
    )
    try:
        stage_pid = scenario.asleep("pretrain")
        started = processes.descendants(process.pid)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        scenario.end()
    processes.wait_until(lambda: not any(map(processes.running, started)), 10)
    left = [pid for pid in started if processes.running(pid)]
    steps = [json.loads(line) for line in out.splitlines() if line.startswith("\t")]
    return Ended(process.returncode, out, err, steps, left, stage_pid, scenario)


def test_a_pipeline_runs_every_stage_and_reports(ended):
    out = ended.steps[0]["out"]
    assert list(out["stages"]) == STAGES
    assert not any(stage["cached"] for stage in out["stages"].values())
    assert out["results"]["val_loss"] == 1.5
    assert out["report"] == f"{ended.scenario.root}/runs/probe/report.md"
    assert not ended.steps[0]["jax"]
    lines = ended.out.splitlines()
    assert sum(line.startswith("evaluate      done in 0.") for line in lines) == 1
    assert "val_loss 1.5  floor 1.4  perplexity 4.48" in lines
    assert f"report: {ended.scenario.root}/runs/probe/report.md" in lines


def test_again_every_stage_is_cached(ended):
    out = ended.steps[1]["out"]
    assert all(stage["cached"] for stage in out["stages"].values())
    assert (
        sum("already done" in line for line in ended.out.splitlines()) == 6 + 3 * 3
    )  # later steps: all before pretrain
    query = "select count(*) from task_run where state_type = 'COMPLETED' and state_name = 'Cached'"
    assert ended.scenario.rows(query) == [(6 + 3 * 3,)]


def test_away_and_preempted_are_retried_and_bad_input_is_not(ended):
    states = ended.scenario.rows(
        "select t.name, s.name, count(*) from task_run_state s join task_run t on t.id = s.task_run_id group by 1, 2"
    )
    waited = {name.partition("-")[0] for name, state, _ in states if state == "AwaitingRetry"}
    assert waited == {"download", "pretrain"}
    failed = [count for name, state, count in states if state == "Failed"]
    assert failed == [2]  # one name: the stage that had bad input, and then crashed
    assert len([name for name, state, _ in states if state == "AwaitingRetry"]) == 2


def test_failures_are_one_sentence_each(ended):
    assert ended.steps[2] == {"exit_code": 65, "message": "data.path=x.txt: no such file; give one that exists."}
    assert ended.steps[3]["exit_code"] == 1
    assert "unexpected RuntimeError (a bug); see " in ended.steps[3]["message"]
    assert "Traceback" not in ended.err
    assert [step["message"] for step in ended.steps[2:]] == ended.err.splitlines()


def test_sigterm_lets_the_stage_save_and_leaves_nothing_behind(ended, processes):
    assert ended.code == 75
    assert ended.steps[4]["message"] == "saved at step 7; run the same command to continue."
    assert ended.left == []
    assert not processes.running(ended.stage_pid)
    assert len(list(ended.scenario.root.glob("store/pretrain-*/saved.part"))) == 1
    assert ended.scenario.rows("select state_type from flow_run order by start_time")[-1] == ("CRASHED",)


def test_artifacts_show_progress_and_the_report(ended):
    rows = ended.scenario.rows("select key, type, data from artifact")
    assert ("probe-report", "markdown", json.dumps("# Report\n\nval_loss 1.5\n")) in rows
    assert {(key, float(data)) for key, kind, data in rows if kind == "progress"} == {
        ("probe-pretrain-progress", 100.0),
        ("probe-sft-progress", 100.0),
    }


@pytest.mark.slow
def test_sigkill_leaves_neither_stage_nor_server(scenario, processes):
    process = scenario.start({"do": {"tokenize": "sleep"}})
    scenario.asleep("tokenize")
    started = processes.descendants(process.pid)
    assert len(started) >= 3  # the stage, the server, its guard
    process.kill()
    process.communicate()
    assert processes.wait_until(lambda: not any(map(processes.running, started)), 20)


@pytest.mark.slow
def test_a_server_that_dies_does_not_fail_the_run(scenario, processes):
    process = scenario.start({"do": {"tokenize": "sleep"}}, FAKE_SECONDS="3", PREFECT_CLIENT_MAX_RETRIES="0")
    stage = scenario.asleep("tokenize")
    for pid in processes.descendants(process.pid):
        with open(f"/proc/{pid}/cmdline") as file:
            if pid != stage and "uvicorn" in file.read():
                os.kill(pid, signal.SIGKILL)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    assert "Prefect's API went away before the flow could report; every stage is done all the same." in out
    assert (scenario.root / "runs" / "probe" / "report.md").exists()
