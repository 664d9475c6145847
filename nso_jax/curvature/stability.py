"""How much noise in the weights raises the loss, beside what the trace of the Hessian predicts."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nso_jax import noise
from nso_jax._checks import check_count
from nso_jax.curvature._batches import explained, weighted
from nso_jax.curvature._checks import check_tolerance
from nso_jax.curvature._estimators import estimator
from nso_jax.curvature._probes import mean_and_error
from nso_jax.curvature.operators import CurvatureMatrix
from nso_jax.curvature.trace import Estimate, trace

__all__ = ["StabilityGap", "noise_stability_gap"]

_ROUNDINGS = 4  # what an error of a loss explains, in roundings of it


class StabilityGap(NamedTuple):
    """What noise does to the loss; the arrays are in float64, with an entry for each sigma.

    Attributes:
      sigma: standard deviations of the noise, in the order given.
      gap: the measured `E[f(W + U)] - f(W)`.
      standard_error: one standard deviation of each `gap`, estimated from the draws.
      quadratic: `sigma^2/2 Tr H`, what the gap is where f is quadratic.
      quadratic_standard_error: one standard deviation of each `quadratic`: that of the trace, scaled.
      loss: f(W).
      trace: the `Estimate` of Tr H, from draws of its own.
    """

    sigma: np.ndarray
    gap: np.ndarray
    standard_error: np.ndarray
    quadratic: np.ndarray
    quadratic_standard_error: np.ndarray
    loss: float
    trace: Estimate


@estimator
def noise_stability_gap(
    key: jax.Array,
    h: CurvatureMatrix,
    *,
    sigmas: Sequence[float],
    num_samples: int = 16,
    num_products: int = 100,
    method: str = "xtrace",
    sampler: noise.Sampler = noise.normal,
    callback: Callable[[int], object] | None = None,
) -> StabilityGap:
    """Measures how much noise U of standard deviation sigma in the weights W raises the mean loss f.

    The gap is estimated from k draws and their mirror images, the quadratic part from the trace of the
    Hessian H, with independent draws:

        gap(sigma)  ~  (1/k) sum_j [ f(W + sigma U_j) + f(W - sigma U_j) ] / 2  -  f(W)
        gap(sigma)  =  sigma^2/2 Tr H + O(sigma^4).

    Where the two agree, training with this noise is gradient descent with the trace as a regularizer. Kinks,
    as of ReLU and max-pooling, add to the gap and not to the Hessian, which is taken between them: the gap of
    a network of ReLUs can be several times the quadratic part at any sigma. The directions U_j are the same
    for every sigma, so the estimate is a smooth function of sigma.

    The losses have the precision that `h.fun` gives them: in float32, a gap below 1e-6 of the loss is
    rounding. The noise is added in float32 (float64 for float64 leaves) and rounded once to the leaf's dtype,
    so that in bfloat16 a sigma below 1 % of a weight is not what the weight gets.

    Args:
      key: PRNG key. Draw j depends on the key and on j alone.
      h: what `hessian` makes of the loss f, at W. A Gauss-Newton matrix is taken as the loss that it is made
        of. Only leaves that its mask chooses get noise, and only their block of H counts.
      sigmas: standard deviations of one weight's noise: positive numbers.
      num_samples: draws k, at least 2, each of two evaluations for each sigma. 16 of them know the standard
        error to a fifth.
      num_products: Hessian-vector products for the trace, as in `trace`.
      method: of the trace, as in `trace`; "hutchinson" needs no memory for its products.
      sampler: `sampler(key, shape, dtype)` of unit variance, as in `nso_jax.value_and_grad`. With
        `noise.rademacher` the diagonal of H enters without variance.
      callback: called with the number of evaluations of the loss so far, after each draw on a batch: for a
        progress bar. They come after the trace, `1 + 2 k len(sigmas)` for each batch.

    Returns:
      The `StabilityGap`. Its `gap` may be negative: about a maximum, or by chance where `standard_error` is
      as large.

    Raises:
      TypeError: `key` is not a PRNG key, `h` is not a `CurvatureMatrix`, or `sigmas` is no sequence of
        numbers.
      ValueError: `sigmas` is empty or has an entry that is not positive and finite, `num_samples` is less
        than 2, or `num_products` is too small for the trace.
      FloatingPointError: the loss or a product of a batch is not finite.

    Example:
      For the loss `1 + w^T A w / 2` the gap is `sigma^2/2 Tr A`, here with a diagonal A and random signs.

      >>> import jax
      >>> import jax.numpy as jnp
      >>> from nso_jax import curvature, noise
      >>> def loss(params, batch):
      ...     return 1 + jnp.mean((batch @ params["w"]) ** 2) / 2
      >>> params, batch = {"w": jnp.zeros(3)}, jnp.diag(jnp.array([3.0, 6.0, 9.0]))
      >>> h = curvature.hessian(loss, params, batch)
      >>> table = curvature.noise_stability_gap(
      ...     jax.random.key(0), h, sigmas=[0.1, 0.2], sampler=noise.rademacher
      ... )
      >>> table.gap.round(3), table.quadratic.round(3)
      (array([0.21, 0.84]), array([0.21, 0.84]))

    References:
      Zhang, Li and Ju, Noise Stability Optimization for Finding Flat Minima, arXiv 2306.08553, 2023.
    """
    values = _check_sigmas(sigmas)
    losses, estimate = noisy_losses_and_trace(
        key, h, num_samples=num_samples, num_products=num_products, method=method, sampler=sampler
    )
    return table(measure(losses._replace(callback=callback), values), estimate)


class NoisyLosses(NamedTuple):
    """What is measured, all but the sigmas."""

    h: CurvatureMatrix  # the Hessian
    draw: Callable[[int, Any], Any]
    draws: range
    callback: Callable[[int], object] | None = None


class Gaps(NamedTuple):
    """The measured gaps."""

    sigma: np.ndarray
    draws: np.ndarray  # (sigmas, draws)
    rounding: np.ndarray  # (sigmas,): how far off a gap may be by the losses' rounding
    loss: float


def noisy_losses_and_trace(
    key: jax.Array,
    h: CurvatureMatrix,
    *,
    num_samples: int,
    num_products: int,
    method: str,
    sampler: noise.Sampler,
) -> tuple[NoisyLosses, Estimate]:
    """What to measure, and the trace, with keys of their own."""
    check_count("num_samples", num_samples, 2)
    of_loss = h.hessian()
    trace_key, noise_key = jax.random.split(key)
    estimate = trace(trace_key, of_loss, method=method, num_products=num_products)
    draw = functools.partial(_draw, noise_key, sampler=sampler, flags=h.flags)
    return NoisyLosses(of_loss, draw, range(num_samples)), estimate


@functools.partial(jax.jit, static_argnames=("sampler", "flags"))
def _draw(
    key: jax.Array, index: jax.Array, params: Any, *, sampler: noise.Sampler, flags: tuple[bool, ...]
) -> Any:
    mask = jax.tree.unflatten(jax.tree.structure(params), flags)
    return noise.perturbation(jax.random.fold_in(key, index), params, 1.0, sampler=sampler, mask=mask)


_move = jax.jit(noise.perturb)


def measure(losses: NoisyLosses, sigmas: np.ndarray) -> Gaps:
    """One pass over the data, batch by batch; the same draws for every sigma."""
    h, size = losses.h, 0.0
    loss = epsilon = 0.0
    pairs = np.zeros((len(sigmas), len(losses.draws)))
    largest = np.zeros(len(sigmas))
    evaluations = 0
    for index, batch, weight in weighted(h.batches, h.weight):
        with explained(h.programs.loss.functions, h.batches):
            clean, noisy = _batch_losses(losses, jax.device_put(batch), sigmas, evaluations)
        _check_finite(clean, noisy, sigmas, index)
        evaluations += 1 + noisy.size
        size += weight
        loss += weight * float(clean)
        pairs += weight * noisy.mean(axis=2).T
        largest += weight * np.abs(noisy).max(axis=(0, 2))
        epsilon = float(jnp.finfo(clean.dtype).eps)
    loss /= size
    return Gaps(sigmas, pairs / size - loss, _ROUNDINGS * epsilon * largest / size, loss)


def _batch_losses(
    losses: NoisyLosses, batch: Any, sigmas: np.ndarray, evaluations: int
) -> tuple[np.ndarray, np.ndarray]:
    """The loss of one batch, and its noisy losses in float64, of shape (draws, sigmas, 2)."""
    params, evaluate = losses.h.params, losses.h.programs.evaluate
    clean = evaluate(params, batch)
    scales = [float(sign * sigma) for sigma in sigmas for sign in (1, -1)]
    rows: list[list[jax.Array]] = []
    for j in losses.draws if scales else ():
        direction = losses.draw(j, params)
        rows.append([evaluate(_move(params, direction, scale), batch) for scale in scales])
        # At most two directions in memory: the device works on one while the next is on its way.
        jax.block_until_ready(rows[:-1][-1:])
        if losses.callback is not None:
            losses.callback(evaluations + 1 + len(rows) * len(scales))
    noisy = np.array(jax.device_get(rows), np.float64).reshape(len(losses.draws), len(sigmas), 2)
    return np.asarray(clean), noisy


def _check_finite(clean: np.ndarray, noisy: np.ndarray, sigmas: np.ndarray, index: int) -> None:
    if not np.isfinite(clean):
        raise FloatingPointError(
            f"The loss of batches[{index}] is not finite ({clean}): check params and the batch for NaN and "
            "infinity."
        )
    bad = ~np.isfinite(noisy).all(axis=(0, 2))
    if bad.any():
        raise FloatingPointError(
            f"The loss of batches[{index}] is not finite with noise of sigma={sigmas[bad].min():.4g}: take "
            "smaller sigmas, or a smaller share in suggest_sigma."
        )


def table(gaps: Gaps, estimate: Estimate) -> StabilityGap:
    """The gaps and their errors, beside the quadratic part."""
    half_squares = gaps.sigma**2 / 2
    gap, standard_error = mean_and_error(gaps.draws.T)
    return StabilityGap(
        sigma=gaps.sigma,
        gap=gap,
        standard_error=standard_error,
        quadratic=half_squares * estimate.value,
        quadratic_standard_error=half_squares * estimate.standard_error,
        loss=gaps.loss,
        trace=estimate,
    )


def _check_sigmas(sigmas: Any) -> np.ndarray:
    try:
        values = np.asarray(sigmas, np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"sigmas: expected a sequence of positive, finite numbers, got {sigmas!r}.") from None
    if values.ndim != 1 or not values.size:
        raise ValueError(f"sigmas: expected a sequence of positive, finite numbers, got {sigmas!r}.")
    for index, value in enumerate(values):
        check_tolerance(f"sigmas[{index}]", float(value))
    return values
