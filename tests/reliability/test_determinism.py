"""The same key gives the same result: bit by bit where the program is the same, and else to rounding."""

import jax
import jax.numpy as jnp
import numpy as np

import nso_jax
from nso_jax import noise
from tests.reliability import determinism, entry_points


def test_other_keys_give_other_digests(key):
    """What is compared would show a difference."""
    params, _ = entry_points.make_problem(np.random.default_rng(0))
    one, other = (noise.perturbation(k, params, 0.1) for k in (key, jax.random.fold_in(key, 1)))
    assert determinism.digest(one) != determinism.digest(other)
    assert determinism._difference(one, other) > 0.1
    assert (
        determinism.digest({"a": 0.0}) != determinism.digest({"a": -0.0}) != determinism.digest({"b": -0.0})
    )


def test_jitted_steps_are_the_same_again_bit_by_bit(key):
    params, batch = entry_points.make_problem(np.random.default_rng(0))
    fn = nso_jax.value_and_grad(entry_points.mean_squared_error, sigma=0.1, num_samples=2)

    def train():
        @jax.jit  # compiled anew
        def step(params, key):
            return jax.tree.map(lambda w, g: w - 0.1 * g, params, fn(key, params, batch)[1])

        trained = params
        for n in range(10):
            trained = step(trained, jax.random.fold_in(key, n))
        return trained

    assert determinism.same_bits(train(), train())


def test_the_order_of_entries_and_leaves_does_not_matter(key):
    names = ["b", "a", "d", "c"]
    loss = lambda p: sum(jnp.sum(jnp.tanh(p[name]) ** 2) for name in sorted(p))  # noqa: E731
    fn = jax.jit(nso_jax.value_and_grad(loss, sigma=0.1))
    one, other = (
        fn(key, {name: jnp.full(3, 0.1 * ord(name)) for name in order}) for order in (names, names[::-1])
    )
    assert determinism.same_bits(one, other)
