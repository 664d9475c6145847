"""Each penalty and its gradient against dense Hessians and Jacobians of small networks."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from nso_jax import noise, penalties
from tests.networks import (
    CUSTOM,
    NUM_KEYS,
    PROBLEMS,
    assert_close,
    assert_mean,
    cross_entropy,
    input_hessians,
    losses_of,
    mlp,
    mlp_logits,
    mlp_losses,
    of_one_key,
    with_tanh,
)

# --- the norm of the input Hessian --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "sign", "step_size"), [("mlp", -1, math.inf), ("conv", 1, math.inf), ("mlp", 1, 2.0)]
)
def test_search_converges_to_the_largest_magnitude(key, x64, elsewhere, problem, sign, step_size):
    logits, make = PROBLEMS[problem]
    losses = lambda *args: sign * losses_of(logits)(*args)  # noqa: E731
    params, x, y = make()
    eigenvalues = np.linalg.eigvalsh(jax.jit(lambda: input_hessians(losses, x, params, y))())
    largest = np.take_along_axis(eigenvalues, abs(eigenvalues).argmax(axis=1)[:, None], axis=1)[:, 0]
    assert np.any(sign * largest > 0)
    norm = jax.jit(
        lambda: penalties.input_hessian_norm(key, losses, x, params, y, num_steps=1000, step_size=step_size)
    )()
    np.testing.assert_allclose(norm, abs(largest), rtol=1e-6)


def published_search(key, hessians, shape, step_size, num_steps=1):
    """Gradient ascent on |H v|, in NumPy, and then the vectors v and u = H v / |H v|."""
    unit = lambda v: v / np.linalg.norm(v, axis=1, keepdims=True)  # noqa: E731
    times = lambda v: np.einsum("nij,nj->ni", hessians, v)  # noqa: E731
    start = noise.perturbation(key, jnp.zeros(shape), 1.0, sampler=noise.normal)
    v = unit(np.asarray(start).reshape(shape[0], -1))
    for _ in range(num_steps):
        g = times(times(v)) / np.linalg.norm(times(v), axis=1, keepdims=True)
        v = unit(g) if np.isinf(step_size) else unit(v + step_size * unit(g))
    return v, unit(times(v))


@pytest.mark.parametrize(
    ("problem", "num_steps", "step_size"),
    [("mlp", 1, math.inf), ("mlp", 1, 0.5), ("conv", 1, math.inf), ("mlp", 3, 2)],
)
def test_search_is_the_published_one_and_the_gradient_that_of_u_H_v(key, x64, problem, num_steps, step_size):
    logits, make = PROBLEMS[problem]
    losses = losses_of(logits)
    params, x, y = make()
    hessians = jax.jit(lambda params: input_hessians(losses, x, params, y))
    v, u = published_search(key, np.asarray(hessians(params)), x.shape, step_size, num_steps)
    weights = jnp.arange(1.0, 1 + len(x))

    def penalty(params):
        norms = penalties.input_hessian_norm(
            key, losses, x, params, y, num_steps=num_steps, step_size=jnp.asarray(step_size)
        )
        return weights @ norms, norms

    def reference(params):
        norms = jnp.einsum("ni,nij,nj->n", u, hessians(params), v)
        return weights @ norms, norms

    grads, norms = jax.jit(jax.grad(penalty, has_aux=True))(params)
    expected_grads, expected = jax.jit(jax.grad(reference, has_aux=True))(params)
    np.testing.assert_allclose(norms, expected, rtol=1e-10)
    assert_close(grads, expected_grads, rtol=1e-10)


def test_operator_norm_of_a_zero_hessian(key, x64):
    """The norm is zero for the first example only, and the gradient is finite for both."""
    x = jnp.ones((2, 3))
    losses = lambda x, w: jnp.sum(w * x**2, axis=1)  # noqa: E731

    def penalty(w):
        return penalties.input_hessian_norm(key, losses, x, w, num_steps=2)

    w = jnp.array([[0.0, 0.0, 0.0], [3.0, 3.0, -3.0]])
    np.testing.assert_allclose(penalty(w), [0, 6], atol=1e-12)
    grads = jax.grad(lambda w: penalty(w).sum())(w)
    assert np.all(np.isfinite(grads))
    assert not np.any(grads[0])
    np.testing.assert_allclose(abs(np.sum(np.sign(w[1]) * grads[1])), 2, rtol=1e-12)


# --- the gradient and the Jacobian of the inputs ------------------------------------------------------


def squared_gradients(losses, x, params, y):
    """By definition, to be differentiated backward over backward."""
    gradient = jax.grad(lambda x: losses(x, params, y).sum())(x)
    return jnp.sum(gradient**2, axis=tuple(range(1, x.ndim)))


@pytest.mark.parametrize("problem", PROBLEMS)
def test_input_gradient_equals_reverse_over_reverse(x64, problem):
    logits, make = PROBLEMS[problem]
    losses = losses_of(logits)
    params, x, y = make()
    weights = jnp.arange(1.0, 1 + len(x))

    def of(function):
        weighted = lambda params: (weights @ function(params), function(params))  # noqa: E731
        return jax.jit(jax.grad(weighted, has_aux=True))(params)

    grads, values = of(lambda params: penalties.input_gradient(losses, x, params, y))
    expected_grads, expected = of(lambda params: squared_gradients(losses, x, params, y))
    np.testing.assert_allclose(values, expected, rtol=1e-12)
    assert_close(grads, expected_grads, rtol=1e-12)


def numpy_penalized_gradient(w, x, y, c):
    """Of the mean of -log p_y + c |g|^2 for logits W^T x, where g = W (p - y)."""
    logits = x @ w
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    r = p - y
    g = r @ w.T
    back = p * (g @ w) - p * np.sum(p * (g @ w), axis=1, keepdims=True)  # (diag p - p p^T) W^T g
    return (x.T @ r + c * 2 * (g.T @ r + x.T @ back)) / len(x)


def test_20_steps_equal_numpy(x64):
    rng = np.random.default_rng(5)
    w, x, y = rng.normal(size=(5, 3)), rng.normal(size=(20, 8, 5)), np.eye(3)[rng.integers(3, size=(20, 8))]
    losses = lambda x, w, y: cross_entropy(x @ w, y)  # noqa: E731

    def penalized(w, x, y):
        return jnp.mean(losses(x, w, y) + 0.3 * penalties.input_gradient(losses, x, w, y))

    optimizer = optax.sgd(0.5)

    @jax.jit
    def step(w, state, x, y):
        updates, state = optimizer.update(jax.grad(penalized)(w, x, y), state)
        return optax.apply_updates(w, updates), state

    trained = jnp.asarray(w)
    state = optimizer.init(trained)
    for x_t, y_t in zip(x, y, strict=True):
        trained, state = step(trained, state, x_t, y_t)
        w = w - 0.5 * numpy_penalized_gradient(w, x_t, y_t, 0.3)
    np.testing.assert_allclose(trained, w, rtol=1e-10)


def squared_jacobians(logits, x, params):
    one = jax.jacrev(lambda x_i: logits(x_i[None], params)[0])
    jacobians = jax.vmap(one)(x)
    return jnp.sum(jacobians**2, axis=tuple(range(1, jacobians.ndim)))


@pytest.mark.parametrize(("problem", "num_projections"), [("mlp", 3), ("conv", 1)])
def test_jacobian_and_its_gradient_are_unbiased(key, x64, elsewhere, problem, num_projections):
    logits, make = PROBLEMS[problem]
    params, x, _ = make()

    def of(function):
        total = lambda params: (function(params).sum(), function(params))  # noqa: E731
        grads, values = jax.grad(total, has_aux=True)(params)
        return ravel_pytree(grads)[0], values

    def estimate(key):
        return of(lambda params: penalties.jacobian(key, logits, x, params, num_projections=num_projections))

    # One after another: 4,000 gradients by as many cotangents at once take a convolution 200 times as long.
    grads, values = jax.jit(lambda keys: jax.lax.map(estimate, keys))(jax.random.split(key, NUM_KEYS))
    expected_grads, expected = jax.jit(lambda: of(lambda params: squared_jacobians(logits, x, params)))()
    assert_mean(values, expected)
    assert_mean(grads, expected_grads)


def test_projections_are_averaged(key, platform, monkeypatch):
    params, x, _ = mlp(jnp.float32)

    def penalty(key, **options):
        return penalties.jacobian(key, mlp_logits, x, params, **options)

    mean = jax.jit(lambda key: penalty(key, num_projections=3))(key)
    of_one_key(monkeypatch)
    singles = jax.jit(jax.vmap(penalty))(jax.random.split(key, 3))
    assert not np.allclose(singles[0], singles[1])
    np.testing.assert_allclose(mean, singles.mean(axis=0), rtol=1e-5)


def test_one_output_needs_no_luck(key, x64):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)))
    expected = 4 * np.sum(np.asarray(x) ** 2, axis=1)
    square = lambda x: jnp.sum(x**2, axis=1)  # noqa: E731
    np.testing.assert_allclose(penalties.jacobian(key, square, x), expected)
    np.testing.assert_allclose(penalties.jacobian(key, lambda x: square(x)[:, None], x), expected)


def test_further_axes_of_the_outputs_count_as_outputs(key, x64):
    params, x, _ = mlp()
    grid = lambda x: mlp_logits(x, params)[:, None, :] * jnp.array([1.0, 2.0]).reshape(1, 2, 1)  # noqa: E731
    keys = jax.random.split(key, NUM_KEYS)
    samples = jax.jit(jax.vmap(lambda key: penalties.jacobian(key, grid, x)))(keys)
    assert_mean(samples, 5 * squared_jacobians(mlp_logits, x, params))


def test_zero_gradients():
    x, w = jnp.ones((2, 3)), jnp.array([[0.0], [2.0]])
    losses = lambda w: penalties.input_gradient(lambda x: jnp.sum(w * x, axis=1), x)  # noqa: E731
    np.testing.assert_allclose(losses(w), [0, 12], rtol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda w: losses(w).sum())(w), [[0], [12]], rtol=1e-6)


# --- what all three have in common --------------------------------------------------------------------

BY_INPUT = {
    "input_hessian_norm": lambda key, losses, logits, x, *args: penalties.input_hessian_norm(
        key, losses, x, *args
    ),
    "input_gradient": lambda key, losses, logits, x, *args: penalties.input_gradient(losses, x, *args),
    "jacobian": lambda key, losses, logits, x, *args: penalties.jacobian(key, logits, x, *args),
}


@pytest.mark.parametrize("name", BY_INPUT)
def test_a_pytree_of_inputs_counts_as_one(name, key, x64):
    """An input cut in two leaves; where the search starts elsewhere for it, H has one eigenvalue +-s."""
    params, x, y = mlp()
    joined = lambda parts: jnp.concatenate([parts["a"].reshape(-1, 1), parts["b"][0]], axis=1)  # noqa: E731
    quadratic = lambda x, params, y: jnp.sum(x**2 * jnp.array([[1.0, -1.0]]), axis=1) * y[:, 0]  # noqa: E731
    losses = quadratic if name == "input_hessian_norm" else mlp_losses
    only = lambda x, params, y: jnp.tanh(x @ params["w1"])[:, :1]  # noqa: E731

    def split(fun):
        return lambda parts, *args: fun(joined(parts), *args)

    whole = BY_INPUT[name](key, losses, only, x, params, y)
    parts = {"a": x[:, 0], "b": [x[:, 1:]]}
    np.testing.assert_allclose(
        BY_INPUT[name](key, split(losses), split(only), parts, params, y), whole, rtol=1e-10
    )
    assert np.any(whole > 0)


@pytest.mark.parametrize("name", ["input_hessian_norm", "input_gradient"])
def test_losses_of_single_examples_under_vmap(name, key, x64):
    params, x, y = mlp()
    x = jnp.ones_like(x) * jnp.arange(1.0, 7)[:, None] / 3
    losses = lambda x, params, y: jnp.sum(x**2, axis=-1) ** 2 * y[..., 0]  # noqa: E731
    batched = jax.vmap(lambda x, y: BY_INPUT[name](key, losses, None, x, params, y))(x, y)
    assert batched.shape == (6,)
    if name == "input_gradient":
        expected = penalties.input_gradient(losses, x, params, y)
    else:
        draw = noise.perturbation(key, x[0], 1.0, sampler=noise.normal)
        expected = [
            np.linalg.norm(h @ h @ h @ draw) / max(np.linalg.norm(h @ h @ draw), 1e-300)
            for h in np.asarray(jax.vmap(jax.hessian(losses), (0, None, 0))(x, params, y))
        ]
    np.testing.assert_allclose(batched, expected, rtol=1e-10)


def test_two_batch_axes(key):
    x = jnp.arange(12.0).reshape(2, 3, 2)
    losses = lambda x: jnp.sum(x**2, axis=-1)  # noqa: E731
    np.testing.assert_allclose(penalties.input_gradient(losses, x), 4 * losses(x), rtol=1e-6)
    np.testing.assert_allclose(penalties.input_hessian_norm(key, losses, x), np.full((2, 3), 2), rtol=1e-6)


@pytest.mark.parametrize("name", BY_INPUT)
def test_jit_equals_eager_and_vmap_over_keys_a_loop(name, key):
    x = jnp.arange(1.0, 7).reshape(3, 2)

    def penalty(key):
        return BY_INPUT[name](key, lambda x: jnp.sum(x**3, axis=1), lambda x: x**2, x)

    keys = jax.random.split(key, 3)
    eager = [penalty(key) for key in keys]
    np.testing.assert_allclose(jax.jit(jax.vmap(penalty))(keys), eager, rtol=1e-5)
    np.testing.assert_allclose([jax.jit(penalty)(key) for key in keys], eager, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("input_hessian_norm", jnp.float16), ("input_gradient", jnp.bfloat16), ("jacobian", jnp.bfloat16)],
)
def test_half_precision_is_near_single(name, key, dtype):
    logits = lambda x, params, y: mlp_logits(x, params)  # noqa: E731

    @jax.jit
    def value_and_grad(params, x, y):
        def penalty(params):
            values = BY_INPUT[name](key, mlp_losses, logits, x, params, y)
            return values.mean(), values

        return jax.grad(penalty, has_aux=True)(params)

    problem = mlp(dtype)
    grads, values = value_and_grad(*problem)
    assert values.dtype == jnp.float32
    single = value_and_grad(*jax.tree.map(lambda x: x.astype(jnp.float32), problem))
    assert_close((grads, values), single, rtol=0.1)


@pytest.mark.parametrize("slope", [300.0, 1e-4])
def test_squares_neither_overflow_nor_vanish_in_half_precision(key, slope):
    """The largest float16 is 65504, the smallest 6e-8."""
    x, w = jnp.ones((2, 4), jnp.float16), jnp.full((1, 4), slope, jnp.float16)
    expected = np.full(2, 4 * float(w[0, 0]) ** 2)
    linear = lambda x, w: jnp.sum(w * x, axis=1)  # noqa: E731
    penalty = lambda w: penalties.input_gradient(linear, x, w)  # noqa: E731
    np.testing.assert_allclose(penalty(w), expected, rtol=1e-2)
    np.testing.assert_allclose(penalties.jacobian(key, linear, x, w), expected, rtol=1e-2)
    np.testing.assert_allclose(jax.grad(lambda w: penalty(w).mean())(w), 2 * w, rtol=1e-2)


# --- confidence ---------------------------------------------------------------------------------------


def test_confidence_equals_numpy(x64):
    logits = np.random.default_rng(0).normal(size=(3, 4, 5)) * 3
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    confidence = jax.jit(penalties.confidence)(jnp.asarray(logits))
    np.testing.assert_allclose(confidence, np.sum(p * np.log(p), axis=-1), rtol=1e-12)
    grads = jax.grad(lambda logits: penalties.confidence(logits).sum())(jnp.asarray(logits))
    expected = p * (np.log(p) - np.sum(p * np.log(p), axis=-1, keepdims=True))
    np.testing.assert_allclose(grads, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_confidence_of_extreme_logits(dtype):
    inf = jnp.inf
    logits = jnp.array([[0, 0, -inf], [5, -inf, -inf], [6e4, -6e4, 0], [7, 7, 7]], dtype)
    value, grads = jax.vmap(jax.value_and_grad(penalties.confidence))(logits)
    np.testing.assert_allclose(value, [-math.log(2), 0, 0, -math.log(3)], atol=1e-6)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(grads.astype(jnp.float32), 0, atol=1e-6)


def test_a_class_that_is_left_out_does_not_change_the_gradient():
    logits = jnp.array([1.0, 2.0, -1.0])
    value_and_grad = jax.value_and_grad(penalties.confidence)
    value, grads = value_and_grad(jnp.append(logits, -jnp.inf))
    assert_close((value, grads[:3], grads[3]), (*value_and_grad(logits), jnp.zeros(())), rtol=1e-6)


OF_INPUTS = {
    "hessian": lambda key, losses, *args: penalties.input_hessian_norm(key, losses, *args, num_steps=2),
    "gradient": lambda _, losses, *args: penalties.input_gradient(losses, *args),
    "jacobian": lambda key, losses, *args: penalties.jacobian(
        key, lambda *args: losses(*args)[:, None], *args
    ),
}


@pytest.mark.parametrize("tanh", CUSTOM)
@pytest.mark.parametrize("name", OF_INPUTS)
def test_penalties_of_inputs_go_through_a_custom_vjp(key, x64, name, tanh):
    params, x, y = mlp()

    def value_and_grad(tanh):
        def penalty(params):
            values = OF_INPUTS[name](key, with_tanh(tanh), x, params, y)
            return values @ jnp.arange(1.0, 7), values

        return jax.jit(jax.value_and_grad(penalty, has_aux=True))(params)

    (_, values), grads = value_and_grad(CUSTOM[tanh])
    (_, expected), expected_grads = value_and_grad(jnp.tanh)
    assert_close(values, expected, 1e-10)
    assert_close(grads, expected_grads, 1e-10)
