"""One evaluation that is NaN or infinite is seen, and with optax's guard the training goes on."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import nso_jax
import nso_jax.nnx
from nso_jax import noise, sharpness
from nso_jax.noise.perturbation import _leaf_keys
from tests.reliability import entry_points, nonfinite

PATIENCE = 3


def test_exactly_one_evaluation_is_hit(key):
    """The fault in one draw is in one draw, and it is enough."""
    rng = np.random.default_rng(0)
    params, batch = entry_points.make_problem(rng)
    fn = jax.jit(
        lambda hit: nso_jax.value_and_grad(
            entry_points.error_and_aux, sigma=0.1, num_samples=8, has_aux=True, aux="stack", chunk_size=3
        )(key, params, batch, hit)
    )
    inputs = entry_points.Inputs(key, params, batch, jnp.float32(jnp.inf), jnp.float32(0.1))
    found = nonfinite._one_infinite_evaluation(rng, inputs, lambda inputs: fn(inputs.hit))
    (value, aux), grads = fn(found.hit)
    assert np.isinf(aux["loss"]).sum() == 1
    assert np.isinf(value)
    assert not any(np.isfinite(g).all() for g in jax.tree.leaves(grads))


# --- weights beyond the range of their dtype ----------------------------------------------------------


def saturated(w):
    """A loss with finite value and gradient at infinite weights."""
    return jnp.sum(jnp.tanh(w.astype(jnp.float32)))


ENTRIES = {
    "value_and_grad": lambda s: nso_jax.value_and_grad(saturated, sigma=s, num_samples=4),
    "one draw of many": lambda s: nso_jax.value_and_grad(
        saturated, sigma=s, num_samples=4, sampler=rarely_huge, chunk_size=3
    ),
    "usam": lambda s: sharpness.usam(saturated, rho=s),
}


def rarely_huge(key, shape, dtype):
    """Below 1 in size, but for one draw of the four that the fixed key has."""
    keys = jax.random.split(jax.random.key(20), 4)
    path_key = _leaf_keys(keys[2], [""])[0]
    huge = jnp.all(jax.random.key_data(key) == jax.random.key_data(path_key))
    return jnp.where(huge, 1.0, 1e-6) * jnp.ones(shape, dtype)


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize(("dtype", "strength"), [(jnp.float16, 1e5), (jnp.float32, jnp.inf)])
def test_a_weight_beyond_its_dtype_is_seen_where_the_loss_saturates(key, name, dtype, strength):
    w = jnp.array([0.5, -0.25, 0.125], dtype)
    assert np.isfinite(saturated(w * jnp.inf))
    grads = jax.jit(lambda s: ENTRIES[name](s)(key, w)[1])(jnp.float32(strength))
    assert np.isnan(grads).all()


def test_bsam_sees_an_infinite_ascent(key):
    """An infinite slope at the noisy weights leads to infinite ones, where the next slope is finite."""
    tx = sharpness.bsam(0.1, num_examples=10, key=key)
    w = jnp.array([0.5, 1.0])
    slope = jnp.array([jnp.inf, 1.0])
    grad_fn = lambda w, i: slope if i == 0 else jax.grad(saturated)(w)  # noqa: E731
    updates, _ = tx.update(slope, tx.init(w), w, grad_fn=grad_fn)
    assert np.isnan(updates[0])
    assert np.isfinite(updates[1])


def test_infinite_and_nan_weights_stay_what_they_are():
    """As in a mask of -inf that a model has among its arrays."""
    w = jnp.array([-jnp.inf, jnp.inf, jnp.nan, 1.0])
    np.testing.assert_array_equal(noise.perturb(w, jnp.full(4, 0.5), -1), [-jnp.inf, jnp.inf, jnp.nan, 0.5])


# --- the recipe ---------------------------------------------------------------------------------------


def parabola(w, scale):
    return scale * jnp.sum(w**2)


def guarded(kind, key):
    """A jitted step with the documented recipe, and its first state."""
    optimizer = optax.apply_if_finite(optax.sgd(0.1, momentum=0.9), PATIENCE)
    tx = optax.chain(nso_jax.noise_stability(0.1, key=key), optimizer)

    @jax.jit
    def by_function(w, state, key, scale):
        grads = nso_jax.value_and_grad(parabola, sigma=0.1)(key, w, scale)[1]
        updates, state = optimizer.update(grads, state, w)
        return optax.apply_updates(w, updates), state

    @jax.jit
    def by_transformation(w, state, _, scale):
        grad_fn = lambda w, i: jax.grad(parabola)(w, scale)  # noqa: E731
        updates, state = tx.update(grad_fn(w, 0), state, w, grad_fn=grad_fn)
        return optax.apply_updates(w, updates), state

    return {"function": (by_function, optimizer.init), "transformation": (by_transformation, tx.init)}[kind]


@pytest.mark.parametrize("kind", ["function", "transformation"])
def test_more_bad_steps_in_a_row_than_allowed_are_let_through(key, kind):
    step, init = guarded(kind, key)
    w = jnp.array([1.0, -2.0])
    state = init(w)
    w, state = step(w, state, key, 1.0)
    for _ in range(PATIENCE):
        kept, state = step(w, state, key, jnp.nan)
        np.testing.assert_array_equal(kept, w)
    if kind == "transformation":
        assert state[0].count == 1 + PATIENCE
    recovered, after = step(w, state, key, 1.0)
    assert np.isfinite(recovered).all()
    assert (after[-1] if kind == "transformation" else after).notfinite_count == 0
    assert np.isnan(step(w, state, key, jnp.nan)[0]).all()


def test_the_noise_after_a_bad_step_is_new(key):
    seen = []
    tx = optax.chain(nso_jax.noise_stability(0.1, key=key), optax.apply_if_finite(optax.sgd(0.1), PATIENCE))
    w = jnp.ones(3)
    state = tx.init(w)
    for scale in (1.0, jnp.nan, 1.0):
        grad_fn = lambda w, i: (seen.append(w), scale * w)[1]  # noqa: B023, E731
        _, state = tx.update(w, state, w, grad_fn=grad_fn)
    first, _, bad, _, last, _ = seen
    assert not np.array_equal(first, bad)
    assert not np.array_equal(bad, last)


class Normalized(nnx.Module):
    def __init__(self, rngs):
        self.linear, self.norm = nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.linear(x))


def test_batch_statistics_are_put_back_by_the_loss(key, standard_promotion):
    """`apply_if_finite` keeps the weights, but statistics are no business of an optimizer."""
    model = Normalized(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.apply_if_finite(optax.sgd(0.1), PATIENCE), wrt=nnx.Param)
    fn = nso_jax.nnx.value_and_grad(lambda model, x: jnp.mean((model(x) - 1) ** 2), sigma=0.05)

    @nnx.jit
    def step(model, optimizer, key, x):
        before = jax.tree.map(lambda x: x, nnx.state(model, nnx.BatchStat))
        value, grads = fn(key, model, x)
        optimizer.update(model, grads)
        after, finite = nnx.state(model, nnx.BatchStat), jnp.isfinite(value)
        nnx.update(model, jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, before))
        return value

    x = jax.random.normal(key, (8, 3))
    step(model, optimizer, key, x)
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model)))
    assert np.isnan(step(model, optimizer, key, x.at[3, 1].set(jnp.nan)))
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(model)), before)
    step(model, optimizer, key, x)
    chex.assert_tree_all_finite(nnx.to_pure_dict(nnx.state(model)))
