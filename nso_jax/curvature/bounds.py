"""A PAC-Bayes bound on the generalization gap, from the trace of the Hessian and the distance trained."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nso_jax import noise
from nso_jax._checks import check_choice, check_count, check_inexact, describe, leaf_name
from nso_jax._derivatives import second_derivative, traced
from nso_jax.curvature._batches import Weight, batch_size, batch_weight, each, explained, unevenness
from nso_jax.curvature._checks import check_concrete, check_like
from nso_jax.curvature._estimators import estimator
from nso_jax.curvature._probes import mean_and_error
from nso_jax.curvature._programs import Loss, checked_loss
from nso_jax.curvature._vectors import Flags
from nso_jax.curvature.operators import CurvatureMatrix

__all__ = ["PacBayesBound", "pac_bayes_bound"]

_UNITS = ("example", "batch")


class PacBayesBound(NamedTuple):
    """The bound and all that it is made of.

    Attributes:
      value: `sqrt(C alpha r^2 / n)`.
      layerwise: `C sqrt(sum_l alpha_l r_l^2 / n)`, over the leaves l.
      max_loss: C, the largest loss of an example, or of a batch.
      max_trace: alpha, the largest trace of the Hessian of an example's loss, or of a batch's.
      max_trace_standard_error: one standard deviation of that example's or batch's estimate, from the probes.
      distance: r, how far `params` are from `initial_params`, as a Euclidean norm.
      sample_size: n, the number of examples.
      per: what the largest loss and traces are the largest of, "example" or "batch".
      leaf_traces: a pytree like `params`: alpha_l, the largest trace of the leaf's own block.
      leaf_distances: a pytree like `params`: r_l, the norm of the leaf's own change.
    """

    value: float
    layerwise: float
    max_loss: float
    max_trace: float
    max_trace_standard_error: float
    distance: float
    sample_size: int
    per: str
    leaf_traces: Any
    leaf_distances: Any


@estimator
def pac_bayes_bound(
    key: jax.Array,
    h: CurvatureMatrix,
    *,
    initial_params: Any,
    num_probes: int = 10,
    per: str = "example",
    callback: Callable[[int], object] | None = None,
) -> PacBayesBound:
    """Evaluates a PAC-Bayes bound on the generalization gap of trained weights W.

    With f_i the loss of example i, H_i its Hessian at W, and W_0 the weights before training,

        value      =  sqrt( C alpha r^2 / n ),    C = max_i f_i(W),  alpha = max_i Tr H_i,  r = ||W - W_0||
        layerwise  =  C sqrt( sum_l max_i Tr H_i,l ||W_l - W_0,l||^2 / n )

    l being the leaves and H_i,l the leaf's own block. The first is the theorem's main term, the second what
    its authors' code evaluates. This is a formula evaluated on the data at hand, not a certificate: the
    theorem takes the loss and the trace over the whole distribution of the data, not over a sample, and has
    constants and lower-order terms that are left out here. It ranks models of one architecture and data set.

    The traces are Hutchinson's estimates, from random signs v in one leaf at a time, so that no other leaf
    adds to their noise:

        Tr H_i,l  ~  (1/m) sum_j v_lj^T H_i v_lj,    v^T H_i v = d^2/dt^2 f_i(W + t v) at t = 0.

    The derivative is taken forward over forward, at once for all the examples of a batch, which share the
    probes: no array of the size of the params is made for an example. It takes four to five evaluations
    of the loss for each probe, leaf and batch. The largest of noisy estimates is biased upwards, so the bound
    errs on the safe side; more probes bring it down. C and traces whose maximum is negative count as 0.

    Args:
      key: PRNG key. Probe j of a leaf depends on the key, on j and on the leaf's path alone.
      h: what `hessian` makes of the loss, at the trained weights. The loss must allow forward
        differentiation, which `jax.custom_vjp` does not: give it without that here. A Gauss-Newton matrix is
        taken as the loss that it is made of. Leaves that its mask leaves out count as fixed: their traces and
        distances are 0. Its batches are taken one after another, and how the examples are divided into them
        matters for `per="batch"` only. The bound has no mean over examples and counts them only, tokens
        never: `weight`, if there is one, must give their number, the length of a leading axis of the batch.
        It is needed only where leaves of a batch have leading axes of different lengths.
      initial_params: a pytree like the params of `h`: the weights that the training started from,
        pretrained ones in fine-tuning. The theorem needs them to be independent of the data.
      num_probes: m, at least 2.
      per: "example", as the theorem has it: `fun` is given batches of one example, `x[i:i+1]` of every array
        that has the leading axis of its batch, other leaves as they are. Or "batch": C and alpha are those
        of the batches' mean losses, which are less than the theorem's, in less time.
      callback: called with the number of second derivatives so far, one for each probe, chosen leaf and
        batch, after each probe of a batch: for a progress bar.

    Returns:
      The `PacBayesBound`.

    Raises:
      TypeError: `key` is not a PRNG key, `h` is not a `CurvatureMatrix`, a leaf of `initial_params` is not
        real floating point, or the loss has a `jax.custom_vjp` inside.
      ValueError: `initial_params` is unlike the params of `h`, `num_probes` is less than 2, `per` is unknown,
        leaves of a batch differ in their leading axes and there is no `weight`, or `weight` is the length of
        none of them.
      FloatingPointError: a loss, a second derivative or a distance is not finite.

    Example:
      The loss `(w . x)^2 / 2` has the trace `||x||^2`, at most 25 here, and is at most 12.5.

      >>> import jax
      >>> import jax.numpy as jnp
      >>> from nso_jax import curvature
      >>> def loss(params, batch):
      ...     return jnp.mean((batch @ params["w"]) ** 2) / 2
      >>> params, initial = {"w": jnp.ones(2)}, {"w": jnp.array([1.0, -3.0])}
      >>> batch = jnp.array([[5.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 2.0]])
      >>> h = curvature.hessian(loss, params, batch)
      >>> bound = curvature.pac_bayes_bound(jax.random.key(0), h, initial_params=initial)
      >>> bound.max_loss, bound.max_trace, bound.distance, bound.sample_size
      (12.5, 25.0, 4.0, 4)
      >>> round(bound.value, 3)  # sqrt(12.5 * 25 * 4**2 / 4)
      35.355

    References:
      Zhang, Li and Ju, Noise Stability Optimization for Finding Flat Minima, arXiv 2306.08553, 2023.
      Hutchinson, A stochastic estimator of the trace of the influence matrix for Laplacian smoothing
      splines, Communications in Statistics: Simulation and Computation 19(2), 1990.
    """
    check_choice("per", per, _UNITS)
    check_count("num_probes", num_probes, 2)
    distances = _leaf_distances(h, initial_params)
    measure = h.programs.compiled(losses_and_curvatures, static_argnames=("per", "size"))
    largest = _Largest(-math.inf, -math.inf, 0.0, np.where(h.flags, -math.inf, 0.0))
    sample_size = probes = 0
    for index, batch in enumerate(each(h.batches)):
        check_concrete(f"batches[{index}]", batch)
        size = _sample_size(batch, index, h.weight)
        if not size:
            continue
        on_batch = functools.partial(measure, h.params, batch=jax.device_put(batch), per=per, size=size)
        rows = []
        for j in range(num_probes):
            with explained(h.programs.loss.functions, h.batches):
                rows.append(_probe(on_batch, _signs(key, j, h.params), h.flags))
            probes += 1
            if callback is not None:
                callback(probes * sum(h.flags))
        losses, samples = _checked(rows, index)
        largest = _larger(largest, losses, samples)
        sample_size += size
    if not sample_size:
        raise ValueError("batches is empty: its iteration gave no batch, or none that `weight` lets count.")
    return _bound(h.params, per, sample_size, distances, largest)


def _sample_size(batch: Any, index: int, weight: Weight | None) -> int:
    """The number of examples in a batch."""
    if weight is None:
        if uneven := unevenness(batch, index):
            raise ValueError(uneven)
        return batch_size(batch, index)
    size = batch_weight(batch, index, weight)
    lengths = {np.shape(leaf)[0] for leaf in jax.tree.leaves(batch) if np.ndim(leaf)}
    if size and size not in (lengths or {1}):
        raise ValueError(
            f"weight(batches[{index}]): expected the number of examples, the length of a leading axis in the "
            f"batch, one of {sorted(lengths)}, got {size:g}; the bound does not count tokens."
        )
    return int(size)


class _Largest(NamedTuple):
    """The largest values in the data so far."""

    loss: float
    trace: float
    trace_standard_error: float
    leaf_traces: np.ndarray  # (leaves,)


def _larger(largest: _Largest, losses: np.ndarray, samples: np.ndarray) -> _Largest:
    """The largest values once a batch has come in, with `samples` of shape (probes, leaves, examples)."""
    totals = samples.sum(axis=1)
    traces = totals.mean(axis=0)
    top = int(np.argmax(traces))
    loss = max(largest.loss, float(losses.max()))
    leaf_traces = np.maximum(largest.leaf_traces, samples.mean(axis=0).max(axis=1))
    if traces[top] <= largest.trace:
        return _Largest(loss, largest.trace, largest.trace_standard_error, leaf_traces)
    _, standard_error = mean_and_error(totals[:, top])
    return _Largest(loss, float(traces[top]), float(standard_error), leaf_traces)


def _bound(
    params: Any, per: str, sample_size: int, distances: np.ndarray, largest: _Largest
) -> PacBayesBound:
    loss, trace = max(largest.loss, 0.0), max(largest.trace, 0.0)
    leaf_sum = float(np.sum(np.maximum(largest.leaf_traces, 0) * distances**2))
    distance = float(np.linalg.norm(distances))
    structure = jax.tree.structure(params)
    return PacBayesBound(
        value=math.sqrt(loss * trace / sample_size) * distance,
        layerwise=loss * math.sqrt(leaf_sum / sample_size),
        max_loss=largest.loss,
        max_trace=largest.trace,
        max_trace_standard_error=largest.trace_standard_error,
        distance=distance,
        sample_size=sample_size,
        per=per,
        leaf_traces=jax.tree.unflatten(structure, largest.leaf_traces.tolist()),
        leaf_distances=jax.tree.unflatten(structure, distances.tolist()),
    )


def losses_and_curvatures(
    loss: Loss, params: Any, signs: Any, leaf: jax.Array, *, batch: Any, per: str, size: int
) -> tuple[jax.Array, jax.Array]:
    """f_i and v^T H_i v of each example i of a batch, or of the batch, for signs v in one leaf."""
    draws, structure = jax.tree.flatten(signs)
    inside = [(leaf == i).astype(v.dtype) * v for i, v in enumerate(draws)]
    along = functools.partial(_loss_and_curvature, loss, params, jax.tree.unflatten(structure, inside))
    arrays, structure = jax.tree.flatten(batch)
    own = [per == "example" and x.ndim > 0 and x.shape[0] == size for x in arrays]
    if not any(own):
        return jax.tree.map(lambda x: x[None], along(batch))

    def one(*slices: jax.Array) -> tuple[jax.Array, jax.Array]:
        cut = [x[None] if flag else x for x, flag in zip(slices, own, strict=True)]
        return along(jax.tree.unflatten(structure, cut))

    return jax.vmap(one, in_axes=[0 if flag else None for flag in own])(*arrays)


def _loss_and_curvature(loss: Loss, params: Any, v: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    """The loss, and its second derivative along v."""
    evaluate, backward_only = traced(lambda params: checked_loss(loss.fun(params, batch)), params)
    if backward_only:
        raise TypeError(
            "fun: has a jax.custom_vjp inside, and forward mode, which pac_bayes_bound needs, does not go "
            "through it; give the same loss without it, such as with plain instead of fused attention."
        )
    return evaluate(params), second_derivative(evaluate, params, v, v)


@jax.jit
def _signs(key: jax.Array, index: jax.Array, params: Any) -> Any:
    """Independent signs, of a leaf's dtype, that do not depend on the other leaves."""
    signs = noise.perturbation(jax.random.fold_in(key, index), params, 1.0, sampler=noise.rademacher)
    return jax.tree.map(lambda v, w: v.astype(w.dtype), signs, params)


def _probe(
    measure: Callable[..., tuple[jax.Array, jax.Array]], signs: Any, flags: Flags
) -> tuple[np.ndarray, np.ndarray]:
    """The losses of a batch's examples, and v^T H v by leaf and example, 0 for leaves that are not chosen."""
    chosen = [leaf for leaf, flag in enumerate(flags) if flag]
    losses, curvatures = zip(*jax.device_get([measure(signs, leaf) for leaf in chosen]), strict=True)
    by_leaf = np.zeros((len(flags), losses[0].size))
    by_leaf[chosen] = np.array(curvatures, np.float64)
    return losses[0].astype(np.float64), by_leaf


def _checked(rows: list[tuple[np.ndarray, np.ndarray]], index: int) -> tuple[np.ndarray, np.ndarray]:
    """The losses of a batch's examples, and v^T H v by probe, leaf and example."""
    losses, samples = rows[0][0], np.stack([by_leaf for _, by_leaf in rows])
    for name, values in (("loss", losses[None]), ("second derivative of the loss", samples.sum(axis=1))):
        bad = np.flatnonzero(~np.isfinite(values).all(axis=0))
        if bad.size:
            where = f"batches[{index}]" + (f", example {bad[0]}," if losses.size > 1 else "")
            raise FloatingPointError(
                f"The {name} of {where} is not finite: check params and the batch for NaN and infinity, and "
                "the loss for points where it has no second derivative."
            )
    return losses, samples


def _leaf_distances(h: CurvatureMatrix, initial_params: Any) -> np.ndarray:
    """The norm of each leaf's change, 0 where it is not chosen."""
    check_inexact(initial_params, "initial_params")
    check_like("initial_params", initial_params, h.params)
    distances = np.zeros(len(h.flags))
    trees = jax.tree.leaves_with_path(h.params), jax.tree.leaves(initial_params)
    for i, ((path, leaf), first) in enumerate(zip(*trees, strict=True)):
        name = leaf_name(path)
        if jnp.iscomplexobj(first):
            raise TypeError(f"initial_params: leaf {name} is {describe(first)}, expected real numbers.")
        change = np.asarray(leaf, np.float64) - np.asarray(first, np.float64)
        distances[i] = np.linalg.norm(change) if h.flags[i] else 0.0
        if not np.isfinite(distances[i]):
            raise FloatingPointError(f"The distance of leaf {name} from initial_params is not finite.")
    return distances
