"""Random weight perturbation: half a batch with noise, noise per filter, noise that gradients damp."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import nso_jax.nnx
from nso_jax import noise, parallel, sharpness

PARAMS = {"w": jnp.array([[1.0, -2.0], [0.5, 3.0], [-1.0, 0.25]]), "b": jnp.array([0.5, -1.0])}
RNG = np.random.default_rng(0)
X, Y = jnp.asarray(RNG.normal(size=(8, 3)), jnp.float32), jnp.asarray(RNG.normal(size=(8, 2)), jnp.float32)
SIGMA = 0.1


def loss(params, x, y):
    return jnp.mean((jnp.tanh(x @ params["w"] + params["b"][None]) - y) ** 2)


def numpy_value_and_grad(params, x, y):
    params, x, y = jax.tree.map(np.asarray, (params, x, y))
    out = np.tanh(x @ params["w"] + params["b"])
    d = 2 * (out - y) * (1 - out**2) / y.size
    return np.mean((out - y) ** 2), {"w": x.T @ d, "b": d.sum(0)}


@pytest.mark.parametrize("share", [0.5, 0.25, 0.0, 1.0])
@pytest.mark.parametrize("jitted", [False, True])
def test_halves_of_the_batch_equal_numpy(key, share, jitted):
    fn = sharpness.mrwp(loss, sigma=SIGMA, noisy_weight=share, batch_argnums=(1, 2))
    value, grads = (jax.jit(fn) if jitted else fn)(key, PARAMS, X, Y)
    u = noise.perturbation(jax.random.split(key, 1)[0], PARAMS, SIGMA)
    noisy = numpy_value_and_grad(jax.tree.map(np.add, PARAMS, u), X[::2], Y[::2])
    plain = numpy_value_and_grad(PARAMS, X[1::2], Y[1::2])
    expected = jax.tree.map(lambda a, b: share * a + (1 - share) * b, noisy, plain)
    chex.assert_trees_all_close((value, grads), expected, rtol=2e-5, atol=1e-7)


def test_noise_of_a_filter_is_as_published(key):
    """By the authors' loops over PyTorch's filters, whose channels come first."""
    params = {"conv": jnp.asarray(RNG.normal(size=(3, 3, 2, 4)), jnp.float32), "bias": jnp.arange(4.0)}
    sigma = noise.relative(0.01, "filter")(params)
    first = np.moveaxis(np.asarray(params["conv"]), -1, 0).reshape(4, -1)
    np.testing.assert_allclose(jnp.ravel(sigma["conv"]), 0.01 * np.linalg.norm(first, axis=1), rtol=1e-6)
    np.testing.assert_allclose(jnp.ravel(sigma["bias"]), [0.01 * np.sqrt(0 + 1 + 4 + 9)], rtol=1e-6)
    stacked = jax.tree.map(lambda w: jnp.stack([w, 2 * w]), params)
    both = noise.relative(0.01, "filter", stack_axes=1)(stacked)
    for name in params:
        alone = jnp.stack([sigma[name], 2 * sigma[name]])
        np.testing.assert_allclose(both[name], alone, rtol=1e-6)


def test_squared_gradients_damp_the_noise(key):
    squares = jax.tree.map(lambda w: w**2, PARAMS)
    sigma = noise.adaptive(noise.relative(0.5), squares, 2.0)
    expected = jax.tree.map(lambda w: 0.5 * abs(w) / np.sqrt(1 + 2 * w**2), PARAMS)
    chex.assert_trees_all_close(sigma(PARAMS), expected, rtol=1e-6)
    assert jax.tree.structure(noise.adaptive({"w": 0.1, "b": 0.2}, squares)(PARAMS)) == jax.tree.structure(
        PARAMS
    )


def test_the_second_moment_of_adam_gives_arwp(key):
    """A step of m-ARWP, with F from the optimizer's state, in one jitted step."""
    optimizer = optax.adam(0.01)

    @jax.jit
    def step(key, params, state):
        sigma = noise.adaptive(0.1, optax.tree.get(state, "nu"), 100.0)
        fn = sharpness.mrwp(loss, sigma=sigma, batch_argnums=(1, 2))
        grads = fn(key, params, X, Y)[1]
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, grads

    with jax.numpy_dtype_promotion("standard"):
        params, state, _ = step(key, PARAMS, optimizer.init(PARAMS))
        nu = jax.tree.map(np.asarray, optax.tree.get(state, "nu"))
        other = jax.random.fold_in(key, 1)
        _, _, grads = step(other, params, state)
    z = noise.perturbation(jax.random.split(other, 1)[0], params, 1.0)
    moved = jax.tree.map(lambda w, z, f: w + 0.1 * z / np.sqrt(1 + 100 * f), params, z, nu)
    expected = jax.tree.map(
        lambda a, b: 0.5 * (a + b),
        numpy_value_and_grad(moved, X[::2], Y[::2])[1],
        numpy_value_and_grad(params, X[1::2], Y[1::2])[1],
    )
    chex.assert_trees_all_close(grads, expected, rtol=1e-4, atol=1e-6)


def test_low_pass_filtering_sgd_is_microbatches_with_noise_per_filter(key):
    """LPF-SGD: each of M parts of the batch at weights of its own, one-sided."""
    fn = nso_jax.value_and_grad(loss, sigma=noise.relative(0.05, "filter"), antithetic=False)
    value, grads = parallel.microbatch(fn, 4, batch_argnums=(1, 2))(key, PARAMS, X, Y)
    parts = []
    for i, part_key in enumerate(jax.random.split(key, 4)):
        u = noise.perturbation(jax.random.split(part_key, 1)[0], PARAMS, noise.relative(0.05, "filter"))
        parts.append(numpy_value_and_grad(jax.tree.map(np.add, PARAMS, u), X[i::4], Y[i::4]))
    expected = jax.tree.map(lambda *xs: sum(xs) / 4, *parts)
    chex.assert_trees_all_close((value, grads), expected, rtol=2e-5, atol=1e-7)


def test_auxiliary_output_and_keys_of_the_halves(key):
    def with_aux(params, x, y, dropout):
        return loss(params, x, y), {
            "mean": jnp.mean(x),
            "count": jnp.int32(len(x)),
            "of_the_noisy": jnp.int32(len(x)),
            "bits": jax.random.key_data(dropout),
        }

    fn = sharpness.mrwp(
        with_aux, sigma=SIGMA, noisy_weight=0.25, batch_argnums=(1, 2), has_aux=True,
        aux={"mean": "mean", "count": "sum", "of_the_noisy": "mean", "bits": "sum"},
    )  # fmt: skip
    dropout = jax.random.key(3)
    (_, aux), _ = fn(key, PARAMS, X, Y, dropout)
    np.testing.assert_allclose(aux["mean"], 0.25 * X[::2].mean() + 0.75 * X[1::2].mean(), rtol=1e-5)
    assert (aux["count"], aux["of_the_noisy"]) == (8, 4)
    folded = [jax.random.key_data(jax.random.fold_in(dropout, i)) for i in range(2)]
    np.testing.assert_array_equal(aux["bits"], folded[0] + folded[1])


class Network(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(2, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return jnp.tanh(self.norm(self.linear(x)))


def test_nnx_modules_train_with_it_and_their_statistics_move_once(key, standard_promotion):
    fun = lambda model, x, y: jnp.mean((model(x) - y) ** 2)  # noqa: E731
    model = Network()
    fn = nso_jax.nnx.value_and_grad(
        fun, method=sharpness.mrwp, sigma=0.0, noisy_weight=0.5, batch_argnums=(1, 2)
    )
    value, grads = nnx.jit(fn)(key, model, X, Y)
    halves = [nnx.value_and_grad(fun)(Network(), X[i::2], Y[i::2]) for i in range(2)]
    expected = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
    chex.assert_trees_all_close(
        (value, nnx.to_pure_dict(grads)), (expected[0], nnx.to_pure_dict(expected[1])), rtol=1e-4, atol=1e-6
    )
    means = [Network().linear(X[i::2]).mean(0) for i in range(2)]
    np.testing.assert_allclose(model.norm.mean[...], 0.01 * (means[0] + means[1]) / 2, rtol=1e-4)


def test_the_state_of_an_nnx_optimizer_has_the_second_moment_too(key, standard_promotion):
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    sigma = noise.adaptive(0.1, optax.tree.get(optimizer.opt_state, "nu"), 1000.0)
    deviations = sigma(nnx.state(model, nnx.Param))
    assert jax.tree.structure(deviations) == jax.tree.structure(nnx.state(model, nnx.Param))
    for deviation in jax.tree.leaves(deviations):
        np.testing.assert_allclose(deviation, 0.1 / np.sqrt(1 + 1000 * 0.001), rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda k: sharpness.mrwp(loss, sigma=SIGMA, noisy_weight=2.0), ValueError, "noisy_weight: expected a number in [0, 1], got 2.0"),
        (lambda k: sharpness.mrwp(loss, sigma=SIGMA, aux="stack"), ValueError, "aux: expected one of 'mean', 'sum'"),
        (lambda k: sharpness.mrwp(loss, sigma=SIGMA, batch_argnums=(1, 2))(k, PARAMS, X[:7], Y[:7]), ValueError, "has 7 examples, which 2"),
        (lambda k: sharpness.mrwp(loss, sigma=SIGMA, argnums=1)(k, PARAMS, X, Y), ValueError, "batch_argnums: argument 1 is differentiated"),
        (lambda k: sharpness.mrwp(loss, sigma=-1.0, batch_argnums=(1, 2))(k, PARAMS, X, Y), ValueError, "sigma: expected a standard deviation >= 0"),
        (lambda k: noise.adaptive(0.1, PARAMS, -1), ValueError, "eta: expected a number >= 0, got -1"),
        (lambda k: noise.adaptive(0.1, {"w": PARAMS["w"]})(PARAMS), ValueError, "squares: expected an array for each leaf of params, of its shape (['b'] (2,), ['w'] (3, 2)), got (3, 2)."),
        (lambda k: noise.relative(0.1, "filters"), ValueError, "per: expected one of 'weight', 'channel', 'tensor', 'filter'"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(call, error, message, key):
    with pytest.raises(error, match=re.escape(message)):
        call(key)
