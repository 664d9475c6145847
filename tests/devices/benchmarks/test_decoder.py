"""A decoder whose weights are split over devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.tasks import decoder
from benchmarks.tasks.decoder import Batch
from tests.devices.benchmarks.test_pods import TINY
from tests.devices.meshes import P, mesh_of


@pytest.mark.parametrize("tensor", [1, 2])
def test_sharded_and_whole_params_give_one_gradient(tensor):
    params = decoder.init(jax.random.key(0), TINY)
    batch = Batch(*jax.random.randint(jax.random.key(1), (2, 8, 16), 0, TINY.vocabulary))
    mesh = mesh_of(8 // tensor, tensor, names=("data", "tensor"))
    specs = decoder.partition(params, "data", "tensor")
    placed = jax.tree.map(lambda w, spec: jax.device_put(w, jax.NamedSharding(mesh, spec)), params, specs)
    assert {w.sharding.num_devices for w in jax.tree.leaves(placed)} == {8}
    split = jax.NamedSharding(mesh, P("data"))
    loss = functools.partial(decoder.loss, size=TINY, dtype=jnp.float32)
    whole = jax.jit(jax.value_and_grad(loss))(params, batch)
    sharded = jax.jit(jax.value_and_grad(functools.partial(loss, sharding=split)))(
        placed, jax.device_put(batch, split)
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), sharded, whole)
