"""IVON: equal to its published updates, and a posterior that knows the curvature."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nso_jax import noise, sharpness
from tests.test_sharpness import loss, numpy_grad, problem

W = jnp.array([1.0, -2.0])
OPTIONS = {"num_examples": 200, "weight_decay": 0.01, "b1": 0.8, "b2": 0.9, "initial_hessian": 0.5}


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("num_samples", [1, 3])
def test_20_steps_equal_numpy(key, x64, num_samples, antithetic):
    reference, xs, ys = problem()
    params = jax.tree.map(jnp.asarray, reference)
    options = OPTIONS | {"num_samples": num_samples, "antithetic": antithetic}
    tx = sharpness.ivon(lambda count: 0.2 - 0.005 * count.astype(float), key=key, **options)

    @jax.jit
    def step(params, state, x, y):
        grad_fn = lambda params, _: jax.grad(loss)(params, x, y)  # noqa: E731
        updates, state = tx.update(params, state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    g = {n: np.zeros_like(w) for n, w in reference.items()}
    h = {n: np.full_like(w, 0.5) for n, w in reference.items()}
    for t, (x, y) in enumerate(zip(xs, ys, strict=True)):
        q = {n: np.zeros_like(w) for n, w in reference.items()}
        p = {n: np.zeros_like(w) for n, w in reference.items()}
        signs = (1, -1) if antithetic else (1,)
        for draw_key in jax.random.split(jax.random.fold_in(key, t), num_samples):
            z = jax.tree.map(np.asarray, noise.perturbation(draw_key, params, 1.0))
            for sign in signs:
                u = {n: sign * z[n] / np.sqrt(200 * (h[n] + 0.01)) for n in z}
                gradient = numpy_grad({n: reference[n] + u[n] for n in u}, x, y)
                for n, step_up in u.items():
                    q[n] += gradient[n] / (num_samples * len(signs))
                    p[n] += gradient[n] * step_up * 200 * (h[n] + 0.01) / (num_samples * len(signs))
        params, state = step(params, state, x, y)
        for n, w in reference.items():
            g[n] = 0.8 * g[n] + 0.2 * q[n]
            h[n] = 0.9 * h[n] + 0.1 * p[n] + 0.5 * 0.1**2 * (h[n] - p[n]) ** 2 / (h[n] + 0.01)
            unbiased = g[n] / (1 - 0.8 ** (t + 1))
            reference[n] = w - (0.2 - 0.005 * t) * 0.51 * (unbiased + 0.01 * w) / (h[n] + 0.01)
    chex.assert_trees_all_close(params, reference, rtol=1e-6)
    chex.assert_trees_all_close(state.hessian, h, rtol=1e-6)
    chex.assert_trees_all_close(state.momentum, g, rtol=1e-6, atol=1e-9)
    assert state.count == 20


def test_the_hessian_of_a_quadratic_is_found_and_the_minimum_with_it(key):
    """Pairs on a quadratic: p is H_ii z_i^2 and more of mean zero, so h tends to the diagonal of H."""
    curvature = jnp.array([1.0, 4.0])
    tx = sharpness.ivon(0.1, num_examples=100, key=key, weight_decay=1e-4, b2=0.999, antithetic=True)

    @jax.jit
    def step(carry, _):
        w, state = carry
        updates, state = tx.update(w, state, w, grad_fn=lambda w, _: curvature * w)
        return (w + updates, state), state.hessian

    (w, _), hessians = jax.lax.scan(step, (W, tx.init(W)), length=20_000)
    late = np.asarray(hessians[10_000:])
    # z^2 has a variance of 2; the mean of h over T steps, that of p over about as many.
    error = np.sqrt(2 / len(late)) * np.asarray(curvature)
    bias = 0.001 * np.asarray(curvature)  # of the squared term: share / 2 of the variance over h
    assert np.all(abs(late.mean(0) - curvature) < 4 * error + 2 * bias)
    assert np.all(abs(w) < 0.1)


def test_weights_and_state_keep_their_dtypes_and_the_hessian_stays_positive(key):
    for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
        params = {"w": jnp.ones(3, dtype), "b": jnp.zeros(2, dtype)}
        tx = sharpness.ivon(0.1, key=key, **OPTIONS)
        state = tx.init(params)
        # A loss that curves downward: p is negative.
        grad_fn = lambda params, _: jax.tree.map(lambda w: -50 * w, params)  # noqa: E731
        for _ in range(3):
            updates, new = tx.update(params, state, params, grad_fn=grad_fn, unknown=3)
            chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
            chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
            chex.assert_tree_all_finite((updates, new))
            assert all(np.all(h > -0.01) for h in jax.tree.leaves(new.hessian))
            state = new
        assert not any(jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in jax.tree.leaves(state))


def test_hyperparameters_may_be_injected(key):
    static = ("num_examples", "num_samples", "antithetic", "sampler", "axis_name")
    injected = optax.inject_hyperparams(sharpness.ivon, static_args=static)(0.1, key=key, **OPTIONS)
    plain = sharpness.ivon(0.1, key=key, **OPTIONS)
    results = [tx.update(W, tx.init(W), W, grad_fn=lambda w, _: 2 * w)[0] for tx in (injected, plain)]
    np.testing.assert_allclose(*results, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda tx: sharpness.ivon(0.1, num_examples=9, key=0), TypeError, "key: expected a PRNG key"),
        (lambda tx: tx(num_examples=0), ValueError, "num_examples: expected an int >= 1, got 0"),
        (lambda tx: tx(weight_decay=0.0), ValueError, "weight_decay: expected a number > 0, got 0.0"),
        (lambda tx: tx(initial_hessian=-1), ValueError, "initial_hessian: expected a number > 0, got -1"),
        (lambda tx: tx(b2=1.0), ValueError, "b2: expected a number in [0, 1), got 1.0"),
        (lambda tx: tx(num_samples=0), ValueError, "num_samples: expected an int >= 1, got 0"),
        (lambda tx: tx().init(jnp.ones(2, jnp.complex64)), TypeError, "but ivon is for real weights"),
        (lambda tx: tx().update(W, tx().init(W)), ValueError, "params: ivon perturbs them, but got None"),
        (lambda tx: tx().update(W, tx().init(W), W), TypeError, "grad_fn: expected a function"),
        (lambda tx: optax.MultiSteps(tx(), 2).init(W), ValueError, "ivon: optax.MultiSteps around it"),
        (
            lambda tx: optax.inject_hyperparams(sharpness.ivon)(0.1, key=jax.random.key(0), **OPTIONS).init(
                W
            ),
            TypeError,
            "optax.inject_hyperparams(nso_jax.sharpness.ivon, static_args=('num_examples'",
        ),
    ],
)
def test_what_cannot_be_is_refused(call, error, message):
    make = lambda **options: sharpness.ivon(0.1, key=jax.random.key(0), **OPTIONS | options)  # noqa: E731
    with pytest.raises(error, match=re.escape(message)):
        call(make)
