"""Many devices and large batches: fresh noise for each part of a batch, and one all-reduce per step."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nso_jax import gradients
from nso_jax._axes import Axes, AxisName, axes_of, check_axes
from nso_jax._callers import takes_batch, unwrapped
from nso_jax._calls import named_after
from nso_jax._checks import (
    PyTree,
    as_key,
    broadcast_prefix,
    check_flag,
    check_function,
    check_no_nnx,
    describe,
    is_inexact,
)
from nso_jax._parts import (
    Batch,
    Parts,
    Weight,
    batch_numbers,
    check_whole,
    fold_keys,
    select_batch,
)

__all__ = ["microbatch", "value_and_grad"]


def microbatch(
    fn: Callable[..., PyTree],
    num_microbatches: int,
    *,
    batch_argnums: int | Sequence[int] = (1,),
    weight: Weight | None = None,
    aux: PyTree = "mean",
    axis_name: AxisName | None = None,
    independent_draws: bool = True,
) -> Callable[..., PyTree]:
    """Splits the batch into m parts, each with noise of its own, and averages what `fn` gives for them.

        g = sum_i w_i g(key_i, W, part i) / sum_i w_i,    key_i = jax.random.split(key, m)[i]

    The cost in FLOPs is that of one `fn` for the whole batch. The variance that the noise gives the estimate
    is divided by m, or by less where the parts' examples differ in what noise does to them; the memory for
    activations is divided by m, as the parts follow one another.

    A loss that is a mean over examples is the mean over parts of the same size. One over tokens, or over the
    examples that a mask leaves, is the mean weighted by how many each part has: say so with `weight`. Batch
    normalization has the statistics of B/m examples, so keep parts at the batch size that the network was
    tuned for, 32 or more. For NNX modules, whose state moves with each part, there is
    `nso_jax.nnx.microbatch`.

    Args:
      fn: `fn(key, *args, **kwargs)`, a function of this library such as `nso_jax.value_and_grad` gives, or
        any other that returns a pytree.
      num_microbatches: m, a static int >= 1; with 1, `fn` gets the key and the batch as they are.
      batch_argnums: which of `args` carry examples along the leading axis of every leaf, counted as for
        `fun`: 0 is the params and 1, the default, what follows them. Part i has the examples i, i + m,
        i + 2m, ..., so that a batch sharded over devices stays on them. Keyword arguments are never split.
        Of a typed PRNG key among the others, as for dropout, part i gets `jax.random.fold_in(key, i)`.
      weight: w, how much the loss of a part counts: a function of the arguments of `fn` without the key, such
        as `lambda params, x, mask: mask.sum()` for a loss that divides by that count. A part of weight 0 does
        not count at all, whatever it gives. The default, None, counts all parts alike.
      aux: for an `fn` that returns `((value, aux), grads)`, what becomes of its auxiliary output: "mean" as
        for all else; "sum" adds up the parts, for counts and numbers of correct predictions; "concatenate"
        puts the entries of the examples in the order of the batch. A prefix pytree of it mixes them. For
        "stack" and "clean", which an `fn` of `nso_jax.value_and_grad` may have been given, it is "mean".
      axis_name: inside `shard_map` or `pmap`: axes to average over, once, in the end; "sum" sums over them,
        and what is concatenated stays on its device. Leave it out of `fn`, which would average after each
        part.
      independent_draws: with `axis_name`, whether each device folds its index into the key.

    Returns:
      A function with the arguments of `fn` that returns what `fn` does: inexact leaves are averaged, in
      float32 at least, and others are those of the first part, where `aux` says nothing else. Parts that all
      have weight 0 give NaN.

    Raises:
      TypeError: an argument has the wrong type, or a batch argument is missing or has no leading axis.
      ValueError: m is below 1 or does not divide the batch, the leaves of the batch differ in length, `aux`
        is unknown, or a leaf to concatenate has not one entry for each example.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import nso_jax
      >>> from nso_jax import parallel
      >>> loss = lambda w, x: jnp.mean((x @ w) ** 2)
      >>> fn = parallel.microbatch(nso_jax.value_and_grad(loss, sigma=0.1), 4)
      >>> value, grad = jax.jit(fn)(jax.random.key(0), jnp.ones(3), jnp.ones((32, 3)))
      >>> grad.shape
      (3,)

      A mean over the examples that a mask leaves, 1 of the first part and 4 of the second:

      >>> masked = lambda w, x, mask: jnp.sum(mask * (x @ w) ** 2) / jnp.sum(mask)
      >>> x, mask = jnp.arange(8.0)[:, None], jnp.array([1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0])
      >>> fn = nso_jax.value_and_grad(masked, sigma=0.0)
      >>> fn = parallel.microbatch(fn, 2, batch_argnums=(1, 2), weight=lambda w, x, mask: mask.sum())
      >>> print(fn(jax.random.key(0), jnp.ones(1), x, mask)[0])  # (0 + 1 + 9 + 25 + 49) / 5
      16.8
    """
    check_function("fn", fn, "a function fn(key, *args)")
    parts = Parts(num_microbatches, weight, aux, Axes(axis_name, independent_draws))
    argnums = batch_numbers(batch_argnums)

    def microbatched(key: jax.Array, /, *args: Any, **kwargs: Any) -> PyTree:
        check_no_nnx("args", (args, kwargs), "nso_jax.nnx.microbatch")
        fixed, batch = select_batch(args, argnums, num_microbatches)
        return parts.call(fn, as_key(key), fixed, batch, kwargs)

    return microbatched


def value_and_grad(
    fun: Callable[..., Any],
    *,
    mesh: jax.sharding.Mesh,
    method: Callable[..., Any] = gradients.value_and_grad,
    axis_name: AxisName = "data",
    batch_argnums: int | Sequence[int] = (1,),
    num_microbatches: int = 1,
    weight: Weight | None = None,
    aux: PyTree = "mean",
    independent_draws: bool = True,
    **options: Any,
) -> Callable[..., tuple[Any, PyTree]]:
    """Like `nso_jax.value_and_grad`, for plain `jax.jit` on many devices: one all-reduce per step, for any k.

        g = sum_d w_d g(fold_in(key, d), W, the examples of device d) / sum_d w_d

    Left to itself, the compiler sums the gradients of each of the 2k evaluations over the devices. Here a
    `shard_map` over `axis_name` keeps them local until one mean in the end, and each device draws for
    itself: the estimate averages k * D draws for the price of k. Other axes of the mesh stay the compiler's:
    params may be sharded over them, and get the noise that they would get on one device.

    Outside a jit it is compiled once for arguments of the same form, as by `jax.jit`: what `fun` closes over
    is as it was then.

    Args:
      fun: as in `nso_jax.value_and_grad`. It sees the examples of one device, so batch normalization has
        statistics per device. It may have collectives over `axis_name` inside.
      mesh: the mesh of devices, as of `jax.make_mesh`.
      method: `nso_jax.value_and_grad`, or one of its rivals in `nso_jax.sharpness`, with which each device
        climbs the loss of its own examples, or with `global_ascent=True` all climb together. NNX modules have
        `nso_jax.nnx.value_and_grad(..., mesh=mesh)`.
      axis_name: its axis, or axes, over which the batch is sharded; params are not.
      batch_argnums: which arguments of `fun` carry examples along the leading axis of every leaf. Of a typed
        PRNG key among the others, as for dropout, device d gets `jax.random.fold_in(key, d)` if
        `independent_draws`; of a legacy one all get the same.
      num_microbatches: m, parts that each device splits its examples into, with fresh noise for each; see
        `microbatch`.
      weight: how much the loss of a device, or of a part, counts, a function of the arguments of `fun`; see
        `microbatch`. For a loss over padded batches, `lambda params, x, mask: mask.sum()`. The default, None,
        counts all alike.
      aux: what becomes of auxiliary output. Over the evaluations it is as in `nso_jax.value_and_grad`. Over
        devices and microbatches "sum" adds up, "concatenate" puts the entries of the examples in the order of
        the batch, sharded as it is, and all others average.
      independent_draws: whether each device folds its index into the key.
      **options: the other arguments of the method, such as `sigma`.

    Returns:
      `fn(key, *args, **kwargs)` as of `nso_jax.value_and_grad`, its results the same on all devices along
      `axis_name` but for what is concatenated: inexact leaves averaged, others those of the first device,
      where `aux` says nothing else.

    Raises:
      TypeError: as the method and `microbatch`, `mesh` is not a mesh, or `method` is that of `nso_jax.nnx`.
      ValueError: as there, `axis_name` is not in the mesh, the devices do not divide the batch, an argument
        with examples is differentiated, or `weight` is given with `global_ascent`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from nso_jax import parallel
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> loss = lambda w, x: jnp.mean((x @ w) ** 2)
      >>> fn = jax.jit(parallel.value_and_grad(loss, sigma=0.1, mesh=mesh))
      >>> value, grad = fn(jax.random.key(0), jnp.ones(3), jnp.ones((32, 3)))
      >>> grad.shape
      (3,)
    """
    _check_method(method, weight, options)
    axes = _mesh_axes(mesh, axis_name)
    num_devices = math.prod(mesh.shape[axis] for axis in axes)
    argnums = batch_numbers(batch_argnums)
    # Over an axis of one device XLA cannot average what the compiler splits over others, and need not.
    averaged = tuple(axis for axis in axes if mesh.shape[axis] > 1)
    together = bool(averaged and options.get("global_ascent"))  # then the method itself averages
    has_aux = bool(options.get("has_aux"))
    aux = aux if has_aux else "mean"
    options |= {} if aux == "mean" else {"aux": aux}
    if "global_ascent" in options:
        options |= {"axis_name": averaged} if together else {"global_ascent": False}
    options |= {"batch_argnums": argnums} if takes_batch(method) else {}
    local = method(fun, **options)
    # The key is folded here, the same for one device and for many.
    along = Axes(None if together or not averaged else averaged, independent_draws=False)
    parts = Parts(num_microbatches, weight, aux, along)
    check_flag("independent_draws", independent_draws)

    def new_program(form: _Form) -> Callable[..., tuple[Any, PyTree]]:
        def on_device(key: jax.Array, arrays: dict[int, jax.Array]) -> PyTree:
            fixed, kwargs, batch = form.joined(arrays)
            if independent_draws:
                index = jax.lax.axis_index(axes)
                fixed, kwargs = fold_keys((fixed, kwargs), index)
                key = key if together else jax.random.fold_in(key, index)
            out = parts.call(local, key, fixed, batch, kwargs)
            return _from_first(out, averaged, parts.modes) if averaged else out

        specs = jax.tree.map(lambda mode: jax.P(axes) if mode == "concatenate" else jax.P(), aux)
        mapped = jax.shard_map(
            on_device,
            mesh=mesh,
            axis_names=set(axes),
            in_specs=(jax.P(), form.specs(axes)),
            out_specs=((jax.P(), specs), jax.P()) if has_aux else jax.P(),
            check_vma=False,  # else a loss that scans from zeros, the same on all devices, would fail
        )
        # Outside a jit, shard_map over some of the axes only does not work without check_vma.
        return jax.jit(mapped)

    kept_program = functools.lru_cache(maxsize=16)(new_program)

    def value_and_grad_fn(key: jax.Array, /, *args: Any, **kwargs: Any) -> tuple[Any, PyTree]:
        key = as_key(key)
        fixed, batch = select_batch(args, argnums, num_microbatches, num_devices)
        check_whole(batch_numbers(options.get("argnums", 0), "argnums"), batch, len(args))
        form, arrays = _taken_apart(fixed, kwargs, batch)
        # Within a trace it is compiled with what is around it, and what `fun` closes over may belong there.
        # (In that of jit new arrays are tracers.)
        traced = any(isinstance(x, jax.core.Tracer) for x in [jnp.zeros(()), key, *arrays.values()])
        program = (kept_program if form.is_hashable and not traced else new_program)(form)
        return program(key, _resharded(arrays, mesh, axes, form.specs(axes)))

    return named_after(fun, value_and_grad_fn, "Value and gradient, averaged over the devices of a mesh,")


class _Form(NamedTuple):
    """The arguments of a loss without their arrays."""

    treedef: Any
    of_batch: tuple[bool, ...]  # for each leaf
    values: tuple[tuple[int, type, Any], ...]  # Python values, which stay what they are; 1 is not True

    @property
    def is_hashable(self) -> bool:
        try:
            hash(self)
        except TypeError:
            return False
        return True

    def specs(self, axes: tuple[Any, ...]) -> dict[int, jax.P]:
        """The partition specs of the arrays."""
        values = {i for i, _, _ in self.values}
        return {
            i: jax.P(axes) if flag else jax.P() for i, flag in enumerate(self.of_batch) if i not in values
        }

    def joined(self, arrays: dict[int, jax.Array]) -> Any:
        """The arguments with these arrays."""
        leaves = arrays | {i: value for i, _, value in self.values}
        return jax.tree.unflatten(self.treedef, [leaves[i] for i in range(len(leaves))])


def _taken_apart(fixed: list[Any], kwargs: dict[str, Any], batch: Batch) -> tuple[_Form, dict[int, Any]]:
    """The arguments as their form and their arrays."""
    leaves, treedef = jax.tree.flatten((fixed, kwargs, batch))
    arrays = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | np.ndarray)}
    of_batch = broadcast_prefix("batch", (False, False, True), (fixed, kwargs, batch))
    values = tuple((i, type(leaf), leaf) for i, leaf in enumerate(leaves) if i not in arrays)
    return _Form(treedef, tuple(of_batch), values), arrays


def _resharded(tree: PyTree, mesh: Any, axes: tuple[Any, ...], specs: PyTree) -> PyTree:
    """The arrays where `shard_map` expects them; with explicit axes it does not move them itself."""
    if jax.sharding.AxisType.Explicit not in mesh.axis_types:
        return _spread(tree, mesh, specs)
    whole = set(axes) == set(mesh.axis_names)  # else params may be sharded over the other axes

    def place(x: Any, spec: jax.P) -> Any:
        return jax.reshard(x, jax.NamedSharding(mesh, spec)) if whole or axes_of(spec) else x

    return jax.tree.map(place, tree, specs)


def _spread(tree: PyTree, mesh: Any, specs: PyTree) -> PyTree:
    """The arrays, those that are on one device spread over the mesh.

    There the results will be too, with which the next call would be compiled again if this one's were not.
    """
    if jax.process_count() > 1 or isinstance(mesh, jax.sharding.AbstractMesh):
        return tree

    def place(x: Any, spec: jax.P) -> Any:
        if isinstance(x, jax.core.Tracer):
            return x
        if isinstance(x, jax.Array) and len(x.sharding.device_set) > 1:
            return x
        return jax.device_put(x, jax.NamedSharding(mesh, spec))

    return jax.tree.map(place, tree, specs)


def _from_first(tree: PyTree, axis_name: AxisName, modes: PyTree) -> PyTree:
    """What the first device has, for leaves that have no mean; the others are the same on all devices."""

    def from_first(x: jax.Array) -> jax.Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(from_first(jax.random.key_data(x)), impl=jax.random.key_impl(x))
        own = jnp.where(jax.lax.axis_index(axis_name) == 0, x, jnp.zeros_like(x))
        return jax.lax.psum(own.astype(jnp.int32) if x.dtype == bool else own, axis_name).astype(x.dtype)

    leaves, treedef = jax.tree.flatten(tree)
    mode_of = broadcast_prefix("aux", modes, tree)
    return jax.tree.unflatten(
        treedef,
        [
            x if is_inexact(x) or mode in ("sum", "concatenate") else from_first(x)
            for x, mode in zip(leaves, mode_of, strict=True)
        ],
    )


def _check_method(method: Any, weight: Any, options: dict[str, Any]) -> None:
    check_function("method", method)
    if getattr(unwrapped(method), "__module__", "") == "nso_jax.nnx":
        raise TypeError(
            "method: NNX modules have state of their own, which this would lose; call "
            "nso_jax.nnx.value_and_grad(fun, ..., mesh=mesh) instead."
        )
    if weight is not None and options.get("global_ascent"):
        raise ValueError(
            "weight: with global_ascent devices climb the mean of their losses; let fun divide a "
            "jax.lax.psum of its losses by one of its counts, over axis_name, and leave weight out."
        )


def _mesh_axes(mesh: Any, axis_name: AxisName) -> tuple[Any, ...]:
    if not isinstance(mesh, jax.sharding.Mesh | jax.sharding.AbstractMesh):
        raise TypeError(f"mesh: expected a mesh such as jax.make_mesh gives, got {describe(mesh)}.")
    check_axes(axis_name)
    axes = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    for axis in axes:
        if axis not in mesh.axis_names:
            raise ValueError(f"axis_name: {axis!r} is none of the mesh's axes {mesh.axis_names}.")
    return axes
