import collections
import functools
import re

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import nso_jax
from nso_jax import _backend, noise

SAMPLERS = [
    noise.normal,
    noise.rademacher,
    noise.centered_binomial,
    noise.uniform,
    noise.laplace,
    noise.cauchy,
]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64"])
@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (33, 5), (4, 1, 7)])
def test_fast_bits_are_those_of_jax(key, dtype, shape, x64):
    fast = _backend.with_fast_bits(key)
    assert fast.dtype != key.dtype
    np.testing.assert_array_equal(jax.random.bits(fast, shape, dtype), jax.random.bits(key, shape, dtype))


def test_fast_bits_are_those_of_jax_in_its_older_order_too(key):
    with jax.threefry_partitionable(False):
        fast = _backend.with_fast_bits(key)
        np.testing.assert_array_equal(jax.random.bits(fast, (9,)), jax.random.bits(key, (9,)))


def test_fast_keys_split_and_fold_as_the_key_does(key):
    def numbers(key):
        keys = jax.random.split(jax.random.fold_in(key, 3), 4)
        return jax.vmap(lambda key: jax.random.bits(key, (5,)))(keys)

    np.testing.assert_array_equal(numbers(_backend.with_fast_bits(key)), numbers(key))


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_do_not_depend_on_the_platform(sampler, impl, request):
    data = jax.random.key_data(jax.random.key(0, impl=impl))

    def draw(data):
        return sampler(jax.random.wrap_key_data(data, impl=impl), (12, 8, 10), jnp.float32)

    on_cpu = jax.jit(draw)(data)
    jax.clear_caches()  # or what samplers have inside would be traced already
    request.getfixturevalue("elsewhere")
    elsewhere = jax.jit(functools.partial(draw))(data)
    jax.clear_caches()
    np.testing.assert_array_max_ulp(np.asarray(on_cpu), np.asarray(elsewhere), 4)


def add_up(carry, i):
    carry = {"sum": carry["sum"] + jnp.asarray(i, jnp.float32)}
    return carry, carry["sum"] * 2.0


def convolve_up(carry, i):
    kernel = jnp.ones((1, 1, 1)) + 0 * carry["sum"]
    one = jax.lax.conv_general_dilated(jnp.ones((1, 1, 1)), kernel, (1,), "SAME")
    return add_up(carry, i * one.squeeze().astype(jnp.int32))


@pytest.mark.parametrize("step", [add_up, convolve_up])
@pytest.mark.parametrize("jitted", [False, True])
def test_a_loop_gives_the_last_carry_and_every_result(step, jitted, key, platform):
    start = {"sum": jnp.float32(3)}
    run = lambda key, start: _backend.loop(step, start, 5, key)  # noqa: E731
    carry, outs = (jax.jit(run) if jitted else run)(key, start)
    assert carry["sum"] == 3 + sum(range(5))
    np.testing.assert_array_equal(outs, 2 * (3 + np.cumsum(np.arange(5))))


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("count", [1, 4])
def test_sums_and_means_over_numbers_and_keys(jitted, count, key, platform):
    wrap = jax.jit if jitted else lambda f: f
    step = lambda total, i: (_backend.added(total, {"i": i}), 2 * i)  # noqa: E731
    total, kept = wrap(lambda key: _backend.sum_over(step, count, key))(key)
    assert total["i"] == sum(range(count))
    np.testing.assert_array_equal(kept, 2 * np.arange(count))
    mean = wrap(lambda key: _backend.mean_over(jax.random.normal, key, count))(key)
    draws = [jax.random.normal(k) for k in jax.random.split(key, count)]
    np.testing.assert_allclose(mean, np.mean(draws), rtol=1e-5)


def conv_loss(kernel, x):
    y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jnp.mean(jnp.tanh(y) ** 2)


def dense_loss(kernel, x):
    return jnp.mean(jnp.tanh(x[:, :, 0] @ kernel[0, 0]) ** 2)


@pytest.mark.parametrize("loss", [conv_loss, dense_loss])
@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_programs_are_those_of_the_platform_that_they_are_exported_for(loss, platform):
    """From a machine with a CPU alone: draws in a loop, with barriers that other compilers keep."""

    def operations(num_samples):
        fn = jax.jit(nso_jax.value_and_grad(loss, sigma=0.1, num_samples=num_samples))
        args = jax.random.key_data(jax.random.key(0)), jnp.ones((3, 3, 2, 4)), jnp.ones((4, 8, 8, 2))
        program = jax.export.export(fn, platforms=[platform])(*args).mlir_module()
        return collections.Counter(re.findall(r"stablehlo\.(?!constant)(\w+)", program))

    few, many = operations(4), operations(8)
    assert few["while"] > 0
    assert (few["optimization_barrier"] > 0) == (platform != "cpu")
    if platform == "cpu" and loss is conv_loss:
        # Unrolled: each step is a call of one function or, since JAX 0.12, written out.
        assert few["slice"] < many["slice"]
        assert many["tanh"] in {few["tanh"], 2 * few["tanh"]}
    else:
        assert few == many


def test_fast_bits_are_not_a_loop_over_arrays(key):
    """JAX's own are one on CPU, in which every array goes through memory in each of the twenty rounds."""

    def has_rounds_in_a_loop(sampler):
        program = jax.jit(lambda key: sampler(key, (64, 64))).lower(key).compile().as_text()
        return "known_trip_count" in program

    assert not has_rounds_in_a_loop(noise.normal)
    assert has_rounds_in_a_loop(jax.random.normal)


def test_noise_is_drawn_once_for_both_sides_with_a_traced_sigma_too(key):
    """Counted in the compiled program: by the operation that Threefry's rounds consist of."""
    params = {"w": jnp.ones((64, 64)), "b": jnp.ones(64)}
    x = jnp.ones((8, 64))

    def rounds(*sigma):
        loss = lambda p: jnp.mean(jnp.tanh(x @ p["w"] + p["b"][None]) ** 2)  # noqa: E731
        step = lambda params, key, *sigma: nso_jax.value_and_grad(loss, sigma=(*sigma, 0.1)[0])(key, params)  # noqa: E731
        return jax.jit(step).lower(params, key, *sigma).compile().as_text().count(" xor(")

    assert rounds(jnp.float32(0.1)) == rounds() > 0


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("sampler", [noise.normal, noise.rademacher])
def test_what_is_broadcast_is_drawn_and_perturbed_once(sampler, antithetic, key):
    """Counted in the compiled program, where XLA would do it again for each entry of what it is added to."""
    params = {"scale": jnp.ones(16), "bias": jnp.ones(16)}

    def loss(params, x):
        for _ in range(2):
            x = x * params["scale"][None, None] + params["bias"][None, None]
            x = jnp.maximum(x - x.mean(axis=(0, 1), keepdims=True), 0)
        return jnp.mean(x**2)

    def operations(fn, *args):
        text = jax.jit(fn).lower(*args).compile().as_text()
        return {name: text.count(f" {name}(") for name in ("xor", "is-finite", "log-plus-one")}

    def draw(key, params):
        return noise.perturbation(jax.random.split(key, 1)[0], params, 0.1, sampler=sampler)

    step = nso_jax.value_and_grad(loss, sigma=0.1, sampler=sampler, antithetic=antithetic)
    sides = 2 if antithetic else 1
    draws = operations(draw, key, params)
    assert draws["xor"] > 0
    assert operations(step, key, params, jnp.ones((64, 8, 16))) == draws | {"is-finite": sides * len(params)}


def test_what_is_computed_once_is_what_it_was(key, platform):
    w = jnp.array([[jnp.inf, 1.0], [jnp.nan, -2.0]])

    for through in (_backend.computed_once, _backend.barrier):

        def double(w):
            return through(2 * w, key)  # noqa: B023

        np.testing.assert_array_equal(double(w), 2 * w)
        np.testing.assert_array_equal(jax.vmap(double)(w), 2 * w)
        np.testing.assert_array_equal(jax.jit(jax.jacobian(double))(w[0]), 2 * jnp.eye(2))
        np.testing.assert_array_equal(jax.hessian(lambda w: jnp.sum(double(w) ** 2))(w[1]), 8 * jnp.eye(2))
        others = (
            jnp.ones(2, jnp.bfloat16),
            jnp.ones((), jnp.complex64),
            jnp.ones((0, 3)),
            key,
            jnp.array([True]),
        )
        chex.assert_trees_all_equal(through(others, key), others)
