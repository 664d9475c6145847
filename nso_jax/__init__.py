"""Train JAX networks toward flat minima, and measure that they are flat."""

from nso_jax import curvature, noise, parallel, penalties, sharpness
from nso_jax.gradients import value_and_grad
from nso_jax.transform import NoiseStabilityState, noise_stability, nso

__version__ = "0.1.0"
__all__ = [
    "NoiseStabilityState",
    "curvature",
    "noise",
    "noise_stability",
    "nso",
    "parallel",
    "penalties",
    "sharpness",
    "value_and_grad",
]
