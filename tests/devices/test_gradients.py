"""One mean over devices, whichever way the function is mapped over them."""

import chex
import jax
import jax.numpy as jnp
import pytest

import nso_jax
from tests.devices.meshes import (
    MAPS,
    PARAMS,
    XS,
    P,
    mesh_of,
    of_device,
    on_devices,
    quartic,
    quartic_and_sum,
)
from tests.test_parallel import mean_of

SIGMA = 0.1


@pytest.mark.parametrize("how", MAPS)
@pytest.mark.parametrize("independent", [True, False])
def test_axis_name_gives_one_mean_over_devices(key, how, independent, platform):
    options = {"sigma": SIGMA, "has_aux": True}
    fn = nso_jax.value_and_grad(quartic_and_sum, axis_name="data", independent_draws=independent, **options)
    one = nso_jax.value_and_grad(quartic_and_sum, **options)
    keys = [jax.random.fold_in(key, i) if independent else key for i in range(8)]
    expected = mean_of([one(k, PARAMS, of_device(XS, i)) for i, k in enumerate(keys)])
    result = on_devices(fn, how)(key, PARAMS, XS)
    chex.assert_trees_all_close(result, expected, rtol=1e-5)


def test_masked_leaves_are_not_summed_over_devices(key):
    """With params shared by the devices JAX would sum their gradients: 8 times too large."""
    mesh = mesh_of(8)
    fn = nso_jax.value_and_grad(
        quartic_and_sum, sigma=0.0, mask=False, has_aux=True, axis_name="data", clean_weight=0.5
    )
    mapped = jax.shard_map(fn, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P())
    plain = jax.grad(lambda p: quartic(p, XS))(PARAMS)
    chex.assert_trees_all_close(jax.jit(mapped)(key, PARAMS, XS)[1], plain, rtol=1e-5)


def test_explicitly_sharded_params(key):
    mesh = mesh_of(8, kind=jax.sharding.AxisType.Explicit)
    loss = lambda w: jnp.sum(w**4)  # noqa: E731
    w = jnp.linspace(-1, 1, 32).reshape(16, 2)
    fn = jax.jit(nso_jax.value_and_grad(loss, sigma=SIGMA, num_samples=2))
    expected = fn(key, w)
    with jax.set_mesh(mesh):
        value, grad = fn(key, jax.device_put(w, P("data")))
    assert grad.sharding.spec[0] == "data"
    chex.assert_trees_all_close((value, grad), expected, rtol=1e-5)
