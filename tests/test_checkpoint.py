"""Checkpoints that nothing has happened to: what comes back, what stays on the disk, and what is refused."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from jaxlm import _writer
from jaxlm.checkpoint import Checkpointer, best_step, dir_lock, restore, restore_step_dir, steps, verify
from jaxlm.errors import DiskError, InputError

PARAMS = {"embed": {"tokens": jnp.arange(6.0).reshape(2, 3)}, "blocks": {"up": jnp.ones((2, 4), jnp.bfloat16)}}


def abstract(tree: Any) -> Any:
    return jax.eval_shape(lambda: jax.tree.map(jnp.asarray, tree))


def raw(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def save_steps(directory: Path, metrics: dict[int, float | None], **options: Any) -> None:
    with Checkpointer(directory, **options) as checkpointer:
        for step, metric in metrics.items():
            assert checkpointer.save(step, {"params": {"w": jnp.full(3, step)}}, meta={}, metric=metric)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One checkpoint of step 7 with two items, which the tests here only read."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    with Checkpointer(directory) as checkpointer:
        checkpointer.save(
            7, {"params": PARAMS, "rest": {"seed": jnp.uint32(3)}}, meta={"config": "abc", "data": [1, 2]}
        )
    return directory


def test_every_bit_comes_back(tmp_path: Path) -> None:
    # Bit patterns by IEEE 754: quiet and signalling NaNs with payloads, -0.0, the smallest subnormal, -inf.
    float32 = np.array([0x7FC00001, 0xFFC12345, 0x7F800001, 0x80000000, 0x00000001, 0xFF800000], np.uint32)
    bfloat16 = np.array([0x7FC1, 0xFF81, 0x8000, 0x0001], np.uint16).view(ml_dtypes.bfloat16)
    params = {
        "nan": jnp.asarray(float32.view(np.float32)),
        "bfloat16": jnp.asarray(bfloat16),
        # a chunk of nothing but -0.0 "equals" the fill value 0.0 of an array store that compares by value
        "minus_zero": jnp.full((64, 64), -0.0),
        "minus_zero_16": jnp.full(5, -0.0, jnp.float16),
        "integers": (jnp.int32(-(2**31)), jnp.uint32(2**32 - 1), np.int8(-1), [np.arange(3, dtype=np.int16)]),
        "flags": jnp.array([True, False]),
        "number": 3,
        "none_of_it": jnp.zeros((0, 3)),
        "empty": {},
        "nothing": None,
    }
    items = {"params": params, "opt_state": optax.adamw(1e-3).init({"w": jnp.ones((2, 2))}), "array": jnp.arange(3)}
    assert raw(params["nan"]) == [float32.tobytes()]  # jax itself has not touched the payloads
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, items, meta={})
    back = restore(tmp_path, abstract(items))
    assert back is not None
    assert back.step == 0
    assert raw(back.items) == raw(jax.tree.map(jnp.asarray, items))
    assert str(jax.tree.structure(back.items)) == str(jax.tree.structure(items))
    assert jax.tree.map(lambda x: x.dtype, back.items) == jax.tree.map(lambda x: jnp.asarray(x).dtype, items)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(back.items))


def test_meta_comes_back_and_items_are_read_one_by_one(saved: Path) -> None:
    back = restore(saved, {"rest": {"seed": jax.ShapeDtypeStruct((), jnp.uint32)}}, expect={"config": "abc"})
    assert back is not None
    assert (back.step, back.meta, back.damaged) == (7, {"config": "abc", "data": [1, 2]}, [])
    assert back.items == {"rest": {"seed": 3}}
    assert (steps(saved), verify(saved)) == ([7], [])
    assert raw(restore_step_dir(saved / "7", {"params": abstract(PARAMS)}).items["params"]) == raw(PARAMS)


def test_orbax_alone_reads_an_item(saved: Path) -> None:
    with ocp.StandardCheckpointer() as reader:
        assert raw(reader.restore(saved / "7" / "params", abstract(PARAMS))) == raw(PARAMS)


def test_leaves_go_where_their_sharding_says(saved: Path) -> None:
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    back = restore(
        saved, {"params": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), PARAMS)}
    )
    assert back is not None
    assert {leaf.sharding for leaf in jax.tree.leaves(back.items)} == {sharding}
    assert raw(back.items["params"]) == raw(PARAMS)


def test_what_is_saved_is_what_save_was_given(tmp_path: Path) -> None:
    """An asynchronous save reads neither the buffers that are donated after it nor numpy arrays changed after it."""
    update = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2 + 1, tree), donate_argnums=0)
    state = update({f"w{i}": jnp.arange(50_000.0) + i for i in range(20)})
    expected = raw(jax.tree.map(lambda x: x + 0, state))
    counter = np.zeros(1000, np.int32)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"state": state, "counter": counter}, meta={})
        for _ in range(5):
            state = update(state)
        counter += 1
    back = restore(tmp_path, {"state": abstract(state), "counter": counter})
    assert back is not None
    assert raw(back.items["state"]) == expected
    assert not np.any(back.items["counter"])


def test_asynchronous_save_counts_only_when_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, original = threading.Event(), _writer.write_manifest
    monkeypatch.setattr(_writer, "write_manifest", lambda *a, **k: (go_on.wait(30), original(*a, **k))[1])
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"params": PARAMS}, meta={})  # returns although the save is held up
        assert (checkpointer.latest_saved, steps(tmp_path), verify(tmp_path)) == (None, [], [])
        assert restore(tmp_path, {"params": abstract(PARAMS)}) is None
        go_on.set()
        checkpointer.wait()
        assert (checkpointer.latest_saved, steps(tmp_path)) == (1, [1])
    with Checkpointer(tmp_path, asynchronous=False) as checkpointer:
        assert checkpointer.latest_saved == 1
        checkpointer.save(2, {"params": PARAMS}, meta={})
        assert (checkpointer.latest_saved, steps(tmp_path)) == (2, [1, 2])


@pytest.mark.parametrize(
    ("metrics", "options", "kept", "best"),
    [
        ({1: 3.0, 2: 1.0, 3: 2.0, 4: 2.0, 5: 2.5}, {}, [2, 4, 5], 2),
        ({1: 3.0, 2: 1.0, 3: 2.0, 4: 1.0}, {"keep_latest": 1}, [4], 4),  # the newest of equals
        ({1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5}, {"keep_best": False}, [3, 4], 3),
        ({1: float("nan"), 2: 1.0, 3: float("-inf"), 4: float("nan")}, {"keep_latest": 1}, [2, 4], 2),
        ({1: float("nan"), 2: None, 3: float("inf")}, {"keep_latest": 1}, [3], None),
    ],
)
def test_the_newest_and_the_best_are_kept(
    tmp_path: Path, metrics: dict[int, float | None], options: dict[str, Any], kept: list[int], best: int | None
) -> None:
    save_steps(tmp_path, metrics, **options)
    assert (steps(tmp_path), best_step(tmp_path)) == (kept, best)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([".lock", *map(str, kept)])


def test_retention_remembers_across_restarts(tmp_path: Path) -> None:
    save_steps(tmp_path, {1: 1.0, 2: 2.0}, keep_latest=1)
    save_steps(tmp_path, {3: 3.0, 4: float("nan")}, keep_latest=1)
    assert steps(tmp_path) == [1, 4]


def test_nothing_is_removed_when_the_newer_save_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_steps(tmp_path, {1: None}, keep_latest=1)

    def broken(*_: Any, **__: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("jaxlm._digests.write_atomic", broken)
    with pytest.raises(DiskError, match=rf"cannot save step 2 in {tmp_path}: Input/output error"):
        save_steps(tmp_path, {2: None}, keep_latest=1)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "1"]
    assert verify(tmp_path) == []


def test_saving_a_step_again_changes_nothing_unless_forced(tmp_path: Path) -> None:
    save_steps(tmp_path, {2: None})
    before = (tmp_path / "2" / "digests.json").read_bytes()
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.save(2, {"params": {"w": jnp.zeros(3)}}, meta={}) is False
        with pytest.raises(InputError, match=r"step 1 is older than the checkpoint of step 2"):
            checkpointer.save(1, {"params": {"w": jnp.zeros(3)}}, meta={})
        assert (tmp_path / "2" / "digests.json").read_bytes() == before
        assert checkpointer.save(2, {"params": {"w": jnp.zeros(3)}}, meta={}, metric=1.0, force=True)
    back = restore(tmp_path, {"params": {"w": jax.ShapeDtypeStruct((3,), jnp.float32)}})
    assert back is not None
    assert not np.any(back.items["params"]["w"])
    assert best_step(tmp_path) == 2
    with Checkpointer(tmp_path, keep_latest=1) as checkpointer:
        assert checkpointer.save(1, {"params": {"w": jnp.ones(3)}}, meta={}, force=True)
    assert steps(tmp_path) == [1, 2]  # what was just saved stays, though it is not the newest


SHAPE = jax.ShapeDtypeStruct


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed": {}}, r"params/embed/tokens is float32\[2, 3\] in .*7, but no such leaf is expected"),
        ({"head": SHAPE((4,), jnp.int32)}, r"params/head is no such leaf in .*, but int32\[4\] is expected"),
        (
            {"embed": {"tokens": SHAPE((3, 2), jnp.float32)}},
            r"tokens is float32\[2, 3\] in .*, but float32\[3, 2\] is ex",
        ),
        (
            {"blocks": {"up": SHAPE((2, 4), jnp.float32)}},
            r"blocks/up is bfloat16\[2, 4\] in .*, but float32\[2, 4\] is ex",
        ),
        ({"blocks": {}, "embed": {}}, r"and 1 more leaves differ"),
    ],
)
def test_another_tree_is_refused_by_the_name_of_the_leaf(saved: Path, change: dict[str, Any], message: str) -> None:
    for read in (lambda items: restore(saved, items), lambda items: restore_step_dir(saved / "7", items)):
        with pytest.raises(InputError, match=message):
            read({"params": abstract(PARAMS) | change})


def test_other_expectations_are_refused(saved: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"config": "xyz"}, r"config is 'abc' in the checkpoint .*7, but 'xyz' is expected"),
        ({"data": (1, 3)}, r"data is \[1, 2\] in .*, but \[1, 3\] is expected"),
        ({"tokenizer": "t"}, r"tokenizer is not recorded in .*, but 't' is expected"),
    ]
    for expect, message in cases:
        with pytest.raises(InputError, match=message):
            restore(saved, {}, expect=expect)
    assert restore(saved, {}, expect={"data": (1, 2)}) is not None  # JSON knows lists only
    with pytest.raises(InputError, match=r"has no item 'opt_state'; it has params, rest"):
        restore(saved, {"opt_state": {}})


def test_of_two_configurations_only_what_differs_is_told(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(7, {"params": PARAMS}, meta={"model": {"n_layers": 2, "norm": {"eps": 1e-5}, "old": 1}})
    now = {"n_layers": 2, "norm": {"eps": 1e-6}, "new": None}
    with pytest.raises(InputError) as told:
        restore(tmp_path, {}, expect={"model": now})
    assert str(told.value).startswith("model.norm.eps is 1e-05 in the checkpoint")
    assert "but 1e-06 is expected (2 more of model differ)" in str(told.value)
    assert "n_layers" not in str(told.value)
    with pytest.raises(InputError, match=r"model\.new is not recorded in the checkpoint .*, but None is expected"):
        restore(tmp_path, {}, expect={"model": {"n_layers": 2, "norm": {"eps": 1e-5}, "old": 1, "new": None}})


def test_asking_for_what_is_not_there(saved: Path, tmp_path: Path) -> None:
    assert restore(tmp_path, {}) is None
    assert restore(tmp_path / "absent", {}) is None
    assert steps(tmp_path / "absent") == []
    with pytest.raises(InputError, match=r"has no checkpoint of step 6; it has \[7\]"):
        restore(saved, {}, step=6)
    with pytest.raises(InputError, match="is not a directory of checkpoints"):
        verify(tmp_path / "absent")
    for path in (saved, saved / "8"):
        with pytest.raises(InputError, match=r"is not a checkpoint|no checkpoint of step 8"):
            restore_step_dir(path, {})


def test_what_cannot_come_back_exactly_is_refused(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        for leaf, message in [
            (np.zeros(2, np.float64), "params/w is float64, which jax would read back as float32"),
            (jax.random.key(0), "params/w is a typed random key"),
            ("text", "params/w is a str"),
        ]:
            with pytest.raises(InputError, match=message):
                checkpointer.save(1, {"params": {"w": leaf}}, meta={})
        with pytest.raises(InputError, match="have the same path"):
            checkpointer.save(1, {"params": {"a.b": jnp.ones(1), "a": {"b": jnp.ones(1)}}}, meta={})
        with pytest.raises(InputError, match="plain JSON"):
            checkpointer.save(1, {"params": PARAMS}, meta={"loss": float("nan")})
        with pytest.raises(InputError, match="step -1"):
            checkpointer.save(-1, {"params": PARAMS}, meta={})
        with pytest.raises(InputError, match="no array"):
            checkpointer.save(1, {"params": {}}, meta={})
    assert steps(tmp_path) == []
    with pytest.raises(RuntimeError, match="closed"):
        checkpointer.save(1, {"params": PARAMS}, meta={})


def test_paths_with_spaces_other_scripts_and_relative_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    directory = Path("ein Lauf/チェックポイント é %20#1")
    with Checkpointer(directory) as checkpointer:
        checkpointer.save(1, {"params": PARAMS}, meta={})
        monkeypatch.chdir("/")  # a relative path means what it meant when it was given
    back = restore(tmp_path / directory, {"params": abstract(PARAMS)})
    assert back is not None
    assert raw(back.items["params"]) == raw(PARAMS)
    monkeypatch.chdir(tmp_path)
    assert (steps(directory), verify(directory)) == ([1], [])


def test_leaving_by_an_exception_waits_and_keeps_the_exception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    def leave(step: int, error: BaseException) -> None:
        with Checkpointer(tmp_path) as checkpointer:
            checkpointer.save(step, {"params": PARAMS}, meta={})
            raise error

    with pytest.raises(KeyboardInterrupt):
        leave(1, KeyboardInterrupt())
    assert steps(tmp_path) == [1]

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jaxlm._writer.write_manifest", full)
    with pytest.raises(ZeroDivisionError) as raised:
        leave(2, ZeroDivisionError())
    assert "No space left on device" in raised.value.__notes__[0]
    assert steps(tmp_path) == [1]
    with dir_lock(tmp_path):  # the failed save has not kept it
        pass


def test_one_writer_and_any_number_of_readers(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"params": PARAMS}, meta={})
        checkpointer.wait()
        with pytest.raises(
            InputError, match=rf"{tmp_path} is in use by process {os.getpid()} on host .* since 20\d\d-"
        ):
            Checkpointer(tmp_path)
        assert restore(tmp_path, {"params": abstract(PARAMS)}) is not None
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    Checkpointer(tmp_path).close()
