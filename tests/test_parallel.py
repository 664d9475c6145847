"""Microbatches: the mean over parts of a batch, each with a key of its own."""

import collections
import re
from typing import NamedTuple

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import nso_jax
from nso_jax import noise, parallel, sharpness

SIGMA = 0.1


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


def strided(batch, i, count):
    return jax.tree.map(lambda x: x[i::count], batch)


def mean_of(results):
    """Of floats; the first of others."""
    return jax.tree.map(
        lambda *xs: sum(xs) / len(xs) if jnp.issubdtype(xs[0].dtype, jnp.inexact) else xs[0], *results
    )


def averaged(**options):
    return nso_jax.value_and_grad(loss, **{"sigma": SIGMA, "has_aux": True, **options})


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


def test_rivals_climb_in_each_microbatch_for_itself(key):
    fn, params, batch = sharpness.sam(loss, rho=0.1, has_aux=True), make_params(), make_batch()
    one = jax.jit(fn)
    expected = mean_of([one(key, params, strided(batch, i, 4)) for i in range(4)])
    result = jax.jit(parallel.microbatch(fn, 4))(key, params, batch)
    chex.assert_trees_all_close(result, expected, rtol=2e-5, atol=1e-6)


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


W, X = {"w": jnp.ones(3)}, jnp.ones((10, 3))


def linear(params, x):
    return jnp.mean(x @ params["w"])


def micro(count, **options):
    return parallel.microbatch(nso_jax.value_and_grad(linear, sigma=SIGMA), count, **options)


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
        (lambda _: micro(2, weight=3.0), TypeError, "weight: expected a function of the arguments of the loss, got 3.0"),
        (lambda k: micro(2, weight=lambda w, x: -1.0)(k, W, X), ValueError, "weight: expected a number >= 0, got -1.0"),
        (lambda k: micro(2, weight=lambda w, x: x)(k, W, X), ValueError, "weight: expected a scalar, got shape"),
        (lambda _: micro(2, aux="median"), ValueError, "aux: expected one of 'mean', 'sum', 'concatenate', .* got 'median'"),
        (lambda k: micro(2, aux="sum")(k, W, X), ValueError, "aux: not a prefix"),
        (lambda _: nso_jax.value_and_grad(linear, sigma=SIGMA, param_specs={"w": 3}), TypeError, r"param_specs: expected partition specs, got 3"),
        (lambda _: nso_jax.value_and_grad(linear, sigma=SIGMA, axis_name="data", param_specs=jax.P("data")), ValueError, "param_specs: .* splits params over axis_name='data'"),
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
