"""Checks of arguments that all modules share: their errors say argument, value and, for a leaf, its path."""

import contextlib
import sys
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nso_jax._callers import check_injected, injection_hint

PyTree = Any

# Samplers of the right form that would be taken without a word, and ours of the same law.
_OTHER_VARIANCE: dict[Any, str] = {
    jax.random.uniform: "uniform",
    jax.random.laplace: "laplace",
    jax.random.cauchy: "cauchy",
    jax.random.exponential: "",
    jax.random.gumbel: "",
    jax.random.logistic: "",
    jax.random.maxwell: "",
}


def describe(x: Any) -> str:
    """`x` in an error message: `float32[2,3]` for an array, the value itself for a number or a name."""
    # nnx.Rngs has a stream for every name, these two as well.
    if hasattr(x, "dtype") and isinstance(getattr(x, "shape", None), tuple):
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


def is_numeric(leaf: Any) -> bool:
    """Whether a value is an array or a Python number: of numbers, bools or PRNG keys."""
    dtype = dtype_of(leaf)
    kinds = (jnp.number, jnp.bool_, jax.dtypes.extended)
    return dtype is not None and any(jnp.issubdtype(dtype, kind) for kind in kinds)


def is_function(option: Any) -> bool:
    """Whether an option is to be called; a module with `__call__` (Equinox) is a pytree of values instead."""
    return callable(option) and jax.tree_util.all_leaves([option])


def as_key(key: Any) -> jax.Array:
    """`key` as a typed key; raises TypeError if it is not one PRNG key."""
    _check_no_stream(key)
    dtype = getattr(key, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        if key.shape == ():
            return key
        raise TypeError(f"key: expected one PRNG key, got keys of shape {key.shape}; use jax.vmap.")
    if dtype == np.uint32 and key.ndim == 1:
        with contextlib.suppress(TypeError):  # another length than the default implementation's keys have
            return jax.random.wrap_key_data(key)
    if dtype == np.int32:  # a step's count, if a sampler that draws from it was taken for a schedule
        check_injected()
    raise TypeError(f"key: expected a PRNG key such as jax.random.key(0), got {describe(key)}.")


def check_count(name: str, value: Any, minimum: int = 1) -> None:
    """Raises TypeError unless `value` is a static int, and ValueError if it is below `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        hint = injection_hint(name) if isinstance(value, jax.Array) else ""
        raise TypeError(f"{name}: expected a static int >= {minimum}, got {describe(value)}.{hint}")
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
    """Raises TypeError unless `sampler` can be called, ValueError if it is known not to have variance 1."""
    check_function("sampler", sampler, "a function (key, shape, dtype) -> array")
    for other, ours in _OTHER_VARIANCE.items():
        if sampler is other:
            raise ValueError(
                f"sampler: jax.random.{other.__name__} has not mean 0 and variance 1; "
                f"{f'use nso_jax.noise.{ours}' if ours else 'shift and scale it'}."
            )


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
    """Raises TypeError if a leaf is not a float or complex array or number, or is a network's state."""
    check_no_state(params, name)
    for path, leaf in jax.tree.leaves_with_path(params):
        dtype = dtype_of(leaf)
        if dtype is None or not jnp.issubdtype(dtype, np.inexact):
            raise TypeError(
                f"{name}: leaf {leaf_name(path)} is {describe(leaf)}, expected float or complex numbers. "
                "Differentiate the inexact leaves alone and pass the others as another argument: "
                "params, rest = eqx.partition(model, eqx.is_inexact_array) splits an Equinox module, "
                "and eqx.combine(params, rest) in the loss joins them; in a dict, take them out."
            )


def check_real_params(params: PyTree, why: str) -> None:
    """Raises TypeError if a leaf is not inexact, or not real; `why` it has to be stands in the message."""
    check_inexact(params)
    for path, leaf in jax.tree.leaves_with_path(params):
        if jnp.iscomplexobj(leaf):
            raise TypeError(
                f"params: leaf {leaf_name(path)} is {describe(leaf)}, but {why}; give "
                "the real and the imaginary part as two leaves."
            )


def check_no_state(params: PyTree, name: str = "params") -> None:
    """Raises TypeError for a network of Flax together with its state, such as batch statistics.

    These are floats, so they would get noise and gradients, and the network's own updates of them be lost.
    """
    for path, variable in _state_variables(params):
        raise TypeError(
            f"{name}: leaf {leaf_name(path)} is of a Flax NNX module, and {_nnx_name(variable)} is no "
            "nnx.Param. Use nso_jax.nnx.value_and_grad (with method=... for its rivals and wrt=nnx.Param, "
            "the default), which moves the others once a step; or else split the module with "
            "graphdef, params, rest = nnx.split(model, nnx.Param, ...) and close over graphdef and rest."
        )
    for tree in params if isinstance(params, tuple) else (params,):
        if isinstance(tree, Mapping) and {"params", "batch_stats"} <= set(tree):
            raise TypeError(
                f"{name}: a Flax Linen network's variables, with batch_stats. Differentiate "
                "variables['params'] alone and pass the rest as another argument: "
                "model.apply({'params': params, **rest}, ...)."
            )


def check_no_nnx(name: str, tree: PyTree, instead: str) -> None:
    """Raises TypeError if a pytree has a Flax NNX module with state, whose updates would get lost.

    Args:
      name: the argument.
      tree: its value.
      instead: what keeps that state, such as `"nso_jax.nnx.microbatch"`.
    """
    for path, variable in _state_variables(tree):
        raise TypeError(
            f"{name}: leaf {leaf_name(path)} is of a Flax NNX module, and updates of its "
            f"{_nnx_name(variable)} would get lost here; use {instead}."
        )


def _state_variables(tree: PyTree) -> list[tuple[Any, Any]]:
    """Variables of NNX modules that are no params, with their paths; of a state, statistics beside params."""
    nnx = sys.modules.get("flax.nnx")  # whoever has a module has imported it
    if nnx is None:
        return []

    def variables(tree: PyTree, *kinds: type) -> list[tuple[Any, Any]]:
        found = jax.tree.leaves_with_path(tree, is_leaf=lambda x: isinstance(x, (nnx.Variable, *kinds)))
        return [(path, x) for path, x in found if isinstance(x, (nnx.Variable, *kinds))]

    state = []
    for path, x in variables(tree, nnx.State):
        if isinstance(x, nnx.State):  # as selected on purpose, so other kinds may be meant
            inside = variables(x)
            if any(isinstance(variable, nnx.Param) for _, variable in inside):
                state += [(path + p, v) for p, v in inside if isinstance(v, nnx.BatchStat)]
        elif not isinstance(x, nnx.Param):
            state.append((path, x))
    return state


def _nnx_name(variable: Any) -> str:
    return f"nnx.{type(variable).__name__}"


def _check_no_stream(key: Any) -> None:
    """Raises TypeError for NNX random streams, whose count moves with each key, and their variables."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is not None and isinstance(key, nnx.RngKey):
        raise TypeError("key: expected a PRNG key, got an nnx.RngKey; pass its value, key[...].")
    if nnx is not None and isinstance(key, nnx.Rngs | nnx.RngStream):
        call = "rngs() or rngs.noise()" if isinstance(key, nnx.Rngs) else "stream()"
        raise TypeError(
            f"key: expected a PRNG key, got an nnx.{type(key).__name__}; pass a key that it gives, {call}."
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
