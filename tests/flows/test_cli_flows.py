"""The commands, as far as they go without a server."""

from __future__ import annotations

import json

import cyclopts
import httpx
import pytest

from jaxlm import cli_flows
from jaxlm.errors import InputError


@pytest.fixture
def jaxlm():
    app = cyclopts.App(name="jaxlm", result_action="return_value")
    cli_flows.register(app)
    return lambda line: app(line, exit_on_error=False, print_error=False)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("flow pipeline nosuch.yaml", r"^nosuch\.yaml: no such configuration file"),
        ("flow pretrain quickstart --set train.stepz=3", r"did you mean steps\?"),
        ("flow sft quickstart --set sft.enabled=false", r"set sft\.enabled=true"),
        ("flow sweep quickstart", r"^--grid: a sweep needs at least one"),
        ("flow pretrain quickstart --grid seed=1", r"^--grid: the flow pretrain has no such option; .* sweep"),
        ("flow pipeline quickstart --shards 2", r"^--shards: the flow pipeline has no such option; .* prepare"),
        ("flow sweep quickstart --grid seed", r"^--grid seed: expected section\.field=value,value\."),
        ("flow sweep quickstart --grid train.stepz=1,2", r"did you mean steps\?"),
        ("flow prepare quickstart --shards 0", r"^--shards 0: expected 1 or more\."),
        ("flow prepare quickstart --runner dask", r"^--runner dask: there is one task"),
        ("flow pipeline quickstart --set launch.kind=lsf", r"launch\.kind"),
        ("flow pipeline quickstart --set pretrain.init_from=gone", r"gone: no such run, stage or directory"),
    ],
)
def test_bad_input_is_told_before_anything_starts(jaxlm, line, sentence):
    with pytest.raises(InputError, match=sentence):
        jaxlm(line)


def test_a_flow_that_does_not_exist(jaxlm):
    with pytest.raises(cyclopts.CycloptsError, match="pipelin"):
        jaxlm("flow pipelin quickstart")


def test_what_reaches_the_flow(jaxlm, monkeypatch):
    from flows import command, deployments, server, sweep

    asked = []
    monkeypatch.setattr(sweep, "runs_of", lambda *args: [])
    monkeypatch.setattr(command, "run", lambda *args, **given: asked.append((args, given)))
    monkeypatch.setattr(server, "away", lambda: False)
    jaxlm("flow sweep a.yaml --set seed=1 --set name=b --root /tmp --grid x=1,2 --grid y=3")
    jaxlm("flow prepare a.yaml --shards 3 --runner dask")
    assert asked[0] == (
        ("a.yaml", ["seed=1", "name=b"], "/tmp"),
        {"flow": deployments.FLOWS["sweep"], "last": "evaluate", "grid": ["x=1,2", "y=3"]},
    )
    assert asked[1][1] == {"flow": deployments.FLOWS["prepare"], "last": "prepare", "shards": 3, "runner": "dask"}


def test_a_server_that_is_away_does_not_keep_the_command(jaxlm, monkeypatch):
    from flows import command, server

    left = []

    def fail(*args, **given):
        raise InputError("wrong.")

    monkeypatch.setattr(server, "away", lambda: True)
    monkeypatch.setattr(server, "leave", left.append)
    monkeypatch.setattr(command, "run", fail)
    with pytest.raises(InputError):
        jaxlm("flow pipeline a.yaml")
    monkeypatch.setattr(command, "run", lambda *args, **given: None)
    jaxlm("flow pipeline a.yaml")
    assert left == [65, 0]


@pytest.fixture
def sweep_of(tmp_path, monkeypatch):
    """sweep_of(what, wait) -> runs a sweep as a command, over chains that do `what`; `wait` comes at its end."""
    from flows import command, server, sweep
    from jaxlm.config import load

    (tmp_path / "a.yaml").write_text("")
    monkeypatch.setattr(server, "away", lambda: True)
    monkeypatch.setattr(server, "leave_when_away", lambda sentence, code: None)  # it would end the tests
    cfg = load(tmp_path / "a.yaml").replace(root=str(tmp_path))

    def run(what, wait):
        class Flow:
            name = "jaxlm-sweep"

            def __call__(self, config, grid, overrides, root):
                sweep.run_grid(config, grid, overrides, root, again="again")
                raise httpx.ConnectError("refused")

        monkeypatch.setattr(sweep, "chain", what)
        monkeypatch.setattr(server, "wait_until_back", wait)
        return command.run(str(tmp_path / "a.yaml"), (), str(tmp_path), flow=Flow(), grid=["seed=0,1"])

    return run, lambda: json.loads((tmp_path / "runs" / "a" / "status.json").read_text()), cfg


def test_a_sweep_has_a_status_of_its_own(sweep_of):
    from flows import status
    from jaxlm.errors import DivergedError, Preempted

    run, left, cfg = sweep_of
    losses, seen = iter([1.5, 1.25]), []

    def chain(each, config, **given):
        seen.append((each.name, left()["state"], given["alone"]))
        return {"stages": {}, "results": {"val_loss": next(losses)}}

    def fail(*args, **given):
        raise InputError("x.txt is gone.")

    def diverge(*args, **given):
        raise DivergedError("NaN at step 3.")

    def interrupt(*args, **given):
        raise KeyboardInterrupt

    with pytest.raises(InputError):
        run(fail, lambda say: True)
    assert (left()["state"], left()["reason"], left()["command"]) == ("failed", "x.txt is gone.", "again")
    with pytest.raises(Preempted):
        run(interrupt, lambda say: True)
    assert left()["state"] == "cancelled"
    out = run(chain, lambda say: True)  # the API is away at the end, and everything is done
    assert seen == [("a-0", "running", False), ("a-1", "running", False)]
    assert (out["best"], [row["val_loss"] for row in out["table"]]) == ("a-1", [1.25, 1.5])
    assert status.state_of(cfg) == "completed"
    assert run(diverge, lambda say: True)["best"] is None
    with pytest.raises(Preempted):
        run(diverge, interrupt)  # Ctrl-C while it waits for the API
    assert status.state_of(cfg) == "completed"
