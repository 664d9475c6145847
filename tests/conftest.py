"""JAX as strict as it can be, and programs compiled once."""

import os
from pathlib import Path

# NumPy's threads wait for cores that XLA and other tests keep busy: small products then take ten times as long.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Compiling takes most of the tests' time: workers, programs that tests start and later runs find what is compiled.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

import jax
import pytest
from hypothesis import HealthCheck, settings

# Properties are searched from a fixed seed and without a memory, so that every run does the same.
settings.register_profile(
    "test",
    max_examples=16,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],  # the first example compiles
)
settings.register_profile("nightly", settings.get_profile("test"), max_examples=175)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "test"))


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


@pytest.fixture
def elsewhere(monkeypatch):
    """What is compiled for TPU and GPU, on the CPU: draws in loops, barriers that are no loops."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cpu, default: default(*args))


@pytest.fixture(params=["on CPU", "elsewhere"])
def platform(request):
    """Tests what is compiled for CPU, and what for others."""
    if request.param == "elsewhere":
        request.getfixturevalue("elsewhere")
