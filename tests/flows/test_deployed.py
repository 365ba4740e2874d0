"""A real Prefect server and a real process work pool on loopback: deploy, trigger, watch, cancel, kill."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from jaxlm.stages.plan import VERSIONS

HERE = Path(__file__).parent
CHECKOUT = HERE.parent.parent
FAKES = [CHECKOUT, HERE / "fakes", HERE.parent / "stages" / "fakes", HERE.parent / "launch" / "fakes"]
POOL = "jaxlm-accelerator"
PATIENCE = 400.0  # seconds, for what takes a few on a machine that is not busy

# A bigram table on a text of one's own: the real stages in seconds.
LETTERS = """
data: {source: file, path: letters.txt, seq_len: 16}
tokenizer: {kind: char, unk: false}
model: {preset: bigram, max_seq_len: 32}
train: {steps: 60, batch_size: 4, learning_rate: 0.1, log_every: 1, eval_every: 20, checkpoint_every: 10,
        sample_tokens: 5}
sft: {enabled: false}
eval: {n_samples: 1, sample_tokens: 5, batch_size: 8}
"""

pytestmark = pytest.mark.slow


class Site:
    """A server with a worker, on a store of their own; what they start is known by process number."""

    def __init__(self, home, root, processes):
        self.root, self.processes, self.started = root, processes, []
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.api = f"http://127.0.0.1:{self.port}/api"
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        self.env = {
            **clean,
            "PREFECT_HOME": str(home),
            "PREFECT_API_URL": self.api,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "PREFECT_CLI_PROMPT": "false",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PREFECT_RUNNER_POLL_FREQUENCY": "1",
            "JAXLM_REPORT_SECONDS": str(PATIENCE),
            "PYTHONPATH": os.pathsep.join(map(str, FAKES)),
            "TMPDIR": str(root.parent / "temporary"),
        }
        root.mkdir()
        (root.parent / "temporary").mkdir()
        (root / "probe.yaml").write_text("train: {steps: 2}\n")
        (root / "letters.txt").write_text("the cat sat on the mat; the dog sat on the log. " * 40)
        (root / "letters.yaml").write_text(LETTERS.replace("letters.txt", str(root / "letters.txt")))

    def prefect(self, *words, wait=True, log="prefect", cwd=None):
        """Prefect's own command line; its output is in a log."""
        out = open(self.root / f"{log}.log", "ab")  # noqa: SIM115, its process has it
        command = [sys.executable, "-m", "prefect", *words]
        process = subprocess.Popen(
            command, env={**self.env, "PWD": str(cwd or self.root)}, cwd=cwd or self.root, stdout=out, stderr=out
        )
        out.close()
        self.started.append(process.pid)
        if wait:
            assert process.wait(PATIENCE) == 0, (self.root / f"{log}.log").read_text()[-3000:]
        return process

    def start_server(self):
        self.server = self.prefect("server", "start", "--port", str(self.port), "--no-ui", wait=False, log="server")
        assert self.processes.wait_until(self.up, PATIENCE), (self.root / "server.log").read_text()[-3000:]

    def up(self):
        try:
            return httpx.get(f"{self.api}/health", timeout=2.0).status_code == 200
        except httpx.HTTPError:
            return False

    def start_worker(self):
        self.worker = self.prefect("worker", "start", "--pool", POOL, "--limit", "1", wait=False, log="worker")

    def kill(self, process):
        """SIGKILL to a process and to all that it has started, but not to the stages, which must see to themselves."""
        for pid in [process.pid, *self.processes.descendants(process.pid)]:
            with suppress(OSError):
                if "fake_stage" not in Path(f"/proc/{pid}/cmdline").read_text():
                    self.started.append(pid)
                    os.kill(pid, signal.SIGKILL)
        process.wait()

    def request(self, method, path, **body):
        """An answer of the API. One that says 503, its database being locked, has done nothing and is asked again."""
        end = time.monotonic() + PATIENCE
        while True:
            answer = httpx.request(method, f"{self.api}{path}", json=body or None, timeout=60.0)
            if answer.status_code != 503 or time.monotonic() > end:
                break
            time.sleep(1)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def deploy(self):
        code = (
            "from deployed import deployed\n"
            "from prefect.flows import Flow\n"
            f"Flow.from_source(source={str(HERE / 'fakes')!r}, entrypoint='deployed.py:deployed').deploy("
            f"name='fakes', work_pool_name={POOL!r}, job_variables={{'working_dir': {str(self.root)!r}}})"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], env=self.env, cwd=self.root, capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == 0, done.stderr
        return self.request("GET", "/deployments/name/jaxlm-pipeline/fakes")

    def trigger(self, do=None, *overrides, config="probe", **env):
        """Makes a flow run of the deployment; a worker picks it up."""
        variables = {"FAKE_DO": json.dumps(do or {}), **env}
        parameters = {"config": str(self.root / f"{config}.yaml"), "overrides": list(overrides), "root": str(self.root)}
        body = {"parameters": parameters, "job_variables": {"env": {**self.stage_env(), **variables}}}
        return self.request("POST", f"/deployments/{self.deployment['id']}/create_flow_run", **body)["id"]

    def stage_env(self):
        keep = ("PYTHONPATH", "PREFECT_API_URL", "PREFECT_HOME", "JAXLM_REPORT_SECONDS")
        return {name: self.env[name] for name in keep}

    def state(self, run):
        return self.request("GET", f"/flow_runs/{run}")["state"]

    def ended(self, run, seconds=PATIENCE):
        """The final state of a flow run."""

        def final():
            with suppress(httpx.HTTPError):
                return self.state(run)["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")

        assert self.processes.wait_until(final, seconds), (self.state(run), self.log())
        return self.state(run)

    def log(self):
        return (self.root / "worker.log").read_text()[-3000:]

    def asleep(self, stage):
        """The process number of a stage that sleeps."""

        def pid():
            for file in self.root.glob(f"store/{stage}-*/pids.part"):
                return int(file.read_text() or 0)

        assert self.processes.wait_until(pid, PATIENCE), self.log()
        return pid()

    def cancel(self, run):
        """As the button in the UI does."""
        state = {"type": "CANCELLING", "name": "Cancelling"}
        self.request("POST", f"/flow_runs/{run}/set_state", state=state, force=True)

    def status(self, run="probe"):
        return json.loads((self.root / "runs" / run / "status.json").read_text())

    def end(self):
        everything = [pid for each in self.started for pid in [each, *self.processes.descendants(each)]]
        for pid in everything:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def site(prefect_home, tmp_path_factory, processes):
    made = Site(prefect_home, tmp_path_factory.mktemp("site") / "root", processes)
    try:
        made.start_server()
        made.prefect("work-pool", "create", POOL, "--type", "process", "--overwrite")
        made.deployment = made.deploy()
        made.start_worker()
        yield made
    finally:
        made.end()


def test_the_form_is_drawn_from_what_the_server_has(site):
    fields = site.deployment["parameter_openapi_schema"]["properties"]
    assert {name: field["title"] for name, field in fields.items()} == {
        "config": "Configuration", "overrides": "Overrides", "root": "Directory",
    }  # fmt: skip
    assert all(field["description"].endswith(".") for field in fields.values())


def test_triggered_watched_and_completed(site):
    run = site.trigger()
    assert site.ended(run)["type"] == "COMPLETED", site.log()
    assert (site.root / "runs" / "probe" / "report.md").exists()
    keys = {item["key"] for item in site.request("POST", "/artifacts/filter", sort="CREATED_DESC")}
    assert {"probe-report", "probe-pretrain-progress", "probe-pretrain-loss"} <= keys
    assert site.status()["state"] == "completed"
    again = site.trigger()
    assert site.ended(again)["type"] == "COMPLETED"
    tasks = site.request("POST", "/task_runs/filter", flow_runs={"id": {"any_": [again]}})
    assert [task["state"]["name"] for task in tasks] == ["Cached"] * 6


def test_cancelled_in_mid_training_and_resumed_by_the_next_run(site):
    """The real pretraining, which notes each row that it reads."""
    modules = {**{stage: f"jaxlm.stages.{stage}" for stage in VERSIONS}, "pretrain": "counting_pretrain"}
    env = {"DEPLOYED_MODULES": json.dumps(modules), "COUNT_SLEEP": "0.5"}
    run = site.trigger(config="letters", **env)

    def steps():
        return sum(len(file.read_text().splitlines()) for file in site.root.glob("store/pretrain-*/rows-0.part"))

    assert site.processes.wait_until(lambda: steps() >= 3, PATIENCE), site.log()
    children = site.processes.descendants(site.worker.pid)
    site.cancel(run)
    assert site.ended(run)["type"] == "CANCELLED", site.log()
    assert site.processes.wait_until(lambda: not any(map(site.processes.running, children)), 60)
    before = steps()
    assert 3 <= before < 60
    assert site.processes.wait_until(lambda: site.status("letters")["state"] == "cancelled", PATIENCE), site.status(
        "letters"
    )
    assert site.status("letters")["command"].startswith("jaxlm flow pipeline ")
    assert re.search("stopped on request.* saved", site.status("letters")["reason"])  # the stage's words, not Prefect's
    again = site.trigger(config="letters", **{**env, "COUNT_SLEEP": "0"})
    assert site.ended(again)["type"] == "COMPLETED", site.log()
    assert steps() == 60  # none was done twice, and none left out
    assert site.status("letters")["state"] == "completed"
    shown = {f"letters-pretrain-{what}" for what in ("progress", "metrics", "loss", "sample")} | {"letters-report"}
    assert shown <= {item["key"] for item in site.request("POST", "/artifacts/filter", sort="CREATED_DESC")}


def test_deployed_from_prefect_yaml_and_run_from_the_command_line(site):
    """What docs/clusters.md shows; the stages are those that the test before has done."""
    site.request("POST", "/work_pools/", name="jaxlm-cpu", type="process")
    site.prefect("deploy", "--all", log="deploy", cwd=CHECKOUT)
    config, root = site.root / "letters.yaml", site.root
    words = ["--param", f"config={config}", "--param", f"root={root}", "--param", 'bounds=["val_loss<9"]']
    site.prefect("deployment", "run", "jaxlm-pipeline/pipeline", *words, "--watch", log="run")
    (run,) = site.request("POST", "/flow_runs/filter", deployments={"name": {"any_": ["pipeline"]}})
    assert run["state"]["type"] == "COMPLETED", site.log()
    assert run["name"] == "pipeline letters"
    tasks = site.request("POST", "/task_runs/filter", flow_runs={"id": {"any_": [run["id"]]}})
    assert sorted(task["state"]["name"] for task in tasks) == ["Cached"] * 4 + ["Completed"]  # the last is the gate


def test_a_killed_worker_takes_its_stage_along_and_the_next_one_continues(site):
    run = site.trigger({"sft": "sleep"}, "train.steps=6")
    stage = site.asleep("sft")
    site.kill(site.worker)
    assert site.processes.wait_until(lambda: not site.processes.running(stage), 60)
    assert list(site.root.glob("store/sft-*/saved.part"))
    site.start_worker()
    again = site.trigger(None, "train.steps=6")
    assert site.ended(again)["type"] == "COMPLETED", site.log()
    assert site.state(run)["type"] != "COMPLETED"


def test_a_killed_server_is_told_the_truth_when_it_is_back(site):
    run = site.trigger({"evaluate": "sleep"}, "train.steps=7", FAKE_SECONDS="20")
    site.asleep("evaluate")
    site.kill(site.server)
    manifest = lambda: list(site.root.glob("store/evaluate-*/manifest.json"))  # noqa: E731
    before = len(manifest())
    assert site.processes.wait_until(lambda: len(manifest()) > before, PATIENCE)  # the stage has not noticed
    site.start_server()
    started = time.monotonic()
    assert site.ended(run)["type"] == "COMPLETED", site.log()
    assert time.monotonic() - started < 120
    assert site.status()["state"] == "completed"


def test_all_flows_are_served_from_one_process(site):
    known = {"deployments": {"tags": {"all_": ["jaxlm"]}}}
    for item in site.request("POST", "/deployments/filter", **known):  # of the same names, from prefect.yaml
        site.request("DELETE", f"/deployments/{item['id']}")
    code = "from jaxlm.cli_flows import serve_flows; serve_flows(limit=1)"
    with open(site.root / "serve.log", "ab") as out:
        served = subprocess.Popen([sys.executable, "-c", code], env=site.env, cwd=site.root, stdout=out, stderr=out)
    site.started.append(served.pid)
    names = {"prepare", "pretrain", "sft", "evaluate", "pipeline", "sweep"}

    def there():
        found = site.request("POST", "/deployments/filter", **known)
        return {item["name"] for item in found} == names and found

    assert site.processes.wait_until(there, PATIENCE), (site.root / "serve.log").read_text()[-3000:]
    for deployment in there():
        for name, field in deployment["parameter_openapi_schema"]["properties"].items():
            assert field["title"] != name
            assert field["description"].endswith(".")
    children = site.processes.descendants(served.pid)
    served.send_signal(signal.SIGTERM)
    served.wait(PATIENCE)
    assert site.processes.wait_until(lambda: not any(map(site.processes.running, children)), PATIENCE)


def test_nothing_is_left_behind(site):
    """Of worker and server, and in the temporary directory, of all the runs before. Must be the last test here."""
    last = [site.worker, site.server]
    children = [pid for process in last for pid in site.processes.descendants(process.pid)]
    for process in last:
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE)
    assert site.processes.wait_until(lambda: not any(map(site.processes.running, children)), PATIENCE)
    assert not site.processes.listening(site.port)
    left = [path.name for path in (site.root.parent / "temporary").iterdir()]
    assert [name for name in left if not name.startswith(("prefect-", "runner_storage"))] == []  # those are Prefect's
