import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nso_jax import _backend
from tests.devices.meshes import P, mesh_of


@pytest.mark.parametrize("through", [_backend.computed_once, _backend.barrier])
def test_what_is_computed_once_is_what_it_was_on_each_device(key, platform, through):
    w = jnp.array([[jnp.inf, 1.0], [jnp.nan, -2.0]])
    double = lambda w: through(2 * w, key)  # noqa: E731
    mapped = jax.shard_map(double, mesh=mesh_of(2), in_specs=P("data"), out_specs=P("data"))
    np.testing.assert_array_equal(jax.jit(mapped)(w), 2 * w)
