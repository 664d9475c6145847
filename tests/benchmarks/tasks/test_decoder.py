"""A decoder-only Transformer: its sizes and identities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.tasks import decoder
from benchmarks.tasks.decoder import Batch

TINY = decoder.Size(layers=2, width=32, heads=4, kv_heads=2, hidden=64, vocabulary=64)
EXAMPLES, LENGTH = 8, 16


@pytest.fixture(scope="module")
def params():
    return decoder.init(jax.random.key(0), TINY)


@pytest.fixture(scope="module")
def batch():
    return Batch(*jax.random.randint(jax.random.key(1), (2, EXAMPLES, LENGTH), 0, TINY.vocabulary))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("160M", 162_417_408),
        ("1.3B", 1_345_423_360),
        ("7B", 6_738_415_616),
        ("34B", 33_743_970_304),
        ("70B", 68_976_648_192),
    ],
)
def test_sizes_are_the_published_ones(name, count):
    shapes = jax.eval_shape(lambda: decoder.init(jax.random.key(0), decoder.SIZES[name]))
    assert sum(w.size for w in jax.tree.leaves(shapes)) == count


def test_without_a_head_all_tokens_are_as_likely(params, batch):
    value = decoder.loss(params | {"head": jnp.zeros_like(params["head"])}, batch, size=TINY)
    assert float(value) == pytest.approx(np.log(TINY.vocabulary), rel=1e-6)


@pytest.mark.parametrize("place", [0, LENGTH - 1])
def test_a_token_is_predicted_from_those_before_it_alone(params, batch, place):
    """The price of another target at a place: whether it depends on what is read later."""

    def price(inputs):
        other = batch.targets.at[:, place].add(1) % TINY.vocabulary
        losses = [
            decoder.loss(params, Batch(inputs, y), size=TINY, dtype=jnp.float32)
            for y in (batch.targets, other)
        ]
        return float(losses[1] - losses[0])

    changed = batch.inputs.at[:, 1:].add(1) % TINY.vocabulary
    same = price(changed) == pytest.approx(price(batch.inputs), rel=1e-3)
    assert same == (place == 0)


def test_turned_queries_and_keys_know_their_distance_alone():
    query, key = jax.random.normal(jax.random.key(0), (2, 8))
    rows = [jnp.broadcast_to(x, (1, LENGTH, 1, 8)) for x in (query, key)]
    turned = [decoder._rotated(x, jnp.arange(LENGTH), TINY)[0, :, 0] for x in rows]
    products = turned[0] @ turned[1].T
    for distance in range(LENGTH):
        np.testing.assert_allclose(jnp.diagonal(products, distance), products[0, distance], atol=1e-5)
    np.testing.assert_allclose(products[0, 0], query @ key, rtol=1e-5)
