"""Kubernetes, against an API on loopback that answers as its own does (fakes/kube_api.py)."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path

import pytest
import yaml

from jaxlm.errors import InputError, Preempted, UnavailableError
from jaxlm.launch import for_stage, kept, kubernetes, submit_once
from jaxlm.launch.kubernetes import KubernetesLauncher, jobset_name
from jaxlm.launch_config import KubernetesConfig, LaunchConfig
from jaxlm.stages.runner import CancelledError, run_stage
from jaxlm.stages.spec import Spec

_spec = importlib.util.spec_from_file_location("kube_api", Path(__file__).parent / "fakes" / "kube_api.py")
kube_api = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kube_api)


@pytest.fixture
def api(tmp_path):
    made = kube_api.KubeApi(tmp_path)
    yield made
    made.stop()


@pytest.fixture
def config(api, tmp_path):
    def make(**given):
        known = dict(api=api.url, image="jaxlm:1", volume_claim="store", mount_path=str(tmp_path), poll_seconds=0.05)
        return KubernetesConfig(**{**known, **given})

    return make


@pytest.fixture
def launcher(config):
    return lambda **given: KubernetesLauncher(config(**given))


FULL = dict(
    accelerator="nvidia.com/gpu", accelerator_count=1, queue="team", service_account="trainer",
    node_selector=("cloud.google.com/gke-tpu-topology=2x4", "zone=a"),
)  # fmt: skip


def test_the_manifest_asks_for_what_is_configured(launcher, config, make_job):
    job = make_job("python", "-m", "jaxlm.stages.pretrain", "it's: here", processes=2, GREETING="a: 'b'")
    found = yaml.safe_load(launcher(**FULL).manifest(job))
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert found["metadata"]["name"] == "jaxlm-pretrain-0123456789ab"
    assert found["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    (group,) = found["spec"]["replicatedJobs"]
    job_spec = group["template"]["spec"]
    assert (job_spec["parallelism"], job_spec["completions"], job_spec["completionMode"]) == (2, 2, "Indexed")
    assert job_spec["backoffLimit"] == found["spec"]["failurePolicy"]["maxRestarts"] == 0
    pod = job_spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] == 60
    patient = for_stage(LaunchConfig(kind="kubernetes", grace_seconds=150.5, kubernetes=config(**FULL)), "pretrain")
    assert "terminationGracePeriodSeconds: 151\n" in patient.manifest(job)
    assert pod["serviceAccountName"] == "trainer"
    assert pod["nodeSelector"] == {"cloud.google.com/gke-tpu-topology": "2x4", "zone": "a"}
    (container,) = pod["containers"]
    assert container["command"] == ["python", "-m", "jaxlm.stages.pretrain", "it's: here"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "1"}
    env = {item["name"]: item.get("value") for item in container["env"]}
    assert env["GREETING"] == "a: 'b'"
    # The DNS name that JobSet's documentation gives to pod 0: <jobset>-<job>-<replica>-<index>.<subdomain>.
    assert env["JAXLM_COORDINATOR"] == "jaxlm-pretrain-0123456789ab-workers-0-0.jaxlm-pretrain-0123456789ab:8476"
    alone = launcher().manifest(make_job("true"))
    assert "JAXLM_COORDINATOR" not in alone
    assert "limits" not in alone


# What of a JobSet is its own and not a Job's: names and types of the v1alpha2 reference page. No package ships it.
JOBSET = {
    "apiVersion": str, "kind": str,
    "metadata": {"name": str, "labels": dict, "annotations": dict},
    "spec": {"failurePolicy": {"maxRestarts": int}, "network": {"enableDNSHostnames": bool}, "replicatedJobs": list},
}  # fmt: skip
REPLICATED_JOB = {"name": str, "replicas": int, "template": dict}


@pytest.mark.parametrize(("given", "processes"), [({}, 1), (FULL, 2)])
def test_the_manifest_is_valid_by_the_published_schemas(launcher, make_job, given, processes):
    client = pytest.importorskip("kubernetes.client", reason="the schema of Jobs comes with the package kubernetes")
    found = yaml.safe_load(launcher(**given).manifest(make_job("true", processes=processes)))
    check_shape(found, JOBSET)
    (group,) = found["spec"]["replicatedJobs"]
    check_shape(group, REPLICATED_JOB)
    check_model(client, group["template"], "V1JobTemplateSpec", "template")
    with pytest.raises(AssertionError, match=r"template\.spec: V1JobSpec has no field backofLimit"):
        check_model(client, {"spec": {"backofLimit": 0}}, "V1JobTemplateSpec", "template")
    with pytest.raises(AssertionError, match="is no int"):
        check_model(client, {"spec": {"parallelism": "two"}}, "V1JobTemplateSpec", "template")


def check_shape(value, shape):
    for name, item in value.items():
        assert name in shape, name
        if isinstance(shape[name], dict):
            check_shape(item, shape[name])
        else:
            assert isinstance(item, shape[name]), name


def check_model(client, value, kind, path):
    """Every field of `value` is one of the API's type `kind`, and of its type."""
    generic = kind[:5].lower()  # list[X] and dict(str, X) in older versions of the package, List and Dict[] in newer
    if generic == "list[":
        for index, item in enumerate(value):
            check_model(client, item, kind[5:-1], f"{path}[{index}]")
    elif generic in ("dict(", "dict["):
        for item in value.values():
            check_model(client, item, kind[5:-1].split(", ")[1], path)
    elif kind in ("int", "str", "bool", "float"):
        assert isinstance(value, {"int": int, "str": str, "bool": bool, "float": float}[kind]), f"{path} is no {kind}"
    elif kind not in ("object", "datetime"):
        model = getattr(client, kind)
        by_json_name = {json_name: name for name, json_name in model.attribute_map.items()}
        for name, item in value.items():
            assert name in by_json_name, f"{path}: {kind} has no field {name}"
            check_model(client, item, model.openapi_types[by_json_name[name]], f"{path}.{name}")


def test_a_job_from_its_submission_to_its_end(api, launcher, make_job, ended, tmp_path):
    job = make_job("/bin/sh", "-c", f"while [ ! -e {tmp_path}/go ]; do sleep 0.05; done", processes=2)
    one = launcher()
    handle, there = submit_once(one, job)
    assert not there
    assert (handle.id, handle.place) == ("jaxlm-pretrain-0123456789ab", "default")
    assert one.poll(handle).phase == "running"
    (tmp_path / "go").touch()
    assert ended(one, handle).exit_code == 0
    assert yaml.safe_load((job.directory / "launch.yaml").read_text()) == api.jobsets[handle.id]
    assert api.requests[-1][2] is None  # kubectl proxy adds the login


def test_none_is_launched_twice(api, launcher, make_job, ended):
    job = make_job("/bin/sh", "-c", "exec sleep 60")
    handle, _ = submit_once(launcher(), job)
    assert submit_once(launcher(), job) == (handle, True)
    (job.directory / "launch.json").unlink()  # the launcher died between the API's answer and its note
    found, _ = submit_once(launcher(), job)
    assert found.id == handle.id
    assert sum(method == "POST" for method, _, _ in api.requests) == 1
    assert launcher().cancel(found, grace=1.0).cancelled
    assert api.jobsets == {}
    new, there = submit_once(launcher(), make_job("true"))
    assert not there
    assert ended(launcher(), new).exit_code == 0
    submit_once(launcher(), make_job("true"))  # the finished one is replaced
    assert sum(method == "POST" for method, _, _ in api.requests) == 3


def test_a_job_that_is_being_deleted_is_waited_for_and_replaced(api, launcher, make_job, ended, monkeypatch, tmp_path):
    saving = f"trap '' TERM; touch {tmp_path}/up; while [ ! -e {tmp_path}/saved ]; do sleep 0.05; done; exit 75"
    handle, _ = submit_once(launcher(), make_job("/bin/sh", "-c", saving))
    while not (tmp_path / "up").exists():
        time.sleep(0.02)
    api.delete(handle.id, {"propagationPolicy": "Foreground"})  # somebody does
    status = launcher().poll(handle)
    assert (status.phase, status.reason) == ("ending", f"JobSet {handle.id} is being deleted")
    with monkeypatch.context() as patch:
        patch.setattr(kubernetes, "POD_GRACE", 0)
        patch.setattr(kubernetes, "GONE_SECONDS", 0.0)
        with pytest.raises(UnavailableError, match="an earlier one is still being deleted; try again later"):
            submit_once(launcher(), make_job("true"))
    (tmp_path / "saved").touch()
    new, there = submit_once(launcher(), make_job("true"))
    assert not there
    assert ended(launcher(), new).exit_code == 0
    assert sum(method == "POST" for method, _, _ in api.requests) == 2


def test_how_a_job_ended(api, launcher, make_job, ended):
    one = launcher()
    handle = one.submit(make_job("/bin/sh", "-c", "echo 'no such module'; exit 3"))
    status = ended(one, handle)
    assert (status.exit_code, status.preempted) == (3, False)
    assert status.reason.endswith("ended with exit code 3 (Error): no such module")
    handle = one.submit(make_job("/bin/sh", "-c", "kill -9 $$", name="sft-000000000000"))
    assert "ask for more with launch.kubernetes.memory" in ended(one, handle).reason
    handle = one.submit(make_job("/bin/sh", "-c", "exit 143", name="sft-000000000001"))
    api.pods[handle.id][0].disrupted = True
    assert ended(one, handle).preempted
    api.pods[handle.id][0].end()
    api.pods[handle.id] = []  # garbage-collected with their node
    assert ended(one, handle).preempted
    del api.jobsets[handle.id]
    assert ended(one, handle).cancelled


def test_what_a_job_waits_for(api, launcher, make_job, monkeypatch):
    one = launcher()
    handle = one.submit(make_job("/bin/sh", "-c", "exec sleep 60"))
    api.suspended = True
    assert one.poll(handle).reason == f"JobSet {handle.id} waits in its queue"
    api.suspended = False
    api.waiting = {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "jaxlm:1"'}
    status = one.poll(handle)
    assert (status.phase, "Back-off pulling image" in status.reason) == ("waiting", True)
    monkeypatch.setattr(kubernetes, "START_SECONDS", 0.0)
    time.sleep(0.01)
    with pytest.raises(InputError, match=r"cannot start: Back-off pulling .* correct launch\.kubernetes\.image"):
        one.poll(handle)


@pytest.mark.parametrize(
    ("refusal", "error", "told"),
    [
        ((403, "Forbidden", 'jobsets is forbidden: User "x" cannot create'), InputError, "does not let us"),
        ((401, "Unauthorized", "Unauthorized"), InputError, "does not let us"),
        ((422, "Invalid", "spec.replicatedJobs: Invalid value"), InputError, "refused the job"),
        ((500, "InternalError", "etcdserver: request timed out"), UnavailableError, "is away"),
        ((429, "TooManyRequests", "too many requests"), UnavailableError, "is away"),
    ],
)
def test_what_the_api_refuses(api, launcher, make_job, refusal, error, told):
    api.refusal = refusal
    with pytest.raises(error, match=told) as caught:
        launcher().submit(make_job())
    assert refusal[2].split()[0] in str(caught.value)


def test_a_cluster_without_jobset(api, launcher, make_job):
    api.installed = False
    with pytest.raises(InputError, match="install JobSet"):
        launcher().submit(make_job())


def test_an_api_that_is_away_is_waited_for(api, launcher, make_job, ended, monkeypatch):
    one = launcher()
    handle = one.submit(make_job("true"))
    api.refusal = (503, "ServiceUnavailable", "the server is currently unable to handle the request")
    status = one.poll(handle)
    assert status.phase == "running"
    assert "503" in status.reason
    api.refusal = (401, "Unauthorized", "Unauthorized")  # a login that is being renewed
    assert one.poll(handle).phase == "running"
    monkeypatch.setattr(kubernetes, "AWAY_SECONDS", 0.0)
    time.sleep(0.01)
    with pytest.raises(UnavailableError, match=f"The job {handle.id} goes on"):
        one.poll(handle)
    api.refusal = None
    assert ended(one, handle).exit_code == 0
    with pytest.raises(UnavailableError, match="the Kubernetes API is away"):
        launcher(api="http://127.0.0.1:1").submit(make_job())


def test_settings_that_cannot_work(launcher, config, make_job, tmp_path):
    with pytest.raises(InputError, match="which the pods would not see"):
        launcher(mount_path="/elsewhere").manifest(make_job())
    with pytest.raises(InputError, match="this is no pod of a cluster; start kubectl proxy"):
        KubernetesLauncher(config(api=""), account=tmp_path / "none").submit(make_job())
    with pytest.raises(ValueError, match="expected label=value"):
        KubernetesConfig(node_selector=("zone",))


def test_names_are_what_kubernetes_takes():
    assert jobset_name("tokenize_sft-0123456789ab") == "jaxlm-tokenize-sft-0123456789ab"
    assert len(jobset_name("x" * 200)) < 64


@pytest.fixture
def on_kubernetes(config, fake_stages, monkeypatch, tmp_path):
    """`python` of the pods is this one."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    # A link outside its environment would not find the packages.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.environ["PYTHONPATH"], *filter(None, sys.path)]))
    return LaunchConfig(kind="kubernetes", kubernetes=config(), grace_seconds=10.0)


def test_stages_on_a_cluster(api, on_kubernetes, tmp_path):
    def stage(do):
        return Spec("pretrain", 1, {"value": 1}, options={"do": do}, root=str(tmp_path), module="fake_stage")

    lines = []
    with pytest.raises(InputError, match=r"^data\.path=x\.txt: no such file"):
        run_stage(stage("input_error"), launch=on_kubernetes, echo=lines.append)
    with pytest.raises(Preempted, match="saved at step 1"):
        run_stage(stage("preempted_once"), launch=on_kubernetes, echo=lines.append)
    spec = stage("sleep")

    def delete(line):
        if line.startswith("pretrain says"):
            KubernetesLauncher(on_kubernetes.kubernetes).cancel(kept(spec.directory), 1.0)

    with pytest.raises(CancelledError, match="run the same command to continue"):
        run_stage(spec, launch=on_kubernetes, echo=delete)
    assert (spec.directory / "saved.part").exists()
    manifest, _ = run_stage(stage("write"), launch=on_kubernetes, echo=lines.append)
    assert "pretrain says write" in lines
    assert "launch.yaml" not in manifest.outputs
    assert kept(manifest.directory) is None
