"""Measuring how curved a loss is: the trace of its Hessian, eigenvalues and their density, with errors."""

from nso_jax.curvature.eigenvalues import Eigenpairs, eigenvalues
from nso_jax.curvature.operators import GaussNewton, ggn_vp, hvp
from nso_jax.curvature.spectrum import Density, spectral_density
from nso_jax.curvature.trace import Estimate, diagonal, trace

__all__ = [
    "Density",
    "Eigenpairs",
    "Estimate",
    "GaussNewton",
    "diagonal",
    "eigenvalues",
    "ggn_vp",
    "hvp",
    "spectral_density",
    "trace",
]
