import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nso_jax
from nso_jax import _backend, noise


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


@pytest.mark.parametrize("sampler", [noise.normal, noise.uniform, noise.laplace, noise.cauchy])
@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_samplers_do_not_depend_on_the_backend(sampler, impl, monkeypatch):
    key = jax.random.key(0, impl=impl)
    on_cpu = sampler(key, (1000,), jnp.float32)
    monkeypatch.setattr(_backend, "on_cpu", lambda: False)
    np.testing.assert_array_max_ulp(np.asarray(on_cpu), np.asarray(sampler(key, (1000,), jnp.float32)), 4)


def test_loops_agree_with_unrolled_steps(monkeypatch):
    def step(carry, i):
        i = jnp.asarray(i, jnp.float32)
        carry = {"sum": i if carry is None else carry["sum"] + i}
        return carry, carry["sum"] * 2.0

    unrolled = [_backend.loop(step, start, 5) for start in (None, {"sum": jnp.float32(3)})]
    monkeypatch.setattr(_backend, "on_cpu", lambda: False)
    looped = [_backend.loop(step, start, 5) for start in (None, {"sum": jnp.float32(3)})]
    for (a, b), (c, d) in zip(unrolled, looped, strict=True):
        assert a["sum"] == c["sum"]
        np.testing.assert_array_equal(b, d)
    np.testing.assert_array_equal(looped[1][1], 2 * (3 + np.cumsum(np.arange(5))))


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
def test_what_is_broadcast_is_drawn_and_perturbed_once(sampler, antithetic, key, monkeypatch):
    """Counted in the compiled program, where XLA would do it again for each entry of what it is added to."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
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


def test_what_is_computed_once_is_what_it_was(key, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    w = jnp.array([[jnp.inf, 1.0], [jnp.nan, -2.0]])

    def double(w):
        return _backend.computed_once(2 * w, w)

    np.testing.assert_array_equal(double(w), 2 * w)
    np.testing.assert_array_equal(jax.vmap(double)(w), 2 * w)
    np.testing.assert_array_equal(jax.jit(jax.jacobian(double))(w[0]), 2 * jnp.eye(2))
    np.testing.assert_array_equal(jax.hessian(lambda w: jnp.sum(double(w) ** 2))(w[1]), 8 * jnp.eye(2))
    mesh = jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(double, mesh=mesh, in_specs=jax.P("i"), out_specs=jax.P("i"))
    np.testing.assert_array_equal(jax.jit(mapped)(w), 2 * w)
    for x in (jnp.ones(2, jnp.bfloat16), jnp.ones((), jnp.complex64), jnp.ones((0, 3))):
        assert _backend.computed_once(x, x).dtype == x.dtype


def test_a_scale_for_each_weight_is_the_scale(key):
    w = jnp.array([1.0, -jnp.inf, jnp.inf, 0.0])
    np.testing.assert_array_equal(_backend.for_each_weight(jnp.float32(0.1), w), jnp.full(4, 0.1))
    scales = jax.random.uniform(key, (4,))
    np.testing.assert_array_equal(_backend.for_each_weight(scales, w), scales)
