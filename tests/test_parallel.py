import collections
import functools
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import nso_jax
import nso_jax.nnx
from nso_jax import noise, parallel, sharpness
from tests.two_processes import train

P = jax.P
SIGMA = 0.1
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Batch(NamedTuple):
    x: jax.Array
    y: jax.Array


def loss(params, batch, *, scale=1.0):
    hidden = jnp.tanh(batch.x @ params["w1"])
    error = (hidden @ params["w2"] + params["b"] - batch.y) ** 2
    return scale * error.mean(), {
        "error": error.mean(),
        "count": jnp.int32(len(error)),
        "first": batch.y[0] > 0,
    }


def make_params(dtype=jnp.float32):
    rng = np.random.default_rng(1)
    shapes = {"w1": (6, 16), "w2": (16,), "b": ()}
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def make_batch(size=64):
    rng = np.random.default_rng(2)
    return Batch(*(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((size, 6), (size,))))


def mesh_of(*sizes, names=("data", "model")):
    axis_types = (jax.sharding.AxisType.Auto,) * len(sizes)
    return jax.make_mesh(sizes, names[: len(sizes)], axis_types=axis_types)


def strided(batch, i, count):
    return jax.tree.map(lambda x: x[i::count], batch)


def mean_of(results):
    """Of floats; the first of others."""
    return jax.tree.map(
        lambda *xs: sum(xs) / len(xs) if jnp.issubdtype(xs[0].dtype, jnp.inexact) else xs[0], *results
    )


def averaged(**options):
    return nso_jax.value_and_grad(loss, **{"sigma": SIGMA, "has_aux": True, **options})


# --- microbatches -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "num_samples"), [(1, 2), (2, 2), (4, 1)])
def test_microbatches_are_averaged_each_with_its_own_key(key, platform, count, num_samples):
    fn, params, batch = averaged(num_samples=num_samples), make_params(), make_batch()
    keys = jax.random.split(key, count) if count > 1 else [key]
    one = jax.jit(fn)
    expected = mean_of([one(k, params, strided(batch, i, count), scale=2.0) for i, k in enumerate(keys)])
    result = jax.jit(parallel.microbatch(fn, count))(key, params, batch, scale=2.0)
    chex.assert_trees_all_equal_shapes_and_dtypes(result, expected)
    chex.assert_trees_all_close(result, expected, rtol=2e-5, atol=1e-6)


def test_without_noise_microbatches_give_the_gradient_of_the_whole_batch(key, platform):
    params, batch = make_params(), make_batch()
    plain = jax.value_and_grad(loss, has_aux=True)(params, batch)[1]
    chex.assert_trees_all_close(
        jax.jit(parallel.microbatch(averaged(sigma=0.0), 4))(key, params, batch)[1],
        plain,
        rtol=1e-5,
        atol=1e-6,
    )


def test_several_batch_arguments_and_any_function(key):
    def fn(key, x, fixed, y):
        return {"sum": (x * y).mean() + fixed, "key": jax.random.key_data(key)}

    x, y = jnp.arange(12.0), jnp.arange(12.0)[::-1]
    result = parallel.microbatch(fn, 3, batch_argnums=(0, -1))(key, x, 5.0, y)
    np.testing.assert_allclose(result["sum"], (x * y).mean() + 5, rtol=1e-6)
    np.testing.assert_array_equal(result["key"], jax.random.key_data(jax.random.split(key, 3)[0]))


def test_bfloat16_is_summed_in_float32(key):
    result = parallel.microbatch(lambda _, x: x.mean(), 256, batch_argnums=0)(
        key, jnp.ones(256, jnp.bfloat16)
    )
    assert result.dtype == jnp.bfloat16
    assert result == 1  # in bfloat16 the sum would stop at 256 only by luck, and 1/3 would not come back
    thirds = parallel.microbatch(lambda _, x: x.sum(), 300, batch_argnums=0)(key, jnp.ones(300, jnp.bfloat16))
    assert thirds == 1


def conv_loss(kernel, x):
    y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jnp.mean(jnp.tanh(y) ** 2)


def test_no_convolution_runs_in_a_loop_on_cpu(key):
    fn = parallel.microbatch(nso_jax.value_and_grad(conv_loss, sigma=SIGMA, sampler=noise.normal), 4)
    args = (jax.random.key_data(key), jnp.ones((3, 3, 2, 4)), jnp.ones((8, 8, 8, 2)))
    on_cpu = jax.jit(fn).lower(*args).compile().as_text()
    assert on_cpu.count(" convolution(") == 4 * 2 * 2  # parts, a pair, forwards and backwards


def test_accelerators_get_a_loop_whose_size_does_not_depend_on_the_count(key):
    def operations(count):
        fn = parallel.microbatch(nso_jax.value_and_grad(conv_loss, sigma=SIGMA), count)
        args = (jax.random.key_data(key), jnp.ones((3, 3, 2, 4)), jnp.ones((16, 8, 8, 2)))
        program = jax.export.export(jax.jit(fn), platforms=["tpu"])(*args).mlir_module()
        return collections.Counter(re.findall(r"stablehlo\.(?!constant)(\w+)", program))

    assert operations(16) == operations(2)


def wide_loss(params, x):
    for w in params:
        x = jnp.tanh(x @ w)
    return jnp.mean(x**2)


def test_activation_memory_falls_with_the_number_of_microbatches(key, platform):
    params, x = [jnp.ones((64, 64))] * 8, jnp.ones((4096, 64))
    activations = 8 * x.nbytes  # one for each layer

    def temporary(count):
        fn = parallel.microbatch(nso_jax.value_and_grad(wide_loss, sigma=SIGMA), count)
        return jax.jit(fn).lower(key, params, x).compile().memory_analysis().temp_size_in_bytes

    whole, part = temporary(1), temporary(8)
    assert whole > activations
    assert part < activations / 8 + 2 * x.nbytes  # and a copy of the batch in the order of the parts


@pytest.mark.parametrize("how", ["shard_map", "shard_map unchecked", "pmap", "vmap"])
@pytest.mark.parametrize("independent", [True, False])
def test_microbatches_on_devices_are_averaged_once(key, how, independent, platform):
    params, batch, inner = make_params(), make_batch(), averaged()
    one = jax.jit(parallel.microbatch(inner, 2))
    on_device = [
        one(
            jax.random.fold_in(key, i) if independent else key,
            params,
            jax.tree.map(lambda x, i=i: x[8 * i : 8 * i + 8], batch),
        )
        for i in range(8)
    ]
    value, grads = mean_of(on_device)
    expected = (value[0], value[1]["error"]), grads

    def fn(key, params, batch):
        local = parallel.microbatch(inner, 2, axis_name="data", independent_draws=independent)
        (value, aux), grads = local(key, params, batch)
        return (value, aux["error"]), grads

    if how.startswith("shard_map"):
        specs = {"in_specs": (P(), P(), P("data")), "out_specs": P(), "check_vma": how == "shard_map"}
        result = jax.jit(jax.shard_map(fn, mesh=mesh_of(8), **specs))(key, params, batch)
    else:
        mapping = jax.pmap if how == "pmap" else jax.vmap
        split = jax.tree.map(lambda x: x.reshape(8, 8, *x.shape[1:]), batch)
        result = mapping(fn, axis_name="data", in_axes=(None, None, 0))(key, params, split)
        result = jax.tree.map(lambda x: x[0], result)
    chex.assert_trees_all_close(result, expected, rtol=2e-5, atol=1e-6)


# --- plain jit on a mesh ------------------------------------------------------------------------------


def on_mesh(mesh, **options):
    return parallel.value_and_grad(loss, **{"sigma": SIGMA, "mesh": mesh, "has_aux": True, **options})


@pytest.mark.parametrize("independent", [True, False])
@pytest.mark.parametrize(("count", "num_samples"), [(1, 2), (2, 1)])
def test_a_mesh_gives_the_mean_of_what_each_device_would(key, independent, count, num_samples):
    params, batch = make_params(), make_batch()
    local = jax.jit(parallel.microbatch(averaged(num_samples=num_samples), count))
    expected = mean_of(
        [
            local(
                jax.random.fold_in(key, i) if independent else key,
                params,
                jax.tree.map(lambda x, i=i: x[16 * i : 16 * i + 16], batch),
                scale=2.0,
            )
            for i in range(4)
        ]
    )
    fn = on_mesh(
        mesh_of(4, 2), independent_draws=independent, num_microbatches=count, num_samples=num_samples
    )
    for call in (fn, jax.jit(fn)):
        result = call(key, params, batch, scale=2.0)
        chex.assert_trees_all_equal_shapes_and_dtypes(result, expected)
        chex.assert_trees_all_close(result, expected, rtol=2e-5, atol=1e-6)


def test_params_sharded_over_a_model_axis_get_the_same_noise(key):
    mesh, params, batch = mesh_of(4, 2), make_params(), make_batch()
    specs = {"w1": P(None, "model"), "w2": P("model"), "b": P()}
    sharded = jax.tree.map(lambda w, spec: jax.device_put(w, jax.NamedSharding(mesh, spec)), params, specs)
    fn = jax.jit(on_mesh(mesh))
    value, grads = fn(key, sharded, batch)
    chex.assert_trees_all_close((value, grads), fn(key, params, batch), rtol=2e-5, atol=1e-6)
    assert grads["w1"].sharding.spec == specs["w1"]


def test_over_two_axes_of_the_mesh(key):
    params, batch = make_params(), make_batch()
    one = on_mesh(mesh_of(8))(key, params, batch)
    two = on_mesh(mesh_of(4, 2), axis_name=("data", "model"))(key, params, batch)
    chex.assert_trees_all_close(two, one, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", [(8,), (4, 2)])
def test_explicit_meshes(key, sizes):
    """The axes that jax.make_mesh makes by default."""
    explicit = (jax.sharding.AxisType.Explicit,) * len(sizes)
    mesh = jax.make_mesh(sizes, ("data", "model")[: len(sizes)], axis_types=explicit)
    params, batch = make_params(), make_batch()
    expected = on_mesh(mesh_of(*sizes))(key, params, batch)
    sharded = jax.device_put(batch, jax.NamedSharding(mesh, P("data")))
    for x in (batch, sharded):
        for fn in (on_mesh(mesh), jax.jit(on_mesh(mesh))):
            chex.assert_trees_all_close(fn(key, params, x), expected, rtol=2e-5, atol=1e-6)


def test_static_arguments_stay_python_values(key):
    def flagged(params, batch, train, names):
        assert train is True
        assert names == ("x",)
        return loss(params, batch)[0]

    fn = parallel.value_and_grad(flagged, sigma=SIGMA, mesh=mesh_of(8))
    chex.assert_tree_all_finite(fn(key, make_params(), make_batch(), True, ("x",)))


def test_outside_jit_it_compiles_once(key):
    traced = []

    def counted(params, batch, train=True):
        traced.append(train)
        return loss(params, batch)[0] * (2 if train is True else 1)

    fn = parallel.value_and_grad(counted, sigma=SIGMA, mesh=mesh_of(8), num_microbatches=2)
    params, batch = make_params(), make_batch()
    first, _ = fn(key, params, batch)
    count = len(traced)
    assert fn(key, params, batch)[0] == first
    assert fn(jax.random.key(3), jax.tree.map(lambda w: 2 * w, params), batch)[0] != first
    assert len(traced) == count
    for flag, factor in ((False, 1), (1, 1), (True, 2), (False, 1)):  # 1 == True, but it is not True
        np.testing.assert_allclose(fn(key, params, batch, flag)[0], first * factor / 2, rtol=1e-6)
    assert len(traced) == 4 * count
    fn(key, params, make_batch(128))
    assert len(traced) == 5 * count
    fn(key, params, batch)
    assert len(traced) == 5 * count


def test_values_that_cannot_be_hashed_are_compiled_anew(key):
    class Scale:
        __hash__ = None
        factor = 1.0

    def scaled(params, batch, scale):
        return scale.factor * loss(params, batch)[0]

    fn = parallel.value_and_grad(scaled, sigma=SIGMA, mesh=mesh_of(8))
    scale = Scale()
    before, _ = fn(key, make_params(), make_batch(), scale)
    scale.factor = 3.0
    np.testing.assert_allclose(fn(key, make_params(), make_batch(), scale)[0], 3 * before, rtol=1e-6)


def test_one_function_in_two_traces(key):
    """What it closes over is a tracer of each in turn."""
    held = {}
    fn = parallel.value_and_grad(
        lambda params, batch: held["scale"] * loss(params, batch)[0], sigma=SIGMA, mesh=mesh_of(8)
    )

    params, batch = make_params(), make_batch()

    def step(scale):
        held["scale"] = scale
        return fn(key, params, batch)[0]

    one = jax.jit(step)(1.0)
    np.testing.assert_allclose(jax.jit(functools.partial(step))(2.0), 2 * one, rtol=1e-6)


# --- weights and auxiliary output ---------------------------------------------------------------------


def tokens(count=64, time=5):
    """Sequences of uneven lengths: those of the first eighth have no token at all."""
    rng = np.random.default_rng(3)
    lengths = np.where(np.arange(count) < count // 8, 0, rng.integers(0, time + 1, count))
    mask = np.arange(time) < lengths[:, None]
    return jnp.asarray(rng.normal(size=(count, time, 6)), jnp.float32), jnp.asarray(mask)


def token_loss(params, x, mask):
    losses = jnp.square(jnp.tanh(x @ params["w1"]) @ params["w2"] + params["b"])
    return jnp.sum(jnp.where(mask, losses, 0)) / jnp.sum(mask.astype(jnp.float32))


def token_count(params, x, mask):
    return mask.sum()


@pytest.mark.parametrize("count", [1, 4])
def test_a_mean_over_tokens_is_that_of_one_device(key, platform, count):
    """The first device has only padding, where the loss is 0 / 0."""
    params, (x, mask) = make_params(), tokens()
    plain = jax.value_and_grad(token_loss)(params, x, mask)
    options = {"batch_argnums": (1, 2), "weight": token_count}
    on_one = parallel.microbatch(nso_jax.value_and_grad(token_loss, sigma=0.0), count, **options)
    on_mesh_ = parallel.value_and_grad(
        token_loss, sigma=0.0, mesh=mesh_of(8), num_microbatches=count, **options
    )
    for fn in (on_one, on_mesh_):
        chex.assert_trees_all_close(jax.jit(fn)(key, params, x, mask), plain, rtol=2e-5, atol=1e-6)
    rival = parallel.value_and_grad(
        token_loss, mesh=mesh_of(8), method=sharpness.sam, rho=0.0, num_microbatches=count, **options
    )
    chex.assert_trees_all_close(jax.jit(rival)(key, params, x, mask), plain, rtol=2e-5, atol=1e-6)


def test_padding_alone_has_no_mean(key):
    params, (x, mask) = make_params(), tokens()
    fn = parallel.value_and_grad(
        token_loss, sigma=SIGMA, mesh=mesh_of(8), batch_argnums=(1, 2), weight=token_count
    )
    value, grads = fn(key, params, x, jnp.zeros_like(mask))
    assert jnp.isnan(value)
    assert all(jnp.isnan(g).all() for g in jax.tree.leaves(grads))


def test_what_is_not_finite_where_it_counts_stays(key):
    params, (x, mask) = make_params(), tokens()
    fn = parallel.value_and_grad(
        token_loss, sigma=SIGMA, mesh=mesh_of(8), batch_argnums=(1, 2), weight=token_count
    )
    real = np.argwhere(np.asarray(mask))[-1]
    assert jnp.isnan(fn(key, params, x.at[tuple(real)].set(jnp.nan), mask)[0])
    assert jnp.isfinite(fn(key, params, x.at[0].set(jnp.nan), mask)[0])  # padding, which the loss leaves out


def test_weights_send_one_number_more(key):
    params, (x, mask) = make_params(), tokens()
    options = {"sigma": SIGMA, "mesh": mesh_of(8), "batch_argnums": (1, 2)}
    plain = reduced_bytes(parallel.value_and_grad(token_loss, **options), key, params, x, mask)
    weighted = parallel.value_and_grad(token_loss, weight=token_count, **options)
    assert reduced_bytes(weighted, key, params, x, mask) == {"all-reduce": plain["all-reduce"] + 4}


def metrics(params, batch):
    outputs = jnp.tanh(batch.x @ params["w1"]) @ params["w2"] + params["b"]
    right = jnp.sign(outputs) == jnp.sign(batch.y)
    aux = {"right": right.sum(), "each": right, "flag": right, "loss": (outputs - batch.y) ** 2, "y": batch.y}
    return jnp.mean((outputs - batch.y) ** 2), aux


MODES = {"right": "sum", "each": "concatenate", "flag": "sum", "loss": "concatenate", "y": "concatenate"}


@pytest.mark.parametrize("method", [nso_jax.value_and_grad, sharpness.sam])
@pytest.mark.parametrize("count", [1, 2])
def test_metrics_are_those_of_the_whole_batch(key, platform, method, count):
    params, batch = make_params(), make_batch()
    _, plain = metrics(params, batch)
    strength = {"rho": 0.0} if method is sharpness.sam else {"sigma": 0.0}
    evaluations = 1 if method is sharpness.sam else 2
    options = {"has_aux": True, "aux": MODES, **strength}
    on_one = parallel.microbatch(method(metrics, **options), count, aux=MODES)
    for fn in (
        on_one,
        parallel.value_and_grad(metrics, mesh=mesh_of(8), method=method, num_microbatches=count, **options),
    ):
        (_, aux), _ = jax.jit(fn)(key, params, batch)
        assert aux["right"] == evaluations * plain["right"]
        assert aux["right"].dtype == jnp.int32
        assert aux["flag"].dtype == jnp.int32
        size = len(batch.y) // (count if fn is on_one else 8 * count)
        assert aux["flag"].shape == (size,)
        assert aux["flag"].sum() == evaluations * plain["right"]
        np.testing.assert_array_equal(aux["each"], plain["each"])
        np.testing.assert_array_equal(aux["y"], batch.y)
        np.testing.assert_allclose(aux["loss"], plain["loss"], rtol=1e-5, atol=1e-6)


def test_what_is_concatenated_stays_sharded():
    mesh = mesh_of(8)
    fn = on_mesh(mesh, aux={"error": "mean", "count": "sum", "first": "mean"})
    (_, aux), _ = fn(jax.random.key(0), make_params(), make_batch())
    assert aux["count"] == 2 * 64
    each = parallel.value_and_grad(
        metrics, sigma=SIGMA, mesh=mesh, has_aux=True, aux="concatenate", num_microbatches=1
    )
    with pytest.raises(ValueError, match=r"aux: leaf .*\['right'\] of what fn returns is int32\[\], but to"):
        each(jax.random.key(0), make_params(), make_batch())
    (_, aux), _ = parallel.value_and_grad(metrics, sigma=SIGMA, mesh=mesh, has_aux=True, aux=MODES)(
        jax.random.key(0), make_params(), make_batch()
    )
    assert aux["loss"].sharding.spec == P(("data",))


def test_typed_keys_are_folded(key):
    """Dropout masks differ between devices and between parts, and are those that the docs name."""

    def seen(params, batch, rng):
        bits = jax.random.bits(rng, batch.y.shape)
        return loss(params, batch)[0], bits

    params, batch, rng = make_params(), make_batch(16), jax.random.key(5)
    fn = parallel.value_and_grad(
        seen, sigma=SIGMA, mesh=mesh_of(4, 2), num_microbatches=2, has_aux=True, aux="concatenate"
    )
    (_, bits), _ = fn(key, params, batch, rng)
    by_part = bits.reshape(4, 2, 2).swapaxes(1, 2)  # device, part, example
    for d in range(4):
        for i in range(2):
            own = jax.random.fold_in(jax.random.fold_in(rng, d), i)
            np.testing.assert_array_equal(by_part[d, i], jax.random.bits(own, (2,)))
    legacy = parallel.value_and_grad(seen, sigma=SIGMA, mesh=mesh_of(8), has_aux=True, aux="concatenate")
    (_, bits), _ = legacy(key, params, batch, jax.random.PRNGKey(5))
    np.testing.assert_array_equal(bits[:2], bits[2:4])


def test_rivals_climb_together_on_a_mesh(key):
    """Against SAM of the whole batch on one device."""
    params, batch = make_params(), make_batch()
    expected = sharpness.sam(loss, rho=0.1, has_aux=True)(key, params, batch)
    fn = parallel.value_and_grad(
        loss, mesh=mesh_of(8), method=sharpness.sam, rho=0.1, has_aux=True, global_ascent=True
    )
    (value, aux), grads = jax.jit(fn)(key, params, batch)
    chex.assert_trees_all_close((value, grads), (expected[0][0], expected[1]), rtol=2e-5, atol=1e-6)
    chex.assert_trees_all_close(aux["error"], expected[0][1]["error"], rtol=2e-5)
    assert reduced_bytes(fn, key, params, batch).keys() == {"all-reduce"}


def test_losses_that_scan_from_zeros(key):
    def recurrent(w, x):
        carry, _ = jax.lax.scan(
            lambda h, x: (jnp.tanh(h @ w + x), None), jnp.zeros((x.shape[0], 3)), x.swapaxes(0, 1)
        )
        return jnp.mean(carry**2)

    w, x = jnp.eye(3), jnp.linspace(-1, 1, 8 * 4 * 3).reshape(8, 4, 3)
    fn = jax.jit(parallel.value_and_grad(recurrent, sigma=0.0, mesh=mesh_of(8)))
    chex.assert_trees_all_close(fn(key, w, x), jax.value_and_grad(recurrent)(w, x), rtol=1e-5)


def reduced_bytes(fn, *args):
    """Bytes of all collectives in the compiled program, by kind."""
    text = jax.jit(fn).lower(*args).compile().as_text()
    found = {}
    for shapes, kind in re.findall(rf"= (\(?[^=]*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", text):
        sizes = [
            int(np.prod([int(n) for n in dims.split(",") if n])) * np.dtype(dtype).itemsize
            for dtype, dims in (
                ({"f32": "f4", "s32": "i4", "pred": "?", "u32": "u4"}[d], s)
                for d, s in re.findall(r"\b(f32|s32|u32|pred)\[([\d,]*)\]", shapes)
            )
        ]
        found[kind] = found.get(kind, 0) + sum(sizes)
    return found


@pytest.mark.parametrize(("num_samples", "count"), [(1, 1), (4, 1), (8, 1), (1, 4)])
def test_a_step_sends_what_a_plain_one_does(key, num_samples, count):
    mesh, params = mesh_of(8), make_params()
    batch = jax.device_put(make_batch(), jax.NamedSharding(mesh, P("data")))
    replicated = jax.device_put(params, jax.NamedSharding(mesh, P()))
    scalar_loss = lambda *args: loss(*args)[0]  # noqa: E731
    plain = reduced_bytes(jax.value_and_grad(scalar_loss), replicated, batch)
    fn = parallel.value_and_grad(
        scalar_loss, sigma=SIGMA, mesh=mesh, num_samples=num_samples, num_microbatches=count
    )
    size = 4 * (1 + sum(w.size for w in params.values()))  # the loss and the gradient
    assert plain == reduced_bytes(fn, key, replicated, batch) == {"all-reduce": size}


@pytest.mark.parametrize("sampler", [noise.normal, noise.rademacher, noise.centered_binomial])
def test_noise_adds_no_collective_to_a_step_with_sharded_params(key, sampler):
    mesh = mesh_of(8, names=("data",))
    split = lambda x, *spec: jax.device_put(x, jax.NamedSharding(mesh, P(*spec)))  # noqa: E731
    params = {"w": split(jnp.ones((64, 32)), "data"), "v": split(jnp.ones((32, 16)), None, "data")}
    x = split(jnp.ones((16, 64)), "data")

    def collectives(sampler):
        fn = nso_jax.value_and_grad(
            lambda p, x: jnp.mean((jnp.tanh(x @ p["w"]) @ p["v"]) ** 2), sigma=SIGMA, sampler=sampler
        )
        return reduced_bytes(fn, key, params, x)

    silent = collectives(lambda key, shape, dtype: jnp.ones(shape, dtype))
    assert silent
    assert collectives(sampler) == silent


# --- a model axis inside shard_map --------------------------------------------------------------------


@pytest.mark.parametrize("checked", [True, False])
def test_each_shard_of_a_param_draws_for_itself(key, checked):
    """Column-parallel w1 and row-parallel w2, as in tensor parallelism; b is whole on every device."""
    specs = {"w1": P(None, "model"), "w2": P("model"), "b": P()}

    def local_loss(params, batch):
        hidden = jnp.tanh(batch.x @ params["w1"])
        prediction = jax.lax.psum(hidden @ params["w2"], "model") + params["b"]
        return jnp.mean((prediction - batch.y) ** 2)

    def per_shard(key, params):
        return noise.perturbation(key, params, SIGMA, param_specs=specs)

    options = {"axis_name": "data"} | ({} if checked else {"param_specs": specs})
    fn = nso_jax.value_and_grad(local_loss, sigma=SIGMA, **options)
    mesh, params, batch = mesh_of(4, 2), make_params(), make_batch()
    mapped = jax.shard_map(
        fn, mesh=mesh, in_specs=(P(), specs, P("data")), out_specs=(P(), specs), check_vma=checked
    )
    value, grads = jax.jit(mapped)(key, params, batch)

    # The whole noise, put together from the shards, and then everything on one device.
    draw = jax.shard_map(per_shard, mesh=mesh, in_specs=(P(), specs), out_specs=specs)
    values = []
    for i in range(4):
        device_key = jax.random.split(jax.random.fold_in(key, i), 1)[0]
        u = jax.jit(draw)(device_key, params)
        assert not np.allclose(u["w2"][:8], u["w2"][8:])
        part = jax.tree.map(lambda x, i=i: x[16 * i : 16 * i + 16], batch)
        whole = jax.value_and_grad(lambda p, part=part: loss(p, part)[0])
        values += [whole(noise.perturb(params, u, sign)) for sign in (1, -1)]
    expected = mean_of(values)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    if checked:  # else JAX itself gives a psum the wrong transpose: factors of the axis size
        chex.assert_trees_all_close(grads, expected[1], rtol=1e-4, atol=1e-6)


# --- variance -----------------------------------------------------------------------------------------


def noise_variance(fn, params, batch, draws=300):
    grads = jax.jit(jax.vmap(lambda key: fn(key, params, batch)))(jax.random.split(jax.random.key(4), draws))
    flat = np.concatenate([np.asarray(g).reshape(draws, -1) for g in jax.tree.leaves(grads)], axis=1)
    squares = (flat - flat.mean(0)) ** 2
    total = squares.sum(1)
    return total.sum() / (draws - 1), total.std(ddof=1) / np.sqrt(draws)


def quartic(w, x):
    """Of every example the same: parts differ in their noise alone."""
    return jnp.mean(x) * jnp.sum(w**4)


@pytest.mark.parametrize("parts", [2, 4, 8])
@pytest.mark.parametrize("of", ["microbatches", "devices"])
def test_the_variance_falls_as_one_over_the_parts(parts, of):
    w, x = jnp.linspace(0.5, 1.5, 400), jnp.ones(8)
    one = lambda *args: nso_jax.value_and_grad(quartic, sigma=0.3)(*args)[1]  # noqa: E731
    if of == "microbatches":
        several = parallel.microbatch(one, parts)
    else:
        mesh = jax.make_mesh(
            (parts,), ("data",), devices=jax.devices()[:parts], axis_types=(jax.sharding.AxisType.Auto,)
        )
        fn = parallel.value_and_grad(quartic, sigma=0.3, mesh=mesh)
        several = lambda *args: fn(*args)[1]  # noqa: E731
    (small, small_error), (large, large_error) = noise_variance(several, w, x), noise_variance(one, w, x)
    ratio, error = parts * small / large, np.hypot(small_error / small, large_error / large)
    assert abs(ratio - 1) < min(0.1, 5 * error)


# --- several processes --------------------------------------------------------------------------------


def test_two_processes_train_as_one_does(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    program = Path(__file__).with_name("two_processes.py")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    processes = [
        subprocess.Popen(  # noqa: S603
            [sys.executable, program, str(i), str(port), tmp_path / f"{i}.safetensors"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    expected = train()
    assert expected["values"][-1] < 0.5 * expected["values"][0]
    for i in range(2):
        results = load_file(tmp_path / f"{i}.safetensors")
        for name, value in expected.items():
            np.testing.assert_allclose(results[name], value, rtol=1e-5, atol=1e-6)


# --- bad input ----------------------------------------------------------------------------------------

W, X = {"w": jnp.ones(3)}, jnp.ones((10, 3))


def linear(params, x):
    return jnp.mean(x @ params["w"])


def micro(count, **options):
    return parallel.microbatch(nso_jax.value_and_grad(linear, sigma=SIGMA), count, **options)


def meshed(**options):
    return parallel.value_and_grad(linear, **{"sigma": SIGMA, "mesh": mesh_of(4, 2), **options})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda _: parallel.microbatch(3, 2), TypeError, r"fn: expected a function fn\(key, \*args\), got 3"),
        (lambda _: micro(0), ValueError, "num_microbatches: expected an int >= 1, got 0"),
        (lambda _: micro(2.0), TypeError, r"num_microbatches: expected a static int >= 1, got 2.0 \(float\)"),
        (lambda k: micro(4)(k, W, X), ValueError, r"args\[1\] has 10 examples, which 4 microbatches do not divide; drop the last 2 or add 2"),
        (lambda k: micro(2, batch_argnums=(2,))(k, W, X), TypeError, "batch_argnums: 2 is out of range, got 2 arguments after the key"),
        (lambda k: micro(2)(k, W, {"x": X, "n": 3}), TypeError, r"batch_argnums: args\[1\]\['n'\] is 3 \(int\), without a leading axis"),
        (lambda k: micro(2)(k, W, (X, X[:4])), ValueError, r"same number of examples, but args\[1\]\[0\] has 10, args\[1\]\[1\] has 4"),
        (lambda _: micro(2)(0, W, X), TypeError, r"key: expected a PRNG key.* got 0 \(int\)"),
        (lambda _: meshed(mesh=4), TypeError, r"mesh: expected a mesh such as jax.make_mesh gives, got 4 \(int\)"),
        (lambda _: meshed(axis_name="batch"), ValueError, r"axis_name: 'batch' is none of the mesh's axes \('data', 'model'\)"),
        (lambda _: meshed(num_samples=0), ValueError, "num_samples: expected an int >= 1, got 0"),
        (lambda k: meshed()(k, W, X), ValueError, "10 examples, which 4 devices do not divide; drop the last 2 or add 2"),
        (lambda k: meshed(num_microbatches=2)(k, W, X), ValueError, "10 examples, which 2 microbatches times 4 devices do not divide"),
        (lambda _: micro(2, weight=3.0), TypeError, "weight: expected a function of the arguments of the loss, got 3.0"),
        (lambda k: micro(2, weight=lambda w, x: -1.0)(k, W, X), ValueError, "weight: expected a number >= 0, got -1.0"),
        (lambda k: micro(2, weight=lambda w, x: x)(k, W, X), ValueError, "weight: expected a scalar, got shape"),
        (lambda _: micro(2, aux="median"), ValueError, "aux: expected one of 'mean', 'sum', 'concatenate', .* got 'median'"),
        (lambda k: micro(2, aux="sum")(k, W, X), ValueError, "aux: not a prefix"),
        (lambda k: meshed(batch_argnums=(0, 1))(k, {"w": jnp.ones(8)}, jnp.ones((8, 8))), ValueError, "batch_argnums: argument 0 is differentiated"),
        (lambda k: meshed(argnums=(0, 1))(k, W, X[:8]), ValueError, "batch_argnums: argument 1 is differentiated"),
        (lambda _: meshed(method=nso_jax.nnx.value_and_grad), TypeError, r"method: NNX modules .* nso_jax.nnx.value_and_grad\(fun, ..., mesh=mesh\)"),
        (lambda _: meshed(method=functools.partial(nso_jax.nnx.value_and_grad, wrt=1)), TypeError, "method: NNX modules"),
        (lambda _: meshed(sigma=None, method=sharpness.sam, rho=1, global_ascent=True, weight=len), ValueError, "weight: with global_ascent"),
        (lambda _: nso_jax.value_and_grad(linear, sigma=SIGMA, param_specs={"w": 3}), TypeError, r"param_specs: expected partition specs, got 3"),
        (lambda _: nso_jax.value_and_grad(linear, sigma=SIGMA, axis_name="data", param_specs=P("data")), ValueError, "param_specs: .* splits params over axis_name='data'"),
    ],
)  # fmt: skip
def test_errors_name_argument_value_and_leaf(key, call, error, message):
    with pytest.raises(error, match=message):
        call(key)


def test_a_forgotten_batch_argument_is_named(key):
    def fun(params, x, y):
        return jnp.mean((x @ params - y) ** 2)

    x, y = jnp.ones((8, 3)), jnp.ones(8)
    fn = parallel.microbatch(nso_jax.value_and_grad(fun, sigma=SIGMA), 4)
    with pytest.raises(TypeError, match="incompatible shapes") as raised:
        fn(key, jnp.ones(3), x, y)
    notes = "".join(raised.value.__notes__)
    assert "batch_argnums: args[2] has 8 entries, as many as the batch has examples" in notes
