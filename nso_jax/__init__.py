"""Train JAX networks toward flat minima, and measure that they are flat."""

import importlib
from typing import TYPE_CHECKING, Any

from nso_jax import noise, parallel, penalties, sharpness
from nso_jax.gradients import value_and_grad
from nso_jax.transform import NoiseStabilityState, noise_stability, nso

if TYPE_CHECKING:
    from nso_jax import curvature

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


def __getattr__(name: str) -> Any:
    """Imports `curvature` when it is first used: SciPy, which it needs, takes as long as optax."""
    if name == "curvature":
        return importlib.import_module("nso_jax.curvature")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
