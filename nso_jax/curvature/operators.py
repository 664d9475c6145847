"""The Hessian and the Gauss-Newton matrix of a mean loss, known by their products with vectors."""

from collections.abc import Callable, Iterator
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from nso_jax._backend import is_on_cpu
from nso_jax._checks import check_count, check_function
from nso_jax.curvature import _vectors
from nso_jax.curvature._batches import Weight, check_batches, explained, is_loader, weighted
from nso_jax.curvature._checks import check_like, check_outside_jit, check_params, chosen_leaves
from nso_jax.curvature._programs import Loss, Programs

__all__ = ["CurvatureMatrix", "gauss_newton", "hessian"]

# Linearizations of a list's batches are kept for the next product while they take no more than this together.
_KEPT_BYTES = 2**28
# A pass over the data takes as many vectors at once as fit into this, with their products.
_BLOCK_BYTES = 2**29
# Vectors side by side where there is more than a CPU, to fill it.
_CHUNK_SIZE = 8


class CurvatureMatrix:
    """The Hessian or the Gauss-Newton matrix of a mean loss over data; `hessian` and `gauss_newton` make it.

    Called with a tangent, it gives the product; the estimators measure the rest. They share its work:
    programs are compiled once for each shape of batch, and the gradient, linearized once for each batch, is
    kept. All this takes memory for as long as the matrix lives. The data, and what the loss closes over,
    count as constant from when the matrix was made: make another one where they have changed.

    Attributes:
      fun: the mean loss, `fun(params, batch)`; for a Gauss-Newton matrix that of the model's outputs.
      params: the params, as JAX arrays.
      batches: the data, as given.
      mask: the choice of leaves, as given.
      weight: how much the mean loss of a batch counts, as given.
      chunk_size: vectors multiplied side by side.
      flags: for each leaf of `params`, whether it is chosen.
      size: how many weights the chosen leaves have: the matrix is of this size.
      dtype: of the products: float32, or float64 if a chosen leaf is.
      epsilon: relative rounding error of the products, that of the coarsest leaf.
      programs: what is compiled, which matrices made by `at` and `on` share.
    """

    fun: Callable[[Any, Any], jax.Array]
    params: Any
    batches: Any
    mask: Any
    weight: Weight | None
    chunk_size: int
    flags: tuple[bool, ...]
    size: int
    dtype: np.dtype
    epsilon: float
    programs: Programs

    def __init__(
        self,
        programs: Programs,
        params: Any,
        batches: Any,
        *,
        mask: Any = None,
        weight: Weight | None = None,
        chunk_size: int | None = None,
    ) -> None:
        check_batches(batches)
        if weight is not None:
            check_function("weight", weight, "a function of a batch, or None")
        if chunk_size is not None:
            check_count("chunk_size", chunk_size, 1)
        self.programs, self.fun = programs, programs.loss.fun
        self.params = check_params(params)
        self.batches, self.mask, self.weight = batches, mask, weight
        self.chunk_size = chunk_size or (1 if is_on_cpu(self.params) else _CHUNK_SIZE)
        self.flags = chosen_leaves(mask, self.params)
        self._chosen = _vectors.select(self.params, self.flags)
        self.size = sum(leaf.size for leaf in self._chosen)
        dtypes = {leaf.dtype for leaf in self._chosen}
        self.dtype = np.dtype(np.float64 if np.dtype(np.float64) in dtypes else np.float32)
        self.epsilon = max(float(jnp.finfo(dtype).eps) for dtype in dtypes)
        self._kept: dict[int, Any] = {}
        self._kept_bytes = 0

    def __call__(self, tangent: Any) -> Any:
        """The product with a pytree like `params`, as another one of the same dtypes.

        Leaves that are not chosen do not count in the tangent, and are zero in the product. It loops in
        Python, so it cannot itself be jitted, vmapped or differentiated.
        """
        check_like("tangent", tangent, self.params)
        check_outside_jit("tangent")
        return self.unravel(self._pass(self.ravel(tangent)[None])[0][0])

    def at(self, params: Any) -> Self:
        """The same at other params of the same form, such as those of a later step of training.

        It shares the compiled programs, and makes its own linearizations.
        """
        check_like("params", params, self.params)
        return self.like(params=params)

    def on(self, batches: Any) -> Self:
        """The same on other data, such as a validation set; it shares programs as with `at`."""
        return self.like(batches=batches)

    def hessian(self) -> Self:
        """The Hessian of the same loss: itself, unless this is a Gauss-Newton matrix."""
        return self.like(programs=self.programs.of_hessian) if self.programs.loss.model else self

    def like(self, **changes: Any) -> Self:
        """The same but for arguments of the constructor; linearizations are not shared."""
        names = ("programs", "params", "batches", "mask", "weight", "chunk_size")
        return type(self)(**{name: getattr(self, name) for name in names} | changes)

    def products(self, vectors: np.ndarray, callback: Callable[[int], object] | None = None) -> np.ndarray:
        """The products with several vectors at once, in as few passes over the data as memory allows.

        Args:
          vectors: of shape (count, size), a row for each, as `ravel` orders the entries.
          callback: called with how many products have been made since it was called last.

        Returns:
          The products, a row for each, in float64 and host memory.
        """
        check_outside_jit("h")
        # A vector, its product and the rounding error of that.
        rows = max(self.chunk_size, _BLOCK_BYTES // (3 * self.dtype.itemsize * max(self.size, 1)))
        images = np.empty((len(vectors), self.size))
        for start in range(0, len(vectors), rows):
            block = vectors[start : start + rows]
            products = np.concatenate(jax.device_get(self._pass(block)))
            images[start : start + rows] = products[: len(block)]
            if callback is not None:
                callback(len(block))
        return images

    def ravel(self, tree: Any) -> jax.Array:
        """The chosen leaves of a pytree like `params` as one vector."""
        return _vectors.ravel(_vectors.select(tree, self.flags), self.dtype)

    def unravel(self, vector: Any) -> Any:
        """A pytree like `params` with the entries of a vector, zero in the leaves that are not chosen."""
        return _vectors.unravel(jnp.asarray(vector, self.dtype), self.params, self.flags)

    def _pass(self, vectors: Any) -> list[jax.Array]:
        """The products with a block of vectors, chunk by chunk, in one pass over the data."""
        size = min(self.chunk_size, len(vectors))
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
                sums[i], ok = self.programs.add(sums[i], weight / weights[0], self._chosen, linear, chunk)
                finite[index].append(ok)
        # Asked only now: waiting for each batch would leave the device idle between them.
        for index, flags in jax.device_get(finite).items():
            if not all(flags):
                raise FloatingPointError(
                    f"The Hessian-vector product of batches[{index}] is not finite: look for NaN or infinity "
                    "in params and in that batch, and for points where the loss has no second derivative."
                )
        return [_divide(total, sum(weights) / weights[0]) for total, _ in sums]

    def _linearizations(self) -> Iterator[tuple[int, float, Any]]:
        """Each batch's number, weight and linearized gradient, kept from the last pass if there is room."""
        for index, batch, weight in weighted(self.batches, self.weight):
            linear = self._kept.get(index)
            if linear is None:
                with explained(self.programs.loss.functions, self.batches):
                    linear = self.programs.linearize(self.params, batch, flags=self.flags)
                size = sum(leaf.nbytes for leaf in jax.tree.leaves(linear))
                if self._may_keep(size):
                    self._kept[index] = linear
                    self._kept_bytes += size
            yield index, weight, linear

    def _may_keep(self, size: int) -> bool:
        """Whether there is room for one more batch's linearization, which a loader may not give again."""
        if not isinstance(self.batches, list):
            return not is_loader(self.batches)
        return len(self.batches) == 1 or self._kept_bytes + size <= _KEPT_BYTES


@jax.jit
def _divide(total: jax.Array, weight: jax.Array) -> jax.Array:
    return total / weight


def hessian(
    fun: Callable[[Any, Any], jax.Array],
    params: Any,
    batches: Any,
    *,
    mask: Any = None,
    weight: Weight | None = None,
    chunk_size: int | None = None,
) -> CurvatureMatrix:
    r"""Returns the Hessian H of the mean loss: a function that multiplies it with a tangent.

    With the weight n_b of batch b, by default its number of examples, and N of all of them, the product is

        H v = sum_b (n_b / N) d/dt grad fun(params + t v, batch_b) at t = 0,

    the forward derivative of a gradient: about two gradients' time, about twice their memory, no matrix.
    Where a `jax.custom_vjp` inside the loss forbids forward mode, it is the backward derivative instead.

    The loop over the batches runs in Python, with one batch's temporaries on the device at a time. The
    gradient is linearized once for each batch. The results of one batch, or of a list of batches while they
    take up to 256 MiB together, are kept for the next product; others are computed again. The products are
    summed over the batches by compensated (Kahan) summation, in float32 or, for float64 params, in float64,
    so the error does not grow with their number.

    Args:
      fun: `fun(params, batch)` is the mean loss over the batch, a real scalar, and depends on nothing else:
        use batch normalization's running statistics and a fixed dropout key, or none.
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
      chunk_size: vectors multiplied side by side by vmap. None: one on CPU, where more are slower, else 8.

    Returns:
      The `CurvatureMatrix`: call it with a tangent, or give it to `trace`, `eigenvalues` or another
      estimator. Its method `at(params)` gives the same at other params, without compiling anew.

    Raises:
      TypeError: `fun` is not callable or, at the first product, returns no real scalar, a leaf of `params` is
        not real floating point, `batches` is a generator or other iterator, which ends after one pass,
        `weight` gives no real number, or it is all called inside jit, or inside vmap or grad over one of the
        arguments.
      ValueError: there are no batches, one of them has no examples, leaves of one of several batches differ
        in their leading axes and there is no `weight`, a weight is negative, not finite or no scalar, all
        are zero, `mask` does not fit `params` or selects nothing, `chunk_size` is less than 1, or a tangent
        is unlike `params`. What is wrong with batches is found at the first product.
      FloatingPointError: the product of a batch is not finite.

    Example:
      The loss `(w . x)^2 / 2` has the Hessian `x x^T`, averaged over the examples.

      >>> import jax
      >>> import jax.numpy as jnp
      >>> from nso_jax import curvature
      >>> def loss(params, batch):
      ...     return jnp.mean((batch @ params["w"]) ** 2) / 2
      >>> params = {"w": jnp.zeros(2)}
      >>> batches = [jnp.array([[1.0, 0.0], [1.0, 0.0]]), jnp.array([[0.0, 3.0]])]
      >>> h = curvature.hessian(loss, params, batches)
      >>> print(h({"w": jnp.array([3.0, 1.0])})["w"])
      [2. 3.]
      >>> round(curvature.trace(jax.random.key(0), h).value, 3)
      3.667
      >>> later = h.at({"w": jnp.ones(2)})  # compiled already

    References:
      Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6(1), 1994.
    """
    check_function("fun", fun, "a function of params and a batch")
    return CurvatureMatrix(
        Programs(Loss(fun)), params, batches, mask=mask, weight=weight, chunk_size=chunk_size
    )


def gauss_newton(
    model: Callable[[Any, Any], Any],
    loss: Callable[[Any, Any], jax.Array],
    params: Any,
    batches: Any,
    *,
    mask: Any = None,
    weight: Weight | None = None,
    chunk_size: int | None = None,
) -> CurvatureMatrix:
    """Returns the Gauss-Newton matrix of the mean loss: a function that multiplies it with a tangent.

    That is the mean of `J^T H J` over the batches, J being the derivative of the model's outputs by the
    params and H the Hessian of `loss` by the outputs. For a loss that is convex in the outputs it has no
    negative eigenvalue: it is the Hessian without the curvature of the model itself, and for cross-entropy
    the Fisher information matrix. Every estimator takes it in place of the Hessian.

    Args:
      model: `model(params, batch)` gives the outputs, an array or a pytree of real arrays.
      loss: `loss(outputs, batch)` is the mean loss over the batch, a real scalar.
      params, batches, mask, weight, chunk_size: as in `hessian`.

    Returns:
      The `CurvatureMatrix`, as `hessian` does.

    Raises:
      TypeError: as `hessian`, for `model` and `loss` too.
      ValueError: as `hessian`.
      FloatingPointError: the product of a batch is not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from nso_jax import curvature
      >>> h = curvature.gauss_newton(
      ...     lambda w, x: x * w**2, lambda outputs, x: jnp.mean(outputs**2) / 2, jnp.array(3.0), jnp.ones(4)
      ... )
      >>> print(h(jnp.array(1.0)))  # (d w^2 / d w)^2; the Hessian is 3 w^2 * 2 = 54
      36.0

    References:
      Schraudolph, Fast curvature matrix-vector products for second-order gradient descent, Neural
      Computation 14(7), 2002.
      Martens, New insights and perspectives on the natural gradient method, arXiv 1412.1193, 2014.
    """
    check_function("model", model, "a function of params and a batch")
    check_function("loss", loss, "a function of the model's outputs and a batch")

    programs = Programs(Loss.of_parts(model, loss))
    return CurvatureMatrix(programs, params, batches, mask=mask, weight=weight, chunk_size=chunk_size)
