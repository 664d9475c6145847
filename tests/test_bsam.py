"""Bayesian SAM against its published update."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nso_jax import noise, sharpness
from tests.test_sharpness import at, loss, numpy_grad, problem

BAYES = {"num_examples": 200, "rho": 0.05, "weight_decay": 0.01, "damping": 0.2, "b1": 0.8, "b2": 0.9}


def bsam_step(tx):
    @jax.jit
    def step(params, state, x, y):
        grad_fn = lambda params, _: jax.grad(loss)(params, x, y)  # noqa: E731
        updates, state = tx.update(grad_fn(params, 0), state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    return step


def test_20_steps_of_bsam_equal_numpy(key, x64):
    reference, xs, ys = problem()
    params = jax.tree.map(jnp.asarray, reference)
    tx = sharpness.bsam(
        lambda count: 0.2 - 0.005 * count.astype(float), key=key, initial_precision=0.5, **BAYES
    )
    state, step = tx.init(params), bsam_step(tx)
    m = {n: np.zeros_like(w) for n, w in reference.items()}
    s = {n: np.full_like(w, 0.5) for n, w in reference.items()}
    for t, (x, y) in enumerate(zip(xs, ys, strict=True)):
        z = jax.tree.map(np.asarray, noise.perturbation(jax.random.fold_in(key, t), params, 1.0))
        params, state = step(params, state, x, y)

        h = numpy_grad(at(reference, {n: z[n] / np.sqrt(200 * s[n]) for n in z}), x, y)
        g = numpy_grad(at(reference, {n: 0.05 * h[n] / s[n] for n in h}), x, y)
        for n, w in reference.items():
            m[n] = 0.8 * m[n] + 0.2 * (g[n] + 0.01 * w)
            reference[n] = w - (0.2 - 0.005 * t) * m[n] / s[n]
            s[n] = 0.9 * s[n] + 0.1 * (np.sqrt(s[n]) * abs(h[n]) + 0.01 + 0.2)
    chex.assert_trees_all_close(params, reference, rtol=1e-10)
    chex.assert_trees_all_close(state.precision, s, rtol=1e-10)
    assert state.count == 20


def test_bsam_converges_and_its_precision_follows_the_curvature(key):
    """Around the minimum of a quadratic |h| is in proportion to the curvature, so s is larger where it is."""
    curvature = jnp.array([1.0, 10.0])
    tx = sharpness.bsam(0.1, num_examples=10, key=key, weight_decay=0.0, damping=0.01, b2=0.99)

    @jax.jit
    def step(w, state):
        updates, state = tx.update(w, state, w, grad_fn=lambda w, _: curvature * w)
        return w + updates, state

    w, state = jnp.array([3.0, -3.0]), tx.init(jnp.zeros(2))
    for _ in range(2000):
        w, state = step(w, state)
    assert np.all(abs(w) < 0.3)
    assert state.precision[1] > 3 * state.precision[0]


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_bsam_keeps_dtypes_masks_and_a_state_of_arrays(key, dtype):
    params = {"w": jnp.ones(3, dtype), "b": jnp.zeros(2, dtype)}
    tx = sharpness.bsam(0.1, key=key, mask={"w": True, "b": False}, **BAYES)
    seen = []
    state = tx.init(params)
    grad_fn = lambda p, i: (seen.append((int(i), p)), jax.tree.map(jnp.zeros_like, p))[1]  # noqa: E731
    updates, new = tx.update(params, state, params, grad_fn=grad_fn, unknown=3)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    chex.assert_tree_all_finite((updates, new))
    assert [i for i, _ in seen] == [0, 1]
    for _, perturbed in seen:
        np.testing.assert_array_equal(perturbed["b"], params["b"])
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    assert not any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(state))


def test_bsam_takes_injected_hyperparameters(key):
    params, xs, ys = problem(np.float32)
    static = ("num_examples", "mask", "axis_name")
    plain = sharpness.bsam(0.1, key=key, **BAYES)
    injected = optax.inject_hyperparams(sharpness.bsam, static_args=static)(0.1, key=key, **BAYES)
    expected, _ = bsam_step(plain)(params, plain.init(params), xs[0], ys[0])
    result, _ = bsam_step(injected)(params, injected.init(params), xs[0], ys[0])
    chex.assert_trees_all_close(result, expected, rtol=1e-6)
