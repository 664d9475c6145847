"""Leaves that are sharded over devices get the noise of whole ones, and nothing is sent for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nso_jax import noise
from tests.devices.meshes import COLLECTIVES, P, mesh_of
from tests.test_noise import draw


def test_sharded_leaves_get_the_same_noise(key):
    mesh = mesh_of(8)
    whole = {"w": jnp.zeros((16, 3))}
    sharded = jax.device_put(whole, jax.NamedSharding(mesh, P("data")))
    np.testing.assert_array_equal(jax.jit(draw)(key, whole)["w"], jax.jit(draw)(key, sharded)["w"])


@pytest.mark.parametrize("sampler", [noise.normal, noise.rademacher, noise.centered_binomial])
@pytest.mark.parametrize("shape", [(512, 64), (64, 24), (24, 64), (40,), (8, 8), (3, 3, 16, 40)])
def test_noise_for_sharded_leaves_needs_no_communication(key, sampler, shape):
    mesh = mesh_of(8)
    whole = jax.jit(functools.partial(draw, sampler=sampler))(key, jnp.zeros(shape))
    for axis, size in enumerate(shape):
        if size % 8 == 0:
            spec = P(*[None] * axis, "data")
            leaf = jax.device_put(jnp.zeros(shape), jax.NamedSharding(mesh, spec))
            add = jax.jit(lambda key, w: noise.perturb(w, draw(key, w, sampler=sampler)))
            program = add.lower(key, leaf).compile().as_text()
            assert not any(collective in program for collective in COLLECTIVES)
            np.testing.assert_array_max_ulp(np.asarray(add(key, leaf)), np.asarray(whole), 4)
