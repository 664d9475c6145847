"""Eight devices, unless XLA_FLAGS says otherwise, and JAX as strict as it can be."""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
# NumPy's threads wait for cores that XLA and other tests keep busy: small products then take ten times as long.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import pytest


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def standard_promotion():
    """For optimizers that need it: optax's Adam multiplies Python floats by int32 counts."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def key():
    return jax.random.key(20)
