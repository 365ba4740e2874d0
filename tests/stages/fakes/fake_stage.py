"""A stage that does what its `do` option says, or what FAKE_DO ({"stage": "what"}) says for the stages of a real plan.

Neither is part of its identity: a test may change its mind.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

from jaxlm.errors import InputError, Preempted, UnavailableError
from jaxlm.stages import process


def run(spec, inputs):
    do = spec.options.get("do") or json.loads(os.environ.get("FAKE_DO", "{}")).get(spec.stage, "write")
    directory = spec.directory
    print(f"{spec.stage} says {do}", flush=True)
    if do == "input_error":
        raise InputError("data.path=x.txt: no such file; give one that exists.")
    if do == "unavailable_once" and not (directory / "tried.part").exists():
        (directory / "tried.part").touch()
        raise UnavailableError("the mirror is away; try again later.")
    if do == "preempted_once" and not (directory / "tried.part").exists():
        (directory / "tried.part").touch()
        raise Preempted("saved at step 1; run the same command to continue.")
    if do == "crash":
        raise RuntimeError("a bug\nwith two lines")
    if do == "no_space":
        raise OSError(28, "No space left on device")
    if do == "sleep":
        wait_for_sigterm(directory, float(os.environ.get("FAKE_SECONDS", "60")))
    if do == "compile":  # its main thread is in a library's code, where no signal handler gets a turn
        (directory / "pids.part").write_text(str(os.getpid()))
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
    if do == "deaf":  # ignores SIGTERM, and has a helper process
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        (directory / "pids.part").write_text(f"{os.getpid()} {helper.pid}")
        time.sleep(60)
    with open(directory / "metrics.jsonl", "a") as file:
        for step in range(3):
            file.write(json.dumps({"step": step, "split": "train", "loss": 3.0 - step}) + "\n")
            file.flush()
    (directory / "deep").mkdir(exist_ok=True)
    upstream = "".join(item.path("deep/out.txt").read_text() for item in inputs.values())
    (directory / "deep" / "out.txt").write_text(f"{upstream}{spec.stage} {spec.config.get('value', 0)}\n")
    if spec.stage == "evaluate":
        (directory / "report.md").write_text("# Report\n\nval_loss 1.5\n")
        (directory / "report.json").write_text("{}\n")
        return {"val_loss": 1.5, "perplexity": 4.48, "floor": 1.4}
    return {"pid": os.getpid()}


def wait_for_sigterm(directory, seconds):
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    (directory / "pids.part").write_text(str(os.getpid()))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if stopped:
            (directory / "saved.part").touch()
            raise Preempted("saved at step 7; run the same command to continue.")
        time.sleep(0.02)


if __name__ == "__main__":
    process.main(run)
