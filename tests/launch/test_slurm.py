"""Slurm, against command-line tools that behave as its own do (fakes/slurm.py)."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from jaxlm.errors import InputError, Preempted, UnavailableError
from jaxlm.launch import kept, slurm, submit_once
from jaxlm.launch.slurm import SlurmLauncher
from jaxlm.launch_config import LaunchConfig, SlurmConfig
from jaxlm.stages import runner
from jaxlm.stages.runner import CancelledError, run_stage
from jaxlm.stages.spec import Spec
from jaxlm.stages.store import write_spec

FAKE = Path(__file__).parent / "fakes" / "slurm.py"
QUICK = SlurmConfig(poll_seconds=0.05, kill_wait=5.0)


class Cluster:
    def __init__(self, home):
        self.home = home

    def fault(self, **said):
        (self.home / "faults").write_text(json.dumps(said))

    def set(self, number, **fields):
        for name, value in fields.items():
            (self.home / number / name).write_text(value)

    def jobs(self):
        return sorted(path.name for path in self.home.iterdir() if path.name.isdigit())

    def end(self):
        """Ends what a test has left running."""
        for file in [*self.home.glob("*/pid"), *self.home.glob("*/steps")]:
            for pid in map(int, file.read_text().split()):
                with suppress(OSError):
                    os.killpg(pid, signal.SIGKILL)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    tools, home = tmp_path / "bin", tmp_path / "slurm"
    tools.mkdir()
    home.mkdir()
    for name in ("sbatch", "squeue", "sacct", "scancel", "srun", "scontrol"):
        (tools / name).symlink_to(FAKE)
    FAKE.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(home))
    made = Cluster(home)
    yield made
    made.end()


@pytest.fixture
def launcher():
    return SlurmLauncher(QUICK)


def test_the_batch_script_asks_for_what_is_configured(make_job):
    cfg = SlurmConfig(
        partition="gpu", account="lab", nodes=2, cpus_per_task=8, gpus_per_task=1, time_limit="1-02:03:04",
        options=("--constraint=a100",), setup=(". /opt/venv/bin/activate",),
    )  # fmt: skip
    script = SlurmLauncher(cfg).script(make_job("python", "-m", "a stage", processes=2, GREETING="it's"))
    lines = script.splitlines()
    assert lines[0] == "#!/bin/bash"
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", script, re.M))
    assert asked["job-name"] == "pretrain-0123456789ab"
    assert (asked["nodes"], asked["ntasks"], asked["cpus-per-task"], asked["gpus-per-task"]) == ("2", "2", "8", "1")
    assert (asked["partition"], asked["account"], asked["time"]) == ("gpu", "lab", "1-02:03:04")
    assert asked["constraint"] == "a100"
    assert asked["signal"] == "TERM@90"
    assert "no-requeue" in asked  # the flow starts again what is worth it
    assert ". /opt/venv/bin/activate" in lines
    assert """export GREETING='it'"'"'s'""" in lines
    assert lines[-1] == "srun --kill-on-bad-exit=1 python -m 'a stage'"
    assert any(line.startswith("JAXLM_COORDINATOR=") for line in lines)
    alone = SlurmLauncher(SlurmConfig(nodes=4)).script(make_job("true"))
    assert "#SBATCH --nodes=1\n" in alone  # srun would not spread one process over four
    assert "JAXLM_COORDINATOR" not in alone
    assert "gpus" not in alone
    # bash reads it without running it
    assert subprocess.run(["/bin/bash", "-n"], input=script, text=True).returncode == 0


def test_a_template_of_ones_own(make_job, tmp_path):
    mine = tmp_path / "mine.sbatch"
    mine.write_text("#!/bin/sh\n#SBATCH --job-name={{ name }}\n{{ comand }}\n")
    with pytest.raises(InputError, match=r"mine\.sbatch: not a usable template \('comand' is undefined\)"):
        SlurmLauncher(SlurmConfig(template=str(mine))).script(make_job())
    with pytest.raises(InputError, match=r"gone: no readable template"):
        SlurmLauncher(SlurmConfig(template=str(tmp_path / "gone"))).script(make_job())


def test_a_job_from_its_submission_to_its_end(cluster, launcher, make_job, ended):
    job = make_job("/bin/sh", "-c", "echo $JAXLM_NUM_PROCESSES:$SLURM_PROCID:$COLOR", processes=2, COLOR="blue")
    directory = job.directory.parent / "at 100%j, it is"  # %j is the job's number where sbatch reads it
    directory.mkdir()
    job = replace(job, directory=directory)
    (cluster.home / "hold").touch()
    handle, there = submit_once(launcher, job)
    assert not there
    assert launcher.poll(handle).phase == "waiting"
    (cluster.home / "hold").unlink()
    assert ended(launcher, handle).exit_code == 0
    assert sorted(launcher.logs(handle)) == ["2:0:blue", "2:1:blue"]
    assert (job.directory / "launch.sbatch").read_text() == launcher.script(job)


def test_who_comes_later_goes_on_with_the_job_and_none_is_launched_twice(cluster, make_job, ended):
    job = make_job("/bin/sh", "-c", "echo up; exec sleep 60")
    handle, _ = submit_once(SlurmLauncher(QUICK), job)
    again, there = submit_once(SlurmLauncher(QUICK), job)
    assert (again, there) == (handle, True)
    (job.directory / "launch.json").unlink()  # the launcher died between sbatch and its note
    found, _ = submit_once(SlurmLauncher(QUICK), job)
    assert found.id == handle.id
    assert cluster.jobs() == [handle.id]
    later = SlurmLauncher(QUICK)
    assert later.cancel(found, grace=0.2).phase == "ended"
    new, there = submit_once(SlurmLauncher(QUICK), job)  # the old one has ended: this is a new one
    assert not there
    assert new.id != handle.id


def test_a_job_that_is_ending_is_not_gone_on_with(cluster, launcher, make_job, ended):
    (cluster.home / "hold").touch()
    handle, _ = submit_once(launcher, make_job("true"))
    cluster.set(handle.id, state="COMPLETING")
    new, there = submit_once(launcher, make_job("true"))
    assert not there
    assert new.id != handle.id
    cluster.set(handle.id, state="CANCELLED by 0")
    (cluster.home / "hold").unlink()
    assert ended(launcher, new).exit_code == 0


@pytest.mark.parametrize(
    ("state", "code", "preempted", "cancelled", "told"),
    [
        ("PREEMPTED", "0:15", True, False, "was preempted"),
        ("NODE_FAIL", "1:0", True, False, "lost a node"),
        ("TIMEOUT", "0:0", True, False, "reached its time limit"),
        ("CANCELLED by 1000", "0:15", False, True, "was cancelled"),
        ("OUT_OF_MEMORY", "0:125", False, False, "needed more memory"),
        ("FAILED", "65:0", False, False, "ended as FAILED"),
    ],
)
def test_how_a_job_ended(cluster, launcher, make_job, ended, state, code, preempted, cancelled, told):
    job = make_job("true")
    (cluster.home / "hold").touch()
    handle = launcher.submit(job)
    cluster.set(handle.id, state=state, code=code)
    status = ended(launcher, handle)
    assert (status.preempted, status.cancelled) == (preempted, cancelled)
    assert told in status.reason
    if state == "FAILED":
        assert status.exit_code == 65
    cluster.set(handle.id, state="CANCELLED by 0")


def test_an_accounting_that_is_late_or_away_is_waited_for(cluster, launcher, make_job, ended, monkeypatch):
    (cluster.home / "unaccounted").touch()
    handle = launcher.submit(make_job("true"))
    assert launcher.poll(handle).phase == "waiting"
    cluster.fault(sacct="slurm_persist_conn_open: Unable to connect to slurmdbd: Connection refused")
    status = launcher.poll(handle)
    assert status.phase == "running"
    assert "Connection refused" in status.reason
    monkeypatch.setattr(slurm, "AWAY_SECONDS", 0.0)
    time.sleep(0.01)
    with pytest.raises(UnavailableError, match=f"The job {handle.id} goes on"):
        launcher.poll(handle)
    cluster.fault()
    (cluster.home / "unaccounted").unlink()
    assert ended(launcher, handle).exit_code == 0
    (cluster.home / "unaccounted").touch()  # purged
    monkeypatch.setattr(slurm, "UNKNOWN_SECONDS", 0.0)
    launcher.poll(handle)
    assert launcher.poll(handle).preempted


def test_what_sbatch_refuses(cluster, make_job):
    with pytest.raises(InputError, match="Invalid partition name specified"):
        SlurmLauncher(SlurmConfig(partition="nosuch")).submit(make_job())
    cluster.fault(sbatch="Batch job submission failed: Unable to contact slurm controller (connect failure)")
    with pytest.raises(UnavailableError, match="Slurm is away"):
        SlurmLauncher(QUICK).submit(make_job())
    assert cluster.jobs() == []


def test_a_machine_without_slurm(make_job, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(InputError, match=r"launch\.kind=slurm: there is no squeue on this machine"):
        SlurmLauncher(QUICK).submit(make_job())


@pytest.fixture
def stage(tmp_path, fake_stages):
    def make(do):
        return Spec("pretrain", 1, {"value": 1}, options={"do": do}, root=str(tmp_path), module="fake_stage")

    return make


ON_SLURM = LaunchConfig(kind="slurm", slurm=QUICK, grace_seconds=10.0)


def test_a_stage_on_a_cluster(cluster, stage):
    lines, records = [], []
    manifest, cached = run_stage(stage("write"), launch=ON_SLURM, echo=lines.append, on_metrics=records.append)
    assert not cached
    assert manifest.path("deep/out.txt").read_text() == "pretrain 1\n"
    assert "pretrain says write" in lines
    assert [record["step"] for record in records] == [0, 1, 2]
    assert kept(manifest.directory) is None
    assert not any(name.startswith("launch") for name in manifest.outputs)
    assert run_stage(stage("write"), launch=ON_SLURM)[1]
    assert len(cluster.jobs()) == 1


def test_the_sentence_of_a_stage_on_a_cluster(cluster, stage):
    with pytest.raises(InputError, match=r"^data\.path=x\.txt: no such file; give one that exists\.$"):
        run_stage(stage("input_error"), launch=ON_SLURM, echo=lambda line: None)
    with pytest.raises(Preempted, match="saved at step 1"):
        run_stage(stage("preempted_once"), launch=ON_SLURM, echo=lambda line: None)
    run_stage(stage("preempted_once"), launch=ON_SLURM, echo=lambda line: None)


def test_a_flow_that_was_killed_goes_on_with_its_job(cluster, stage):
    spec, lines = stage("write"), []
    (cluster.home / "hold").touch()
    directory = write_spec(spec).resolve()
    job = runner._job(spec, directory, ON_SLURM, terminal=False, follow=False)
    handle, _ = submit_once(SlurmLauncher(QUICK), job)  # and then its process was killed
    (cluster.home / "hold").unlink()
    manifest, cached = run_stage(spec, launch=ON_SLURM, echo=lines.append)
    assert not cached
    assert f"pretrain: goes on as slurm job {handle.id}" in lines
    assert cluster.jobs() == [handle.id]
    assert kept(manifest.directory) is None


def test_a_job_of_which_nothing_is_heard_goes_on_and_the_next_command_with_it(cluster, stage, monkeypatch):
    spec, lines = stage("write"), []
    (cluster.home / "hold").touch()
    cluster.fault(sacct="slurm_persist_conn_open: Unable to connect to slurmdbd: Connection refused")
    with monkeypatch.context() as patch:
        patch.setattr(slurm, "AWAY_SECONDS", 0.0)
        with pytest.raises(UnavailableError, match=r"The job \d+ goes on; run the same command later\.$"):
            run_stage(spec, launch=ON_SLURM, echo=lines.append)
    (number,) = cluster.jobs()
    assert (cluster.home / number / "state").read_text() == "PENDING"  # and not cancelled
    handle = kept(spec.directory)
    assert handle is not None
    assert handle.id == number
    cluster.fault()
    (cluster.home / "hold").unlink()
    run_stage(spec, launch=ON_SLURM, echo=lines.append)
    assert f"pretrain: goes on as slurm job {number}" in lines
    assert cluster.jobs() == [number]


class Asked(BaseException):
    pass


def test_an_interrupted_wait_lets_the_job_save(cluster, stage):
    spec = stage("sleep")

    def echo(line):
        if line.startswith("pretrain says"):
            raise Asked

    with pytest.raises(Asked) as caught:
        run_stage(spec, launch=ON_SLURM, echo=echo)
    assert caught.value.__notes__ == ["saved at step 7; run the same command to continue."]
    assert (spec.directory / "saved.part").exists()
    assert kept(spec.directory) is None


def test_a_job_that_somebody_cancels_is_not_started_again(cluster, stage):
    spec = stage("sleep")

    def cancel(line):
        if line.startswith("pretrain says"):
            subprocess.run(["scancel", cluster.jobs()[0]], check=True)

    with pytest.raises(CancelledError, match="was cancelled; run the same command to continue"):
        run_stage(spec, launch=ON_SLURM, echo=cancel)
    assert len(cluster.jobs()) == 1
