"""Devices climb each for itself or together, with the norm of all of a weight that they share among them."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nso_jax import noise, parallel, sharpness
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
from tests.test_bsam import BAYES
from tests.test_parallel import mean_of
from tests.test_sharpness import METHODS, RHO


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


@pytest.mark.parametrize("how", MAPS)
def test_each_device_climbs_for_itself(key, method, how):
    fn = method(quartic_and_sum, rho=RHO, has_aux=True, axis_name="data")
    result = on_devices(fn, how)(key, PARAMS, XS)
    local = jax.jit(method(quartic_and_sum, rho=RHO, has_aux=True))
    parts = [local(jax.random.fold_in(key, i), PARAMS, of_device(XS, i)) for i in range(8)]
    expected = mean_of(parts)
    chex.assert_trees_all_close(result, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", MAPS)
def test_all_devices_may_climb_together(key, method, how):
    fn = method(quartic, rho=RHO, axis_name="data", global_ascent=True)
    expected = jax.jit(method(quartic, rho=RHO))(key, PARAMS, XS)
    result = on_devices(fn, how)(key, PARAMS, XS)
    chex.assert_trees_all_close(result, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("together", "rounds"), [(False, 1), (True, 2)])
def test_a_common_ascent_costs_one_more_all_reduce(key, together, rounds):
    fn = sharpness.sam(quartic, rho=RHO, axis_name="data", global_ascent=together)
    text = on_devices(fn, "shard_map").lower(key, PARAMS, XS).compile().as_text()
    assert len(re.findall(r" all-reduce(?:-start)?\(", text)) == rounds


@pytest.mark.parametrize("checked", [True, False])
def test_norms_are_those_of_whole_params_on_a_model_axis(key, method, checked):
    specs = {"w": P("model"), "b": P()}

    def local_loss(params, x):
        own = x.reshape(-1, 2, 4)[:, jax.lax.axis_index("model")]
        prediction = jax.lax.psum(own @ params["w"], "model")
        return jnp.mean((prediction + jnp.sum(params["b"])) ** 4)

    def whole_loss(params, x):
        return jnp.mean((x @ params["w"] + jnp.sum(params["b"])) ** 4)

    params, xs = {"w": jnp.linspace(-1, 1, 8), "b": jnp.ones(2)}, jnp.linspace(-1, 1, 64).reshape(8, 8)
    options = {"axis_name": "data", "rho": RHO} | ({} if checked else {"param_specs": specs})
    if method is METHODS["rsam"]:
        options["mask"] = False if checked else {"w": False, "b": True}  # shards draw noise of their own
    mapped = jax.shard_map(
        method(local_loss, **options),
        mesh=mesh_of(1, 2),
        in_specs=(P(), specs, P("data")),
        out_specs=(P(), specs),
        check_vma=checked,
    )
    value, grads = jax.jit(mapped)(key, params, xs)
    whole = method(whole_loss, rho=RHO, mask=options.get("mask"))
    expected = jax.jit(whole)(jax.random.fold_in(key, 0), params, xs)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    if checked:  # else JAX itself gives a psum the wrong transpose
        chex.assert_trees_all_close(grads, expected[1], rtol=1e-4, atol=1e-6)


def test_on_a_mesh_one_argument_changes(key, method):
    fn = parallel.value_and_grad(quartic, method=method, rho=RHO, mesh=mesh_of(8))
    mapped = on_devices(method(quartic, rho=RHO, axis_name="data"), "shard_map")
    chex.assert_trees_all_close(jax.jit(fn)(key, PARAMS, XS), mapped(key, PARAMS, XS), rtol=1e-5, atol=1e-6)


def test_bsam_averages_over_devices(key):
    tx = sharpness.bsam(0.1, key=key, axis_name="data", **BAYES)

    def update(_, params, x):
        grad_fn = lambda params, _: jax.grad(quartic)(params, x)  # noqa: E731
        return tx.update(params, tx.init(params), params, grad_fn=grad_fn)

    updates, state = on_devices(update, "shard_map")(key, PARAMS, XS)
    own = sharpness.bsam(0.1, key=key, **BAYES)
    momenta, sizes = [], []
    for i in range(8):
        draw_key = jax.random.fold_in(jax.random.fold_in(key, 0), i)
        grad = lambda params, i=i: jax.grad(quartic)(params, of_device(XS, i))  # noqa: E731
        u = noise.perturbation(draw_key, PARAMS, 1 / np.sqrt(200))
        h = grad(noise.perturb(PARAMS, u))
        g = grad(jax.tree.map(lambda w, h: w + 0.05 * h, PARAMS, h))
        momenta.append(jax.tree.map(lambda g, w: 0.2 * (g + 0.01 * w), g, PARAMS))
        sizes.append(jax.tree.map(abs, h))
    chex.assert_trees_all_close(updates, jax.tree.map(lambda m: -0.1 * m, mean_of(momenta)), rtol=1e-4)
    expected = jax.tree.map(lambda h: 0.9 + 0.1 * (h + 0.21), mean_of(sizes))
    chex.assert_trees_all_close(state.precision, expected, rtol=1e-5)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, own.init(PARAMS))


@pytest.mark.parametrize("wrap", [lambda loss: loss, jax.jit, jax.checkpoint], ids=["plain", "jit", "remat"])
def test_bsam_refuses_a_gradient_that_may_be_a_part_of_it(key, wrap):
    mesh = mesh_of(8)
    tx = sharpness.bsam(0.1, num_examples=100, key=key, axis_name="data")

    def step(w, x):
        def grad_fn(w, _):
            return jax.grad(wrap(lambda w: jax.lax.pmean(jnp.mean((x @ w) ** 2), "data")))(w)

        return tx.update(w, tx.init(w), w, grad_fn=grad_fn)[0]

    specs = {"in_specs": (P(), P("data")), "out_specs": P()}
    with pytest.raises(
        ValueError, match=r"grad_fn: its loss has a collective, .* give bsam, .* check_vma=False"
    ):
        jax.jit(jax.shard_map(step, mesh=mesh, **specs))(jnp.ones(3), jnp.ones((8, 3)))
    unchecked = jax.jit(jax.shard_map(step, mesh=mesh, check_vma=False, **specs))
    assert jnp.isfinite(unchecked(jnp.ones(3), jnp.ones((8, 3)))).all()
