"""Measuring how curved a loss is, with errors: trace, eigenvalues, spectrum, layers, stability, bounds."""

from nso_jax.curvature.bounds import PacBayesBound, pac_bayes_bound
from nso_jax.curvature.eigenvalues import Eigenpairs, eigenvalues
from nso_jax.curvature.layers import KroneckerFactors, LayerStructure, layer_structure, subspace_overlap
from nso_jax.curvature.operators import GaussNewton, ggn_vp, hvp
from nso_jax.curvature.spectrum import Density, spectral_density
from nso_jax.curvature.stability import SigmaSuggestion, StabilityGap, noise_stability_gap, suggest_sigma
from nso_jax.curvature.trace import Estimate, diagonal, trace

__all__ = [
    "Density",
    "Eigenpairs",
    "Estimate",
    "GaussNewton",
    "KroneckerFactors",
    "LayerStructure",
    "PacBayesBound",
    "SigmaSuggestion",
    "StabilityGap",
    "diagonal",
    "eigenvalues",
    "ggn_vp",
    "hvp",
    "layer_structure",
    "noise_stability_gap",
    "pac_bayes_bound",
    "spectral_density",
    "subspace_overlap",
    "suggest_sigma",
    "trace",
]
