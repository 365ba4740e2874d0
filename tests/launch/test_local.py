"""Processes on this machine. The jobs are shell scripts: what is tested is their beginning and their end."""

from __future__ import annotations

import json
import os
import time
from types import SimpleNamespace

import pytest

from jaxlm.errors import InputError
from jaxlm.launch import Handle, kept, submit_once
from jaxlm.launch.local import LocalLauncher
from jaxlm.launch_config import LaunchConfig
from jaxlm.stages import runner
from jaxlm.stages.runner import StageTimeoutError, run_stage
from jaxlm.stages.spec import Spec


def sh(make_job, script, **given):
    return make_job("/bin/sh", "-c", script, **given)


def test_a_job_runs_in_a_session_of_its_own_and_its_lines_are_passed_on(make_job, ended):
    launcher = LocalLauncher()
    job = sh(make_job, 'echo one; echo "$COLOR" >&2; ps -o sid= -p $$', COLOR="blue")
    handle, there = submit_once(launcher, job)
    assert not there
    assert kept(job.directory) == handle
    status = ended(launcher, handle)
    assert (status.exit_code, status.preempted) == (0, False)
    lines = launcher.logs(handle)
    assert lines[:2] == ["one", "blue"]
    assert int(lines[2]) == int(handle.id) != os.getsid(0)
    assert launcher.logs(handle) == []
    assert (job.directory / "log.txt").read_text().splitlines() == lines


def test_processes_are_numbered_and_share_one_address(make_job, ended):
    launcher = LocalLauncher()
    job = sh(make_job, "echo $JAXLM_PROCESS_ID of $JAXLM_NUM_PROCESSES at $JAXLM_COORDINATOR", processes=2)
    handle = launcher.submit(job)
    assert ended(launcher, handle).exit_code == 0
    first = (job.directory / "log.txt").read_text()
    second = (job.directory / "log-1.txt.part").read_text()
    assert first.startswith("0 of 2 at 127.0.0.1:")
    assert second == first.replace("0 of 2", "1 of 2", 1)
    assert launcher.logs(handle) == [first.strip()]


def test_when_one_fails_the_others_are_ended_and_its_code_counts(make_job, ended, alive):
    launcher = LocalLauncher()
    job = sh(make_job, '[ "$JAXLM_PROCESS_ID" = 1 ] && exit 65; exec sleep 60', processes=2)
    handle = launcher.submit(job)
    started = time.monotonic()
    assert ended(launcher, handle).exit_code == 65
    assert time.monotonic() - started < 50  # and not 60
    assert not any(alive(int(pid)) for pid in handle.id.split())


def test_cancel_lets_a_job_save_and_ends_its_helpers(make_job, alive, tmp_path):
    launcher = LocalLauncher()
    job = sh(make_job, f"sleep 60 & echo $! > {tmp_path}/helper; trap 'echo saved; exit 75' TERM; echo up; wait")
    handle = launcher.submit(job)
    while "up" not in launcher.logs(handle):
        time.sleep(0.02)
    assert launcher.cancel(handle, grace=20.0).exit_code == 75
    assert "saved" in launcher.logs(handle)
    assert not alive(int((tmp_path / "helper").read_text()))


def test_a_job_that_does_not_listen_is_killed_after_the_grace(make_job):
    launcher = LocalLauncher()
    handle = launcher.submit(sh(make_job, "trap '' TERM; echo up; sleep 60; sleep 60"))
    while "up" not in launcher.logs(handle):
        time.sleep(0.02)
    started = time.monotonic()
    assert launcher.cancel(handle, grace=0.3).exit_code == -9
    assert time.monotonic() - started < 50  # and not 60


def test_of_a_job_that_cannot_start_nothing_is_left(make_job, tmp_path):
    launcher = LocalLauncher()
    with pytest.raises(FileNotFoundError):
        launcher.submit(make_job(tmp_path / "no such program", processes=2))
    assert launcher._children == []


def test_a_handle_of_a_cluster_is_not_taken_for_one_of_ours(make_job):
    job = make_job()
    there = Handle("slurm", "17", job.name, str(job.directory), "", "2026-01-01T00:00:00+00:00")
    (job.directory / "launch.json").write_text(json.dumps(there.to_json()))
    with pytest.raises(
        InputError, match=r"launch\.json: this result is being made by the slurm job 17, and launch.kind"
    ):
        submit_once(LocalLauncher(), job)
    (job.directory / "launch.json").write_text("{}")
    with pytest.raises(InputError, match=r"launch\.json: not the handle of a job"):
        submit_once(LocalLauncher(), job)


def test_a_stage_that_takes_too_long_saves_and_is_not_tried_again(fake_stages, tmp_path, monkeypatch):
    spec = Spec("pretrain", 1, {"value": 1}, options={"do": "sleep"}, root=str(tmp_path), module="fake_stage")
    passed, told = [0.0], []

    def echo(line):
        told.append(line)
        while not (spec.directory / "pids.part").exists():
            time.sleep(0.02)
        passed[0] = 7200.0  # the launcher's clock is two hours on

    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + passed[0], sleep=time.sleep)
    monkeypatch.setattr(runner, "time", clock)
    with pytest.raises(StageTimeoutError, match=r"has not ended after launch\.timeout_hours=1; it was told to save"):
        run_stage(spec, launch=LaunchConfig(timeout_hours=1.0), echo=echo)
    assert StageTimeoutError.exit_code == 75
    assert told == ["pretrain says sleep"]
    assert (spec.directory / "saved.part").exists()
    assert kept(spec.directory) is None
