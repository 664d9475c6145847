"""A training run on eight devices, in one process or as one of two: `two_processes.py INDEX PORT OUTPUT`."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import save_file

from nso_jax import parallel


def train():
    """Ten steps of a small network, the batch sharded over all devices of all processes."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded, replicated = (jax.NamedSharding(mesh, spec) for spec in (jax.P("data"), jax.P()))

    def everywhere(x, sharding):
        """From what every process has, the slices that its own devices need."""
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    def loss(params, x, y):
        return jnp.mean((jnp.tanh(x @ params["w1"]) @ params["w2"] - y) ** 2)

    rng = np.random.default_rng(0)
    params = {"w1": rng.normal(size=(5, 16)), "w2": rng.normal(size=(16, 1))}
    params = jax.tree.map(lambda w: everywhere(w.astype(np.float32), replicated), params)
    x = rng.normal(size=(10, 64, 5)).astype(np.float32)
    y = np.sin(x.sum(-1, keepdims=True))
    value_and_grad = parallel.value_and_grad(
        loss, sigma=0.1, mesh=mesh, batch_argnums=(1, 2), num_samples=2, num_microbatches=2
    )
    optimizer = optax.sgd(0.1, momentum=0.9)

    @jax.jit
    def step(params, opt_state, key, x, y):
        value, grads = value_and_grad(key, params, x, y)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    opt_state, values = optimizer.init(params), []
    for i in range(10):
        key = jax.random.fold_in(jax.random.key(0), i)
        batch = [everywhere(part[i], sharded) for part in (x, y)]
        params, opt_state, value = step(params, opt_state, key, *batch)
        values.append(np.asarray(value))
    return {"values": np.stack(values), **{name: np.asarray(w) for name, w in params.items()}}


def main(index, port, output):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(index))
    assert (jax.device_count(), jax.local_device_count()) == (8, 4)
    save_file(train(), output)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
