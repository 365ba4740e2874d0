"""Which devices a training step runs on, and how its arrays lie on them.

Training is data-parallel over one mesh axis, `data`: batches are split by rows, parameters are whole on every device,
and the optimizer's state of the stacked layers is split by layer (ZeRO stage 1, arXiv 1910.02054), so that Muon
orthogonalises each matrix on one device only. The step itself (`jaxlm.train.train_step`) knows nothing of this: the
partitioner follows the shardings of its arguments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxlm._memory import cores
from jaxlm.errors import InputError
from jaxlm.launch.protocol import n_processes
from jaxlm.model.weights import path_of

if TYPE_CHECKING:
    from jaxlm.data import RowSet


class Layout(NamedTuple):
    """A mesh, and where the pieces of a step go."""

    mesh: Mesh

    @property
    def devices(self) -> int:
        """How many devices take part."""
        return int(self.mesh.size)

    @property
    def rows(self) -> NamedSharding:
        """Of batches: the leading axis is split."""
        return NamedSharding(self.mesh, PartitionSpec("data"))

    @property
    def whole(self) -> NamedSharding:
        """A full copy on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    def of_state(self, state: Any) -> Any:
        """Shardings for a `TrainState` (of arrays or of shapes), leaf by leaf."""

        def place(path: Any, leaf: Any) -> NamedSharding:
            name = path_of(path)
            stacked = "opt_state" in name and "blocks/" in name and len(leaf.shape) >= 3
            return self.rows if stacked and leaf.shape[0] % self.devices == 0 else self.whole

        return jax.tree_util.tree_map_with_path(place, state)

    def put_batch(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """A host batch, the same in every process, split over the devices."""
        if jax.process_count() == 1:
            return jax.device_put(batch, self.rows)
        return {name: _global(array, self.rows) for name, array in batch.items()}

    def put_rows(self, rows: RowSet, indices: np.ndarray) -> dict[str, jax.Array]:
        """The rows `indices` (int64[B]) of a split as a batch, split over the devices.

        Each process reads only the rows of its own devices: together they read every row once.
        """
        if jax.process_count() == 1:
            return self.put_batch(rows.batch(indices))
        mine = self.rows.addressable_devices_indices_map((len(indices),))
        parts = {device: rows.batch(indices[place[0]]) for device, place in mine.items() if place is not None}
        first = next(iter(parts.values()))
        return {
            name: jax.make_array_from_single_device_arrays(
                (len(indices), *array.shape[1:]),
                self.rows,
                [jax.device_put(part[name], device) for device, part in parts.items()],
            )
            for name, array in first.items()
        }

    def put_state(self, state: Any) -> Any:
        """A state that every process has made alike, on the devices of all of them."""
        shardings = self.of_state(state)
        if jax.process_count() == 1:
            return jax.device_put(state, shardings)
        return jax.tree.map(_global, state, shardings)


def _global(array: Any, sharding: NamedSharding) -> jax.Array:
    """An array that every process holds whole, as one over the devices of all processes."""
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, sharding, lambda place: whole[place])


def use_all_cores() -> None:
    """Makes each CPU core this process may use a device of its own. Call it before jax has looked at its devices.

    Processes that train together on one machine share its cores.

    One XLA CPU device spreads only its large products over threads; everything else runs on one core. Two devices on
    two cores run a whole step in parallel: 1.5 times faster at the sizes of the quickstart (docs/recipe.md). Where an
    accelerator is present this changes nothing.
    """
    try:
        jax.config.update("jax_num_cpu_devices", max(1, cores() // n_processes()))
    except (RuntimeError, AttributeError):  # the backend is up already, as in a notebook: use what it has
        return


def layout_for(rows: int) -> Layout:
    """The mesh for batches of `rows` rows: as many of the present devices as divide them evenly.

    Raises:
        InputError: with several processes, their devices do not divide the rows; none of them can be left out.
    """
    devices = jax.devices()
    if jax.process_count() > 1 and rows % len(devices):
        raise InputError(
            f"launch.processes={jax.process_count()}: their {len(devices)} devices do not divide the {rows} rows of a "
            "microbatch evenly; choose another train.batch_size or train.grad_accum_steps."
        )
    count = max(n for n in range(1, len(devices) + 1) if rows % n == 0)
    return Layout(jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=devices[:count]))
