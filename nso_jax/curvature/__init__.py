"""Measuring how curved a loss is, with errors: trace, eigenvalues, spectrum, layers, stability, bounds."""

from nso_jax.curvature._kronecker import KroneckerFactors
from nso_jax.curvature.bounds import PacBayesBound, pac_bayes_bound
from nso_jax.curvature.eigenvalues import Eigenpairs, eigenvalues
from nso_jax.curvature.layers import LayerStructure, layer_structure
from nso_jax.curvature.operators import CurvatureMatrix, gauss_newton, hessian
from nso_jax.curvature.sigma import SigmaSuggestion, suggest_sigma
from nso_jax.curvature.spectrum import Density, spectral_density
from nso_jax.curvature.stability import StabilityGap, noise_stability_gap
from nso_jax.curvature.subspaces import subspace_overlap
from nso_jax.curvature.trace import Estimate, diagonal, trace

__all__ = [
    "CurvatureMatrix",
    "Density",
    "Eigenpairs",
    "Estimate",
    "KroneckerFactors",
    "LayerStructure",
    "PacBayesBound",
    "SigmaSuggestion",
    "StabilityGap",
    "diagonal",
    "eigenvalues",
    "gauss_newton",
    "hessian",
    "layer_structure",
    "noise_stability_gap",
    "pac_bayes_bound",
    "spectral_density",
    "subspace_overlap",
    "suggest_sigma",
    "trace",
]
