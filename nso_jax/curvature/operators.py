"""Products of the Hessian or the Gauss-Newton matrix with vectors, and checks that every estimator shares."""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np

from nso_jax import noise
from nso_jax._backend import is_on_cpu
from nso_jax._checks import (
    as_key,
    check_count,
    check_inexact,
    check_loss,
    check_scalar,
    describe,
    leaf_mask,
    leaf_name,
)
from nso_jax._checks import check_function as check_callable
from nso_jax._derivatives import linearize, linearize_gradient

__all__ = ["GaussNewton", "ggn_vp", "hvp"]

# Linearizations of a list's batches are kept for the next product while they take no more than this together.
_KEPT_BYTES = 2**28
# A pass over the data takes as many vectors at once as fit into this, with their products.
_BLOCK_BYTES = 2**29
# Vectors side by side where there is more than a CPU, to fill it.
_CHUNK_SIZE = 8

# How much the mean loss of a batch counts.
Weight = Callable[[Any], Any]
_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class GaussNewton:
    """A loss in two parts: as `fun` of an estimator it stands for the Gauss-Newton matrix.

    That is the mean of `J^T H J` over the batches, J being the derivative of the model's outputs by the
    params and H the Hessian of `loss` by the outputs. For a loss that is convex in the outputs it has no
    negative eigenvalue: it is the Hessian without the curvature of the model itself, and for cross-entropy
    the Fisher information matrix.

    Attributes:
      model: `model(params, batch)` gives the outputs, an array or a pytree of real arrays.
      loss: `loss(outputs, batch)` is the mean loss over the batch, a real scalar.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from nso_jax import curvature
      >>> def model(params, batch):
      ...     return batch @ params["w"] ** 2
      >>> fun = curvature.GaussNewton(model, lambda outputs, batch: jnp.mean(outputs**2) / 2)
      >>> params, batch = {"w": jnp.ones(2)}, jnp.eye(2)
      >>> curvature.eigenvalues(jax.random.key(0), fun, params, batch, k=1).values.round(3)
      array([2.])

    References:
      Schraudolph, Fast curvature matrix-vector products for second-order gradient descent, Neural
      Computation 14(7), 2002.
      Martens, New insights and perspectives on the natural gradient method, arXiv 1412.1193, 2014.
    """

    model: Callable[[Any, Any], Any]
    loss: Callable[[Any, Any], jax.Array]

    def __call__(self, params: Any, batch: Any) -> jax.Array:
        """The mean loss over the batch."""
        return self.loss(self.model(params, batch), batch)


def hvp(
    fun: Callable[[Any, Any], jax.Array],
    params: Any,
    batches: Any,
    *,
    mask: Any = None,
    weight: Callable[[Any], Any] | None = None,
) -> Callable[[Any], Any]:
    r"""Returns the function that multiplies the Hessian of the mean loss with a tangent.

    With the weight n_b of batch b, by default its number of examples, and N of all of them, the product is

        H v = sum_b (n_b / N) d/dt grad fun(params + t v, batch_b) at t = 0,

    the forward derivative of a gradient: about two gradients' time, about twice their memory, no matrix.
    Where a `jax.custom_vjp` inside the loss forbids forward mode, it is the backward derivative instead.

    Each shape of batch is compiled once; the loop over the batches runs in Python, with one batch's
    temporaries on the device at a time. The gradient is linearized once for each batch. The results of one
    batch, or of a list of batches while they take up to 256 MiB together, are kept for the next product;
    others are computed again. The products are summed over the batches by compensated (Kahan) summation, in
    float32 or, for float64 params, in float64, so the error does not grow with their number.

    Args:
      fun: `fun(params, batch)` is the mean loss over the batch, a real scalar, and depends on nothing else:
        use batch normalization's running statistics and a fixed dropout key, or none. A plain function is
        compiled anew by every call of `hvp`, because the variables that it closes over may have changed;
        a jitted one (`jax.jit(fun)`) promises that they have not, and stays compiled for the next call.
        A `GaussNewton` of two functions gives products with the Gauss-Newton matrix.
      params: any pytree of real arrays.
      batches: either one batch: an array, a tuple, a dict, a NamedTuple or any other pytree that is not a
        list. Or many: a list of them, or an iterable that is no pytree and can be iterated again, such as
        a data loader, which must give the same examples in every pass. A batch of None or () suits a
        loss without data.
      mask: bools, a prefix pytree of `params` or a callable giving one: only these leaves' block of H. The
        tangent's other leaves do not count, and the product is zero there.
      weight: `weight(batch)` is how much the mean loss of a batch counts: what `fun` divides its sum by, a
        number >= 0. A loss that is a mean over tokens, or over anything else than examples, needs it:
        `weight=lambda batch: batch["mask"].sum()`. Batches of weight 0 are skipped. None: the number of
        examples, the length of the leading axis of the batch's leaves (1 where none has an axis).

    Returns:
      `product(tangent)`, from a pytree like `params` to another, of the same dtypes. It loops in Python,
      so it cannot itself be jitted, vmapped or differentiated.

    Raises:
      TypeError: `fun` is not callable or returns no real scalar, a leaf of `params` is not real floating
        point, `batches` is a generator or other iterator, which ends after one pass, `weight` gives no real
        number, or it is all called inside jit, or inside vmap or grad over one of the arguments.
      ValueError: there are no batches, one of them has no examples, leaves of one of several batches differ
        in their leading axes and there is no `weight`, a weight is negative, not finite or no scalar, all
        are zero, `mask` does not fit `params` or selects nothing, or the tangent is unlike `params`.
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
    operator = Operator(fun, params, batches, mask=mask, weight=weight)

    def product(tangent: Any) -> Any:
        _check_tangent(tangent, operator.params)
        return operator.unravel(operator.product(operator.ravel(tangent)))

    return product


def ggn_vp(
    model: Callable[[Any, Any], Any],
    loss: Callable[[Any, Any], jax.Array],
    params: Any,
    batches: Any,
    *,
    mask: Any = None,
    weight: Callable[[Any], Any] | None = None,
) -> Callable[[Any], Any]:
    """Returns the function that multiplies the Gauss-Newton matrix of the mean loss with a tangent.

    The same as `hvp(GaussNewton(model, loss), params, batches)`; every estimator takes a `GaussNewton` too.

    Args:
      model: `model(params, batch)` gives the outputs.
      loss: `loss(outputs, batch)` is the mean loss over the batch, a real scalar.
      params: as in `hvp`.
      batches: as in `hvp`.
      mask: as in `hvp`.
      weight: as in `hvp`.

    Returns:
      `product(tangent)`, as `hvp` does.

    Raises:
      TypeError: as `hvp`, for `model` and `loss` too.
      ValueError: as `hvp`.
      FloatingPointError: the product of a batch is not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from nso_jax import curvature
      >>> product = curvature.ggn_vp(
      ...     lambda w, x: x * w**2, lambda outputs, x: jnp.mean(outputs**2) / 2, jnp.array(3.0), jnp.ones(4)
      ... )
      >>> print(product(jnp.array(1.0)))  # (d w^2 / d w)^2; the Hessian is 3 w^2 * 2 = 54
      36.0

    References:
      Schraudolph, Fast curvature matrix-vector products for second-order gradient descent, Neural
      Computation 14(7), 2002.
    """
    return hvp(GaussNewton(model, loss), params, batches, mask=mask, weight=weight)


class Operator:
    """The Hessian, or Gauss-Newton matrix, of the mean loss over the data, for vectors of the chosen leaves.

    Attributes:
      params: the params, as JAX arrays.
      flags: for each leaf, whether it is chosen.
      size: how many entries a vector has.
      dtype: of the products: float32, or float64 if a leaf is.
      epsilon: relative rounding error of the products, that of the coarsest leaf.
      num_products: how many have been made.
    """

    def __init__(
        self,
        fun: Callable[[Any, Any], jax.Array],
        params: Any,
        batches: Any,
        *,
        mask: Any = None,
        weight: Weight | None = None,
        chunk_size: int | None = None,
        callback: Callable[[int], object] | None = None,
    ) -> None:
        check_batches(batches)
        check_function(fun)
        check_weight(weight)
        if chunk_size is not None:
            check_count("chunk_size", chunk_size, 1)
        self.params = check_params(params)
        self.flags = tuple(chosen_leaves(mask, self.params))
        self._chosen = _select(jax.tree.leaves(self.params), self.flags)
        self.size = sum(leaf.size for leaf in self._chosen)
        dtypes = {leaf.dtype for leaf in self._chosen}
        self.dtype = np.dtype(np.float64 if np.dtype(np.float64) in dtypes else np.float32)
        self.epsilon = max(float(jnp.finfo(dtype).eps) for dtype in dtypes)
        self.num_products = 0
        self._fun, self._batches, self._weight = fun, batches, weight
        self._steps = _kept_steps(fun, self.flags) if is_jitted(fun) else _new_steps(fun, self.flags)
        self._kept: dict[int, Any] = {}
        self._kept_bytes = 0
        self._chunk_size = chunk_size or (1 if is_on_cpu(self.params) else _CHUNK_SIZE)
        self._callback = callback

    def products(self, vectors: np.ndarray) -> np.ndarray:
        """The products with vectors, a row for each, in float64 and host memory."""
        # A vector, its product and the rounding error of that.
        rows = max(self._chunk_size, _BLOCK_BYTES // (3 * self.dtype.itemsize * max(self.size, 1)))
        images = np.empty((len(vectors), self.size))
        for start in range(0, len(vectors), rows):
            block = vectors[start : start + rows]
            products = np.concatenate(jax.device_get(self._pass(block)))
            images[start : start + rows] = products[: len(block)]
        return images

    def product(self, vector: jax.Array) -> jax.Array:
        """The product with one vector, on the device."""
        return self._pass(vector[None])[0][0]

    def signs(self, key: jax.Array, first: int, count: int) -> np.ndarray:
        """Random signs, a row for each of the probes from `first` on; a probe depends on its number alone."""
        rows = [_signs(jax.random.fold_in(key, first + i), self.size) for i in range(count)]
        return np.stack(rows, dtype=np.float64)

    def ravel(self, tree: Any) -> jax.Array:
        """The chosen leaves of a pytree like params as one vector."""
        return _ravel(_select(jax.tree.leaves(tree), self.flags), self.dtype)

    def unravel(self, vector: Any) -> Any:
        """A pytree like params with the entries of a vector, zero in the leaves that are not chosen."""
        return _unravel(jnp.asarray(vector, self.dtype), self.params, self.flags)

    def split(self, rows: np.ndarray) -> list[np.ndarray]:
        """The stretch of the last axis that belongs to each leaf of params."""
        pairs = zip(jax.tree.leaves(self.params), self.flags, strict=True)
        ends = np.cumsum([leaf.size if flag else 0 for leaf, flag in pairs])
        return np.split(rows, ends[:-1], axis=-1)

    def _pass(self, vectors: Any) -> list[jax.Array]:
        """The products with a block of vectors, chunk by chunk, in one pass over the data."""
        size = min(self._chunk_size, len(vectors))
        padding = -len(vectors) % size  # one shape of chunk, one compilation
        padded = jnp.asarray(np.pad(vectors, ((0, padding), (0, 0))) if padding else vectors, self.dtype)
        chunks = [padded[i : i + size] for i in range(0, len(padded), size)]
        sums: list[Any] = [(jnp.zeros_like(chunk), jnp.zeros_like(chunk)) for chunk in chunks]
        weights: list[float] = []
        finite: dict[int, list[jax.Array]] = {}
        for index, weight, linear in self._linearizations():
            weights.append(weight)
            finite[index] = []
            for i, chunk in enumerate(chunks):
                # Relative to the first batch, so that one batch or equal ones are not rounded once more.
                sums[i], ok = self._steps.add(sums[i], weight / weights[0], self._chosen, linear, chunk)
                finite[index].append(ok)
        # Asked only now: waiting for each batch would leave the device idle between them.
        for index, flags in jax.device_get(finite).items():
            if not all(flags):
                raise FloatingPointError(
                    f"The Hessian-vector product of batches[{index}] is not finite: look for NaN or infinity "
                    "in params and in that batch, and for points where the loss has no second derivative."
                )
        self.num_products += len(vectors)
        if self._callback is not None:
            self._callback(self.num_products)
        return [_divide(total, sum(weights) / weights[0]) for total, _ in sums]

    def _linearizations(self) -> Iterator[tuple[int, float, Any]]:
        """Each batch's number, weight and linearized gradient, kept from the last pass if there is room."""
        for index, batch, weight in weighted(self._batches, self._weight):
            linear = self._kept.get(index)
            if linear is None:
                with explained(self._fun, self._batches):
                    linear = self._steps.linearize(self.params, batch)
                if self._may_keep(size := _bytes(linear)):
                    self._kept[index] = linear
                    self._kept_bytes += size
            yield index, weight, linear

    def _may_keep(self, size: int) -> bool:
        """Whether there is room for one more batch's linearization, which a loader may not give again."""
        if not isinstance(self._batches, list):
            return not _is_loader(self._batches)
        return len(self._batches) == 1 or self._kept_bytes + size <= _KEPT_BYTES


class _Steps(NamedTuple):
    """Compiled parts of a product."""

    linearize: Callable[..., Any]
    add: Callable[..., tuple[Any, jax.Array]]


def _new_steps(fun: Callable[[Any, Any], jax.Array], flags: tuple[bool, ...]) -> _Steps:
    """Compiles the linearization of a batch, and the sum of its products and those of the batches before."""

    @jax.jit
    def linearize(params: Any, batch: Any) -> Any:
        leaves, structure = jax.tree.flatten(params)

        def with_chosen(chosen: list[jax.Array]) -> Any:
            moving = iter(chosen)
            merged = [next(moving) if flag else leaf for leaf, flag in zip(leaves, flags, strict=True)]
            return jax.tree.unflatten(structure, merged)

        chosen = _select(leaves, flags)
        if isinstance(fun, GaussNewton):
            return _gauss_newton(fun, with_chosen, chosen, batch)
        gradient = jax.grad(lambda chosen: _checked_loss(fun(with_chosen(chosen), batch)))
        return linearize_gradient(gradient, chosen)

    @functools.partial(jax.jit, donate_argnums=0)
    def add(
        sums: Any, weight: jax.Array, chosen: list[jax.Array], linear: Any, vectors: jax.Array
    ) -> tuple[Any, jax.Array]:
        total, excess = sums  # excess: what the last rounding added too much
        product = jax.vmap(lambda v: _ravel(linear(_parts(v, chosen)), v.dtype))(vectors)
        term = weight * product - excess
        new_total = total + term
        return (new_total, (new_total - total) - term), jnp.all(jnp.isfinite(product))

    return _Steps(linearize, add)


# For jitted functions only; few, because an entry keeps alive what its function closes over.
_kept_steps: Callable[..., _Steps] = functools.lru_cache(maxsize=16)(_new_steps)


def is_jitted(fun: Any) -> bool:
    """Whether a function promises to stay what it is, by being jitted."""
    parts = (fun.model, fun.loss) if isinstance(fun, GaussNewton) else (fun,)
    return all(isinstance(part, jax.stages.Wrapped) for part in parts)


def _gauss_newton(fun: GaussNewton, with_chosen: Callable[..., Any], chosen: Any, batch: Any) -> Any:
    """The linear function v -> J^T H J v."""
    outputs, forward, backward = linearize(lambda chosen: fun.model(with_chosen(chosen), batch), chosen)
    gradient = jax.grad(lambda outputs: _checked_loss(fun.loss(outputs, batch)))
    curve = linearize_gradient(gradient, outputs)
    return jax.tree_util.Partial(_backward_curve_forward, backward, curve, forward)


def _backward_curve_forward(backward: Any, curve: Any, forward: Any, tangent: Any) -> Any:
    return backward(curve(forward(tangent)))


def _select(leaves: list[Any], flags: tuple[bool, ...]) -> list[Any]:
    return [leaf for leaf, flag in zip(leaves, flags, strict=True) if flag]


def _parts(vector: jax.Array, chosen: list[jax.Array]) -> list[jax.Array]:
    """The stretches of a vector, in the shapes and dtypes of the chosen leaves."""
    pieces = jnp.split(vector, np.cumsum([leaf.size for leaf in chosen])[:-1])
    pairs = zip(pieces, chosen, strict=True)
    return [piece.reshape(leaf.shape).astype(leaf.dtype) for piece, leaf in pairs]


@functools.partial(jax.jit, static_argnums=1)
def _ravel(leaves: list[Any], dtype: Any) -> jax.Array:
    return jnp.concatenate([jnp.ravel(leaf).astype(dtype) for leaf in leaves])


@functools.partial(jax.jit, static_argnums=2)
def _unravel(vector: jax.Array, params: Any, flags: tuple[bool, ...]) -> Any:
    leaves, structure = jax.tree.flatten(params)
    parts = iter(_parts(vector, _select(leaves, flags)))
    filled = [next(parts) if flag else jnp.zeros_like(leaf) for leaf, flag in zip(leaves, flags, strict=True)]
    return jax.tree.unflatten(structure, filled)


@functools.partial(jax.jit, static_argnums=1)
def _signs(key: jax.Array, size: int) -> jax.Array:
    # In whole words of 32, which one draw of random bits fills.
    return noise.rademacher(key, (32 * -(-size // 32),), jnp.float32)[:size]


@jax.jit
def _divide(total: jax.Array, weight: jax.Array) -> jax.Array:
    return total / weight


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def each(batches: Any) -> Iterable[Any]:
    """The batches one after another, by the rule that `hvp` gives."""
    return batches if isinstance(batches, list) or _is_loader(batches) else [batches]


def _is_loader(batches: Any) -> bool:
    no_pytree = jax.tree_util.all_leaves([batches])
    return no_pytree and isinstance(batches, Iterable) and not hasattr(batches, "shape")


def batch_size(batch: Any, index: int) -> int:
    """The number of examples in a batch; 1 where no leaf has a leading axis."""
    shape = next((np.shape(leaf) for leaf in jax.tree.leaves(batch) if np.ndim(leaf)), (1,))
    if shape[0] == 0:
        raise ValueError(f"batches[{index}] has no examples: its first array has shape {shape}.")
    return int(shape[0])


def batch_weight(batch: Any, index: int, weight: Weight | None) -> float:
    """How much a batch's mean loss counts: what `weight` says, else by its number of examples."""
    if weight is None:
        return batch_size(batch, index)
    value = weight(batch)
    name = f"weight(batches[{index}])"
    check_scalar(name, value, lambda x: 0 <= x < np.inf, "a finite number >= 0")
    return float(value)


def weighted(batches: Any, weight: Weight | None) -> Iterator[tuple[int, Any, float]]:
    """The batches that count, with their numbers and weights."""
    count, total = 0, 0.0
    uneven = ""
    for index, batch in enumerate(each(batches)):
        count += 1
        check_concrete(f"batches[{index}]", batch)
        if weight is None:
            uneven = uneven or unevenness(batch, index)
            if uneven and count > 1:  # of one batch alone, the size does not matter
                raise ValueError(uneven)
        value = batch_weight(batch, index, weight)
        total += value
        if value:
            yield index, batch, value
    if not count:
        raise ValueError("batches is empty: its iteration gave no batch.")
    if not total:
        raise ValueError("weight: is 0 for all batches, so that there is no mean loss.")


def unevenness(batch: Any, index: int) -> str:
    """What is wrong with a batch whose leaves do not agree on the number of examples, else nothing."""
    leaves = [(path, np.shape(leaf)) for path, leaf in jax.tree.leaves_with_path(batch)]
    lengths = {leaf_name(path): shape[0] for path, shape in leaves if shape}
    if len(set(lengths.values())) <= 1:
        return ""
    shown = ", ".join(f"{name}: {length}" for name, length in lengths.items())
    return (
        f"batches[{index}]: its leaves have leading axes of different lengths, {shown}, so that it is not "
        "clear how many examples it has; say it, as in weight=lambda batch: batch['x'].shape[0]."
    )


@contextlib.contextmanager
def explained(fun: Any, batches: Any) -> Iterator[None]:
    """Notes on an error that a call of `fun` raises what may be wrong with the call."""
    try:
        yield
    except Exception as error:
        if isinstance(error, TypeError) and _wants_other_arguments(fun):
            error.add_note(
                "fun is called as fun(params, batch), with a batch as one argument: for a loss of more, pass "
                "lambda params, batch: loss(params, *batch)."
            )
        if _looks_like_many(batches):
            error.add_note(
                f"batches is a tuple of {len(batches)}: that is one batch, and fun is given all of it. Give "
                "many batches as a list."
            )
        raise


def _wants_other_arguments(fun: Any) -> bool:
    parts = (fun.model, fun.loss) if isinstance(fun, GaussNewton) else (fun,)
    for part in parts:
        try:
            inspect.signature(part).bind(None, None)
        except TypeError:
            return True
        except ValueError:  # a builtin without a signature
            continue
    return False


def _looks_like_many(batches: Any) -> bool:
    """Whether a tuple has elements of one kind, which differ in their leading axes at most."""
    if type(batches) is not tuple or len(batches) < 2:  # noqa: PLR2004
        return False
    kinds = [
        (jax.tree.structure(batch), [np.shape(leaf)[1:] for leaf in jax.tree.leaves(batch)])
        for batch in batches
    ]
    return all(kind == kinds[0] for kind in kinds[1:])


def orthogonalise(vectors: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """A vector, or rows of them, without what lies in the span of a basis with orthonormal rows."""
    # Twice, because the first pass leaves rounding errors of the size of what it removed.
    for _ in range(2):
        vectors = vectors - (vectors @ basis.T) @ basis
    return vectors


_ORDER = "The arguments are (key, fun, params, batches), in this order."


def starting_with_key(function: _Function) -> _Function:
    """Says better than Python does that one of (key, fun, params, batches) is missing, say the key."""
    names = ("key", "fun", "params", "batches")

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        missing = [name for i, name in enumerate(names) if i >= len(args) and name not in kwargs]
        if missing:
            with contextlib.suppress(IndexError):
                check_call(args[0], f" {missing[0]!r} is missing.")
            raise TypeError(f"Missing argument: {missing[0]!r}. {_ORDER} With no data, give None.")
        return function(*args, **kwargs)

    return cast("_Function", checked)


def check_call(key: Any, missing: str = "") -> jax.Array:
    """`key` as a typed key; raises TypeError if it is not one, or is a tracer."""
    try:
        typed = as_key(key)
    except TypeError as error:
        raise TypeError(f"{error}{missing} {_ORDER}") from None
    check_concrete("key", typed)
    return typed


def check_concrete(name: str, tree: Any) -> None:
    """Raises TypeError for an array whose values jit, vmap or grad hide."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        if isinstance(leaf, jax.core.Tracer):
            where = f" for leaf {leaf_name(path)}" if path else ""
            raise TypeError(f"{name}: got a tracer, {describe(leaf)}{where}; {_OUTSIDE}")


_OUTSIDE = "curvature.* loops over the data in Python: call it outside jit, vmap and grad."


def check_weight(weight: Any) -> None:
    """Raises TypeError unless `weight` is a function or None."""
    if weight is not None:
        check_callable("weight", weight, "a function of a batch, or None")


def check_function(fun: Any) -> None:
    """Raises TypeError for a loss, or a part of one, that is no function."""
    if isinstance(fun, GaussNewton):
        for name, part in (("model", fun.model), ("loss", fun.loss)):
            if not callable(part):
                raise TypeError(f"fun: expected a function as the {name} of a GaussNewton, got {part!r}.")
    elif not callable(fun):
        raise TypeError(f"fun: expected a function of params and a batch, got {fun!r}.")


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
    check_concrete("params", params)
    if isinstance(jnp.zeros(()), jax.core.Tracer):
        raise TypeError(f"params: expected to be used outside of jit; {_OUTSIDE}")
    for path, leaf in jax.tree.leaves_with_path(params):
        if jnp.iscomplexobj(leaf):
            raise TypeError(
                f"params: leaf {jax.tree_util.keystr(path)} is {describe(leaf)}, but curvature is of real "
                "parameters; give the real and the imaginary part as two leaves."
            )
    return jax.tree.map(jnp.asarray, params)


def check_tolerance(name: str, value: Any) -> None:
    """Raises unless `value` is a positive, finite number."""
    check_scalar(name, value, lambda x: 0 < x < np.inf, "a positive, finite number")


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
    check_concrete("tangent", tangent)
    leaves = jax.tree.leaves(tangent)
    for (path, like), leaf in zip(jax.tree.leaves_with_path(params), leaves, strict=True):
        if np.shape(leaf) != like.shape:
            where = jax.tree_util.keystr(path)
            raise ValueError(f"tangent: expected shape {like.shape} for leaf {where}, got {np.shape(leaf)}.")
