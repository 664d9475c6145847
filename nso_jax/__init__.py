"""Train JAX networks toward flat minima, and measure that they are flat."""

import importlib
from typing import TYPE_CHECKING, Any

from nso_jax import noise, parallel, penalties, sharpness
from nso_jax.gradients import value_and_grad
from nso_jax.transform import NoiseStabilityState, noise_stability, nso

if TYPE_CHECKING:
    from nso_jax import curvature, nnx

__version__ = "0.1.0"
__all__ = [
    "NoiseStabilityState",
    "curvature",
    "nnx",
    "noise",
    "noise_stability",
    "nso",
    "parallel",
    "penalties",
    "sharpness",
    "value_and_grad",
]


def __getattr__(name: str) -> Any:
    """Imports these when they are first used: SciPy takes as long as optax, and Flax may be missing."""
    if name in ("curvature", "nnx"):
        return importlib.import_module(f"nso_jax.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(["__version__", *__all__])
