"""Meshes of eight devices, ways to map a function over them, and a loss to map."""

import jax
import jax.numpy as jnp

P = jax.P
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
MAPS = ("shard_map", "shard_map unchecked", "pmap", "vmap")

PARAMS = {"w": jnp.array([1.0, -2.0, 0.5]), "b": jnp.ones(2)}
XS = jnp.linspace(-1, 1, 8 * 4 * 3).reshape(32, 3)


def quartic(params, x):
    return jnp.mean((x @ params["w"]) ** 4) + jnp.sum(params["b"] ** 4)


def quartic_and_sum(params, x):
    return quartic(params, x), x.sum()


def mesh_of(*sizes, names=("data", "model"), kind=jax.sharding.AxisType.Auto):
    return jax.make_mesh(sizes, names[: len(sizes)], axis_types=(kind,) * len(sizes))


def on_devices(fn, how):
    """`fn(key, params, batch)` with an eighth of the batch on each device; what it returns is the same on all."""
    if how.startswith("shard_map"):
        specs = {"in_specs": (P(), P(), P("data")), "out_specs": P(), "check_vma": how == "shard_map"}
        return jax.jit(jax.shard_map(fn, mesh=mesh_of(8), **specs))
    mapped = (jax.pmap if how == "pmap" else jax.vmap)(fn, axis_name="data", in_axes=(None, None, 0))

    def on_first(key, params, batch):
        split = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), batch)
        return jax.tree.map(lambda x: x[0], mapped(key, params, split))

    return on_first


def of_device(batch, i, count=8):
    """The part of a batch that the i-th of the devices has."""
    return jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:])[i], batch)
