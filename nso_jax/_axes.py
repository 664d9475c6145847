"""Axes of `shard_map`, `pmap` or `vmap`: everything stays local along them until one mean in the end."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, Literal

from nso_jax._checks import (
    PyTree,
    broadcast_prefix,
    check_flag,
    check_mapped,
    describe,
    dtype_of,
    is_inexact,
)
from nso_jax._precision import widen
from nso_jax._tracing import inner_jaxprs, varies

AxisName = Hashable | tuple[Hashable, ...]

# Collectives whose results differ between devices, as do those of a loss that is each device's own.
_VARYING = {
    "all_gather", "all_to_all", "axis_index", "pbroadcast", "pcast", "ppermute", "psum_scatter",
    "pvary", "reduce_scatter",
}  # fmt: skip

# The axes along which the params that a loss is evaluated at are copies, one for each device.
_COPIED: contextvars.ContextVar[tuple[Hashable, ...]] = contextvars.ContextVar("copied", default=())


@dataclasses.dataclass(frozen=True, eq=False)
class Axes:
    """The mapped axes that results are averaged over, and those that split the params.

    Attributes:
      axis_name: what is averaged over: an axis, or a tuple of axes, or None.
      independent_draws: whether devices along them draw for themselves.
      param_specs: how other axes split the params: partition specs, a prefix pytree; None if JAX knows.
    """

    axis_name: AxisName | None = None
    independent_draws: bool = True
    param_specs: PyTree = None

    def __post_init__(self) -> None:
        """Raises TypeError or ValueError, naming the argument and its value, for what cannot be."""
        check_axes(self.axis_name, self.param_specs)
        check_flag("independent_draws", self.independent_draws)

    def localize(self, tree: PyTree, key: jax.Array) -> tuple[PyTree, jax.Array]:
        """Each device's own copy of a pytree and its own key: what `combine` joins in the end.

        With a copy that the devices share, JAX would sum gradients over them.
        """
        axes = as_tuple(self.axis_name)
        check_mapped("axis_name", axes)
        tracked = _tracked(axes)

        def own_if_inexact(x: Any) -> Any:
            dtype = dtype_of(x)
            return _own(x, tracked) if dtype is not None and jnp.issubdtype(dtype, jnp.inexact) else x

        if axes and self.independent_draws:
            key = jax.random.fold_in(key, jax.lax.axis_index(axes))
        data = _own(jax.random.key_data(key), tracked)
        key = jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))
        return jax.tree.map(own_if_inexact, tree), key

    @contextlib.contextmanager
    def copies(self) -> Iterator[None]:
        """What is traced inside evaluates losses at what `localize` made; `own_loss` needs to know."""
        token = _COPIED.set((*_COPIED.get(), *as_tuple(self.axis_name)))
        try:
            yield
        finally:
            _COPIED.reset(token)

    def specs(self, params: PyTree, key: jax.Array) -> PyTree:
        """A partition spec for each leaf: the one given, or how JAX knows the axes to split it, in any order.

        Axes along which the key differs, so that draws do, and those averaged over do not count.
        """
        if self.param_specs is None:
            manual = jax.sharding.get_abstract_mesh().manual_axes
            data = jax.random.key_data(key)
            axes = [a for a in manual if a not in as_tuple(self.axis_name) and not varies(data, a)]
            return jax.tree.map(lambda x: jax.P(tuple(axis for axis in axes if varies(x, axis))), params)
        specs = broadcast_prefix("param_specs", self.param_specs, params)
        check_mapped("param_specs", {axis for spec in specs for axis in axes_of(spec)})
        return jax.tree.unflatten(jax.tree.structure(params), specs)

    def combine(self, tree: PyTree, modes: PyTree = "mean", weight: Any = None) -> PyTree:
        """Joins what the devices have: leaves of mode "mean" are averaged and those of mode "sum" summed.

        Leaves of another mode, and those of mode "mean" that are not inexact, stay as they are on each
        device.
        With a `weight`, a number for each device, means are weighted, and where it is 0 anything may stand.
        """
        if self.axis_name is None:
            return tree
        leaves, treedef = jax.tree.flatten(tree)
        mode_of = jax.tree.leaves(jax.tree.broadcast(modes, tree))
        means = [i for i, leaf in enumerate(leaves) if mode_of[i] == "mean" and is_inexact(leaf)]
        sums = [i for i, leaf in enumerate(leaves) if mode_of[i] == "sum"]
        averaged = _weighted_mean([leaves[i] for i in means], self.axis_name, weight)
        for i, mean in zip(means, averaged, strict=True):
            leaves[i] = mean
        for i, total in zip(sums, jax.lax.psum([leaves[i] for i in sums], self.axis_name), strict=True):
            leaves[i] = total
        return jax.tree.unflatten(treedef, leaves)


def localize_like(tree: PyTree, values: PyTree) -> PyTree:
    """Each device's own copy of arrays, along the axes of `shard_map` on which JAX knows values to differ."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    axes = [axis for axis in manual if any(varies(x, axis) for x in jax.tree.leaves(values))]
    return jax.tree.map(lambda x: _own(x, axes), tree)


def own_loss(value: Any) -> Any:
    """A loss as each device's own, even if it ends in a sum over the devices that have copies of the params.

    JAX takes a value that all devices share for one loss, and divides its derivative among the copies. As
    many losses as there are copies, averaged in the end, have the derivative of the one.
    """
    return _own(value, _tracked(_COPIED.get()))


def check_own_gradients(
    name: str, grad_fn: Callable[[PyTree], PyTree], params: PyTree, axis_name: AxisName | None
) -> None:
    """Raises ValueError if gradients are of a loss that devices share, or might be.

    Of copies of the params, that is, for which JAX knows (`check_vma`) that they are the devices' own.
    """
    axes = {axis for axis in as_tuple(axis_name) if any(varies(x, axis) for x in jax.tree.leaves(params))}
    if not axes:
        return
    closed = jax.make_jaxpr(grad_fn)(params)
    if _sums_over(axes, closed.jaxpr, [True] * len(closed.jaxpr.invars)):
        raise ValueError(
            f"grad_fn: its loss has a collective, such as psum or pmean, over axis_name={axis_name!r}. "
            f"jax.grad then may give {name}, at the devices' own params, but a part of the gradient. Use "
            "nso_jax.value_and_grad(loss, ..., axis_name=...), which sees the loss, or pass "
            "check_vma=False to shard_map."
        )


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
        if set(axes_of(spec)) & set(as_tuple(axis_name)):
            raise ValueError(
                f"param_specs: {spec} splits params over axis_name={axis_name!r}, over which their gradients "
                "are averaged; only whole params, or other axes, can be."
            )


def as_tuple(axis_name: AxisName | None) -> tuple[Hashable, ...]:
    """The axes as a tuple, which is empty for None."""
    if isinstance(axis_name, tuple):
        return axis_name
    return () if axis_name is None else (axis_name,)


def axes_of(spec: jax.P) -> tuple[str, ...]:
    """The mesh axes that a partition spec names."""
    entries = [entry for entry in spec if entry is not None]
    return tuple(axis for entry in entries for axis in (entry if isinstance(entry, tuple) else (entry,)))


def weighed(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`weight * x`, and 0 where the weight is 0, even if x is not finite: a mean over no examples is not."""
    return jnp.where(weight == 0, jnp.zeros((), x.dtype), weight.astype(x.dtype) * x)


def _weighted_mean(leaves: list[jax.Array], axis_name: AxisName, weight: Any) -> list[jax.Array]:
    if weight is None:
        return jax.lax.pmean(leaves, axis_name)
    wide = [widen(x) for x in leaves]
    total, sums = jax.lax.psum((weight, [weighed(x, weight) for x in wide]), axis_name)
    return [(x / total.astype(x.dtype)).astype(leaf.dtype) for x, leaf in zip(sums, leaves, strict=True)]


def _sums_over(axes: set[Hashable], jaxpr: Jaxpr, depends: list[bool]) -> bool:
    """Whether an equation joins, over some of these axes, what depends on those inputs."""
    dependent = {v for v, flag in zip(jaxpr.invars, depends, strict=True) if flag}
    for equation in jaxpr.eqns:
        flags = [not isinstance(v, Literal) and v in dependent for v in equation.invars]
        if not any(flags):
            continue
        over = [equation.params.get(name, ()) for name in ("axes", "axis_name")]
        if equation.primitive.name not in _VARYING and axes & {a for axis in over for a in as_tuple(axis)}:
            return True
        for inner in inner_jaxprs(equation):
            same = len(inner.invars) == len(flags)
            if _sums_over(axes, inner, flags if same else [True] * len(inner.invars)):
                return True
        dependent.update(equation.outvars)
    return False


def _own(x: Any, axes: Iterable[Hashable]) -> Any:
    for axis in axes:
        x = x if varies(x, axis) else jax.lax.pcast(x, axis, to="varying")
    return x


def _tracked(axes: Iterable[Hashable]) -> list[Hashable]:
    """Those axes along which JAX tracks what differs between devices: of `shard_map` with `check_vma`."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    zero = jnp.zeros(())
    return [axis for axis in axes if axis in manual and varies(jax.lax.pcast(zero, axis, to="varying"), axis)]
