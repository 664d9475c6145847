"""Checks of arguments that all modules share: their errors say argument, value and, for a leaf, its path."""

import contextlib
from collections.abc import Callable, Collection, Hashable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


def describe(x: Any) -> str:
    """`x` in an error message: `float32[2,3]` for an array, the value itself for a number or a name."""
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"{x.dtype}[{','.join(map(str, x.shape))}]"
    return f"{x!r} ({type(x).__name__})" if isinstance(x, int | float | complex | str) else type(x).__name__


def dtype_of(x: Any) -> Any:
    """The dtype of an array or a Python number; None for anything else."""
    if hasattr(x, "dtype"):
        return x.dtype
    return jnp.result_type(x) if isinstance(x, int | float | complex) else None


def leaf_name(path: tuple[Any, ...]) -> str:
    """A leaf's path in an error message."""
    return jax.tree_util.keystr(path) or "(the whole)"


def is_inexact(leaf: Any) -> bool:
    """Whether an array has a mean: its dtype is float or complex."""
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def is_function(option: Any) -> bool:
    """Whether an option is to be called; a module with `__call__` (Equinox) is a pytree of values instead."""
    return callable(option) and jax.tree_util.all_leaves([option])


def as_key(key: Any) -> jax.Array:
    """`key` as a typed key; raises TypeError if it is not one PRNG key."""
    dtype = getattr(key, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        if key.shape == ():
            return key
        raise TypeError(f"key: expected one PRNG key, got keys of shape {key.shape}; use jax.vmap.")
    if dtype == np.uint32 and key.ndim == 1:
        with contextlib.suppress(TypeError):  # another length than the default implementation's keys have
            return jax.random.wrap_key_data(key)
    raise TypeError(f"key: expected a PRNG key such as jax.random.key(0), got {describe(key)}.")


def check_count(name: str, value: Any, minimum: int = 1) -> None:
    """Raises TypeError unless `value` is a static int, and ValueError if it is below `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name}: expected a static int >= {minimum}, got {describe(value)}.")
    if value < minimum:
        raise ValueError(f"{name}: expected an int >= {minimum}, got {value}.")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raises ValueError unless `value` is one of some names."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}.")


def check_flag(name: str, value: Any) -> None:
    """Raises TypeError unless `value` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {describe(value)}.")


def check_function(name: str, value: Any, what: str = "a function") -> None:
    """Raises TypeError unless `value` can be called."""
    if not callable(value):
        raise TypeError(f"{name}: expected {what}, got {describe(value)}.")


def check_sampler(sampler: Any) -> None:
    """Raises TypeError unless `sampler` can be called."""
    check_function("sampler", sampler, "a function (key, shape, dtype) -> array")


def check_mapped(name: str, axes: Iterable[Hashable]) -> None:
    """Raises ValueError for an axis over which nothing maps here."""
    for axis in axes:
        try:
            jax.lax.axis_size(axis)
        except NameError:
            raise ValueError(
                f"{name}: there is no mapped axis {axis!r} here; call the function inside shard_map, pmap or "
                "vmap over it."
            ) from None


def check_real(name: str, value: Any, where: str = "") -> None:
    """Raises TypeError unless `value` is a real number or an array of them."""
    dtype = dtype_of(value)
    if dtype is None or not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise TypeError(f"{name}: expected a real number{where}, got {describe(value)}.")


def check_nonnegative(name: str, value: Any, path: str = "", what: str = "a number") -> None:
    """Raises TypeError unless `value` is real, and ValueError if it is known and not >= 0."""
    where = f" for leaf {path}" if path else ""
    check_real(name, value, where)
    if isinstance(value, jax.core.Tracer):
        return
    numbers = np.asarray(jax.device_get(value))
    bad = numbers[~(numbers >= 0)]  # NaN compares false
    if bad.size:
        raise ValueError(f"{name}: expected {what} >= 0{where}, got {bad.flat[0]}.")


def check_scalar(
    name: str,
    value: Any,
    holds: Callable[[Any], bool] = lambda x: x >= 0,
    expected: str = "a number >= 0",
) -> None:
    """Raises TypeError unless `value` is real, ValueError unless it is a scalar and, if known, in range."""
    check_real(name, value)
    if np.shape(value) != ():
        raise ValueError(f"{name}: expected a scalar, got shape {np.shape(value)}.")
    if not isinstance(value, jax.core.Tracer) and not holds(jax.device_get(value)):
        raise ValueError(f"{name}: expected {expected}, got {value}.")


def check_inexact(params: PyTree, name: str = "params") -> None:
    """Raises TypeError if a leaf is not a float or complex array or number."""
    for path, leaf in jax.tree.leaves_with_path(params):
        dtype = dtype_of(leaf)
        if dtype is None or not jnp.issubdtype(dtype, np.inexact):
            raise TypeError(
                f"{name}: leaf {leaf_name(path)} is {describe(leaf)}, expected float or complex numbers; "
                "keep other leaves out of the differentiated argument."
            )


def check_loss(value: Any, hint: str = "") -> None:
    """Raises TypeError unless what a loss function returned is a real scalar."""
    dtype = dtype_of(value)
    if dtype is None or jnp.shape(value) != () or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"fun: expected a real scalar as the loss, got {describe(value)}.{hint}")


def broadcast_prefix(name: str, option: PyTree, params: PyTree) -> list[Any]:
    """One entry of `option`, a prefix of `params` or a function to one, for each leaf of `params`."""
    if is_function(option):
        option = option(params)
    try:
        return jax.tree.leaves(jax.tree.broadcast(option, params))
    except ValueError as error:
        reason = " ".join(str(error).replace("broadcast_prefix prefix_tree", name).split())
        raise ValueError(f"{name}: not a prefix of the pytree that it is for. {reason}") from None


def leaf_mask(mask: PyTree, params: PyTree) -> list[bool]:
    """One bool for each leaf of `params`, from a prefix of bools or a function giving one; None is True."""
    flags = broadcast_prefix("mask", True if mask is None else mask, params)
    for flag, (path, _) in zip(flags, jax.tree.leaves_with_path(params), strict=True):
        if not isinstance(flag, bool | np.bool_):
            raise TypeError(f"mask: expected True or False for leaf {leaf_name(path)}, got {describe(flag)}.")
    return [bool(flag) for flag in flags]
