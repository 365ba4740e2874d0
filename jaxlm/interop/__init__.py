"""Models of other formats in and out."""

from jaxlm.interop.export import save_hf
from jaxlm.interop.hf import Loaded, load_hf

__all__ = ["Loaded", "load_hf", "save_hf"]
