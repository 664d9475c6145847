"""Statistics, dropout masks and metrics of NNX modules on several devices."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import nso_jax.nnx
from tests.devices.meshes import P, mesh_of
from tests.test_nnx import SIGMA, ConvNet, arrays, counts, data, evaluations, in_parts, loss, mean, statistics


@pytest.fixture
def model(standard_promotion):
    return ConvNet(nnx.Rngs(0))


def test_axis_name_averages_gradients_and_statistics_over_devices(key, model):
    graphdef, state = nnx.split(model)
    mesh = mesh_of(8)
    fn = nso_jax.nnx.value_and_grad(loss, sigma=0.0, axis_name="data")

    def step(state, key, x, y):
        model = nnx.merge(graphdef, state)
        model.dropout.deterministic = True
        value, grads = fn(key, model, x, y)
        return value, arrays(grads), arrays(nnx.state(model, nnx.BatchStat))

    x, y = data(key)
    specs = {"in_specs": (P(), P(), P("data"), P("data")), "out_specs": P()}
    result = jax.jit(jax.shard_map(step, mesh=mesh, **specs))(state, key, x, y)
    local = []
    for i in range(8):
        copy = nnx.clone(model)
        copy.dropout.deterministic = True
        value, grads = nnx.value_and_grad(loss)(copy, x[i : i + 1], y[i : i + 1])
        local.append((value, arrays(grads), statistics(copy)))
    chex.assert_trees_all_close(result, mean(local), rtol=1e-4, atol=1e-6)


def with_own_masks(model, i):
    """A device's copy: its number is folded into the keys of the module's random streams."""
    copy = nnx.clone(model)
    keys = nnx.state(copy, nnx.RngKey)
    nnx.update(copy, jax.tree.map(lambda key: jax.random.fold_in(key, i), keys))
    return copy


@pytest.mark.parametrize("jitted", [False, True])
def test_on_a_mesh_devices_have_statistics_masks_and_noise_of_their_own(key, model, jitted):
    mesh = mesh_of(4, 2)
    x, y = data(key)
    before = arrays(nnx.state(nnx.clone(model), nnx.Param))
    on_device = []
    for i in range(4):
        own_key, part = jax.random.fold_in(key, i), slice(2 * i, 2 * i + 2)
        on_device += evaluations(own_key, with_own_masks(model, i), x[part], y[part])
    expected = mean(on_device)
    fn = nso_jax.nnx.value_and_grad(loss, sigma=SIGMA, mesh=mesh, batch_argnums=(1, 2))
    value, grads = (nnx.jit(fn) if jitted else fn)(key, model, x, y)
    result = value, arrays(grads), statistics(model)
    chex.assert_trees_all_close(result, expected, rtol=1e-4, atol=1e-6)
    assert counts(model)[0] == 1
    chex.assert_trees_all_equal(arrays(nnx.state(model, nnx.Param)), before)
    fn(key, model, x, y)
    assert counts(model)[0] == 2


def test_a_training_step_on_a_mesh_compiles_once(key, model):
    mesh = mesh_of(8)
    traced = []

    def counted(model, x, y):
        traced.append(x.shape)
        return loss(model, x, y)

    fn = nso_jax.nnx.value_and_grad(counted, sigma=SIGMA, mesh=mesh, batch_argnums=(1, 2))
    x, y = data(key)
    fn(key, model, x, y)
    count = len(traced)
    fn(jax.random.key(1), model, x, y)
    assert len(traced) == count


@pytest.mark.parametrize("form", ["mesh", "microbatch"])
def test_padding_alone_moves_no_statistics(key, model, form):
    """Of four parts, two on a mesh of two devices each, the second has no example that counts."""
    model.dropout.deterministic = True
    x, y = data(key)
    mask = jnp.arange(8) % 4 != 1 if form == "microbatch" else jnp.arange(8) < 4

    def masked(model, x, y, mask):
        losses = optax.softmax_cross_entropy_with_integer_labels(model(x), y)
        return jnp.sum(jnp.where(mask, losses, 0)) / jnp.sum(mask.astype(jnp.float32))

    options = {"batch_argnums": (1, 2, 3), "weight": lambda model, x, y, mask: mask.sum()}
    if form == "mesh":
        mesh = mesh_of(2)
        fn = nso_jax.nnx.value_and_grad(masked, sigma=0.0, mesh=mesh, **options)
        parts = [slice(0, 4)]
    else:
        fn = nso_jax.nnx.microbatch(nso_jax.nnx.value_and_grad(masked, sigma=0.0), 4, **options)
        parts = [slice(i, None, 4) for i in (0, 2, 3)]
    expected = []
    reference = nnx.clone(model)
    for part in parts:
        value, grads = nnx.value_and_grad(loss)(reference, x[part], y[part])
        expected.append((value, arrays(grads)))
    value, grads = fn(key, model, x, y, mask)
    chex.assert_trees_all_close((value, arrays(grads)), mean(expected), rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(statistics(model), statistics(reference), rtol=1e-5, atol=1e-6)


def test_metrics_on_a_mesh(key, model):
    model.dropout.deterministic = True
    mesh = mesh_of(8)

    def metrics(model, x, y):
        logits = model(x)
        right = logits.argmax(axis=1) == y
        return loss(model, x, y), {"right": right.sum(), "logits": logits}

    model.eval()
    x, y = data(key)
    modes = {"right": "sum", "logits": "concatenate"}
    options = {"sigma": 0.0, "has_aux": True, "aux": modes}
    fn = nso_jax.nnx.value_and_grad(metrics, mesh=mesh, batch_argnums=(1, 2), **options)
    (_, aux), _ = fn(key, model, x, y)
    assert aux["right"] == 2 * (model(x).argmax(axis=1) == y).sum()
    np.testing.assert_allclose(aux["logits"], model(x), rtol=1e-5, atol=1e-6)
    one = nso_jax.nnx.value_and_grad(metrics, **options)
    micro = nso_jax.nnx.microbatch(one, 4, batch_argnums=(1, 2), aux=modes)
    (_, aux), _ = micro(key, model, x, y)
    assert aux["right"] == 2 * (model(x).argmax(axis=1) == y).sum()
    np.testing.assert_allclose(aux["logits"], model(x), rtol=1e-5, atol=1e-6)


def test_microbatches_on_devices(key, model):
    model.dropout.deterministic = True
    graphdef, state = nnx.split(model)
    mesh = mesh_of(2)
    fn = nso_jax.nnx.value_and_grad(loss, sigma=SIGMA)
    microbatched = nso_jax.nnx.microbatch(fn, 4, batch_argnums=(1, 2), axis_name="data")

    def step(state, key, x, y):
        model = nnx.merge(graphdef, state)
        value, grads = microbatched(key, model, x, y)
        return value, arrays(grads), arrays(nnx.state(model, nnx.BatchStat))

    x, y = (jnp.concatenate([part, part[::-1]]) for part in data(key))
    specs = {"in_specs": (P(), P(), P("data"), P("data")), "out_specs": P()}
    result = jax.jit(jax.shard_map(step, mesh=mesh, **specs))(state, key, x, y)
    local = []
    for i in range(2):
        copy, device_key = nnx.clone(model), jax.random.fold_in(key, i)
        value, grads = in_parts(fn, device_key, copy, x[8 * i : 8 * i + 8], y[8 * i : 8 * i + 8])
        local.append((value, arrays(grads), statistics(copy)))
    chex.assert_trees_all_close(result, mean(local), rtol=1e-4, atol=1e-6)
