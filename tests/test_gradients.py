import dataclasses
import functools
import itertools
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
from nso_jax import noise

SIGMA = 0.1


# --- exact oracles ------------------------------------------------------------------------------------


def quadratic(params):
    w, b = params["w"], params["b"]
    return w @ (jnp.arange(1, 6, dtype=w.dtype) * w) / 2 + w[:2] @ b + b.sum()


def cubic(params):
    w, b = params["w"], params["b"]
    return jnp.sum(w**3) + w[0] * b[0] * w[1] + (w[:2] @ b) * b[1] + quadratic(params)


def point(dtype):
    rng = np.random.default_rng(0)
    return {"w": jnp.asarray(rng.normal(size=5), dtype), "b": jnp.asarray(rng.normal(size=2), dtype)}


def draws(key, params, k, sigma=SIGMA, **options):
    return [noise.perturbation(key_j, params, sigma, **options) for key_j in jax.random.split(key, k)]


def assert_within_ulps(actual, expected, largest, ulps=20):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        tolerance = 1e-12 if a.dtype == jnp.float64 else ulps * np.spacing(np.float32(largest))
        assert np.max(abs(np.asarray(a, np.float64) - np.asarray(e, np.float64))) <= tolerance


def largest_term(*trees):
    return max(float(abs(leaf).max()) for leaf in jax.tree.leaves(trees))


@pytest.fixture(params=[jnp.float32, jnp.float64])
def dtype(request, x64):
    return request.param


@pytest.mark.parametrize("num_samples", [1, 4])
def test_quadratic_gives_the_plain_gradient(key, dtype, num_samples):
    params = point(dtype)
    value, grads = nso_jax.value_and_grad(quadratic, sigma=SIGMA, num_samples=num_samples)(key, params)
    expected = jax.grad(quadratic)(params)
    assert_within_ulps(grads, expected, largest_term(expected, params))
    assert value.dtype == dtype


@pytest.mark.parametrize("num_samples", [1, 4])
def test_cubic_gives_the_gradient_of_f_plus_half_u_H_u(key, dtype, num_samples):
    params = point(dtype)
    us = draws(key, params, num_samples)

    def smoothed(params):
        def curvature(u):
            return optax.tree.vdot(u, jax.jvp(jax.grad(cubic), (params,), (u,))[1])

        return cubic(params) + sum(0.5 * curvature(u) for u in us) / num_samples

    value, grads = nso_jax.value_and_grad(cubic, sigma=SIGMA, num_samples=num_samples)(key, params)
    expected = jax.grad(smoothed)(params)
    largest = largest_term(expected, jax.grad(cubic)(params))
    assert_within_ulps(grads, expected, largest)
    assert_within_ulps(value, smoothed(params), largest)


def test_one_sided_differs_and_varies_more(key):
    params = point(jnp.float32)

    def estimates(antithetic, num_samples):
        fn = nso_jax.value_and_grad(
            cubic, sigma=SIGMA, antithetic=antithetic, num_samples=num_samples, chunk_size=num_samples
        )
        grads = jax.jit(jax.vmap(lambda key: fn(key, params)[1]))(jax.random.split(key, 2000))
        return np.concatenate([grads["b"], grads["w"]], axis=1)

    one_sided, pairs = estimates(False, 2), estimates(True, 1)  # two gradients each
    assert not np.allclose(one_sided[0], pairs[0], rtol=1e-3)
    # both estimate the same mean; to first order the one-sided one keeps H U / 2, the pair only terms in U^2
    error = np.sqrt((one_sided.var(0, ddof=1) + pairs.var(0, ddof=1)) / len(pairs))
    assert np.all(abs(one_sided.mean(0) - pairs.mean(0)) < 5 * error)
    assert one_sided.var(0).sum() > 20 * pairs.var(0).sum()


@pytest.mark.parametrize("clean_weight", [0.0, 0.3, 1.0, jnp.float32(0.3)])
def test_without_noise_it_is_the_plain_gradient(key, clean_weight):
    params = point(jnp.float32)
    plain = jax.value_and_grad(cubic)(params)
    fn = nso_jax.value_and_grad(cubic, sigma=0.0, num_samples=2, clean_weight=clean_weight)
    chex.assert_trees_all_close(fn(key, params), plain, rtol=1e-6)


def test_value_and_gradients_are_the_weighted_mean_of_all_evaluations(key):
    params = point(jnp.float32)
    us = draws(key, params, 3, sampler=noise.laplace)
    pairs = [
        jax.value_and_grad(cubic)(noise.perturb(params, u, sign))
        for u, sign in itertools.product(us, (1, -1))
    ]
    plain = jax.value_and_grad(cubic)(params)
    expected = jax.tree.map(lambda clean, *xs: 0.3 * clean + 0.7 * sum(xs) / 6, plain, *pairs)
    fn = nso_jax.value_and_grad(cubic, sigma=SIGMA, num_samples=3, sampler=noise.laplace, clean_weight=0.3)
    chex.assert_trees_all_close(fn(key, params), expected, rtol=1e-5)


def test_value_is_an_unbiased_estimate_of_F(key):
    """F = E[sum w^4] = sum w^4 + 6 sigma^2 w^2 + 3 sigma^4 for Gaussian noise."""
    w = jnp.array([1.0, -0.5])
    fn = nso_jax.value_and_grad(lambda w: jnp.sum(w**4), sigma=0.3)
    values, grads = jax.jit(jax.vmap(fn, in_axes=(0, None)))(jax.random.split(key, 20_000), w)
    for sample, expected in (
        (values, np.sum(w**4 + 6 * 0.09 * w**2 + 3 * 0.0081)),
        (grads[:, 0], 4 * w[0] ** 3 + 12 * 0.09 * w[0]),
    ):
        samples = np.asarray(sample, np.float64)
        assert abs(samples.mean() - expected) < 5 * samples.std(ddof=1) / np.sqrt(len(samples))


# --- an independent implementation in NumPy -----------------------------------------------------------


def mlp_loss(params, x, y):
    hidden = jnp.tanh(x @ params["w1"] + params["b1"].reshape(1, -1))
    return jnp.mean((hidden @ params["w2"] - y) ** 2)


def numpy_mlp_value_and_grad(params, x, y):
    hidden = np.tanh(x @ params["w1"] + params["b1"])
    residual = hidden @ params["w2"] - y
    d_out = 2 * residual / residual.size
    d_hidden = (d_out @ params["w2"].T) * (1 - hidden**2)
    grads = {"w1": x.T @ d_hidden, "b1": d_hidden.sum(0), "w2": hidden.T @ d_out}
    return np.mean(residual**2), grads


def mlp_problem():
    rng = np.random.default_rng(1)
    shapes = {"w1": (4, 8), "b1": (8,), "w2": (8, 2)}
    params = {name: rng.normal(size=shape) * 0.5 for name, shape in shapes.items()}
    return params, rng.normal(size=(50, 16, 4)), rng.normal(size=(50, 16, 2))


class NumpySGD:
    def __init__(self):
        self.velocity = 0.0

    def step(self, gradient):
        self.velocity = 0.9 * self.velocity + gradient
        return -0.05 * self.velocity


class NumpyAdam:
    def __init__(self):
        self.m, self.v, self.t = 0.0, 0.0, 0

    def step(self, gradient):
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * gradient
        self.v = 0.999 * self.v + 0.001 * gradient**2
        m, v = self.m / (1 - 0.9**self.t), self.v / (1 - 0.999**self.t)
        return -0.01 * m / (np.sqrt(v) + 1e-8)


@pytest.mark.parametrize(
    ("options", "optimizer", "numpy_optimizer"),
    [
        ({}, optax.sgd(0.05, momentum=0.9), NumpySGD),
        ({"clean_weight": 0.3, "num_samples": 3}, optax.sgd(0.05, momentum=0.9), NumpySGD),
        ({"antithetic": False, "num_samples": 3}, optax.sgd(0.05, momentum=0.9), NumpySGD),
        ({"clean_weight": 0.3, "num_samples": 3}, optax.adam(0.01), NumpyAdam),
        ({"antithetic": False, "clean_weight": 0.3, "num_samples": 3}, optax.adam(0.01), NumpyAdam),
    ],
)
@pytest.mark.parametrize("through_optax", [False, True])
def test_50_steps_equal_numpy(
    key, options, optimizer, numpy_optimizer, through_optax, x64, standard_promotion
):
    """The algorithm of the paper, written from its formulas and fed the same noise."""
    reference, xs, ys = mlp_problem()
    params = jax.tree.map(jnp.asarray, reference)
    tx = nso_jax.nso(optimizer, SIGMA, key=key, **options) if through_optax else optimizer
    fn = nso_jax.value_and_grad(mlp_loss, sigma=SIGMA, **options)

    @jax.jit
    def step(params, state, key, x, y):
        if through_optax:
            grad_fn = lambda params, _: jax.grad(mlp_loss)(params, x, y)  # noqa: E731
            updates, state = tx.update(grad_fn(params, 0), state, params, grad_fn=grad_fn)
        else:
            updates, state = optimizer.update(fn(key, params, x, y)[1], state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    states = {name: numpy_optimizer() for name in reference}
    k, weight = options.get("num_samples", 1), options.get("clean_weight", 0.0)
    signs = (1, -1) if options.get("antithetic", True) else (1,)
    for t, (x, y) in enumerate(zip(xs, ys, strict=True)):
        step_key = jax.random.fold_in(key, t)
        us = [jax.tree.map(np.asarray, u) for u in draws(step_key, params, k)]
        params, state = step(params, state, step_key, x, y)

        perturbed = [{n: w + s * u[n] for n, w in reference.items()} for u in us for s in signs]
        noisy = [numpy_mlp_value_and_grad(p, x, y)[1] for p in perturbed]
        clean = numpy_mlp_value_and_grad(reference, x, y)[1]
        for name in reference:
            mean = sum(g[name] for g in noisy) / len(noisy)
            reference[name] = reference[name] + states[name].step(weight * clean[name] + (1 - weight) * mean)
    chex.assert_trees_all_close(params, reference, rtol=1e-5)


# --- options ------------------------------------------------------------------------------------------


def with_aux(params, x):
    hidden = jnp.tanh(x @ params["w"])
    return jnp.sum(hidden**2), {
        "hidden": hidden.mean(0),
        "calls": jnp.int32(3),
        "more": [jnp.float16(2), None],
    }


ROUNDING = 1e-6  # of sums of a few numbers of order 1, which may cancel
AUX_ARGS = ({"w": jnp.ones((3, 2))}, jnp.linspace(-1, 1, 12).reshape(4, 3))


def aux_of(key, num_samples=2, **options):
    fn = nso_jax.value_and_grad(with_aux, sigma=SIGMA, num_samples=num_samples, has_aux=True, **options)
    return jax.jit(fn)(key, *AUX_ARGS)[0][1]


def evaluations(key, num_samples):
    us = draws(key, AUX_ARGS[0], num_samples)
    return [with_aux(noise.perturb(AUX_ARGS[0], u, s), AUX_ARGS[1])[1] for u in us for s in (1, -1)]


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 3])
def test_aux_modes(key, chunk_size):
    expected = evaluations(key, 5)
    stacked = np.stack([aux["hidden"] for aux in expected])
    mean, stack, clean = (
        aux_of(key, 5, chunk_size=chunk_size, aux=mode) for mode in ("mean", "stack", "clean")
    )
    np.testing.assert_allclose(mean["hidden"], stacked.mean(0), atol=ROUNDING)
    np.testing.assert_allclose(stack["hidden"], stacked, atol=ROUNDING)
    np.testing.assert_allclose(clean["hidden"], with_aux(*AUX_ARGS)[1]["hidden"], atol=ROUNDING)
    assert mean["calls"] == clean["calls"] == 3
    np.testing.assert_array_equal(stack["calls"], [3] * 10)
    assert mean["more"][0].dtype == clean["more"][0].dtype == jnp.float16
    assert stack["more"][0].shape == (10,)


@pytest.mark.parametrize("chunk_size", [1, 2, 5])
def test_sums_are_those_of_all_evaluations(key, chunk_size):
    def counted(w):
        return jnp.sum(w**2), {"flag": w > 0, "small": jnp.int8(100), "half": w.astype(jnp.float16), "w": w}

    def run(aux):
        options = {"sigma": 1.0, "num_samples": 5, "chunk_size": chunk_size, "has_aux": True}
        return jax.jit(nso_jax.value_and_grad(counted, aux=aux, **options))(key, jnp.array([0.1, -0.3]))[0][1]

    total, each = run("sum"), run("stack")
    assert total["small"] == 1000  # beyond int8
    np.testing.assert_array_equal(total["flag"], each["flag"].sum(axis=0))
    np.testing.assert_allclose(total["w"], each["w"].sum(axis=0), rtol=1e-6)
    np.testing.assert_allclose(total["half"], each["half"].astype(np.float32).sum(axis=0), rtol=1e-3)
    assert {name: x.dtype.name for name, x in total.items()} == {
        "flag": "int32", "small": "int32", "half": "float16", "w": "float32",
    }  # fmt: skip


def test_aux_modes_may_be_mixed_and_weighted(key):
    aux = aux_of(key, aux={"hidden": "stack", "calls": "clean", "more": "mean"})
    assert aux["hidden"].shape == (4, 2)
    assert aux["calls"] == 3
    assert aux["more"][0] == 2
    clean = with_aux(*AUX_ARGS)[1]["hidden"]
    noisy = np.stack([aux["hidden"] for aux in evaluations(key, 2)]).mean(0)
    np.testing.assert_allclose(
        aux_of(key, clean_weight=0.3)["hidden"], 0.3 * clean + 0.7 * noisy, atol=ROUNDING
    )


def test_auxiliary_output_without_entries_is_stacked_too(key):
    fn = nso_jax.value_and_grad(
        lambda w: (w.sum(), jnp.ones((0, 2))), sigma=SIGMA, num_samples=3, has_aux=True, aux="stack"
    )
    assert fn(key, jnp.ones(2))[0][1].shape == (6, 0, 2)


def test_clean_aux_costs_one_forward_pass_more():
    calls = []

    def fun(w):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.sum(w**2), w

    for aux, count in (("mean", 4), ("clean", 5)):
        calls.clear()
        fn = nso_jax.value_and_grad(fun, sigma=SIGMA, num_samples=2, has_aux=True, aux=aux)
        jax.block_until_ready(jax.jit(fn)(jax.random.key(0), jnp.ones(3)))
        jax.effects_barrier()
        assert len(calls) == count


def test_chunk_sizes_agree(key, platform):
    results = []
    for chunk_size in (1, 2, 3, 5, 8, None):
        fn = nso_jax.value_and_grad(
            with_aux, sigma=SIGMA, num_samples=5, chunk_size=chunk_size, has_aux=True, aux="stack"
        )
        results.append(jax.jit(fn)(key, *AUX_ARGS))
    for result in results[1:]:
        chex.assert_trees_all_close(result, results[0], rtol=2e-6, atol=ROUNDING)


def deep_loss(params, x):
    for w in params:
        x = jnp.tanh(x @ w)
    return jnp.sum(x**2)


def test_memory_does_not_grow_with_k(platform):
    params, x = [jnp.ones((256, 256))] * 4, jnp.ones((32, 256))
    size = sum(w.nbytes for w in params)

    def temporary(num_samples, chunk_size=1):
        fn = nso_jax.value_and_grad(deep_loss, sigma=SIGMA, num_samples=num_samples, chunk_size=chunk_size)
        compiled = jax.jit(fn).lower(jax.random.key(0), params, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporary(2), temporary(16)
    assert large - small < 0.05 * size  # 14 more keys and indices, but no array of weights
    assert temporary(16, chunk_size=16) > large + 10 * size  # what the chunks save


def test_options_reach_the_noise(key):
    params = point(jnp.float32)
    mask = {"w": True, "b": False}
    fn = nso_jax.value_and_grad(cubic, sigma=noise.relative(0.2), mask=mask, sampler=noise.rademacher)
    (u,) = draws(key, params, 1, noise.relative(0.2), mask=mask, sampler=noise.rademacher)
    assert u["b"] is None
    sides = [jax.grad(cubic)(noise.perturb(params, u, sign)) for sign in (1, -1)]
    chex.assert_trees_all_close(fn(key, params)[1], jax.tree.map(lambda a, b: (a + b) / 2, *sides), rtol=1e-6)


def test_sigma_may_be_traced(key):
    params = point(jnp.float32)
    step = jax.jit(lambda sigma: nso_jax.value_and_grad(cubic, sigma=sigma)(key, params))
    for sigma in (0.0, 0.3):
        expected = nso_jax.value_and_grad(cubic, sigma=sigma)(key, params)
        chex.assert_trees_all_close(step(sigma), expected, rtol=1e-5)
    assert step._cache_size() == 1


# --- pytrees, dtypes, arguments -----------------------------------------------------------------------


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
