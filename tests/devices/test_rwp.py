"""Random weight perturbation and IVON on several devices: as the mean of what each device would do."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nso_jax.nnx
from nso_jax import noise, parallel, sharpness
from tests.devices.meshes import P, mesh_of

PARAMS = {"w": jnp.array([[1.0, -2.0], [0.5, 3.0], [-1.0, 0.25]]), "b": jnp.array([0.5, -1.0])}
RNG = np.random.default_rng(0)
X, Y = jnp.asarray(RNG.normal(size=(32, 3)), jnp.float32), jnp.asarray(RNG.normal(size=(32, 2)), jnp.float32)
BATCH = {"batch_argnums": (1, 2)}


def loss(params, x, y):
    return jnp.mean((jnp.tanh(x @ params["w"] + params["b"][None]) - y) ** 2)


def on_each(fn, key, count=8):
    """The mean over devices, each with its part of the batch and a key of its own."""
    size = len(X) // count
    parts = [slice(size * i, size * (i + 1)) for i in range(count)]
    results = [fn(jax.random.fold_in(key, i), PARAMS, X[part], Y[part]) for i, part in enumerate(parts)]
    return jax.tree.map(lambda *xs: sum(xs) / count, *results)


@pytest.mark.parametrize("how", ["mesh", "shard_map", "shard_map unchecked", "vmap"])
def test_halves_of_each_devices_examples(key, how):
    options = {"sigma": noise.relative(0.05, "filter"), "noisy_weight": 0.25, **BATCH}
    expected = on_each(jax.jit(sharpness.mrwp(loss, **options)), key)
    if how == "mesh":
        fn = parallel.value_and_grad(loss, mesh=mesh_of(8), method=sharpness.mrwp, **options)
        result = jax.jit(fn)(key, PARAMS, X, Y)
    elif how == "vmap":
        fn = sharpness.mrwp(loss, axis_name="data", **options)
        parts = [x.reshape(8, 4, -1) for x in (X, Y)]
        result = jax.vmap(fn, axis_name="data", in_axes=(None, None, 0, 0))(key, PARAMS, *parts)
        result = jax.tree.map(lambda x: x[0], result)
    else:
        specs = {"in_specs": (P(), P(), P("data"), P("data")), "out_specs": P()}
        fn = sharpness.mrwp(loss, axis_name="data", **options)
        mapped = jax.shard_map(fn, mesh=mesh_of(8), check_vma=how == "shard_map", **specs)
        result = jax.jit(mapped)(key, PARAMS, X, Y)
    chex.assert_trees_all_close(result, expected, rtol=2e-5, atol=1e-6)


def test_modules_on_a_mesh(key, standard_promotion):
    def fun(model, x, y):
        return jnp.mean((jnp.tanh(model(x)) - y) ** 2)

    options = {"method": sharpness.mrwp, "sigma": 0.05, **BATCH}
    alone = nso_jax.nnx.value_and_grad(fun, **options)
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    results = [
        alone(jax.random.fold_in(key, i), model, X[4 * i : 4 * i + 4], Y[4 * i : 4 * i + 4]) for i in range(8)
    ]
    expected = jax.tree.map(lambda *xs: sum(xs) / 8, *results)
    on_mesh = nso_jax.nnx.value_and_grad(fun, mesh=mesh_of(8), **options)
    chex.assert_trees_all_close(nnx.jit(on_mesh)(key, model, X, Y), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("checked", [True, False])
def test_ivon_averages_gradients_and_curvature(key, checked):
    options = {"num_examples": 200, "weight_decay": 0.01, "b1": 0.8, "b2": 0.9, "initial_hessian": 0.5}
    tx = sharpness.ivon(0.1, key=key, axis_name="data", **options)

    def update(params, x, y):
        grad_fn = lambda params, _: jax.grad(loss)(params, x, y)  # noqa: E731
        return tx.update(params, tx.init(params), params, grad_fn=grad_fn)

    specs = {"in_specs": (P(), P("data"), P("data")), "out_specs": P(), "check_vma": checked}
    updates, state = jax.jit(jax.shard_map(update, mesh=mesh_of(8), **specs))(PARAMS, X, Y)

    def figures(key, params, x, y):
        u = noise.perturbation(jax.random.split(key, 1)[0], params, 1 / np.sqrt(200 * 0.51))
        q = jax.grad(loss)(noise.perturb(params, u), x, y)
        return q, jax.tree.map(lambda q, u: q * u * 200 * 0.51, q, u)

    q, p = on_each(figures, jax.random.fold_in(key, 0))
    hessian = jax.tree.map(lambda p: 0.9 * 0.5 + 0.1 * p + 0.5 * 0.1**2 * (0.5 - p) ** 2 / 0.51, p)
    moved = jax.tree.map(lambda q, w, h: -0.1 * 0.51 * (q + 0.01 * w) / (h + 0.01), q, PARAMS, hessian)
    chex.assert_trees_all_close(state.hessian, hessian, rtol=1e-4)
    chex.assert_trees_all_close(updates, moved, rtol=1e-4)
