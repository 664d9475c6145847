"""The Hessian layer by layer: each layer's top eigenspace, and the Kronecker product that comes near it."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from nso_jax._checks import check_choice, check_count
from nso_jax.curvature._checks import check_tolerance
from nso_jax.curvature._dense_layers import NotDenseError
from nso_jax.curvature._estimators import estimator
from nso_jax.curvature._kronecker import Block, KroneckerFactors, kronecker_factors
from nso_jax.curvature.eigenvalues import Eigenpairs, eigenvalues
from nso_jax.curvature.operators import CurvatureMatrix

__all__ = ["LayerStructure", "layer_structure"]

# How a layer's factors are formed where an example has many inputs.
_WEIGHT_SHARING = ("expand", "reduce")


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


@estimator
def layer_structure(
    key: jax.Array,
    h: CurvatureMatrix,
    *,
    k: int = 10,
    tol: float = 1e-3,
    num_probes: int = 20,
    weight_sharing: str = "expand",
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

    Where an example has many inputs x_t (time steps, patches), with M_st the Hessian of its loss by z_s and
    z_t, the block is `B = E[sum_st x_s x_t^T (x) M_st]`. There are two approximations of it:

        expand:  K = E_t[x_t x_t^T] (x) E[sum_t M_tt]
        reduce:  K = E[x' x'^T] (x) E[sum_st M_st],   x' = mean_t x_t.

    The first one takes each x_t for an example of its own. Both neglect what varies together. In a deep
    linear network with the squared loss nothing does: the first one is B if the loss is a sum or mean over
    the time steps, the second one if it is of the sum or mean of the outputs over them.

    The layer's input and output are found in the model itself, which can be any function that JAX traces: the
    leaf is followed through jit, checkpoint, vmap, casts and transposes to the one matrix product that takes
    it. A leaf of more dimensions, such as the kernels of attention, will do if the product is over its first
    or its last axes. Where the leaf is used otherwise (convolution, embedding, twice, in a loop) or where
    examples mix (batch normalization in training mode), `kronecker` is None and `reason` says why. Time steps
    may mix. Which inputs are of one example is found by rotating the examples of the first batch.

    The products of a layer are those of `eigenvalues`, one for each probe and each output, and one to three.
    Where time steps mix, as they do before attention, expand takes another one for each output and time step
    if these are at most `num_probes`. Else it estimates `E[sum_t M_tt]`, without bias, from draws of random
    signs for all time steps of all examples: two to `num_probes` of them, until `output_standard_error` is
    .01, each of one product for each output. The `error` is then that of K with the estimate in it.

    Args:
      key: PRNG key for the start vectors and the probes; a leaf's depend on its position in `params`.
      h: the matrix. With that of `gauss_newton`, all of the above holds with `M = J^T H J`, J being the
        derivative of the model's outputs by z. Its mask chooses the leaves to study; without one, these are
        the leaves of at least two dimensions: kernels, but no biases. Empty leaves are left out. A penalty on
        the weights in the loss uses a leaf once more: leave it out. Whatever `weight` says, time steps that
        are padding count among a layer's inputs.
      k: how many eigenvalues of each layer; all of them where a layer has fewer.
      tol: largest residual of an eigenpair, relative to the layer's largest absolute eigenvalue. The default
        suits the comparison of subspaces, whose error is of that size over the gap behind the k-th value.
      num_probes: probes for the error; at least 2. In a layer of 640 to 4,096 weights, the default gave it to
        5 % of itself. Also the most time steps, or draws of signs, from which expand forms a factor.
      weight_sharing: "expand" or "reduce": the approximation where an example has many inputs. The default
        suits losses of each time step, as in language models; the other is for one loss of a mean or sum of
        them, as in classifiers of images by their patches. They are the same where an example has one input.
      callback: called with the number of products so far, over all layers: for a progress bar.

    Returns:
      A `LayerStructure` for each leaf, by the leaf's path as `jax.tree_util.keystr` writes it.

    Warns:
      UserWarning: an eigenvalue did not converge, as in `eigenvalues`.

    Raises:
      TypeError: `key` is not a PRNG key, or `h` is not a `CurvatureMatrix`.
      ValueError: `k` is less than 1, `num_probes` less than 2, `tol` is not positive, `weight_sharing` is
        neither of the two, the mask selects no leaf that has entries, or without a mask no leaf has two
        dimensions.
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
      >>> h = curvature.gauss_newton(model, loss, params, jax.random.normal(data, (50, 3)))
      >>> layers = curvature.layer_structure(jax.random.key(1), h, k=2)
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
      Eschenhagen, Immer, Turner, Schneider, Hennig, Kronecker-Factored Approximate Curvature for Modern
      Neural Network Architectures, arXiv 2311.00636, 2023.
    """
    check_count("k", k, 1)
    check_count("num_probes", num_probes, 2)
    check_tolerance("tol", tol)
    check_choice("weight_sharing", weight_sharing, _WEIGHT_SHARING)
    new_callback = _joint_callbacks(callback)
    leaves, structure = jax.tree.flatten_with_path(h.params)
    structures = {}
    for position in _chosen(h):
        path, leaf = leaves[position]
        alone = jax.tree.unflatten(structure, [i == position for i in range(len(leaves))])
        block = Block(h.like(mask=alone), position, new_callback)
        start_key, rest_key = jax.random.split(jax.random.fold_in(key, position))
        pairs = _eigenpairs(start_key, block, min(k, leaf.size), tol)
        structures[jax.tree_util.keystr(path)] = _structure(
            rest_key, block, pairs, num_probes, weight_sharing
        )
    return structures


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


def _chosen(h: CurvatureMatrix) -> list[int]:
    """The positions of the leaves to study."""
    leaves = jax.tree.leaves(h.params)
    flags = [leaf.ndim > 1 for leaf in leaves] if h.mask is None else h.flags
    chosen = [i for i, (leaf, flag) in enumerate(zip(leaves, flags, strict=True)) if flag and leaf.size]
    if not chosen and h.mask is None:
        raise ValueError("params: no leaf has two dimensions or more; choose leaves with mask.")
    if not chosen:
        raise ValueError("mask: selects no leaf of params that has entries.")
    return chosen


def _eigenpairs(key: jax.Array, block: Block, k: int, tol: float) -> Eigenpairs:
    pairs = eigenvalues(key, block.matrix, k=k, tol=tol, callback=block.new_callback())
    return pairs._replace(vectors=[jax.tree.leaves(vector)[block.position] for vector in pairs.vectors])


def _structure(
    key: jax.Array, block: Block, pairs: Eigenpairs, num_probes: int, weight_sharing: str
) -> LayerStructure:
    try:
        return LayerStructure(pairs, kronecker_factors(key, block, pairs, num_probes, weight_sharing), "")
    except NotDenseError as reason:
        return LayerStructure(pairs, None, str(reason))
