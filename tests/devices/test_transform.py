import jax
import jax.numpy as jnp

from tests.devices.meshes import P, mesh_of
from tests.test_transform import nso, update


def test_state_and_updates_keep_the_sharding_type():
    mesh = mesh_of(8, kind=jax.sharding.AxisType.Explicit)
    tx = nso(num_samples=2)
    with jax.set_mesh(mesh):
        params = jax.device_put(jnp.ones((16, 2)), P("data"))
        state = tx.init(params)
        step = jax.jit(lambda p, s: update(tx, lambda p: jnp.sum(p**2), p, s))
        new_params, new_state = step(params, state)
    assert jax.typeof(new_params) == jax.typeof(params)
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(new_state), strict=True):
        assert jax.typeof(new) == jax.typeof(old)
