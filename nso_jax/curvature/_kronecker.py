"""The Kronecker product that comes near a dense layer's block of the Hessian."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nso_jax import noise
from nso_jax.curvature._batches import batch_size, weighted
from nso_jax.curvature._dense_layers import Layout, NotDenseError, Use, find_layout, tapped
from nso_jax.curvature._estimators import Products
from nso_jax.curvature._probes import mean_and_error, random_signs
from nso_jax.curvature._programs import Loss, Programs
from nso_jax.curvature.eigenvalues import Eigenpairs
from nso_jax.curvature.operators import CurvatureMatrix
from nso_jax.curvature.subspaces import subspace_overlap

_MATRIX = 2  # dimensions
# An estimated factor with a standard error of this part of it is exact enough: K is farther from B than that.
_ENOUGH = 0.01


class KroneckerFactors(NamedTuple):
    """The Kronecker product that approximates a dense layer's block of the Hessian.

    A leaf of more than two dimensions is a matrix here: the axes along which the layer sums are one of its
    two, and the others the other.

    Attributes:
      input: `E[x x^T]`, (in, in) in float64, x being the layer's input: of an example, or where an example
        has many, of each (expand) or their mean (reduce).
      output: `E[M]`, (out, out) in float64, M being the Hessian of an example's loss by the layer's output,
        or where an example has many, the sum of those by each one (expand) or by a shift of all (reduce).
      error: `||B - K||_F / ||B||_F`, B being the block and K the Kronecker product, estimated from probes.
      error_standard_error: one standard deviation of `error`, estimated from the probes.
      eigenvalues: the largest eigenvalues of K, as many as there are eigenpairs of the block, descending.
      vectors: their eigenvectors, of unit norm and the leaf's shape, in float64.
      overlap: `subspace_overlap` of these vectors with the block's own.
      output_standard_error: one standard deviation of `output` over its Frobenius norm where it is estimated;
        0 where it is exact.
    """

    input: np.ndarray
    output: np.ndarray
    error: float
    error_standard_error: float
    eigenvalues: np.ndarray
    vectors: list[np.ndarray]
    overlap: float
    output_standard_error: float


class Block(NamedTuple):
    """One leaf's block of a matrix."""

    matrix: CurvatureMatrix  # of this leaf alone
    position: int
    new_callback: Callable[[], Callable[[int], object] | None]

    @property
    def leaf(self) -> jax.Array:
        """The leaf."""
        return jax.tree.leaves(self.matrix.params)[self.position]

    @property
    def loss(self) -> Loss:
        """What the matrix is of."""
        return self.matrix.programs.loss

    def products(self, matrix: CurvatureMatrix) -> Products:
        """Products with a matrix, which count among those of all layers."""
        return Products(matrix, self.new_callback())


class _Layer(NamedTuple):
    """How a block's leaf is used as a dense layer."""

    use: Use  # by its shapes
    layout: Layout
    reduce: bool  # else expand


def kronecker_factors(
    key: jax.Array, block: Block, pairs: Eigenpairs, num_probes: int, weight_sharing: str
) -> KroneckerFactors:
    """The factors, how far off their product is, and its top eigenpairs; raises NotDenseError without any."""
    shape = block.leaf.shape
    if len(shape) < _MATRIX:
        raise NotDenseError(f"the leaf has shape {shape}, and the weight of a dense layer is a matrix.")
    _, first, _ = next(weighted(block.matrix.batches, block.matrix.weight))
    inputs = block.matrix.programs.compiled(_use, static_argnames="position")
    use, layout = find_layout(functools.partial(inputs, position=block.position), block.matrix.params, first)
    layer = _Layer(use, layout, weight_sharing == "reduce")
    moment, positions = _input_moment(block, layer)
    mixing_key, probe_key = jax.random.split(key)
    matrix, matrix_error = _output_matrix(mixing_key, block, layer, positions, num_probes)
    # In the order of the leaf's axes, in which the product with an array V like the leaf is left @ V @ right.
    left, right = (moment, matrix) if use.axis == 0 else (matrix, moment)
    error, standard_error = product_error(probe_key, block, left, right, num_probes)
    values, vectors = _top_products(left, right, len(pairs.values))
    vectors = [vector.reshape(shape) for vector in vectors]
    overlap = subspace_overlap(vectors, pairs.vectors)
    return KroneckerFactors(moment, matrix, error, standard_error, values, vectors, overlap, matrix_error)


def _use(loss: Loss, params: Any, batch: Any, *, position: int) -> Use:
    return tapped(loss.traced, position, params, batch)[1]


def _input_moment(block: Block, layer: _Layer) -> tuple[np.ndarray, set[int]]:
    """E[x x^T], and how many positions the examples have in the batches."""
    h = block.matrix
    moment = h.programs.compiled(_batch_moment, static_argnames=("position", "layout", "reduce"))
    total: Any = 0.0
    size = 0.0
    found = set()
    for _, batch, weight in weighted(h.batches, h.weight):
        matrix, positions = jax.device_get(
            moment(h.params, batch, position=block.position, layout=layer.layout, reduce=layer.reduce)
        )
        found.add(int(positions))
        of_examples = h.weight is None and not layer.reduce  # which have so many inputs each
        count = weight * (int(positions) if of_examples else 1)
        total += count * np.asarray(matrix, np.float64)
        size += count
    return total / size, found


def _batch_moment(
    loss: Loss, params: Any, batch: Any, *, position: int, layout: Layout, reduce: bool
) -> tuple[jax.Array, int]:
    """The mean of x x^T in a batch, and how many positions its examples have."""
    inputs = _use(loss, params, batch, position=position).inputs
    x = layout.rows(inputs, batch_size(batch, 0)).astype(_tap_dtype(inputs))
    positions = x.shape[1]
    x = jnp.mean(x, axis=1) if reduce else x.reshape(-1, x.shape[2])
    return jnp.matmul(x.T, x, precision="highest") / len(x), positions


def _output_matrix(
    key: jax.Array, block: Block, layer: _Layer, positions: set[int], num_probes: int
) -> tuple[np.ndarray, float]:
    """E[M], and its relative standard error.

    A bias that is added to all of the layer's outputs z_i has for matrix the sum of M_ij over all pairs. With
    random signs s_i, a bias that z_i gets s_i times has the sum of s_i s_j M_ij. The two are the same where
    nothing mixes: M_ij = 0 unless i = j. Only then are they the sum of M_ii, an example's positions counting
    as one z_i to reduce, and each by itself to expand.
    """
    sign_key, direction_key = jax.random.split(key)
    size = layer.use.size

    def signs(n: int, r: int) -> jax.Array:
        return noise.rademacher(sign_key, (n, 1 if layer.reduce else r, 1), _tap_dtype(block.leaf))

    products = block.products(_shifts(block, layer, 1, _to_all, signs))
    direction = np.asarray(jax.random.normal(direction_key, (size,)), np.float64)
    images = products(np.vstack([np.eye(size, 2 * size), np.append(np.zeros(size), direction)]))
    matrix, signed = images[:-1, :size], images[-1, size:]
    scale = np.linalg.norm(matrix) * np.linalg.norm(direction) + np.linalg.norm(signed)
    if np.linalg.norm(signed - matrix @ direction) <= np.sqrt(layer.use.epsilon) * scale:
        return (matrix + matrix.T) / 2, 0.0
    if positions == {1}:
        raise _mixing_error()
    rest_key = jax.random.fold_in(key, 2)
    if not layer.reduce:
        return _sum_over_positions(rest_key, block, layer, positions, num_probes)
    # Or the sum over an example's positions is zero but for rounding, as it is for the keys of attention.
    _shifts_of_unmixed(rest_key, block, layer, 1, exact=False)
    return (matrix + matrix.T) / 2, 0.0


def _sum_over_positions(
    key: jax.Array, block: Block, layer: _Layer, positions: set[int], num_probes: int
) -> tuple[np.ndarray, float]:
    """The mean of an example's sum of M_ii, where its positions i mix, and its relative standard error.

    A bias that every example gets at one position has that position's term. Where these are more than the
    probes, biases that come with a random sign for each z_i have the sum, and terms of mean 0 besides.
    """
    exact = len(positions) == 1 and max(positions) <= num_probes
    number = max(positions) if exact else num_probes
    products = _shifts_of_unmixed(key, block, layer, number, exact=exact)
    size = layer.use.size
    terms: list[np.ndarray] = []
    for start in range(0, number * size, size):
        term = products(np.eye(size, products.h.size, start))[:, start : start + size]
        terms.append((term + term.T) / 2)
        if not exact and len(terms) > 1 and _relative_error(terms) <= _ENOUGH:
            break
    if exact:
        return np.sum(terms, axis=0), 0.0
    return np.mean(terms, axis=0), _relative_error(terms)


def _shifts_of_unmixed(key: jax.Array, block: Block, layer: _Layer, number: int, *, exact: bool) -> Products:
    """The matrix by biases for one position each, or with random signs; raises if examples mix."""
    draw_key, sign_key, direction_key = jax.random.split(key, 3)
    dtype = _tap_dtype(block.leaf)

    def with_signs(biases: jax.Array, n: int, r: int) -> jax.Array:
        draws = noise.rademacher(draw_key, (number, n, r), dtype)
        return jnp.einsum("dnr,do->nro", draws, biases, precision="highest")

    def signs(n: int, r: int) -> jax.Array:  # noqa: ARG001
        return noise.rademacher(sign_key, (n, 1, 1), dtype)

    products = block.products(_shifts(block, layer, number, _to_all if exact else with_signs, signs))
    width = products.h.size // 2
    direction = np.asarray(jax.random.normal(direction_key, (1, width)), np.float64)
    images = products(np.kron(np.eye(2), direction))
    common, signed = images[0, :width], images[1, width:]
    scale = np.linalg.norm(common) + np.linalg.norm(signed)
    if np.linalg.norm(signed - common) > np.sqrt(layer.use.epsilon) * scale:
        raise _mixing_error()
    return products


def _relative_error(samples: list[np.ndarray]) -> float:
    """The standard error of a mean matrix over its Frobenius norm."""
    mean, error = mean_and_error(np.stack(samples))
    norm = np.linalg.norm(mean)
    return float(np.linalg.norm(error) / norm) if norm else 0.0


def _shifts(
    block: Block,
    layer: _Layer,
    number: int,
    spread: Callable[[jax.Array, int, int], jax.Array],
    signs: Callable[[int, int], jax.Array],
) -> CurvatureMatrix:
    """The matrix by biases of the layer: a `number` that are common to the examples, and as many with signs.

    From the numbers of examples and of positions, `spread` turns biases (number, out) into what each z_i gets
    of them, and `signs` gives the signs that the others get besides; both fit (examples, positions, out).
    """
    h, traced = block.matrix, block.loss.traced
    zeros = jnp.zeros((number, layer.use.size), _tap_dtype(block.leaf))

    def model(shifted: Any, batch: Any) -> Any:
        def shift(n: int, r: int) -> jax.Array:
            common, signed = (spread(shifted[name], n, r) for name in ("common", "signed"))
            return jnp.broadcast_to(common + signs(n, r) * signed, (n, r, layer.use.size))

        return tapped(traced, block.position, shifted["params"], batch, (layer.layout, shift))[0]

    return h.like(
        programs=Programs(block.loss.of(model)),
        params={"common": zeros, "params": h.params, "signed": zeros},
        mask={"common": True, "params": False, "signed": True},
    )


def _to_all(biases: jax.Array, n: int, r: int) -> jax.Array:  # noqa: ARG001
    """One bias for all examples and positions, or one for each position of all examples."""
    return biases[None]


def _mixing_error() -> NotDenseError:
    return NotDenseError("examples mix after the layer: its output for one changes the loss of others.")


def _tap_dtype(array: jax.Array) -> Any:
    return jnp.float64 if array.dtype == jnp.float64 else jnp.float32


def product_error(
    key: jax.Array, block: Block, left: np.ndarray, right: np.ndarray, num_probes: int
) -> tuple[float, float]:
    """||B - K||_F / ||B||_F and its standard error, by the delta method for the root of a ratio of means."""
    probes = random_signs(key, 0, num_probes, block.matrix.size)
    exact = block.products(block.matrix)(probes)
    matrices = probes.reshape(-1, len(left), len(right))
    approximate = np.reshape(left @ matrices @ right, exact.shape)
    missed = np.sum((exact - approximate) ** 2, axis=1)
    norms = np.sum(exact**2, axis=1)
    if not norms.any():
        raise NotDenseError("the leaf's block is zero: the loss does not depend on it to second order.")
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
