"""The optimizers' states come back from checkpoints and from JAX's tree functions as they were."""

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("flax")
pytest.importorskip("orbax.checkpoint")

from tests.reliability import round_trips
from tests.reliability.round_trips import KEYS, OPTIMIZERS, ROUTES


@pytest.fixture(autouse=True)
def strict():
    """Instead of the fixture for all tests: Adam and Flax need standard promotion."""


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_nothing_is_lost_on_a_round_trip(optimizer, key, route):
    """Neither a bit of a leaf nor of the next step."""
    assert round_trips.lost(optimizer, key, route) == []


def test_the_row_counts_all_trips(monkeypatch):
    monkeypatch.setattr(round_trips, "OPTIMIZERS", {"nso": OPTIMIZERS["nso"]})
    done = []
    row = round_trips.round_trips(done.append)
    assert row.survived == row.tried == len(KEYS) * len(ROUTES) == sum(done)


@pytest.mark.parametrize(
    ("route", "expected"),
    [
        (lambda _, other: other, "[1][0].rng_key"),
        (lambda state, _: jax.tree.map(lambda x: x.astype(jnp.float32), state), "[1][0].count"),
        (lambda state, _: jax.tree.map(lambda x: x.reshape(1, *x.shape), state), "[1][0].count"),
        (lambda state, _: jax.tree.map(jnp.negative, state), "[1][1][0].mu['kernel']"),
        (lambda state, _: (state[0], tuple(map(tuple, state[1]))), "structure"),
    ],
    ids=["other state", "other dtype", "other shape", "other sign", "other structure"],
)
def test_what_is_lost_is_named(route, expected):
    training = round_trips.training("nso", "typed")
    state = training.step(training.init(1))
    assert expected in round_trips._differences(state, route(state, training.init(2)))


def test_a_flipped_bit_in_the_key_or_the_count_makes_another_step():
    """So that the next step's bits are a test of the state at all."""
    init, step = round_trips.training("nso", "typed")
    params, (noise, adam) = step(init(1))
    for other in (noise._replace(count=noise.count + 1), noise._replace(rng_key=noise.rng_key ^ 1)):
        pair = step((params, (noise, adam))), step((params, (other, adam)))
        kernels = [state[0]["kernel"] for state in pair]
        assert bool((kernels[0] != kernels[1]).any())
