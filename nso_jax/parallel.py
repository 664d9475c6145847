"""Many devices and large batches: fresh noise for each part of a batch, and one all-reduce per step."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nso_jax import _backend, gradients, noise
from nso_jax._axes import AxisName, check_axes, localize, mean_over_axis
from nso_jax._calls import as_argnums
from nso_jax._checks import (
    PyTree,
    as_key,
    broadcast_prefix,
    check_count,
    check_flag,
    check_function,
    describe,
    is_inexact,
)

__all__ = ["microbatch", "value_and_grad"]

Batch = dict[int, PyTree]  # arguments that carry examples, by their numbers


def microbatch(
    fn: Callable[..., PyTree],
    num_microbatches: int,
    *,
    batch_argnums: int | Sequence[int] = (1,),
    axis_name: AxisName | None = None,
    independent_draws: bool = True,
) -> Callable[..., PyTree]:
    """Splits the batch into m parts, each with noise of its own, and averages what `fn` gives for them.

        g = 1/m sum_i g(key_i, W, part i),    key_i = jax.random.split(key, m)[i]

    The cost in FLOPs is that of one `fn` for the whole batch. The variance that the noise gives the estimate
    is divided by m, or by less where the parts' examples differ in what noise does to them; the memory for
    activations is divided by m, as the parts follow one another.

    A loss that is a mean over examples is the mean over parts of the same size. One that is not, like a
    weighted mean or one with batch normalization, becomes the mean of what each part gives by itself: batch
    statistics are those of B/m examples, so keep parts at the batch size that the network was tuned for, 32
    or more. For NNX modules, whose state moves with each part, there is `nso_jax.nnx.microbatch`.

    Args:
      fn: `fn(key, *args, **kwargs)`, a function of this library such as `nso_jax.value_and_grad` gives, or
        any other that returns a pytree.
      num_microbatches: m, a static int >= 1; with 1, `fn` gets the key and the batch as they are.
      batch_argnums: which of `args` carry examples along the leading axis of every leaf, counted as for
        `fun`: 0 is the params and 1, the default, what follows them. Part i has the examples i, i + m,
        i + 2m, ..., so that a batch sharded over devices stays on them. Keyword arguments are never split,
        and a dropout key among the others is the same for all parts.
      axis_name: inside `shard_map` or `pmap`: axes to average over, once, in the end. Leave it out of `fn`,
        which would average after each part.
      independent_draws: with `axis_name`, whether each device folds its index into the key.

    Returns:
      A function with the arguments of `fn` that returns what `fn` does: inexact leaves are averaged, in
      float32 at least, and others are those of the first part.

    Raises:
      TypeError: an argument has the wrong type, or a batch argument is missing or has no leading axis.
      ValueError: m is below 1 or does not divide the batch, or the leaves of the batch differ in length.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import nso_jax
      >>> from nso_jax import parallel
      >>> loss = lambda w, x: jnp.mean((x @ w) ** 2)
      >>> fn = parallel.microbatch(nso_jax.value_and_grad(loss, sigma=0.1), 4)
      >>> value, grad = jax.jit(fn)(jax.random.key(0), jnp.ones(3), jnp.ones((32, 3)))
      >>> grad.shape
      (3,)
    """
    argnums = check_microbatch(
        fn, num_microbatches, batch_argnums, axis_name, independent_draws=independent_draws
    )

    def microbatched(key: jax.Array, /, *args: Any, **kwargs: Any) -> PyTree:
        def evaluate(
            key: jax.Array, examples: PyTree, others: PyTree, state: PyTree
        ) -> tuple[PyTree, PyTree]:
            fixed, kwargs = others
            return fn(key, *join(fixed, examples), **kwargs), state

        fixed, batch = select_batch(args, argnums, num_microbatches)
        mean, _ = mean_over_parts(
            evaluate,
            as_key(key),
            batch,
            (fixed, kwargs),
            (),
            count=num_microbatches,
            axis_name=axis_name,
            independent_draws=independent_draws,
        )
        return mean

    return microbatched


def value_and_grad(
    fun: Callable[..., Any],
    *,
    mesh: jax.sharding.Mesh,
    method: Callable[..., Any] = gradients.value_and_grad,
    axis_name: AxisName = "data",
    batch_argnums: int | Sequence[int] = (1,),
    num_microbatches: int = 1,
    independent_draws: bool = True,
    **options: Any,
) -> Callable[..., tuple[Any, PyTree]]:
    """Like `nso_jax.value_and_grad`, for plain `jax.jit` on many devices: one all-reduce per step, for any k.

        g = 1/D sum_d g(fold_in(key, d), W, the examples of device d)

    Left to itself, the compiler sums the gradients of each of the 2k evaluations over the devices. Here a
    `shard_map` over `axis_name` keeps them local until one mean in the end, and each device draws for
    itself: the estimate averages k * D draws for the price of k. Other axes of the mesh stay the compiler's:
    params may be sharded over them, and get the noise that they would get on one device.

    Args:
      fun: as in `nso_jax.value_and_grad`. It sees the examples of one device, so batch normalization has
        statistics per device; a loss should be a mean over examples.
      mesh: the mesh of devices, as of `jax.make_mesh`.
      method: `nso_jax.value_and_grad`, or one of its rivals in `nso_jax.sharpness`, with which each device
        climbs the loss of its own examples.
      axis_name: its axis, or axes, over which the batch is sharded; params are not.
      batch_argnums: which arguments of `fun` carry examples along the leading axis of every leaf.
      num_microbatches: m, parts that each device splits its examples into, with fresh noise for each; see
        `microbatch`.
      independent_draws: whether each device folds its index into the key.
      **options: the other arguments of the method, such as `sigma`.

    Returns:
      `fn(key, *args, **kwargs)` as of `nso_jax.value_and_grad`, its results the same on all devices along
      `axis_name`: inexact leaves averaged, others those of the first device.

    Raises:
      TypeError: as the method and `microbatch`, or `mesh` is not a mesh.
      ValueError: as there, `axis_name` is not in the mesh, or the devices do not divide the batch.

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
    check_function("method", method)
    axes = _mesh_axes(mesh, axis_name)
    num_devices = math.prod(mesh.shape[axis] for axis in axes)
    argnums = batch_numbers(batch_argnums)
    local = microbatch(
        method(fun, **options),
        num_microbatches,
        batch_argnums=argnums,
        axis_name=axes,
        independent_draws=independent_draws,
    )

    def value_and_grad_fn(key: jax.Array, /, *args: Any, **kwargs: Any) -> tuple[Any, PyTree]:
        key = as_key(key)
        fixed, batch = select_batch(args, argnums, num_microbatches, num_devices)
        of_leaves = broadcast_prefix("batch", (jax.P(), jax.P(), jax.P(axes)), (fixed, kwargs, batch))
        leaves, treedef = jax.tree.flatten((fixed, kwargs, batch))
        arrays = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | np.ndarray)}
        specs = {i: of_leaves[i] for i in arrays}

        def on_device(key: jax.Array, arrays: dict[int, jax.Array]) -> PyTree:
            # Python values among the arguments stay what they are.
            present = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
            fixed, kwargs, batch = jax.tree.unflatten(treedef, present)
            out = local(key, *join(fixed, batch), **kwargs)
            return jax.tree.map(functools.partial(_from_first, axis_name=axes), out)

        mapped = jax.shard_map(
            on_device,
            mesh=mesh,
            axis_names=set(axes),
            in_specs=(jax.P(), specs),
            out_specs=jax.P(),
            check_vma=False,  # else a loss that scans from zeros, the same on all devices, would fail
        )
        # Outside a jit, shard_map over some of the axes only does not work without check_vma.
        return jax.jit(mapped)(key, _resharded(arrays, mesh, axes, specs))

    return value_and_grad_fn


def mean_over_parts(
    evaluate: Callable[[jax.Array, Batch, PyTree, PyTree], tuple[PyTree, PyTree]],
    key: jax.Array,
    batch: Batch,
    others: PyTree,
    state: PyTree,
    *,
    count: int,
    axis_name: AxisName | None,
    independent_draws: bool,
) -> tuple[PyTree, PyTree]:
    """The mean of `out, state = evaluate(key_i, part i of the batch, others, state)`, and the last state.

    Leaves of `out` that are not inexact are those of the first part.
    """
    (batch, others, state), key = localize(
        (batch, others, state), key, axis_name, independent_draws=independent_draws
    )
    if count == 1:
        return mean_over_axis(evaluate(key, batch, others, state), axis_name)
    keys = jax.random.split(key, count)

    def part(i: Any) -> Batch:
        def examples(x: Any) -> jax.Array:
            interleaved = jnp.reshape(x, (x.shape[0] // count, count, *x.shape[1:]))
            return jax.lax.dynamic_index_in_dim(interleaved, i, axis=1, keepdims=False)

        return jax.tree.map(examples, batch)

    def add(carry: tuple[list[jax.Array], PyTree], i: Any) -> Any:
        total, state = carry
        out, state = evaluate(keys[i], part(i), others, state)
        means, firsts = _split_inexact(jax.tree.leaves(out))
        total = [so_far + noise.widen(x) for so_far, x in zip(total, means, strict=True)]
        return (total, state), firsts

    like, _ = jax.eval_shape(lambda: evaluate(keys[0], part(0), others, state))
    leaves, treedef = jax.tree.flatten(like)
    zeros = [noise.widen(jnp.zeros_like(leaf)) for leaf in _split_inexact(leaves)[0]]
    (total, state), kept = _backend.loop(add, (zeros, state), count)
    means, firsts = iter(total), iter(kept)
    out = [
        (next(means) / count).astype(leaf.dtype) if is_inexact(leaf) else next(firsts)[0] for leaf in leaves
    ]
    return mean_over_axis((jax.tree.unflatten(treedef, out), state), axis_name)


def check_microbatch(
    fn: Any,
    num_microbatches: Any,
    batch_argnums: int | Sequence[int],
    axis_name: Any,
    *,
    independent_draws: Any,
) -> tuple[int, ...]:
    """The batch's argnums as a tuple; raises TypeError or ValueError if `microbatch` cannot work."""
    check_function("fn", fn, "a function fn(key, *args)")
    check_count("num_microbatches", num_microbatches)
    check_axes(axis_name)
    check_flag("independent_draws", independent_draws)
    return batch_numbers(batch_argnums)


def batch_numbers(batch_argnums: int | Sequence[int]) -> tuple[int, ...]:
    """The batch's argnums as a tuple."""
    numbers = as_argnums("batch_argnums", batch_argnums)
    return numbers if isinstance(numbers, tuple) else (numbers,)


def select_batch(
    args: tuple[Any, ...], argnums: tuple[int, ...], num_microbatches: int, num_devices: int = 1
) -> tuple[list[Any], Batch]:
    """The arguments with None for those of the batch, and these, checked, by their numbers."""
    for i in argnums:
        if not -len(args) <= i < len(args):
            raise TypeError(f"batch_argnums: {i} is out of range, got {len(args)} arguments after the key.")
    batch = {i % len(args): args[i] for i in argnums}
    counts = {"microbatches": num_microbatches, "devices": num_devices}
    _check_divides(
        num_microbatches * num_devices,
        " times ".join(f"{count} {name}" for name, count in counts.items() if count > 1),
        batch,
    )
    return [None if i in batch else arg for i, arg in enumerate(args)], batch


def join(fixed: list[Any], batch: Batch) -> list[Any]:
    """The arguments that `select_batch` took apart."""
    return [batch.get(i, arg) for i, arg in enumerate(fixed)]


def _check_divides(count: int, of_what: str, batch: Batch) -> None:
    """Raises unless all leaves of the batch have one length, a multiple of `count`."""
    sizes = {}
    for path, leaf in jax.tree.leaves_with_path(batch):
        where = f"args{jax.tree_util.keystr(path)}"
        if not jnp.ndim(leaf):
            raise TypeError(
                f"batch_argnums: {where} is {describe(leaf)}, without a leading axis of examples; pass it "
                "as another argument or by keyword."
            )
        sizes[where] = jnp.shape(leaf)[0]
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{where} has {size}" for where, size in sizes.items())
        raise ValueError(f"batch_argnums: all leaves need the same number of examples, but {listed}.")
    for where, size in sizes.items():
        if size % count:
            raise ValueError(
                f"batch_argnums: {where} has {size} examples, which {of_what} do not divide; drop "
                f"the last {size % count} or add {count - size % count}."
            )


def _resharded(tree: PyTree, mesh: Any, axes: tuple[Any, ...], specs: PyTree) -> PyTree:
    """The arrays where `shard_map` expects them; with explicit axes it does not move them itself."""
    if jax.sharding.AxisType.Explicit not in mesh.axis_types:
        return tree
    whole = set(axes) == set(mesh.axis_names)  # else params may be sharded over the other axes

    def place(x: Any, spec: jax.P) -> Any:
        return jax.reshard(x, jax.NamedSharding(mesh, spec)) if whole or noise.axes_of(spec) else x

    return jax.tree.map(place, tree, specs)


def _split_inexact(leaves: list[Any]) -> tuple[list[Any], list[Any]]:
    flags = [is_inexact(leaf) for leaf in leaves]
    return (
        [leaf for leaf, flag in zip(leaves, flags, strict=True) if flag],
        [leaf for leaf, flag in zip(leaves, flags, strict=True) if not flag],
    )


def _from_first(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """What the first device has, for leaves that have no mean; the others are the same on all devices."""
    if is_inexact(x):
        return x
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(
            _from_first(jax.random.key_data(x), axis_name), impl=jax.random.key_impl(x)
        )
    own = jnp.where(jax.lax.axis_index(axis_name) == 0, x, jnp.zeros_like(x))
    return jax.lax.psum(own.astype(jnp.int32) if x.dtype == bool else own, axis_name).astype(x.dtype)


def _mesh_axes(mesh: Any, axis_name: AxisName) -> tuple[Any, ...]:
    if not isinstance(mesh, jax.sharding.Mesh | jax.sharding.AbstractMesh):
        raise TypeError(f"mesh: expected a mesh such as jax.make_mesh gives, got {describe(mesh)}.")
    check_axes(axis_name)
    axes = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    for axis in axes:
        if axis not in mesh.axis_names:
            raise ValueError(f"axis_name: {axis!r} is none of the mesh's axes {mesh.axis_names}.")
    return axes
