"""What holds in bfloat16, float16 and mixed precision, to the rounding of each."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nso_jax
from nso_jax import noise, sharpness

SIGMA = 0.5
MATRIX = np.array([[2.0, 0.5, -1.0], [0.5, 1.0, 0.25], [-1.0, 0.25, 3.0]])
WEIGHTS = np.array([1.0, -0.75, 0.5])  # as all of the above, exact in every dtype


def quadratic(w):
    return w @ (jnp.asarray(MATRIX, w.dtype) @ w) / 2


def cubic(w):
    return jnp.sum(w**3) + quadratic(w)


def curvature_along(u):
    """The gradient of u^T H u / 2 for the cubic: all that a pair adds to its gradient."""
    return 3 * u**2


# The dtype that weights are stored in, that of the loss, and the factor that keeps float16 in range.
MODES = {
    "float32": (jnp.float32, jnp.float32, 1.0),
    "bfloat16": (jnp.bfloat16, jnp.bfloat16, 1.0),
    "float32, cast to bfloat16 in the loss": (jnp.float32, jnp.bfloat16, 1.0),
    "float16, scaled": (jnp.float16, jnp.float16, 2.0**7),
    "float32, cast to float16 in the loss, scaled": (jnp.float32, jnp.float16, 2.0**7),
}


def averaged(mode, fun, key, **options):
    """The averaged gradient with the loss cast and scaled as a user would, in float64, and the draw."""
    stored, computed, scale = MODES[mode]
    loss = lambda w: fun(w.astype(computed)) * jnp.asarray(scale, computed)  # noqa: E731
    w = jnp.asarray(WEIGHTS, stored)
    _, grads = jax.jit(nso_jax.value_and_grad(loss, sigma=SIGMA, **options))(key, w)
    assert grads.dtype == stored
    u = noise.perturbation(jax.random.split(key, 1)[0], w, SIGMA)
    return np.asarray(grads, np.float64) / scale, np.asarray(u, np.float64)


def rounding(mode, u, num_terms):
    """What so many roundings of the largest terms can come to.

    Weights are rounded once and each term of the gradient a few times, each by half an eps of its size, which
    is that of the gradient with all signs positive at |W| + |U|.
    """
    size = abs(WEIGHTS) + abs(u)
    terms = abs(MATRIX) @ size + 3 * size**2
    return num_terms * float(jnp.finfo(MODES[mode][1]).eps) / 2 * terms


@pytest.mark.parametrize("mode", MODES)
def test_a_pair_on_a_quadratic_gives_the_plain_gradient(key, mode):
    grads, u = averaged(mode, quadratic, key)
    error, bound = abs(grads - MATRIX @ WEIGHTS), rounding(mode, u, 4)
    assert np.all(error <= bound)
    one_sided, _ = averaged(mode, quadratic, key, antithetic=False)
    assert np.any(abs(one_sided - MATRIX @ WEIGHTS) > bound)


@pytest.mark.parametrize("mode", MODES)
def test_a_pair_on_a_cubic_adds_the_gradient_of_the_curvature(key, mode):
    grads, u = averaged(mode, cubic, key)
    plain = MATRIX @ WEIGHTS + 3 * WEIGHTS**2
    bound = rounding(mode, u, 6)
    assert np.all(abs(grads - plain - curvature_along(u)) <= bound)
    assert np.any(abs(grads - plain) > bound)


# --- loss scaling -------------------------------------------------------------------------------------


def network(params, x, dtype):
    hidden = jnp.tanh(x.astype(dtype) @ params["w1"].astype(dtype))
    return jnp.mean((hidden @ params["w2"].astype(dtype)).astype(jnp.float32) ** 2)


METHODS = {
    "value_and_grad": lambda fun: nso_jax.value_and_grad(fun, sigma=0.05, clean_weight=0.25),
    "sam": lambda fun: sharpness.sam(fun, rho=0.05),
    "asam": lambda fun: sharpness.asam(fun, rho=0.5),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", MODES)
def test_scaling_the_loss_by_a_power_of_two_changes_no_bit(key, method, mode):
    stored, computed, _ = MODES[mode]
    keys = jax.random.split(key, 3)
    params = {"w1": jax.random.normal(keys[0], (4, 8)), "w2": jax.random.normal(keys[1], (8, 2))}
    params = jax.tree.map(lambda w: w.astype(stored), params)
    x = jax.random.normal(keys[2], (16, 4))

    def run(factor):
        loss = lambda params: factor * network(params, x, computed)  # noqa: E731
        value, grads = jax.jit(METHODS[method](loss))(key, params)
        return jax.tree.map(lambda y: np.asarray(y, np.float32) / np.float32(factor), (value, grads))

    # Both so large that nothing falls below float16's range, and so small that nothing exceeds it.
    jax.tree.map(np.testing.assert_array_equal, run(2.0**8), run(2.0**4))


def test_scaling_saves_gradients_that_float16_loses(key):
    w = jnp.array([1.0, 0.5], jnp.float16)
    loss = lambda w, scale: scale * 1e-8 * jnp.sum(w.astype(jnp.float32) ** 2)  # noqa: E731
    fn = nso_jax.value_and_grad(loss, sigma=0.1, num_samples=4)
    np.testing.assert_array_equal(fn(key, w, 1.0)[1], 0)
    scaled = fn(key, w, 2.0**20)[1].astype(jnp.float32) / 2.0**20
    # Sums of eight gradients, each rounded once, at weights rounded once.
    np.testing.assert_allclose(scaled, [2e-8, 1e-8], rtol=2 * float(jnp.finfo(jnp.float16).eps))


# --- weights that no longer move ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_casting_in_the_loss_rounds_the_noise_as_storing_does(key, dtype):
    w = (0.05 * jax.random.normal(key, 1000)).astype(dtype)
    wide = w.astype(jnp.float32)
    u = noise.perturbation(key, w, 1e-3)
    np.testing.assert_array_equal(noise.perturb(w, u), noise.perturb(wide, u).astype(dtype))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_weight_moves_when_its_noise_is_above_half_a_spacing(dtype):
    half = float(jnp.finfo(dtype).eps) / 2
    for w in (1.0, 1.5, -1.75, 2.0**-4):
        unit = half * 2.0 ** np.floor(np.log2(abs(w)))  # half the distance to the next number away from zero
        moves = functools.partial(noise.perturb, jnp.asarray(w, dtype))
        away = float(np.sign(w))
        assert moves(jnp.float32(0.99 * unit), away) == w
        if dtype != jnp.float32:  # in which 1.01 of it cannot be added without rounding twice
            assert moves(jnp.float32(1.01 * unit), away) != w
