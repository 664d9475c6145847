import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nso_jax import curvature
from tests.curvature.problems import KEY, flat, mlp, mlp_loss, random_tangent
from tests.devices.meshes import P, mesh_of


@pytest.mark.parametrize("axis_type", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_batches_may_be_sharded_over_devices(axis_type):
    mesh = mesh_of(8, kind=axis_type)
    params, batch = mlp(jnp.float32)
    batch = jax.tree.map(lambda x: x[:24], batch)
    sharded = jax.device_put(batch, jax.NamedSharding(mesh, P("data")))
    replicated = jax.device_put(params, jax.NamedSharding(mesh, P()))
    tangent = random_tangent(params)
    expected = curvature.hessian(mlp_loss, params, batch)(tangent)
    result = curvature.hessian(mlp_loss, replicated, sharded)(tangent)
    np.testing.assert_allclose(flat(result), flat(expected), rtol=1e-4, atol=1e-5)
    whole, parts = (
        curvature.trace(KEY, curvature.hessian(mlp_loss, *arguments), num_products=16)
        for arguments in ((params, batch), (replicated, sharded))
    )
    assert whole.value == pytest.approx(parts.value, rel=1e-4)
