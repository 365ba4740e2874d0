"""A look inside a model: any intermediate by name, and what can be read from it.

Needs the `analysis` extra (scikit-learn) for PCA, for neighbours and for probes; plots need matplotlib only.
"""

from jaxlm.analysis.calibration import Calibration, calibration, reliability
from jaxlm.analysis.capture import capture, names
from jaxlm.analysis.information import (
    Probed,
    discrete_information,
    entropy,
    gaussian_classes,
    gaussian_pair,
    neighbour_information,
    probe_information,
)  # fmt: skip
from jaxlm.analysis.layers import LayerInformation, information_by_layer, token_labels
from jaxlm.analysis.lens import LensSummary, lens_summary, logit_lens
from jaxlm.analysis.projection import Projection, pca

__all__ = [
    "Calibration", "LayerInformation", "LensSummary", "Probed", "Projection", "calibration", "capture",
    "discrete_information", "entropy", "gaussian_classes", "gaussian_pair", "information_by_layer", "lens_summary",
    "logit_lens", "names", "neighbour_information", "pca", "probe_information", "reliability", "token_labels",
]  # fmt: skip
