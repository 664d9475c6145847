"""The gradient function under JAX's transformations, of any pytree, and its words for bad input."""

import dataclasses
import functools
from typing import NamedTuple

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import nso_jax
from tests.test_gradients import SIGMA, cubic, point


class Pair(NamedTuple):
    w: jax.Array
    b: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Record:
    w: jax.Array
    b: jax.Array


def sum_of_fourth_powers(params):
    squares = [jnp.real(x * jnp.conj(x)).astype(jnp.float32) for x in jax.tree.leaves(params)]
    return sum((jnp.sum(x**2) for x in squares), start=jnp.float32(0))


ONES = jnp.ones((2, 3))
LINEN = nn.Dense(2).init(jax.random.key(0), jnp.ones((1, 3)))
EQUINOX = eqx.partition(eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0)), eqx.is_inexact_array)[0]
NNX_STATE = nnx.state(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Param)
TREES = {
    "array": ONES,
    "scalar": jnp.float32(2),
    "python float": 2.0,
    "dict": {"w": ONES, "b": {"c": jnp.ones(3)}},
    "list": [ONES, jnp.ones(3)],
    "tuple": (ONES, (jnp.ones(3),)),
    "named tuple": Pair(ONES, jnp.ones(3)),
    "dataclass": Record(w=ONES, b=jnp.ones(3)),
    "equinox": EQUINOX,
    "linen": LINEN,
    "nnx state": NNX_STATE,
    "empty array": {"w": jnp.ones((0, 3)), "b": jnp.ones(2)},
    "None leaf": {"w": ONES, "b": None},
    "no leaf": {"w": None},
    "dtypes": [jnp.ones(2, d) for d in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.complex64)],
}


@pytest.mark.parametrize("params", TREES.values(), ids=TREES)
@pytest.mark.parametrize("chunk_size", [1, 3])
def test_structures_shapes_and_dtypes_are_those_of_jax(key, params, chunk_size):
    expected = jax.value_and_grad(sum_of_fourth_powers)(params)
    options = {"num_samples": 3, "chunk_size": chunk_size}
    fn = nso_jax.value_and_grad(sum_of_fourth_powers, sigma=SIGMA, **options)
    for result in (fn(key, params), jax.jit(fn)(key, params)):
        assert jax.tree.structure(result) == jax.tree.structure(expected)
        for a, e in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
            assert (a.shape, a.dtype) == (e.shape, e.dtype)
            assert np.all(np.isfinite(np.asarray(a, np.complex128)))
    zero = nso_jax.value_and_grad(sum_of_fourth_powers, sigma=0.0, **options)(key, params)
    chex.assert_trees_all_close(zero, expected, rtol=1e-6)


def test_float64_leaves_are_summed_in_float64(key, x64):
    params = {"w": jnp.array([1e-9, 1.0]), "f": jnp.ones(2, jnp.float32)}
    fun = lambda p: jnp.sum(p["w"] * jnp.array([1.0, 1e-12])) + jnp.sum(p["f"]).astype(jnp.float64)  # noqa: E731
    value, grads = nso_jax.value_and_grad(fun, sigma=0.0, num_samples=3)(key, params)
    assert value.dtype == grads["w"].dtype == jnp.float64
    assert grads["f"].dtype == jnp.float32
    np.testing.assert_allclose(grads["w"], [1.0, 1e-12], rtol=1e-15)
    np.testing.assert_allclose(value, fun(params), rtol=1e-15)


def test_argnums_and_keyword_arguments(key):
    def fun(a, n, b, *, scale, power):
        return scale * jnp.sum(a**power) * n + jnp.sum(b["c"] ** 2)

    args, kwargs = (jnp.ones(2), 3, {"c": jnp.ones(4)}), {"scale": 2.0, "power": 3}
    for argnums in (0, 2, -1, (0, 2), (2, 0), [0, -1], (0,)):
        expected = jax.value_and_grad(fun, argnums=argnums)(*args, **kwargs)
        result = nso_jax.value_and_grad(fun, sigma=0.0, argnums=argnums)(key, *args, **kwargs)
        chex.assert_trees_all_close(result, expected)
    sigma = (0.0, {"c": 0.5})
    _, (a, b) = nso_jax.value_and_grad(fun, sigma=sigma, argnums=(0, 2), antithetic=False)(
        key, *args, **kwargs
    )
    np.testing.assert_array_equal(a, jax.grad(fun)(*args, **kwargs))
    assert not np.array_equal(b["c"], 2 * jnp.ones(4))


def test_non_finite_evaluations_are_not_averaged_away(key):
    for bad in (jnp.nan, jnp.inf):
        fun = lambda w: jnp.sum(jnp.where(w > 1, bad * w, w**2))  # noqa: B023, E731
        value, grad = nso_jax.value_and_grad(fun, sigma=0.1, num_samples=8)(key, jnp.ones(1))
        assert not jnp.isfinite(value)
        assert not jnp.isfinite(grad[0])


def test_float16_gradients_are_summed_without_overflow(key):
    w = jnp.full(3, 1.5, jnp.float16)
    value, grads = nso_jax.value_and_grad(lambda w: jnp.sum(w) * 40000, sigma=0.0, num_samples=8)(key, w)
    np.testing.assert_array_equal(grads, jnp.full(3, 40000, jnp.float16))
    assert jnp.isinf(value)  # as the plain loss: 180,000 is beyond float16


# --- composition --------------------------------------------------------------------------------------

FN = nso_jax.value_and_grad(cubic, sigma=SIGMA, num_samples=2)


def test_jit_does_not_retrace():
    traces = []

    def fun(params):
        traces.append(1)
        return cubic(params)

    step = jax.jit(nso_jax.value_and_grad(fun, sigma=SIGMA, num_samples=2))
    step(jax.random.key(0), point(jnp.float32))
    before = len(traces)
    step(jax.random.key(1), point(jnp.float32))
    assert len(traces) == before
    assert step._cache_size() == 1


def test_vmap_over_a_batch_of_models(key, platform):
    models = jax.tree.map(lambda x: jnp.stack([x, 2 * x, -x]), point(jnp.float32))
    keys = jax.random.split(key, 3)
    batched = jax.jit(jax.vmap(FN))(keys, models)
    for i in range(3):
        one = FN(keys[i], jax.tree.map(lambda x: x[i], models))  # noqa: B023
        chex.assert_trees_all_close(jax.tree.map(lambda x: x[i], batched), one, rtol=1e-5)  # noqa: B023


def test_scan_over_steps(key):
    def step(params, key):
        value, grads = FN(key, params)
        return optax.tree.add_scale(params, -0.01, grads), value

    keys = jax.random.split(key, 4)
    params = point(jnp.float32)
    scanned, values = jax.jit(lambda: jax.lax.scan(step, params, keys))()
    for k, value in zip(keys, values, strict=True):
        params, one = step(params, k)
        np.testing.assert_allclose(one, value, rtol=1e-5)
    chex.assert_trees_all_close(scanned, params, rtol=1e-5)


def test_checkpointed_losses_and_checkpointed_steps(key, platform):
    expected = FN(key, point(jnp.float32))
    inner = nso_jax.value_and_grad(jax.checkpoint(cubic), sigma=SIGMA, num_samples=2)
    outer = jax.checkpoint(FN)
    for fn in (inner, outer):
        chex.assert_trees_all_close(jax.jit(fn)(key, point(jnp.float32)), expected, rtol=1e-5)


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_it_can_be_differentiated(key, platform, chunk_size):
    """The derivative of the averaged value is the averaged gradient."""
    params = point(jnp.float32)
    fn = nso_jax.value_and_grad(cubic, sigma=SIGMA, num_samples=2, chunk_size=chunk_size)
    derivative = jax.jit(jax.grad(lambda p: fn(key, p)[0]))(params)
    chex.assert_trees_all_close(derivative, fn(key, params)[1], rtol=1e-5)
    tangent = jax.tree.map(jnp.ones_like, params)
    second = jax.jvp(lambda p: fn(key, p)[1], (params,), (tangent,))[1]
    chex.assert_tree_all_finite(second)


def test_donated_params(key):
    params = point(jnp.float32)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(params, key):
        return optax.tree.add_scale(params, -0.01, FN(key, params)[1])

    expected = optax.tree.add_scale(params, -0.01, FN(key, params)[1])
    chex.assert_trees_all_close(step(jax.tree.map(jnp.copy, params), key), expected, rtol=1e-5)


def test_jax_debugging_modes(key):
    fn = nso_jax.value_and_grad(cubic, sigma=SIGMA, num_samples=2)
    params = point(jnp.float32)
    with jax.debug_nans(True), jax.checking_leaks():
        expected = fn(key, params)
        chex.assert_trees_all_close(jax.jit(fn)(key, params), expected, rtol=1e-5)
    step = jax.jit(functools.partial(fn))
    with jax.transfer_guard("disallow"):
        result = step(key, params)
    chex.assert_trees_all_close(result, expected, rtol=1e-5)


def test_x64_and_eager(key, x64):
    params = point(jnp.float64)
    chex.assert_trees_all_close(FN(key, params), jax.jit(FN)(key, params), rtol=1e-12)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_key_implementations(impl):
    params = point(jnp.float32)
    result = jax.jit(FN)(jax.random.key(0, impl=impl), params)
    other = jax.jit(FN)(jax.random.key(1, impl=impl), params)
    chex.assert_tree_all_finite(result)
    assert not np.array_equal(result[0], other[0])


# --- bad input ----------------------------------------------------------------------------------------

W = {"w": jnp.ones((2, 3)), "n": jnp.ones(2)}


def vg(fun=sum_of_fourth_powers, **options):
    return nso_jax.value_and_grad(fun, **{"sigma": SIGMA, **options})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda _: vg(fun=3), TypeError, r"fun: expected a function, got 3 \(int\)"),
        (lambda _: vg(num_samples=0), ValueError, "num_samples: expected an int >= 1, got 0"),
        (lambda _: vg(num_samples=2.0), TypeError, r"num_samples: expected a static int >= 1, got 2.0 \(float\)"),
        (lambda _: vg(num_samples=True), TypeError, "num_samples: expected a static int"),
        (lambda _: jax.jit(lambda k: vg(num_samples=k))(2), TypeError, r"num_samples: .* got int32\[\]"),
        (lambda _: vg(chunk_size=-1), ValueError, "chunk_size: expected an int >= 1, got -1"),
        (lambda _: vg(chunk_size="all"), TypeError, "chunk_size: expected a static int >= 1, got 'all'"),
        (lambda _: vg(clean_weight=1.5), ValueError, r"clean_weight: expected a number in \[0, 1\], got 1.5"),
        (lambda _: vg(clean_weight=jnp.nan), ValueError, r"clean_weight: expected a number in \[0, 1\], got nan"),
        (lambda _: vg(clean_weight=jnp.ones(2)), ValueError, r"clean_weight: expected a scalar, got shape \(2,\)"),
        (lambda _: vg(clean_weight="1"), TypeError, r"clean_weight: expected a real number, got '1' \(str\)"),
        (lambda _: vg(has_aux=1), TypeError, "has_aux: expected True or False, got 1"),
        (lambda _: vg(argnums="0"), TypeError, "argnums: expected an int or a sequence of ints, got '0'"),
        (lambda k: vg(argnums=(0, -2))(k, W, W), ValueError, r"argnums: \(0, -2\) names one of the 2 arguments twice"),
        (lambda _: vg(axis_name=["data"]), TypeError, "axis_name: expected the name of a mapped axis, .* got list"),
        (lambda k: vg(axis_name="data")(k, W), ValueError, "axis_name: there is no mapped axis 'data' here; .*shard_map"),
        (lambda k: vg(param_specs={"w": jax.P()})(k, W), ValueError, "param_specs: not a prefix"),
        (lambda k: vg(param_specs=jax.P("data"))(k, W), ValueError, "param_specs: there is no mapped axis 'data' here"),
        (lambda _: vg(antithetic=1), TypeError, "antithetic: expected True or False, got 1"),
        (lambda _: vg(sampler="normal"), TypeError, "sampler: expected a function .* got 'normal'"),
        (lambda _: vg(aux="first"), ValueError, "aux: expected one of 'mean', 'sum', 'concatenate', .*'first'"),
        (lambda k: vg(sigma=-1)(k, W), ValueError, r"sigma: .* >= 0 for leaf \['n'\], got -1"),
        (lambda k: vg(sigma=jnp.nan)(k, W), ValueError, "sigma: .* got nan"),
        (lambda k: vg(sigma={"w": 0.1})(k, W), ValueError, "sigma: not a prefix"),
        (lambda k: vg(mask={"w": True})(k, W), ValueError, "mask: not a prefix"),
        (lambda _: vg()(W), TypeError, "key: expected a PRNG key.* got dict"),
        (lambda _: vg()(0, W), TypeError, r"key: expected a PRNG key.* got 0 \(int\)"),
        (lambda _: vg()(), TypeError, "missing 1 required positional argument: 'key'"),
        (lambda _: vg()(jnp.ones(3, jnp.uint32), W), TypeError, r"key: expected a PRNG key.* got uint32\[3\]"),
        (lambda k: vg(argnums=1)(k, W), TypeError, "argnums: 1 is out of range, got 1 arguments after the key"),
        (lambda k: vg()(k, {"w": jnp.ones(2, int)}), TypeError, r"argnums=0: leaf \['w'\] is int32\[2\]"),
        (lambda k: vg(argnums=(0, 1))(k, W, 3), TypeError, r"argnums=\(0, 1\): leaf \[1\] is 3 \(int\)"),
        (lambda k: vg(lambda w: w)(k, jnp.ones(2)), TypeError, r"fun: expected a real scalar as the loss, got float32\[2\]"),
        (lambda k: vg(lambda w: w.astype(jnp.complex64))(k, jnp.ones(())), TypeError, r"fun: .* got complex64\[\]"),
        (lambda k: vg(lambda w: (w.sum(), 1))(k, jnp.ones(2)), TypeError, "fun: .* got tuple.* set has_aux=True"),
        (lambda k: vg(lambda w: w.sum(), has_aux=True)(k, jnp.ones(2)), TypeError, r"fun: .* a pair \(loss, aux\), got float32"),
        (lambda k: vg(lambda w: (w.sum(), {"a": "b"}), has_aux=True)(k, jnp.ones(2)), TypeError, r"fun: leaf \['a'\] of the auxiliary output is 'b' \(str\)"),
    ],
)  # fmt: skip
def test_errors_name_argument_value_and_leaf(key, call, error, message):
    with pytest.raises(error, match=message):
        call(key)
