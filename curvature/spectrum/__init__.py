"""What a curvature's spectrum looks like, from products alone: trace, diagonal, extreme eigenvalues, density."""

from curvature.spectrum.density import SpectralDensity, spectral_density
from curvature.spectrum.diagonal import EstimatedDiagonal, xdiag
from curvature.spectrum.extreme import Eigenpairs, extreme_eigenvalues
from curvature.spectrum.flat import Estimated
from curvature.spectrum.trace import hutch_plus_plus, hutchinson_trace, xtrace

__all__ = [
    "Eigenpairs",
    "Estimated",
    "EstimatedDiagonal",
    "SpectralDensity",
    "extreme_eigenvalues",
    "hutch_plus_plus",
    "hutchinson_trace",
    "spectral_density",
    "xdiag",
    "xtrace",
]
