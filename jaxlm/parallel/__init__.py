"""Devices, meshes and shardings."""

from jaxlm.parallel.mesh import Layout, layout_for, use_all_cores

__all__ = ["Layout", "layout_for", "use_all_cores"]
