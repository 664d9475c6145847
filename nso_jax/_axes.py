"""Axes of `shard_map`, `pmap` or `vmap`: everything stays local along them until one mean in the end."""

from collections.abc import Hashable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from nso_jax import noise
from nso_jax._checks import PyTree, broadcast_prefix, check_mapped, describe, dtype_of, is_inexact

AxisName = Hashable | tuple[Hashable, ...]


def localize(
    tree: PyTree, key: jax.Array, axis_name: AxisName | None, *, independent_draws: bool
) -> tuple[PyTree, jax.Array]:
    """Each device's own copy of a pytree and its own key: what `mean_over_axis` joins in the end.

    With a copy that the devices share, JAX would sum gradients over them.
    """
    axes = as_tuple(axis_name)
    check_mapped("axis_name", axes)

    def own_if_inexact(x: Any) -> Any:
        dtype = dtype_of(x)
        return _own(x, axes) if dtype is not None and jnp.issubdtype(dtype, jnp.inexact) else x

    if axes and independent_draws:
        key = jax.random.fold_in(key, jax.lax.axis_index(axes))
    key = jax.random.wrap_key_data(_own(jax.random.key_data(key), axes), impl=jax.random.key_impl(key))
    return jax.tree.map(own_if_inexact, tree), key


def localize_like(tree: PyTree, values: PyTree) -> PyTree:
    """Each device's own copy of arrays, along the axes of `shard_map` on which JAX knows values to differ."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    axes = [axis for axis in manual if any(_varies(x, axis) for x in jax.tree.leaves(values))]
    return jax.tree.map(lambda x: _own(x, axes), tree)


def _own(x: Any, axes: Iterable[Hashable]) -> Any:
    for axis in axes:
        x = x if _varies(x, axis) else jax.lax.pcast(x, axis, to="varying")
    return x


def mean_over_axis(tree: PyTree, axis_name: AxisName | None) -> PyTree:
    """The mean over devices of the inexact leaves; the others stay as they are on each device."""
    if axis_name is None:
        return tree
    leaves, treedef = jax.tree.flatten(tree)
    inexact = [i for i, leaf in enumerate(leaves) if is_inexact(leaf)]
    for i, mean in zip(inexact, jax.lax.pmean([leaves[i] for i in inexact], axis_name), strict=True):
        leaves[i] = mean
    return jax.tree.unflatten(treedef, leaves)


def other_axes(key: jax.Array, axis_name: AxisName | None) -> list[Hashable]:
    """The axes of `shard_map` along which the key is the same, but those that are averaged over."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    data = jax.random.key_data(key)
    return [axis for axis in manual if axis not in as_tuple(axis_name) and not _varies(data, axis)]


def leaf_specs(params: PyTree, param_specs: PyTree, axes: list[Hashable]) -> PyTree:
    """A partition spec for each leaf: the one given, or how JAX knows the axes to split it, in any order."""
    if param_specs is None:
        return jax.tree.map(lambda x: jax.P(tuple(axis for axis in axes if _varies(x, axis))), params)
    specs = broadcast_prefix("param_specs", param_specs, params)
    check_mapped("param_specs", {axis for spec in specs for axis in noise.axes_of(spec)})
    return jax.tree.unflatten(jax.tree.structure(params), specs)


def shared(tree: PyTree, axes: list[Hashable]) -> list[Any]:
    """The leaves that the axes do not split: what waits for others would differ along them itself."""
    return [x for x in jax.tree.leaves(tree) if not any(_varies(x, axis) for axis in axes)]


def check_axes(axis_name: Any, param_specs: PyTree = None) -> None:
    """Raises TypeError for no axis name or partition spec, and ValueError for a spec that has `axis_name`."""
    # JAX takes an int for the number of an array's axis.
    if not all(isinstance(axis, Hashable) and not isinstance(axis, int) for axis in as_tuple(axis_name)):
        raise TypeError(
            f"axis_name: expected the name of a mapped axis, or a tuple of names, got {describe(axis_name)}."
        )
    for spec in jax.tree.leaves(param_specs):
        if not isinstance(spec, jax.P):
            raise TypeError(f"param_specs: expected partition specs, got {describe(spec)}.")
        if set(noise.axes_of(spec)) & set(as_tuple(axis_name)):
            raise ValueError(
                f"param_specs: {spec} splits params over axis_name={axis_name!r}, over which their gradients "
                "are averaged; only whole params, or other axes, can be."
            )


def as_tuple(axis_name: AxisName | None) -> tuple[Hashable, ...]:
    """The axes as a tuple, which is empty for None."""
    if isinstance(axis_name, tuple):
        return axis_name
    return () if axis_name is None else (axis_name,)


def _varies(x: Any, axis: Hashable) -> bool:
    """Whether JAX knows that `x` differs along a mapped axis; without `check_vma` it knows of nothing."""
    try:
        jax.lax.pcast(x, axis, to="varying")
    except ValueError:
        return True
    return False
