"""What devices send one another in a training step: the mean of the gradient and the loss, and nothing else."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nso_jax
from nso_jax import noise, parallel, sharpness
from tests.devices.meshes import COLLECTIVES, P, mesh_of
from tests.devices.test_parallel import token_count, token_loss, tokens
from tests.test_parallel import SIGMA, loss, make_batch, make_params


def test_weights_send_one_number_more(key):
    params, (x, mask) = make_params(), tokens()
    options = {"sigma": SIGMA, "mesh": mesh_of(8), "batch_argnums": (1, 2)}
    plain = reduced_bytes(parallel.value_and_grad(token_loss, **options), key, params, x, mask)
    weighted = parallel.value_and_grad(token_loss, weight=token_count, **options)
    assert reduced_bytes(weighted, key, params, x, mask) == {"all-reduce": plain["all-reduce"] + 4}


def reduced_bytes(fn, *args):
    """Bytes of all collectives in the compiled program, by kind."""
    text = jax.jit(fn).lower(*args).compile().as_text()
    found = {}
    for shapes, kind in re.findall(rf"= (\(?[^=]*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", text):
        sizes = [
            int(np.prod([int(n) for n in dims.split(",") if n])) * np.dtype(dtype).itemsize
            for dtype, dims in (
                ({"f32": "f4", "s32": "i4", "pred": "?", "u32": "u4"}[d], s)
                for d, s in re.findall(r"\b(f32|s32|u32|pred)\[([\d,]*)\]", shapes)
            )
        ]
        found[kind] = found.get(kind, 0) + sum(sizes)
    return found


@pytest.mark.parametrize(("num_samples", "count"), [(1, 1), (4, 1), (8, 1), (1, 4)])
def test_a_step_sends_what_a_plain_one_does(key, num_samples, count):
    mesh, params = mesh_of(8), make_params()
    batch = jax.device_put(make_batch(), jax.NamedSharding(mesh, P("data")))
    replicated = jax.device_put(params, jax.NamedSharding(mesh, P()))
    scalar_loss = lambda *args: loss(*args)[0]  # noqa: E731
    plain = reduced_bytes(jax.value_and_grad(scalar_loss), replicated, batch)
    fn = parallel.value_and_grad(
        scalar_loss, sigma=SIGMA, mesh=mesh, num_samples=num_samples, num_microbatches=count
    )
    size = 4 * (1 + sum(w.size for w in params.values()))  # the loss and the gradient
    assert plain == reduced_bytes(fn, key, replicated, batch) == {"all-reduce": size}


@pytest.mark.parametrize("sampler", [noise.normal, noise.rademacher, noise.centered_binomial])
def test_noise_adds_no_collective_to_a_step_with_sharded_params(key, sampler):
    mesh = mesh_of(8, names=("data",))
    split = lambda x, *spec: jax.device_put(x, jax.NamedSharding(mesh, P(*spec)))  # noqa: E731
    params = {"w": split(jnp.ones((64, 32)), "data"), "v": split(jnp.ones((32, 16)), None, "data")}
    x = split(jnp.ones((16, 64)), "data")

    def collectives(sampler):
        fn = nso_jax.value_and_grad(
            lambda p, x: jnp.mean((jnp.tanh(x @ p["w"]) @ p["v"]) ** 2), sigma=SIGMA, sampler=sampler
        )
        return reduced_bytes(fn, key, params, x)

    silent = collectives(lambda key, shape, dtype: jnp.ones(shape, dtype))
    assert silent
    assert collectives(sampler) == silent


def test_rivals_climb_together_on_a_mesh(key):
    """Against SAM of the whole batch on one device."""
    params, batch = make_params(), make_batch()
    expected = sharpness.sam(loss, rho=0.1, has_aux=True)(key, params, batch)
    fn = parallel.value_and_grad(
        loss, mesh=mesh_of(8), method=sharpness.sam, rho=0.1, has_aux=True, global_ascent=True
    )
    (value, aux), grads = jax.jit(fn)(key, params, batch)
    chex.assert_trees_all_close((value, grads), (expected[0][0], expected[1]), rtol=2e-5, atol=1e-6)
    chex.assert_trees_all_close(aux["error"], expected[0][1]["error"], rtol=2e-5)
    assert reduced_bytes(fn, key, params, batch).keys() == {"all-reduce"}
