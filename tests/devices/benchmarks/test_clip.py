"""A contrastive step over the whole batch of several devices is that of one device."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

import nso_jax.nnx
from benchmarks.tasks import clip
from benchmarks.tasks.bert import Tokens
from benchmarks.tasks.clip import Pairs
from benchmarks.tasks.data import Examples
from nso_jax import sharpness
from tests.devices.meshes import mesh_of

METHODS = {
    "plain": ({"sigma": 0.0}, {}),
    # The devices' noise is to be that of the one.
    "nso": ({"sigma": 0.02}, {"independent_draws": False}),
    "sam": ({"method": sharpness.sam, "rho": 0.1}, {"global_ascent": True}),
}


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 300, (16, 8)).astype(np.int32)
    mask = (np.arange(8) < rng.integers(2, 9, (16, 1))).astype(np.int32)
    images = rng.integers(0, 256, (16, 8, 8, 3), np.uint8)
    return Examples(Pairs(images, Tokens(tokens, mask)), np.arange(16))


@pytest.fixture
def model():
    return clip.small_clip(3, 300, 8, widths=(8,), width=16, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", METHODS)
def test_a_step_on_eight_devices_is_that_of_one(name, batch, model):
    options, on_many = METHODS[name]
    key = jax.random.key(1)
    value, grads = nnx.jit(nso_jax.nnx.value_and_grad(clip.info_nce, **options))(key, model, batch)
    loss = functools.partial(clip.info_nce, axis_name="data")
    fn = nso_jax.nnx.value_and_grad(loss, mesh=mesh_of(8), **options, **on_many)
    values, many = nnx.jit(fn)(key, model, batch)
    np.testing.assert_allclose(values, value, rtol=1e-6)
    scale = max(float(abs(g).max()) for g in jax.tree.leaves(grads))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6 * scale), many, grads)


def test_without_the_other_devices_negatives_it_is_another_loss(batch, model):
    key, whole = jax.random.key(1), clip.info_nce(model, batch)
    fn = nso_jax.nnx.value_and_grad(clip.info_nce, mesh=mesh_of(8), sigma=0.0)
    assert fn(key, model, batch)[0] < whole - 1
