import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nso_jax import penalties
from tests.devices.meshes import P, mesh_of
from tests.networks import backward_only


@pytest.mark.parametrize("check_vma", [True, False])
def test_trace_through_a_custom_vjp_is_each_devices_own(key, check_vma):
    """By weights that the devices share, JAX sums gradients over devices."""
    mesh = mesh_of(4)
    x, w = jnp.linspace(-1, 1, 8), jnp.array([0.3, -0.5])

    def mean_trace(tanh):
        def local(w, x):
            loss = lambda w: jnp.mean((tanh(x[:, None] * w[None]) - 1) ** 2)  # noqa: E731
            return jax.lax.pmean(penalties.hessian_trace(key, loss, w), "data")

        specs = {"in_specs": (P(), P("data")), "out_specs": P(), "check_vma": check_vma}
        return jax.jit(jax.value_and_grad(lambda w: jax.shard_map(local, mesh=mesh, **specs)(w, x)))(w)

    (value, grads), (expected, expected_grads) = mean_trace(backward_only(jnp.tanh)), mean_trace(jnp.tanh)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(grads, expected_grads, rtol=1e-5)
