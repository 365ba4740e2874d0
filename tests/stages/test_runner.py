from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from jaxlm._lock import dir_lock
from jaxlm.config import RunConfig
from jaxlm.errors import DiskError, InputError, JaxlmError, Preempted, UnavailableError
from jaxlm.stages import in_time, store
from jaxlm.stages.plan import plan
from jaxlm.stages.process import read_error
from jaxlm.stages.runner import MetricsTail, run_chain, run_stage

PATIENCE = 60.0  # seconds that a test which fails waits for; others have what they want long before


def pids(spec):
    try:
        return [int(number) for number in (spec.directory / "pids.part").read_text().split()]
    except (OSError, ValueError):
        return []


@pytest.mark.parametrize("launcher", ["process", "inline"])
def test_a_stage_runs_once(make_spec, launcher):
    lines, records = [], []
    first = make_spec("first", value=5)
    second = make_spec("second", inputs=[first])
    run_stage(first, launcher=launcher, echo=lines.append)
    manifest, cached = run_stage(second, launcher=launcher, on_metrics=records.append, echo=lines.append)
    assert not cached
    assert manifest.path("deep/out.txt").read_text() == "first 5\nsecond 0\n"
    assert (manifest.results["pid"] == os.getpid()) == (launcher == "inline")
    assert [record["step"] for record in records] == [0, 1, 2]
    again, cached = run_stage(second, launcher=launcher, echo=lines.append)
    assert cached
    assert again.to_json() == manifest.to_json()
    if launcher == "process":
        assert lines == ["first says write", "second says write"]
        assert (second.directory / "log.txt").read_text() == "second says write\n"


def test_a_missing_or_damaged_input_is_named(make_spec):
    first = make_spec("first")
    second = make_spec("second", inputs=[first])
    with pytest.raises(InputError, match=f"the input first of {second.name} is not there"):
        run_stage(second, launcher="inline")
    run_stage(first, launcher="inline")
    out = first.directory / "deep" / "out.txt"
    whole, times = out.read_bytes(), out.stat()
    out.write_bytes(whole[::-1])
    os.utime(out, ns=(times.st_atime_ns, times.st_mtime_ns))  # as when a disk goes bad: only the bytes tell
    assert run_stage(first, launcher="inline")[1]
    with pytest.raises(InputError, match=r"out\.txt: its SHA-256 is .*; remove that file and run the stage first ag"):
        run_stage(second, launcher="inline")
    out.unlink()  # what the sentence says
    with pytest.raises(InputError, match=r"out\.txt: missing; run the stage first again"):
        run_stage(second, launcher="inline")
    assert not run_stage(first, launcher="inline")[1]
    assert out.read_bytes() == whole
    assert not run_stage(second, launcher="inline")[1]


@pytest.mark.parametrize(
    ("do", "kind", "code", "sentence"),
    [
        ("input_error", InputError, 65, r"^data\.path=x\.txt: no such file; give one that exists\.$"),
        ("unavailable_once", UnavailableError, 69, "^the mirror is away; try again later.$"),
        ("no_space", DiskError, 74, r"the disk failed \(\[Errno 28\] No space left on device\)"),
        ("preempted_once", Preempted, 75, "^saved at step 1"),
        ("crash", JaxlmError, 1, r"^fake-\w+: unexpected RuntimeError \(a bug\); see .*traceback\.txt\.$"),
    ],
)
def test_a_failure_is_its_error_with_one_sentence(make_spec, do, kind, code, sentence):
    lines = []
    with pytest.raises(kind, match=sentence) as caught:
        run_stage(make_spec(do=do), echo=lines.append)
    assert type(caught.value) is kind
    assert caught.value.exit_code == code
    assert lines == [f"fake says {do}"]  # the sentence is the launcher's to print, and there is no traceback
    directory = make_spec().directory
    assert json.loads((directory / "error.json").read_text())["exit_code"] == code
    assert (directory / "traceback.txt").exists() == (do == "crash")
    assert not (directory / "manifest.json").exists()
    run_stage(make_spec(do="write"), echo=lines.append)  # and the same stage can be run after all
    assert not (directory / "error.json").exists()


def test_by_hand_the_sentence_goes_to_stderr(make_spec):
    directory = store.write_spec(make_spec(do="input_error"))
    done = subprocess.run([sys.executable, "-m", "fake_stage", directory], capture_output=True, text=True)
    assert done.returncode == 65
    assert done.stderr == "data.path=x.txt: no such file; give one that exists.\n"
    done = subprocess.run([sys.executable, "-m", "fake_stage", directory / "no"], capture_output=True, text=True)
    assert done.returncode == 65
    assert done.stderr.endswith("spec.json: no such file; name the directory of a stage.\n")
    assert done.stderr.count("\n") == 1


def test_a_directory_in_use_is_refused(make_spec):
    spec = make_spec()
    with dir_lock(spec.directory), pytest.raises(InputError, match=f"in use by process {os.getpid()}"):
        run_stage(spec, echo=lambda line: None)
    run_stage(spec, echo=lambda line: None)


def in_background(function):
    result = {}

    def work():
        try:
            result["value"] = function()
        except BaseException as error:
            result["error"] = error

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread, result


def test_kill_9_of_the_child_is_told(make_spec, eventually):
    spec = make_spec(do="sleep")
    thread, result = in_background(lambda: run_stage(spec, echo=lambda line: None))
    assert eventually(lambda: pids(spec))
    os.kill(pids(spec)[0], signal.SIGKILL)
    thread.join(PATIENCE)
    assert type(result["error"]) is JaxlmError
    assert "was killed by SIGKILL (out of memory?); run the same command to continue" in str(result["error"])


def test_sigterm_to_the_child_alone_is_preempted(make_spec, eventually):
    spec = make_spec(do="sleep")
    thread, result = in_background(lambda: run_stage(spec, echo=lambda line: None))
    assert eventually(lambda: pids(spec))
    os.kill(pids(spec)[0], signal.SIGTERM)
    thread.join(PATIENCE)
    assert isinstance(result["error"], Preempted)
    assert str(result["error"]) == "saved at step 7; run the same command to continue."


def test_sigterm_is_heard_while_the_main_thread_is_in_a_library(make_spec, eventually):
    spec = make_spec(do="compile")
    thread, result = in_background(lambda: run_stage(spec, echo=lambda line: None))
    assert eventually(lambda: pids(spec))
    started = time.monotonic()
    os.kill(pids(spec)[0], signal.SIGTERM)
    thread.join(PATIENCE)
    # At once, and it would be the ordinary handler's doing, in a main thread that was in no library.
    assert in_time.SECONDS - 1 < time.monotonic() - started < 20
    assert isinstance(result["error"], Preempted)
    assert str(result["error"]) == f"{spec.name}: stopped on request; run the same command to continue."


HELPED = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from jaxlm.stages.process import Helpers
with ProcessPoolExecutor(1, mp_context=Helpers()) as pool:
    print(pool.submit(os.getpid).result(), flush=True)
    time.sleep(60)
"""


def test_kill_9_of_a_stage_ends_the_helpers_that_wait_for_work(alive, eventually):
    """As when the stage was started by hand: no launcher ends its group."""
    stage = subprocess.Popen([sys.executable, "-c", HELPED], stdout=subprocess.PIPE, text=True)
    assert stage.stdout is not None
    try:
        helper = int(stage.stdout.readline())
        assert alive(helper)
    finally:
        stage.kill()
        stage.wait()
        stage.stdout.close()
    assert eventually(lambda: not alive(helper))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_stage_can_listen_is_a_request_to_stop(tmp_path, number):
    """While its libraries are still being loaded, the system ends it: nothing has begun, and nothing is lost."""
    assert isinstance(error := read_error(tmp_path, -number), Preempted)
    assert "stopped on request before it began; run the same command to continue." in str(error)
    assert type(read_error(tmp_path, -signal.SIGSEGV)) is JaxlmError


LAUNCHER = """
import sys
from pathlib import Path
from jaxlm.errors import JaxlmError
from jaxlm.stages.runner import preempted_when_stopped, run_stage
from jaxlm.stages.store import read_spec
try:
    with preempted_when_stopped():
        run_stage(read_spec(Path(sys.argv[1])), grace=float(sys.argv[2]))
except JaxlmError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


@pytest.fixture
def launch(eventually):
    started = []

    def start(spec, grace=20.0):
        store.write_spec(spec)
        launcher = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, spec.directory, str(grace)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(launcher)
        assert eventually(lambda: pids(spec))
        return launcher

    yield start
    for launcher in started:
        launcher.kill()
        launcher.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_lets_the_stage_save(make_spec, launch, alive, number):
    spec = make_spec(do="sleep")
    launcher = launch(spec)
    launcher.send_signal(number)
    _, said = launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode == 75
    assert said == "saved at step 7; run the same command to continue.\n"
    assert (spec.directory / "saved.part").exists()
    assert not alive(pids(spec)[0])


def test_a_stage_that_does_not_listen_is_killed_after_the_grace_with_its_helpers(make_spec, launch, eventually, alive):
    spec = make_spec(do="deaf")
    launcher = launch(spec, grace=0.5)
    started = time.monotonic()
    launcher.send_signal(signal.SIGTERM)
    _, said = launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode == 75
    assert "was killed by SIGKILL" in said
    assert time.monotonic() - started < 50  # its helper would take 60
    assert eventually(lambda: not any(alive(pid) for pid in pids(spec)))


def test_a_launcher_that_is_killed_takes_its_stage_along(make_spec, launch, eventually, alive):
    spec = make_spec(do="sleep")
    launcher = launch(spec)
    launcher.kill()
    launcher.wait()
    assert eventually(lambda: not alive(pids(spec)[0]))
    assert (spec.directory / "saved.part").exists()


def test_on_a_terminal_the_stage_writes_there_and_to_its_log(make_spec):
    spec = make_spec()
    store.write_spec(spec)
    ours, theirs = pty.openpty()
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, spec.directory, "1"], stdout=theirs, stderr=theirs)
    os.close(theirs)
    assert launcher.wait(PATIENCE) == 0
    assert os.read(ours, 1000) == b"fake says write\r\n"
    os.close(ours)
    assert (spec.directory / "log.txt").read_text() == "fake says write\n"


def test_metrics_are_read_line_by_line_and_again_when_the_file_is_new(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    assert tail.new() == []
    with open(path, "w") as file:
        file.write('{"step": 1}\n{"step": 2}\n{"st')
        file.flush()
        assert tail.new() == [{"step": 1}, {"step": 2}]
        file.write('ep": 3}\n')
        file.flush()
        assert tail.new() == [{"step": 3}]
    assert tail.new() == []
    (tmp_path / "new").write_text('{"step": 1}\nnot json\n[4]\n{"step": 9}\n{"step": 10}\n{"step": 11}\n')
    os.replace(tmp_path / "new", path)
    assert [record["step"] for record in tail.new()] == [1, 9, 10, 11]


def test_a_listener_that_fails_does_not_fail_the_stage(make_spec):
    def listener(record):
        raise ConnectionError("the server is away")

    assert not run_stage(make_spec(), on_metrics=listener, echo=lambda line: None)[1]


def test_a_chain_runs_in_order_and_only_what_is_missing(tmp_path, fake_modules, capsys):
    cfg = RunConfig(name="chain", root=str(tmp_path), launcher="inline")
    modules = {spec.stage: "fake_stage" for spec in plan(cfg)}
    done = run_chain(cfg, last="pretrain", modules=modules)
    assert [(manifest.stage, cached) for manifest, cached in done] == [
        ("download", False),
        ("tokenize", False),
        ("pretrain", False),
    ]
    done = run_chain(cfg, modules=modules)
    assert [cached for _, cached in done] == [True, True, False, True, False, False]
    assert (tmp_path / "runs" / "chain" / "report.md").exists()
    said = capsys.readouterr().out
    assert f"download      already done       {tmp_path}/store/download-" in said
    assert re.search(r"^evaluate      done in \d+\.\d s  ", said, re.M)
