"""The Hessian layer by layer: each layer's top eigenspace, and the Kronecker product that comes near it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun

from nso_jax import noise
from nso_jax._checks import as_key, check_count, leaf_mask
from nso_jax.curvature.eigenvalues import Eigenpairs, eigenvalues
from nso_jax.curvature.operators import (
    GaussNewton,
    Operator,
    batch_size,
    check_batches,
    check_function,
    check_params,
    check_tolerance,
    each,
)
from nso_jax.curvature.probes import mean_and_error

# Primitives that give back the matrices that they are given.
_KEEPING = {"convert_element_type", "copy", "copy_p", "name", "optimization_barrier", "sharding_constraint"}
# Primitives that evaluate a jaxpr once, and differentiate it by its own equations.
_CALLING = {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"}
_MATRIX = 2  # dimensions
# A vector of norm 1 nearer than this to the span of others is taken to lie in it.
_DEPENDENT = 1e-6


class KroneckerFactors(NamedTuple):
    """The Kronecker product that approximates a dense layer's block of the Hessian.

    Attributes:
      input: `E[x x^T]`, (in, in) in float64, x being the layer's input of an example.
      output: `E[M]`, (out, out) in float64, M being the Hessian of an example's loss by the layer's output.
      error: `||B - K||_F / ||B||_F`, B being the block and K the Kronecker product, estimated from probes.
      error_standard_error: one standard deviation of `error`, estimated from the probes.
      eigenvalues: the largest eigenvalues of K, as many as there are eigenpairs of the block, descending.
      vectors: their eigenvectors, of unit norm and the leaf's shape, in float64.
      overlap: `subspace_overlap` of these vectors with the block's own.
    """

    input: np.ndarray
    output: np.ndarray
    error: float
    error_standard_error: float
    eigenvalues: np.ndarray
    vectors: list[np.ndarray]
    overlap: float


class LayerStructure(NamedTuple):
    """What `layer_structure` finds for one leaf.

    Attributes:
      eigenpairs: the largest eigenvalues of the leaf's own block of the Hessian, with their eigenvectors as
        arrays of the leaf's shape.
      kronecker: the Kronecker approximation of the block; None where the leaf is no dense layer's weight.
      reason: why `kronecker` is None, else empty.
    """

    eigenpairs: Eigenpairs
    kronecker: KroneckerFactors | None
    reason: str


def layer_structure(
    key: jax.Array,
    fun: Callable[[Any, Any], jax.Array],
    params: Any,
    batches: Any,
    *,
    k: int = 10,
    tol: float = 1e-3,
    mask: Any = None,
    num_probes: int = 20,
    callback: Callable[[int], object] | None = None,
) -> dict[str, LayerStructure]:
    """Computes each layer's top eigenspace, and how near its block of the Hessian is to a Kronecker product.

    A dense layer `z = x W + b` with the input x of an example, and M the Hessian of that example's loss by z,
    has the block B of the Hessian of the mean loss, and the approximation K by two small matrices:

        B = E[x x^T (x) M],    K = E[x x^T] (x) E[M].

    They are equal where x x^T and M do not vary together. K has the products of the factors' eigenvalues for
    eigenvalues, and the outer products of their eigenvectors for eigenvectors. How well it does is told by

        error = ||B - K||_F / ||B||_F,    overlap = Tr(P_B P_K) / k,

    P being the projections on the top-k eigenspaces. The norms come from the products of B and of K with the
    same probes v of random signs, since `E ||A v||^2 = ||A||_F^2`.

    The layer's input and output are found in the model itself, which can be any function that JAX traces: the
    leaf is followed through jit, checkpoint, vmap, casts and transposes to the one matrix product that takes
    it. Where the leaf is used otherwise (convolution, embedding, twice, in a loop, on sequences) or where
    examples mix (batch normalization in training mode), `kronecker` is None and `reason` says why.

    The products of a layer are those of `eigenvalues`, one for each probe and each output, and one more.

    Args:
      key: PRNG key for the start vectors and the probes; a leaf's depend on its position in `params`.
      fun: `fun(params, batch)` is the mean loss over the batch, a real scalar, as in `hvp`. A `GaussNewton`
        stands for its matrix instead: all of the above then holds with `M = J^T H J`, J being the derivative
        of the model's outputs by z. A penalty on the weights in `fun` uses a leaf once more: leave it out.
        A jitted function, or a GaussNewton of two, saves compilations.
      params: any pytree of real arrays.
      batches: one batch, or a list or other re-iterable of batches, by the rule of `hvp`.
      k: how many eigenvalues of each layer; all of them where a layer has fewer.
      tol: largest residual of an eigenpair, relative to the layer's largest absolute eigenvalue. The default
        suits the comparison of subspaces, whose error is of that size over the gap behind the k-th value.
      mask: bools, a prefix pytree of `params` or a callable giving one: the leaves to study. The default is
        those of at least two dimensions: kernels, but no biases. Empty leaves are left out.
      num_probes: probes for the error; at least 2. In a layer of 640 to 4,096 weights, the default gave it to
        5 % of itself.
      callback: called with the number of products so far, over all layers: for a progress bar.

    Returns:
      A `LayerStructure` for each leaf, by the leaf's path as `jax.tree_util.keystr` writes it.

    Warns:
      UserWarning: an eigenvalue did not converge, as in `eigenvalues`.

    Raises:
      TypeError: `key` is not a PRNG key, or `fun`, `params` or `batches` is none that `hvp` takes.
      ValueError: `k` is less than 1, `num_probes` less than 2, `tol` is not positive, `mask` does not fit
        `params` or selects nothing, or without a mask no leaf has two dimensions.
      FloatingPointError: the product of a batch is not finite.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from nso_jax import curvature
      >>> def model(params, x):
      ...     return jnp.tanh(x @ params["first"]) @ params["second"]
      >>> def loss(outputs, x):
      ...     return jnp.mean(jnp.sum(outputs**2, axis=1)) / 2
      >>> first, second, data = jax.random.split(jax.random.key(0), 3)
      >>> params = {"first": jax.random.normal(first, (3, 4)), "second": jax.random.normal(second, (4, 2))}
      >>> fun = curvature.GaussNewton(model, loss)
      >>> layers = curvature.layer_structure(
      ...     jax.random.key(1), fun, params, jax.random.normal(data, (50, 3)), k=2
      ... )
      >>> list(layers)
      ["['first']", "['second']"]
      >>> factors = layers["['second']"].kronecker  # M is the identity for every example: nothing is lost
      >>> round(factors.error, 3), round(factors.overlap, 3)
      (0.0, 1.0)
      >>> factors.output.round(3)
      array([[1., 0.],
             [0., 1.]])

    References:
      Wu, Zhu, Wu, Wang, Ge, Dissecting Hessian: Understanding Common Structure of Hessian in Neural Networks,
      arXiv 2010.04261, 2020.
      Martens, Grosse, Optimizing Neural Networks with Kronecker-factored Approximate Curvature,
      arXiv 1503.05671, 2015.
    """
    key = as_key(key)
    check_count("k", k, 1)
    check_count("num_probes", num_probes, 2)
    check_tolerance("tol", tol)
    check_batches(batches)
    check_function(fun)
    params = check_params(params)
    new_callback = _joint_callbacks(callback)
    structures = {}
    for position in _chosen(mask, params):
        path, leaf = jax.tree.leaves_with_path(params)[position]
        block = _Block(fun, params, batches, position, new_callback)
        start_key, rest_key = jax.random.split(jax.random.fold_in(key, position))
        pairs = _eigenpairs(start_key, block, min(k, leaf.size), tol)
        structures[jax.tree_util.keystr(path)] = _structure(rest_key, block, pairs, num_probes)
    return structures


def subspace_overlap(first: Sequence[Any], second: Sequence[Any]) -> float:
    """Computes how much of one subspace lies in another, from 0 (orthogonal) to 1 (the same).

    With the orthogonal projections P and Q on the two spans of k vectors, it is

        Tr(P Q) / k = (1/k) sum_i cos^2 theta_i,

    theta_i being the principal angles between them. For two independent random subspaces of R^n it is k/n on
    average: so much must be subtracted in thought from what is found between two models or two layers.

    Args:
      first: k vectors: arrays or pytrees. They need not be orthogonal, for their span alone counts.
      second: k vectors of the same structure and shapes.

    Returns:
      The overlap.

    Raises:
      ValueError: a list is empty, the lists differ in length, a vector differs from the first one in
        structure or shape or is not finite, or the vectors of a list are linearly dependent.

    Example:
      >>> import jax.numpy as jnp
      >>> from nso_jax import curvature
      >>> x, y, z = jnp.eye(3)
      >>> round(curvature.subspace_overlap([x, y], [x + y, z]), 3)
      0.5

    References:
      Wu, Zhu, Wu, Wang, Ge, Dissecting Hessian: Understanding Common Structure of Hessian in Neural Networks,
      arXiv 2010.04261, 2020.
      Golub, Van Loan, Matrix Computations, 4th edition, section 6.4, Johns Hopkins University Press, 2013.
    """
    for name, vectors in (("first", first), ("second", second)):
        if not len(vectors):
            raise ValueError(f"{name}: expected at least one vector, got none.")
    if len(first) != len(second):
        raise ValueError(f"second: expected as many vectors as in first, {len(first)}, got {len(second)}.")
    bases = [_basis(name, vectors, first[0]) for name, vectors in (("first", first), ("second", second))]
    return float(np.sum((bases[0].T @ bases[1]) ** 2) / len(first))


class _Block(NamedTuple):
    """One leaf's block of the matrix that `fun` stands for."""

    fun: Callable[[Any, Any], jax.Array]
    params: Any
    batches: Any
    position: int
    new_callback: Callable[[], Callable[[int], None]]

    @property
    def leaf(self) -> jax.Array:
        return jax.tree.leaves(self.params)[self.position]

    @property
    def mask(self) -> Any:
        leaves, structure = jax.tree.flatten(self.params)
        return jax.tree.unflatten(structure, [i == self.position for i in range(len(leaves))])

    @property
    def model(self) -> Callable[[Any, Any], Any]:
        """The function that is traced: what comes after its outputs does not depend on the leaf."""
        return self.fun.model if isinstance(self.fun, GaussNewton) else self.fun


class _NotDenseError(Exception):
    """Says why a leaf has no Kronecker factors."""


def _joint_callbacks(callback: Callable[[int], object] | None) -> Callable[[], Callable[[int], None]]:
    """Gives each operator its own callback, which reports the products of all of them."""
    counts: list[int] = []

    def new_callback() -> Callable[[int], None]:
        position = len(counts)
        counts.append(0)

        def report(count: int) -> None:
            counts[position] = count
            if callback is not None:
                callback(sum(counts))

        return report

    return new_callback


def _chosen(mask: Any, params: Any) -> list[int]:
    """The positions of the leaves to study."""
    leaves = jax.tree.leaves(params)
    flags = [leaf.ndim > 1 for leaf in leaves] if mask is None else leaf_mask(mask, params)
    chosen = [i for i, (leaf, flag) in enumerate(zip(leaves, flags, strict=True)) if flag and leaf.size]
    if not chosen and mask is None:
        raise ValueError("params: no leaf has two dimensions or more; choose leaves with mask.")
    if not chosen:
        raise ValueError("mask: selects no leaf of params that has entries.")
    return chosen


def _eigenpairs(key: jax.Array, block: _Block, k: int, tol: float) -> Eigenpairs:
    fun, params, batches, position, new_callback = block
    pairs = eigenvalues(key, fun, params, batches, k=k, tol=tol, mask=block.mask, callback=new_callback())
    return pairs._replace(vectors=[jax.tree.leaves(vector)[position] for vector in pairs.vectors])


def _structure(key: jax.Array, block: _Block, pairs: Eigenpairs, num_probes: int) -> LayerStructure:
    try:
        return LayerStructure(pairs, _kronecker(key, block, pairs, num_probes), "")
    except _NotDenseError as reason:
        return LayerStructure(pairs, None, str(reason))


def _kronecker(key: jax.Array, block: _Block, pairs: Eigenpairs, num_probes: int) -> KroneckerFactors:
    """The factors, how far off their product is, and its top eigenpairs."""
    shape = block.leaf.shape
    if len(shape) != _MATRIX:
        raise _NotDenseError(f"the leaf has shape {shape}, and the weight of a dense layer is a matrix.")
    moment, axis, epsilon = _input_moment(block)
    mixing_key, probe_key = jax.random.split(key)
    matrix = _output_matrix(mixing_key, block, shape[1 - axis], epsilon)
    # In the order of the leaf's axes, in which the product with an array V like the leaf is left @ V @ right.
    left, right = (moment, matrix) if axis == 0 else (matrix, moment)
    error, standard_error = _error(probe_key, block, left, right, num_probes)
    values, vectors = _top_products(left, right, len(pairs.values))
    overlap = subspace_overlap(vectors, pairs.vectors)
    return KroneckerFactors(moment, matrix, error, standard_error, values, vectors, overlap)


def _input_moment(block: _Block) -> tuple[np.ndarray, int, float]:
    """E[x x^T], the leaf's axis along x, and the relative rounding error of the layer."""

    @jax.jit
    def moment(params: Any, batch: Any) -> _Moment:
        _, use = _tapped(block.model, block.position, params, batch, None)
        x = use.inputs.astype(_tap_dtype(use.inputs))
        return _Moment(jnp.matmul(x.T, x, precision="highest") / len(x), use.axis, use.epsilon)

    total: Any = 0.0
    size = 0
    for index, batch in enumerate(each(block.batches)):
        count = batch_size(batch, index)
        found = moment(block.params, batch)
        total += count * np.asarray(found.matrix, np.float64)
        size += count
    return total / size, found.axis, found.epsilon


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Moment:
    """What a jitted function returns, with what it found while it was traced."""

    matrix: jax.Array
    axis: int = dataclasses.field(metadata={"static": True})
    epsilon: float = dataclasses.field(metadata={"static": True})


def _output_matrix(key: jax.Array, block: _Block, size: int, epsilon: float) -> np.ndarray:
    """E[M], as the matrix of a bias `common` that is added to z: the sum of M_ij over all pairs of examples.

    With random signs s_i, the matrix of a bias that example i gets s_i times is the sum of s_i s_j M_ij. The
    two are the same where examples do not mix: M_ij = 0 unless i = j. Only then are they E[M].
    """
    sign_key, direction_key = jax.random.split(key)

    def model(shifted: Any, batch: Any) -> Any:
        signs = noise.rademacher(sign_key, (batch_size(batch, 0), 1), shifted["common"].dtype)
        shift = shifted["common"][None] + signs * shifted["signed"][None]
        return _tapped(block.model, block.position, shifted["params"], batch, shift)[0]

    zeros = jnp.zeros(size, _tap_dtype(block.leaf))
    fun: Any = dataclasses.replace(block.fun, model=model) if isinstance(block.fun, GaussNewton) else model
    operator = Operator(
        fun,
        {"common": zeros, "params": block.params, "signed": zeros},
        block.batches,
        mask={"common": True, "params": False, "signed": True},
        callback=block.new_callback(),
    )
    direction = np.asarray(jax.random.normal(direction_key, (size,)), np.float64)
    images = operator.products(np.vstack([np.eye(size, 2 * size), np.append(np.zeros(size), direction)]))
    matrix, signed = images[:-1, :size], images[-1, size:]
    scale = np.linalg.norm(matrix) * np.linalg.norm(direction) + np.linalg.norm(signed)
    if np.linalg.norm(signed - matrix @ direction) > np.sqrt(epsilon) * scale:
        raise _NotDenseError("examples mix after the layer: its output for one changes the loss of others.")
    return (matrix + matrix.T) / 2


def _tap_dtype(array: jax.Array) -> Any:
    return jnp.float64 if array.dtype == jnp.float64 else jnp.float32


def _error(
    key: jax.Array, block: _Block, left: np.ndarray, right: np.ndarray, num_probes: int
) -> tuple[float, float]:
    """||B - K||_F / ||B||_F and its standard error, by the delta method for the root of a ratio of means."""
    fun, params, batches, _, new_callback = block
    operator = Operator(fun, params, batches, mask=block.mask, callback=new_callback())
    probes = operator.signs(key, 0, num_probes)
    exact = operator.products(probes)
    matrices = probes.reshape(-1, *block.leaf.shape)
    approximate = np.reshape(left @ matrices @ right, exact.shape)
    missed = np.sum((exact - approximate) ** 2, axis=1)
    norms = np.sum(exact**2, axis=1)
    if not norms.any():
        raise _NotDenseError("the leaf's block is zero: the loss does not depend on it to second order.")
    ratio = missed.mean() / norms.mean()
    ratio_error = mean_and_error(missed - ratio * norms)[1] / norms.mean()
    return float(np.sqrt(ratio)), float(ratio_error / (2 * np.sqrt(ratio))) if ratio else 0.0


def _top_products(left: np.ndarray, right: np.ndarray, k: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """The k largest eigenvalues of the Kronecker product, and its eigenvectors as matrices."""
    left_values, left_vectors = np.linalg.eigh(left)
    right_values, right_vectors = np.linalg.eigh(right)
    values = np.outer(left_values, right_values)
    order = np.argsort(-values, axis=None, kind="stable")[:k]
    pairs = zip(*np.unravel_index(order, values.shape), strict=True)
    return values.flat[order], [np.outer(left_vectors[:, i], right_vectors[:, j]) for i, j in pairs]


def _basis(name: str, vectors: Sequence[Any], like: Any) -> np.ndarray:
    """An orthonormal basis of the span of vectors, in columns."""
    columns = np.stack([_column(name, i, vector, like) for i, vector in enumerate(vectors)], axis=1)
    if not np.isfinite(columns).all():
        raise ValueError(f"{name}: expected finite vectors, got NaN or infinity in one.")
    norms = np.linalg.norm(columns, axis=0)
    basis, triangle = np.linalg.qr(columns / np.where(norms > 0, norms, 1))
    # An entry of the diagonal is how far a vector is from the span of those before it.
    if len(triangle) < len(vectors) or np.abs(np.diag(triangle)).min() <= _DEPENDENT:
        raise ValueError(f"{name}: the {len(vectors)} vectors are linearly dependent; give a basis.")
    return basis


def _column(name: str, position: int, vector: Any, like: Any) -> np.ndarray:
    """One vector in float64, checked to be like the first one."""
    given: Any = jax.tree.structure(vector)
    expected: Any = jax.tree.structure(like)
    if given != expected:
        raise ValueError(f"{name}[{position}]: expected a pytree like first[0], {expected}, got {given}.")
    pairs = zip(jax.tree.leaves_with_path(vector), jax.tree.leaves(like), strict=True)
    for (path, leaf), like_leaf in pairs:
        if np.shape(leaf) != np.shape(like_leaf):
            where = f" for leaf {jax.tree_util.keystr(path)}" if path else ""
            raise ValueError(
                f"{name}[{position}]: expected shape {np.shape(like_leaf)}{where} as in first[0], "
                f"got {np.shape(leaf)}."
            )
    return np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(vector)])


class _Use(NamedTuple):
    """The matrix product that takes a leaf."""

    inputs: jax.Array  # (examples, in)
    axis: int  # of the leaf, along which the product sums
    epsilon: float  # relative rounding error of its coarsest operand or result


# For each value in a jaxpr: which of the leaf's axes its own axes are if it is the leaf, else None.
_Axes = tuple[int, ...] | None


class _Layer(NamedTuple):
    """What to do where the leaf is found."""

    shift: jax.Array | None  # (examples, out), to be added to the product
    examples: int
    uses: list[_Use]


def _tapped(
    model: Callable[[Any, Any], Any], position: int, params: Any, batch: Any, shift: jax.Array | None
) -> tuple[Any, _Use]:
    """The model's outputs, with `shift` added to those of a layer, and how its weight, a leaf, is used."""
    closed, shapes = jax.make_jaxpr(model, return_shape=True)(params, batch)
    arguments = jax.tree.leaves((params, batch))
    axes: list[_Axes] = [(0, 1) if i == position else None for i in range(len(arguments))]
    layer = _Layer(shift, batch_size(batch, 0), [])
    outputs, output_axes = _evaluate(closed, arguments, axes, layer)
    if any(output_axes):
        raise _NotDenseError("the leaf is among the outputs of the model.")
    if not layer.uses:
        raise _NotDenseError("the model does not use the leaf.")
    return jax.tree.unflatten(jax.tree.structure(shapes), outputs), layer.uses[0]


def _evaluate(
    closed: ClosedJaxpr, arguments: list[Any], axes: list[_Axes], layer: _Layer
) -> tuple[list[Any], list[_Axes]]:
    """Evaluates a jaxpr equation by equation, following the leaf."""
    jaxpr = closed.jaxpr
    values: dict[Var, Any] = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))
    leaf_axes: dict[Var, _Axes] = dict(zip(jaxpr.invars, axes, strict=True))

    def read(atoms: Sequence[Any]) -> tuple[list[Any], list[_Axes]]:
        return (
            [atom.val if isinstance(atom, Literal) else values[atom] for atom in atoms],
            [None if isinstance(atom, Literal) else leaf_axes.get(atom) for atom in atoms],
        )

    for equation in jaxpr.eqns:
        operands, operand_axes = read(equation.invars)
        result_axes: list[_Axes] = [None] * len(equation.outvars)
        if any(operand_axes) and equation.primitive.name in _CALLING:
            results, result_axes = _evaluate(_called(equation), operands, operand_axes, layer)
        else:
            results = _apply(jaxpr, equation, operands)
            if any(operand_axes):
                results, result_axes = _follow(equation, operands, operand_axes, results, layer)
        values.update(zip(equation.outvars, results, strict=True))
        leaf_axes.update(zip(equation.outvars, result_axes, strict=True))
    return read(jaxpr.outvars)


def _apply(jaxpr: Jaxpr, equation: JaxprEqn, operands: list[Any]) -> list[Any]:
    """The results of one equation of a jaxpr."""
    pairs = zip(equation.invars, operands, strict=True)
    given = {atom: operand for atom, operand in pairs if isinstance(atom, Var)}
    alone = jaxpr.replace(constvars=[], invars=list(given), outvars=equation.outvars, eqns=[equation])
    return jaxpr_as_fun(ClosedJaxpr(alone, ()))(*given.values())


def _called(equation: JaxprEqn) -> ClosedJaxpr:
    parameters = equation.params
    inner = parameters["jaxpr"] if "jaxpr" in parameters else parameters["call_jaxpr"]
    return inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())


def _follow(
    equation: JaxprEqn, operands: list[Any], axes: list[_Axes], results: list[Any], layer: _Layer
) -> tuple[list[Any], list[_Axes]]:
    """What becomes of an equation's results, the leaf being among its operands."""
    name = equation.primitive.name
    if name in _KEEPING:
        return results, axes
    if name == "transpose" and axes[0]:
        return results, [tuple(axes[0][i] for i in equation.params["permutation"])]
    if name == "dot_general":
        return [_product(equation, operands, axes, results[0], layer)], [None]
    raise _NotDenseError(f"the leaf goes into {name}, and not into the matrix product of a dense layer.")


def _product(
    equation: JaxprEqn, operands: list[Any], axes: list[_Axes], result: jax.Array, layer: _Layer
) -> jax.Array:
    """Records the matrix product of the leaf with the layer's inputs, and shifts it."""
    if layer.uses or all(axes):
        raise _NotDenseError("the leaf is used more than once.")
    side = 0 if axes[0] else 1
    weight, inputs = operands[side], operands[1 - side]
    contracted, batched = equation.params["dimension_numbers"]
    if batched[side] or len(contracted[side]) != 1 or inputs.ndim != _MATRIX:
        raise _NotDenseError(
            f"the leaf is multiplied with an array of shape {inputs.shape}, not with one vector per example."
        )
    rows = jnp.moveaxis(inputs, contracted[1 - side][0], 1)
    if len(rows) != layer.examples:
        raise _NotDenseError(f"the layer is applied to {len(rows)} vectors in a batch of {layer.examples}.")
    leaf_axes: Any = axes[side]
    epsilon = max(float(jnp.finfo(array.dtype).eps) for array in (weight, result))
    layer.uses.append(_Use(rows, leaf_axes[contracted[side][0]], epsilon))
    if layer.shift is None:
        return result
    return result + (layer.shift if side else layer.shift.T).astype(result.dtype)
