"""What is read from compiled programs with loops and collectives, of which all is known."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.cost import compilers
from tests.devices.meshes import P, mesh_of

DEVICES, OUTER, INNER = 8, 5, 3


ROWS, WIDTH = 16, 32


@pytest.fixture(scope="module")
def nested():
    """A loop in a loop: in the inner one a matrix product and an all-reduce of it, in the outer an all-gather."""
    mesh = mesh_of(DEVICES)

    def inner(x, w):
        return jnp.tanh(jax.lax.psum(x @ w, "data")), None

    def outer(x, w):
        x, _ = jax.lax.scan(inner, x, jnp.stack([w] * INNER))
        return x, jax.lax.all_gather(x[0], "data")

    def run(x, w):
        return jax.lax.scan(outer, x, jnp.stack([w] * OUTER))

    specs = {"in_specs": (P("data"), P()), "out_specs": (P("data"), P())}
    mapped = jax.shard_map(run, mesh=mesh, check_vma=False, **specs)
    return jax.jit(mapped).lower(jnp.ones((DEVICES * ROWS, WIDTH)), jnp.eye(WIDTH)).compile()


def test_collectives_in_loops_count_as_often_as_they_are_repeated(nested):
    assert compilers.collectives(nested) == {
        "all-reduce": (OUTER * INNER, OUTER * INNER, OUTER * INNER * 4 * ROWS * WIDTH),
        "all-gather": (OUTER, OUTER, OUTER * 4 * DEVICES * WIDTH),
    }


def test_loops_tell_how_often_they_are_repeated(nested):
    figures = sorted((loop.trips, loop.runs) for loop in compilers.loops(nested))
    assert figures == [(INNER, OUTER), (OUTER, 1)]


def test_instructions_are_counted_once_in_loops(nested):
    assert compilers.count(nested, "all-reduce") == 1
    assert compilers.count(nested, "while") == 2
