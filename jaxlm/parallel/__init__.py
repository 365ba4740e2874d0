"""Devices, meshes and shardings; several processes as one."""

from jaxlm.parallel.mesh import Layout, layout_for, use_all_cores
from jaxlm.parallel.processes import as_the_first, asked_together, connect, is_first

__all__ = ["Layout", "as_the_first", "asked_together", "connect", "is_first", "layout_for", "use_all_cores"]
