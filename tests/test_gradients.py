import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

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
