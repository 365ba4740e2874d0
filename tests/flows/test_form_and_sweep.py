"""The form of each flow, the commands that continue it, and the grid of a sweep: all without a server."""

from __future__ import annotations

import html
import json
import os
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from jaxlm.errors import InputError

NAMES = ["prepare", "pretrain", "sft", "evaluate", "pipeline", "sweep"]


@pytest.fixture(scope="module")
def served():
    """Deployments as serve-flows makes them: their schema is what the server gets, and the UI draws its form from."""
    from flows import deployments

    return {deployment.name: deployment for deployment in deployments.deployments()}


def render(schema) -> str:
    """The form that the UI shows: a label, an input by type, the help below. Refuses what it cannot draw."""
    rows = []
    for name, field in sorted(schema["properties"].items(), key=lambda item: item[1]["position"]):
        kinds = [item for item in field.get("anyOf", [field]) if item.get("type") != "null"]
        assert len(kinds) == 1, name
        (kind,) = kinds
        if "enum" in kind:
            control = (
                "<select>" + "".join(f"<option>{html.escape(value)}</option>" for value in kind["enum"]) + "</select>"
            )
        elif kind["type"] == "array":
            assert kind["items"] == {"type": "string"}, name
            control = f"<textarea>{html.escape(chr(10).join(field['default']))}</textarea>"
        else:
            control = {"string": "<input type=text>", "integer": "<input type=number>"}[kind["type"]]
        label, help_text = html.escape(field["title"]), html.escape(field["description"])
        rows.append(f"<label id={name}>{label}{control}</label><small>{help_text}</small>")
    return f"<form>{''.join(rows)}</form>"


class Labels(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self._open = {}, ""

    def handle_starttag(self, tag, attributes):
        if tag == "label":
            self._open = dict(attributes)["id"]
        elif tag in ("input", "select", "textarea"):
            self.found[self._open] = [*self.found.get(self._open, []), tag]

    def handle_data(self, data):
        if self._open and self._open not in self.found:
            self.found[self._open] = [data]


@pytest.mark.parametrize("name", NAMES)
def test_the_form_of_a_flow_can_be_filled_in(served, name):
    schema = served[name]._parameter_openapi_schema.model_dump()
    labels = Labels()
    labels.feed(render(schema))
    assert list(labels.found) == list(schema["properties"])
    assert next(iter(schema["properties"])) == "config"
    assert {"overrides", "root"} <= set(schema["properties"])
    assert schema.get("required", []) == []  # it can be sent as it is
    for field, value in schema["properties"].items():
        assert value["title"] != field  # written for people
        assert value["title"][0].isupper()
        assert value["description"].endswith(".")
        assert len(value["description"]) > 20
    assert len(schema["properties"]) < 10


def test_deployments_that_train_wait_for_each_other(served):
    assert list(served) == NAMES
    assert served["prepare"].concurrency_limit is None
    assert {served[name].concurrency_limit for name in NAMES[1:]} == {1}
    assert all(deployment.tags == ["jaxlm"] and deployment.description for deployment in served.values())


def test_serving_needs_a_server(monkeypatch):
    from flows import deployments, server

    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with pytest.raises(InputError, match=r"^PREFECT_API_URL: not set"):
        deployments.serve_all(limit=1)
    monkeypatch.setattr(server, "away", lambda: True)


def test_prefect_yaml_deploys_the_same_flows(checkout, served):
    from prefect.cli.deploy._models import PrefectYamlModel
    from prefect.flows import load_flow_from_entrypoint

    values = yaml.safe_load((checkout / "prefect.yaml").read_text())
    model = PrefectYamlModel.model_validate(values)
    assert [deployment.name for deployment in model.deployments] == NAMES
    here = Path.cwd()
    try:
        os.chdir(checkout)
        for deployment in model.deployments:
            flow = load_flow_from_entrypoint(deployment.entrypoint)
            assert flow.name == f"jaxlm-{deployment.name}"
            assert flow.validate_parameters(deployment.parameters).items() >= deployment.parameters.items()
    finally:
        os.chdir(here)
    pools = {deployment.name: deployment.work_pool.name for deployment in model.deployments}
    assert pools == {**dict.fromkeys(NAMES, "jaxlm-accelerator"), "prepare": "jaxlm-cpu"}
    schedules = [schedule for each in values["deployments"] for schedule in each.get("schedules", [])]
    assert len(schedules) == 1
    limits = {each["name"]: (each.get("concurrency_limit") or {}).get("limit") for each in values["deployments"]}
    assert limits == {**dict.fromkeys(NAMES, 1), "prepare": None}


def test_fields_of_the_form_become_overrides():
    from flows.form import merged

    assert merged(["seed=1"]) == ["seed=1"]
    given = merged(["seed=1"], name="a", steps=5, seed=0, processes=2, bounds=["val_loss<=1"], publish_to="s3://b")
    assert given == [
        "seed=1", 'name="a"', "train.steps=5", "seed=0", "launch.processes=2", 'gate.bounds=["val_loss<=1"]',
        'publish.to="s3://b"',
    ]  # fmt: skip


def test_the_command_that_continues_a_run(tmp_path):
    from flows import status

    (tmp_path / "my run.yaml").write_text("name: mine\n")
    parameters = {
        "config": str(tmp_path / "my run.yaml"), "overrides": ["seed=1"], "steps": 7, "root": str(tmp_path),
        "grid": ["seed=1,2"], "name": None,
    }  # fmt: skip
    cfg, again = status.of_parameters("jaxlm-sweep", parameters)
    assert (cfg.name, cfg.train.steps) == ("mine", 7)
    assert again == (
        f"jaxlm flow sweep '{tmp_path}/my run.yaml' --set seed=1 --set train.steps=7 --root {tmp_path} --grid seed=1,2"
    )


@pytest.mark.parametrize(("kind", "state"), [("FAILED", "failed"), ("CRASHED", "crashed"), ("CANCELLED", "cancelled")])
def test_a_hook_leaves_the_reason_and_the_command(tmp_path, kind, state):
    from types import SimpleNamespace

    from prefect.client.schemas.objects import State

    from flows import status
    from flows.parts import pretrain as flow

    (tmp_path / "a.yaml").write_text("")
    run = SimpleNamespace(parameters={"config": str(tmp_path / "a.yaml"), "root": str(tmp_path)})
    status.on_end(flow, run, State(type=kind, message="Flow run encountered an exception: InputError: x.txt is gone."))
    left = json.loads((tmp_path / "runs" / "a" / "status.json").read_text())
    assert left["state"] == state
    assert left["reason"] == "InputError: x.txt is gone."
    assert left["command"] == f"jaxlm flow pretrain {tmp_path}/a.yaml --root {tmp_path}"
    status.on_end(flow, SimpleNamespace(parameters={"config": "nosuch.yaml"}), State(type=kind))  # no run to write to


def test_an_untouched_form_has_no_parameters(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from prefect.client.schemas.objects import State
    from prefect.context import FlowRunContext

    from flows import status
    from flows.command import run_name
    from flows.parts import prepare

    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.yaml").write_text("")
    status.on_end(prepare, SimpleNamespace(parameters={}), State(type="CRASHED", message="killed"))
    left = json.loads((tmp_path / "runs" / "quickstart" / "status.json").read_text())
    # Our own command line takes that; it refuses a --runner with nothing to run.
    assert left["command"] == "jaxlm flow prepare configs/quickstart.yaml"
    with FlowRunContext.model_construct(flow=prepare, flow_run=SimpleNamespace(id=1), parameters={}):
        assert run_name() == "prepare quickstart"


def test_a_flow_that_could_not_report_its_end_stays_completed(tmp_path):
    from types import SimpleNamespace

    import httpx
    from prefect.client.schemas.objects import State

    from flows import status
    from flows.parts import prepare as flow
    from jaxlm.config import load

    (tmp_path / "a.yaml").write_text("")
    parameters = {"config": str(tmp_path / "a.yaml"), "root": str(tmp_path), "shards": 2, "runner": "threads"}
    cfg = load(parameters["config"]).replace(root=str(tmp_path))
    away = State(type="FAILED", data=httpx.ConnectError("refused"))
    for before, error, after in [
        ("completed", away, "completed"),
        ("running", away, "failed"),
        ("completed", State(type="FAILED", data=ValueError("a bug")), "failed"),
    ]:
        status.write(cfg, before, "", "")
        status.on_end(flow, SimpleNamespace(parameters=parameters), error)
        assert status.state_of(cfg) == after
    left = json.loads((tmp_path / "runs" / "a" / "status.json").read_text())
    assert left["command"] == f"jaxlm flow prepare {tmp_path}/a.yaml --root {tmp_path} --shards 2 --runner threads"
    # What the flow has left itself is better than what a worker sees of its end: a state without an exception.
    for before, kind, after in [
        ("completed", "CRASHED", ("completed", "own words")),
        ("cancelled", "CANCELLING", ("cancelled", "own words")),
        ("cancelled", "CRASHED", ("cancelled", "own words")),
        ("running", "CANCELLING", ("cancelled", "seen")),
        ("running", "CRASHED", ("crashed", "seen")),
    ]:
        status.write(cfg, before, "own words", "")
        status.on_end(flow, SimpleNamespace(parameters=parameters), State(type=kind, message="seen"))
        left = json.loads((tmp_path / "runs" / "a" / "status.json").read_text())
        assert (left["state"], left["reason"]) == after, (before, kind)


def test_a_grid_is_every_combination():
    from flows.sweep import combinations

    rows = combinations(["seed=0,1", "data.pack=stream", "gate.bounds=[[a<=1, b<=2], []]"])
    assert len(rows) == 4
    assert rows[0] == {"seed": "seed=0", "data.pack": "data.pack=stream", "gate.bounds": "gate.bounds=[a<=1, b<=2]"}
    assert rows[-1] == {"seed": "seed=1", "data.pack": "data.pack=stream", "gate.bounds": "gate.bounds=[]"}
    for grid, sentence in [
        (["seed"], "expected section.field=value,value"),
        (["seed="], "expected section.field=value,value"),
        (["seed=1", "seed=2"], "seed comes twice"),
        ([], "the grid is empty"),
        (["seed=[]"], "not readable as a YAML list with a value or more"),
        (["seed=[1]: 2"], "not readable as a YAML list"),
        (["seed=0,,1"], "a value is empty"),
        (["seed=0,1,0"], "a value comes twice"),
        (["name=a,b"], "a sweep names its runs itself"),
        (["seed=" + ",".join(map(str, range(501)))], "the grid has 501 combinations"),
    ]:
        with pytest.raises(InputError, match=sentence):
            combinations(grid)


def test_the_table_of_a_sweep():
    from flows.sweep import markdown, ranked

    rows = ranked([
        {"run": "a-0", "seed": "0", "note": "gate: a | b"},
        {"run": "a-1", "seed": "1", "val_loss": 1.5, "note": ""},
        {"run": "a-2", "seed": "2", "val_loss": 1.25, "note": ""},
    ])  # fmt: skip
    assert [row["run"] for row in rows] == ["a-2", "a-1", "a-0"]
    assert markdown(rows).splitlines() == [
        "| run | seed | val_loss | note |",
        "| --- | --- | --- | --- |",
        "| a-2 | 2 | 1.25 |  |",
        "| a-1 | 1 | 1.5 |  |",
        "| a-0 | 0 |  | gate: a / b |",
    ]
