"""Hessian-vector products of the mean loss over a data set, and the checks that every estimator shares."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nso_jax._checks import check_inexact, check_loss, describe, leaf_mask


def hvp(fun: Callable[[Any, Any], jax.Array], params: Any, batches: Any) -> Callable[[Any], Any]:
    r"""Returns the function that multiplies the Hessian of the mean loss with a tangent.

    With n_b examples in batch b and N in all of them, the product is

        H v = sum_b (n_b / N) d/dt grad fun(params + t v, batch_b) at t = 0,

    the forward derivative of a gradient: about two gradients' time, about twice their memory, no matrix.

    Each shape of batch is compiled once; the loop over the batches runs in Python, with one batch's
    temporaries on the device at a time. The products are summed over the batches by compensated (Kahan)
    summation, in float32 or, for float64 params, in float64, so the error does not grow with their number.

    Args:
      fun: `fun(params, batch)` is the mean loss over the batch, a real scalar, and depends on nothing else:
        use batch normalization's running statistics and a fixed dropout key, or none. A plain function is
        compiled anew by every call of `hvp`, because the variables that it closes over may have changed;
        a jitted one (`jax.jit(fun)`) promises that they have not, and stays compiled for the next call.
      params: any pytree of real arrays.
      batches: either one batch: an array, a tuple, a dict, a NamedTuple or any other pytree that is not a
        list. Or many: a list of them, or an iterable that is no pytree and can be iterated again, such as
        a data loader, which must give the same examples in every pass. A batch of None or () suits a
        loss without data. A batch counts by its size: the length of the leading axis of its first leaf
        that has one. Arrays in host memory are copied to the device for every product.

    Returns:
      `product(tangent)`, from a pytree like `params` to another, of the same dtypes. It loops in Python,
      so it cannot itself be jitted, vmapped or differentiated.

    Raises:
      TypeError: `fun` is not callable or returns no real scalar, a leaf of `params` is not real floating
        point, or `batches` is a generator or other iterator, which ends after one pass.
      ValueError: there are no batches, one of them has no examples, or the tangent is unlike `params`.
      FloatingPointError: the product of a batch is not finite.

    Example:
      The loss `(w . x)^2 / 2` has the Hessian `x x^T`, averaged over the examples.

      >>> import jax.numpy as jnp
      >>> from nso_jax import curvature
      >>> def loss(params, batch):
      ...     return jnp.mean((batch @ params["w"]) ** 2) / 2
      >>> params = {"w": jnp.zeros(2)}
      >>> batches = [jnp.array([[1.0, 0.0], [1.0, 0.0]]), jnp.array([[0.0, 3.0]])]
      >>> product = curvature.hvp(loss, params, batches)
      >>> print(product({"w": jnp.array([3.0, 1.0])})["w"])
      [2. 3.]

    References:
      Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6(1), 1994.
    """
    params = check_params(params)
    mean_product = mean_hessian_product(fun, params, batches)

    def product(tangent: Any) -> Any:
        _check_tangent(tangent, params)
        return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), mean_product(tangent), params)

    return product


def mean_hessian_product(
    fun: Callable[[Any, Any], jax.Array], params: Any, batches: Any
) -> Callable[[Any], Any]:
    """`hvp` for checked params, without its last cast: the product is in float32 at least."""
    check_batches(batches)
    if not callable(fun):
        raise TypeError(f"fun: expected a function of params and a batch, got {fun!r}.")
    add = _kept_step(fun) if isinstance(fun, jax.stages.Wrapped) else _new_step(fun)
    zeros = jax.tree.map(
        lambda p: jnp.zeros(p.shape, jnp.float64 if p.dtype == jnp.float64 else jnp.float32), params
    )

    def product(tangent: Any) -> Any:
        sums, finite = (zeros, zeros), []
        sizes: list[int] = []
        for batch in _each(batches):
            sizes.append(_size(batch, len(sizes)))
            # Relative to the first batch, so that one batch or equal ones are not rounded once more.
            sums, ok = add(sums, sizes[-1] / sizes[0], params, batch, tangent)
            finite.append(ok)
        if not sizes:
            raise ValueError("batches is empty: its iteration gave no batch.")
        # Asked only now: waiting for each batch would leave the device idle between them.
        if not all(jax.device_get(finite)):
            index = [bool(ok) for ok in finite].index(False)
            raise FloatingPointError(f"The Hessian-vector product of batches[{index}] is not finite.")
        return _divide(sums[0], sum(sizes) / sizes[0])

    return product


def _hessian_product(fun: Callable[[Any, Any], jax.Array], params: Any, batch: Any, tangent: Any) -> Any:
    """Forward over reverse: the gradient's directional derivative along the tangent."""
    gradient = jax.grad(lambda weights: _checked_loss(fun(weights, batch)))
    return jax.jvp(gradient, (params,), (tangent,))[1]


def _new_step(fun: Callable[[Any, Any], jax.Array]) -> Callable[..., Any]:
    """Compiles `add`, which adds `weight` times a batch's product to the total of the batches before it."""

    @jax.jit
    def add(sums: Any, weight: jax.Array, params: Any, batch: Any, tangent: Any) -> tuple[Any, jax.Array]:
        total, excess = sums  # excess: what the last rounding added too much
        tangent = jax.tree.map(lambda t, p: jnp.asarray(t, p.dtype), tangent, params)
        product = _hessian_product(fun, params, batch, tangent)
        term = jax.tree.map(lambda h, e: weight * h.astype(e.dtype) - e, product, excess)
        new_total = jax.tree.map(jnp.add, total, term)
        excess = jax.tree.map(lambda new, old, added: (new - old) - added, new_total, total, term)
        finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(product)]
        return (new_total, excess), jnp.all(jnp.array(finite))

    return add


# For jitted functions only; few, because an entry keeps alive what its function closes over.
_kept_step: Callable[[Any], Callable[..., Any]] = functools.lru_cache(maxsize=16)(_new_step)


@jax.jit
def _divide(total: Any, weight: jax.Array) -> Any:
    return jax.tree.map(lambda leaf: leaf / weight, total)


def _each(batches: Any) -> Iterable[Any]:
    """The batches one after another, by the rule that `hvp` gives."""
    return batches if isinstance(batches, list) or _is_loader(batches) else [batches]


def _is_loader(batches: Any) -> bool:
    no_pytree = jax.tree_util.all_leaves([batches])
    return no_pytree and isinstance(batches, Iterable) and not hasattr(batches, "shape")


def _size(batch: Any, index: int) -> int:
    """The number of examples in a batch; 1 where no leaf has a leading axis."""
    shape = next((np.shape(leaf) for leaf in jax.tree.leaves(batch) if np.ndim(leaf)), (1,))
    if shape[0] == 0:
        raise ValueError(f"batches[{index}] has no examples: its first array has shape {shape}.")
    return int(shape[0])


def check_batches(batches: Any) -> None:
    """Raises for batches that a second product would find exhausted, and for an empty list."""
    if hasattr(batches, "__next__"):
        kind = "a generator" if hasattr(batches, "gi_frame") else f"an iterator ({type(batches).__name__})"
        raise TypeError(f"batches is {kind}: it ends after one pass; give a list.")
    if isinstance(batches, list) and not batches:
        raise ValueError("batches is empty: give at least one batch.")


def check_params(params: Any) -> Any:
    """`params` with every leaf a JAX array; raises for leaves that have no curvature or a complex one."""
    check_inexact(params)
    for path, leaf in jax.tree.leaves_with_path(params):
        if jnp.iscomplexobj(leaf):
            raise TypeError(
                f"params: leaf {jax.tree_util.keystr(path)} is {describe(leaf)}, but curvature is of real "
                "parameters; give the real and the imaginary part as two leaves."
            )
    return jax.tree.map(jnp.asarray, params)


def check_tolerance(name: str, value: Any) -> None:
    """Raises unless `value` is a positive, finite number."""
    if not 0 < value < np.inf:
        raise ValueError(f"{name}: expected a positive, finite number, got {value!r}.")


def chosen_leaves(mask: Any, params: Any) -> list[bool]:
    """One bool for each leaf of `params`; raises ValueError if `mask` selects none."""
    flags = leaf_mask(mask, params)
    if not any(flags):
        raise ValueError("mask: selects no leaf of params.")
    return flags


def _checked_loss(value: Any) -> Any:
    check_loss(value)
    return value


def _check_tangent(tangent: Any, params: Any) -> None:
    given: Any = jax.tree.structure(tangent)
    expected: Any = jax.tree.structure(params)
    if given != expected:
        raise ValueError(f"tangent: expected a pytree like params, {expected}, got {given}.")
    leaves = jax.tree.leaves(tangent)
    for (path, like), leaf in zip(jax.tree.leaves_with_path(params), leaves, strict=True):
        if np.shape(leaf) != like.shape:
            where = jax.tree_util.keystr(path)
            raise ValueError(f"tangent: expected shape {like.shape} for leaf {where}, got {np.shape(leaf)}.")
