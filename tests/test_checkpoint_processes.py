"""One checkpoint of several processes: each saves its shards, process 0 vouches for all of them and decides."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

PROCESS = """
import pathlib, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P

directory, port, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(
    f"127.0.0.1:{port}", 2, index, heartbeat_timeout_seconds=10, shutdown_timeout_seconds=5
)
from jax.experimental import multihost_utils
from jaxlm.checkpoint import Checkpointer, restore

mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
rows, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
w = jax.jit(lambda: jnp.arange(64.0).reshape(8, 8), out_shardings=rows)()
with Checkpointer(directory, keep_latest=2) as checkpointer:
    for step in (1, 2, 3):
        n = jax.jit(lambda: jnp.int32(step), out_shardings=everywhere)()
        assert checkpointer.save(step, {"params": {"w": w}, "rest": {"n": n, "host": np.int32(5)}}, meta={})
        checkpointer.wait()
        assert checkpointer.latest_saved == step
    assert checkpointer.save(3, {"params": {"w": w}}, meta={}) is False
multihost_utils.sync_global_devices("saved")
if index == 0:  # the size stays: only process 0, which reads the contents, sees it
    path = pathlib.Path(directory, "3", "params", "_METADATA")
    path.write_bytes(path.read_bytes()[::-1])
multihost_utils.sync_global_devices("damaged")
want = {
    "params": {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=rows)},
    "rest": {
        "n": jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere), "host": jax.ShapeDtypeStruct((), jnp.int32)
    },
}
back = restore(directory, want)
assert back.step == 2, back
assert back.items["params"]["w"].sharding == rows
for shard in back.items["params"]["w"].addressable_shards:
    np.testing.assert_array_equal(shard.data, np.arange(64.0, dtype=np.float32).reshape(8, 8)[shard.index])
assert (int(back.items["rest"]["n"]), int(back.items["rest"]["host"])) == (2, 5)
"""


@pytest.mark.slow
def test_two_processes_save_shards_and_agree_on_what_to_restore(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "JAX_NUM_CPU_DEVICES": "2",
        "JAX_PLATFORMS": "cpu",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(tmp_path), str(port), str(index)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
