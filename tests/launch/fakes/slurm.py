#!/usr/bin/env python3
"""sbatch, squeue, sacct and scancel of a cluster of one machine, as far as jaxlm uses them; named by argv[0].

The state of the cluster is a directory, FAKE_SLURM: <job>/{state,code,name,pid}. A job's script is run by bash with
srun, and scontrol, on its PATH. Formats and messages are those of Slurm 23's manual pages: `--parsable` prints "job" or
"job;cluster", sacct's ExitCode is "status:signal", a cancelled job's State is "CANCELLED by UID", and errors go to
standard error as "sbatch: error: ...". FAKE_SLURM/faults holds {"tool": "message"}: that tool fails with it.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

HOME = Path(os.environ["FAKE_SLURM"])
TOOL = Path(sys.argv[0]).name
ARGS = sys.argv[1:]


def option(name, default=""):
    for index, word in enumerate(ARGS):
        if word == name:
            return ARGS[index + 1]
        if word.startswith(name + "="):
            return word.partition("=")[2]
    return default


def fail(message, code=1):
    print(f"{TOOL}: error: {message}", file=sys.stderr)
    sys.exit(code)


def jobs():
    return sorted((path for path in HOME.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))


def read(job, name, default=""):
    try:
        return (HOME / str(job) / name).read_text()
    except OSError:
        return default


def write(job, name, value):
    part = HOME / str(job) / f"{name}.tmp"
    part.write_text(str(value))
    part.rename(HOME / str(job) / name)


def sbatch():
    script = Path(ARGS[-1]).read_text()
    if not script.startswith("#!"):
        fail("This does not look like a batch script.  The first line must start with #! followed by the path")
    given = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", script, re.M))
    if given.get("partition") == "nosuch":
        fail("Batch job submission failed: Invalid partition name specified")
    number = max([int(path.name) for path in jobs()], default=100) + 1
    (HOME / str(number)).mkdir()
    write(number, "name", given["job-name"])
    write(number, "state", "PENDING")
    write(number, "code", "0:0")
    runner = [
        sys.executable,
        str(Path(__file__).resolve()),
        "run",
        str(number),
        str(Path(ARGS[-1]).resolve()),
        "".join(shlex.split(given["output"])).replace("%%", "%"),  # sbatch reads quotes, and %j and the like
        given["ntasks"],
    ]
    env = {**os.environ, "FAKE_TOOL": "run"}
    subprocess.Popen(runner, start_new_session=True, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    print(f"{number};test" if "--parsable" in ARGS else f"Submitted batch job {number}")


def run_job():
    """The daemon of the node: runs the script and accounts for its end."""
    number, script, output, tasks = ARGS[1:5]
    while (HOME / "hold").exists():
        if read(number, "state").startswith("CANCELLED"):
            return
        time.sleep(0.02)
    env = {**os.environ, "SLURM_JOB_ID": number, "SLURM_JOB_NODELIST": "localhost", "SLURM_NTASKS": tasks}
    with open(output, "ab") as log:
        child = subprocess.Popen(["/bin/bash", script], env=env, stdout=log, stderr=log, start_new_session=True)
        write(number, "pid", child.pid)
        write(number, "state", "RUNNING")
        code = child.wait()
    # A job that was cancelled or preempted keeps that state, whatever its script ended with.
    wanted = read(number, "wanted")
    write(number, "code", f"{code}:0" if code >= 0 else f"0:{-code}")
    write(number, "state", wanted or ("COMPLETED" if code == 0 else "FAILED"))


def srun():
    """Starts the tasks, and passes the signals of the job's steps on: it leads no group of its own here."""
    command = [word for word in ARGS if not word.startswith("--")]
    children = []
    for number in range(int(os.environ.get("SLURM_NTASKS", "1"))):
        env = {**os.environ, "SLURM_PROCID": str(number)}
        children.append(subprocess.Popen(command, env=env, start_new_session=True))
    (HOME / os.environ["SLURM_JOB_ID"] / "steps").write_text(" ".join(str(child.pid) for child in children))
    codes = [child.wait() for child in children]
    sys.exit(next((code if code > 0 else 128 - code for code in codes if code), 0))


COMPACT = {"PENDING": "PD", "RUNNING": "R", "COMPLETING": "CG"}  # what squeue lists unless it is told otherwise


def squeue():
    for job in jobs():
        state = read(job.name, "state")
        if state in COMPACT and read(job.name, "name") == option("--name"):
            print(option("--format").replace("%i", job.name).replace("%t", COMPACT[state]))


def sacct():
    number = option("--jobs")
    if (HOME / "unaccounted").exists() or not (HOME / number).is_dir():
        return
    print(f"{read(number, 'state')}|{read(number, 'code', '0:0')}")


def scancel():
    number = ARGS[-1]
    if not (HOME / number).is_dir():
        fail(f"Kill job error on job id {number}: Invalid job id specified")
    steps = [int(pid) for pid in read(number, "steps").split()]
    wanted = option("--signal")
    if wanted:
        for pid in steps:
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, getattr(signal, f"SIG{wanted}"))
        return
    write(number, "wanted", "CANCELLED by 1000")
    if not read(number, "pid"):
        write(number, "state", "CANCELLED by 1000")
    for pid in [*steps, *map(int, read(number, "pid").split())]:
        with suppress(OSError):
            os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    if ARGS and ARGS[0] == "run" and TOOL == "slurm.py":
        run_job()
        sys.exit(0)
    faults = HOME / "faults"
    said = json.loads(faults.read_text()).get(TOOL) if faults.exists() else None
    if said:
        fail(said)
    if TOOL == "scontrol":
        print(ARGS[-1])
        sys.exit(0)
    {"sbatch": sbatch, "squeue": squeue, "sacct": sacct, "scancel": scancel, "srun": srun}[TOOL]()
