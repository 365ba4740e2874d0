"""Which devices a training step runs on, and how its arrays lie on them.

Training is data-parallel over one mesh axis, `data`: batches are split by rows, parameters are whole on every device,
and the optimizer's state of the stacked layers is split by layer (ZeRO stage 1, arXiv 1910.02054), so that Muon
orthogonalises each matrix on one device only. The step itself (`jaxlm.train.train_step`) knows nothing of this: the
partitioner follows the shardings of its arguments.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxlm.model.weights import path_of


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
        """A host batch, split over the devices."""
        return jax.device_put(batch, self.rows)


def use_all_cores() -> None:
    """Makes each CPU core this process may use a device of its own. Call it before jax has looked at its devices.

    One XLA CPU device spreads only its large products over threads; everything else runs on one core. Two devices on
    two cores run a whole step in parallel: 1.5 times faster at the sizes of the quickstart (docs/recipe.md). Where an
    accelerator is present this changes nothing.
    """
    try:
        jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))
    except (RuntimeError, AttributeError):  # the backend is up already, as in a notebook: use what it has
        return


def layout_for(rows: int) -> Layout:
    """The mesh for batches of `rows` rows: as many of the present devices as divide them evenly."""
    devices = jax.devices()
    count = max(n for n in range(1, len(devices) + 1) if rows % n == 0)
    return Layout(jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=devices[:count]))
