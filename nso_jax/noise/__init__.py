"""Noise for weights: samplers of unit variance, scales, and a perturbation of a whole pytree.

A sampler is `sampler(key, shape, dtype) -> array` with mean 0, variance 1 and a symmetric law, so that
sigma means the same for each and any `jax.random` function of that form fits.
"""

from nso_jax.noise.perturbation import perturb, perturbation
from nso_jax.noise.samplers import Sampler as Sampler
from nso_jax.noise.samplers import cauchy, centered_binomial, laplace, normal, rademacher, uniform
from nso_jax.noise.scales import Per as Per
from nso_jax.noise.scales import Relative, adaptive, relative
from nso_jax.noise.scales import Sigma as Sigma

__all__ = [
    "Relative",
    "adaptive",
    "cauchy",
    "centered_binomial",
    "laplace",
    "normal",
    "perturb",
    "perturbation",
    "rademacher",
    "relative",
    "uniform",
]
