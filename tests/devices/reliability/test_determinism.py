"""The same key gives the same result on any number of devices."""

import jax
import numpy as np
import pytest

import nso_jax
from nso_jax import parallel
from tests.reliability import determinism, entry_points


@pytest.mark.slow
def test_the_same_key_gives_the_same_result_everywhere():
    advances = []
    outcome = determinism.determinism(advances.append, times=1, seeds_of_hashes=("random",))
    assert outcome.survived == outcome.tried == len(advances) > 30


@pytest.mark.parametrize("size", [1, 2, 8])
def test_on_any_number_of_devices_shared_draws_give_one_result(key, size):
    params, batch = entry_points.make_problem(np.random.default_rng(0))
    fn = nso_jax.value_and_grad(entry_points.mean_squared_error, sigma=0.1, num_samples=2)
    expected = jax.jit(fn)(key, params, batch)
    mesh = entry_points.device_mesh(size)

    def on_mesh(independent_draws):
        fn = parallel.value_and_grad(
            entry_points.mean_squared_error,
            sigma=0.1,
            num_samples=2,
            mesh=mesh,
            independent_draws=independent_draws,
        )
        return fn(key, params, batch)

    assert determinism._difference(expected, on_mesh(False)) < determinism.ROUNDING
    assert determinism._difference(expected, on_mesh(True)) > 100 * determinism.ROUNDING
