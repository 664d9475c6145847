"""How much noise in the weights the loss bears: the sigma at which it rises by a share, or grows faster."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from nso_jax import noise
from nso_jax.curvature._checks import check_tolerance
from nso_jax.curvature._estimators import estimator
from nso_jax.curvature._probes import mean_and_error
from nso_jax.curvature.operators import CurvatureMatrix
from nso_jax.curvature.stability import (
    Gaps,
    NoisyLosses,
    StabilityGap,
    measure,
    noisy_losses_and_trace,
    table,
)
from nso_jax.curvature.trace import Estimate

__all__ = ["SigmaSuggestion", "suggest_sigma"]

# Neighbours on the ladder of sigmas. Each pass over the data takes four rungs, the first pass two of them
# below the start.
_STEP = math.sqrt(2)
_RUNGS = 4
_BELOW = 2
_MAX_EXTENSIONS = 8  # a factor of 2^16, up or down
# The growth with sigma^2 is measured from a sigma so far below the start, and below a limit at least.
_REFERENCE = 16
_MARGIN = 8
_CLEAR = 64  # roundings in the lowest gap, for a look further down
# A limit counts as met where a measured gap uses up this much of it, more or less: for a gap that grows with
# sigma^2, sigma is then right to 2.5 %.
_CLOSE = 0.05
_MAX_REFINEMENTS = 6
# What an error explains, in standard errors.
_DOUBT = 3
# The lowest gap is known well where it is so many standard errors; if it is not, the trace may be.
_KNOWN = 8
# A trace that may be zero, and is less than this part of the lowest gap, has no part in it.
_NOTHING = 0.1
_MAX_DOUBLINGS = 3  # of the draws, where they leave it open whether a limit is reached


class SigmaSuggestion(NamedTuple):
    """How much noise the loss bears.

    Attributes:
      sigma: the suggested standard deviation.
      limit: what forbids more: "share", the rise of the loss, or "quadratic", the end of the quadratic
        picture: the gap does not grow with sigma^2.
      gap: the measured `E[f(W + U)] - f(W)` at `sigma`.
      standard_error: one standard deviation of `gap`.
      loss: f(W).
      trace: the `Estimate` of Tr H.
      table: every sigma that was tried, ascending.
    """

    sigma: float
    limit: str
    gap: float
    standard_error: float
    loss: float
    trace: Estimate
    table: StabilityGap


@estimator
def suggest_sigma(
    key: jax.Array,
    h: CurvatureMatrix,
    *,
    share: float = 0.2,
    tolerance: float = 0.5,
    num_samples: int = 16,
    num_products: int = 100,
    method: str = "xtrace",
    sampler: noise.Sampler = noise.normal,
) -> SigmaSuggestion:
    """Finds the standard deviation of weight noise that a loss f bears at W.

    That is the smallest sigma at which one of these is reached:

        share:      |gap(sigma)| = share |f(W)|
        quadratic:  |gap(sigma) - q(sigma)| - 3 e(sigma) = tolerance |q(sigma)|,

    gap(sigma) being what `noise_stability_gap` measures, q its growth with sigma^2 from the lowest sigma of
    the table on, and e(sigma) the standard error of the difference, with q scaled to the gap since only
    their ratio counts. Beyond the first the noise drowns the loss; beyond the second it penalizes something
    else than a curvature. For a quadratic loss the result is `sqrt(2 share |f(W)| / |Tr H|)`. Where the trace
    is zero beside the lowest gap, or neither differs from zero by three standard errors, there is no
    quadratic picture to break, and only the share counts.

    For a smooth loss, `q = sigma^2/2 Tr H`. Kinks, as of ReLU and max-pooling, bend the loss on the average
    over the noise where the Hessian, taken between them, is blind: there q can be several times that, which
    `table` shows. Where a few eigenvalues dominate, the draws know the lowest gap badly, to less than 1/8 of
    it, and the trace knows it better: then q is that of the trace, if the two agree.

    A ladder of sigmas is measured with the same draws, starting where the trace puts the share, going up or
    down until the limit lies between two rungs. Interpolation and further measurements follow, until the
    limit is met to 5 %, which means 2.5 % of sigma for a gap that grows with its square. It takes three
    passes over the data or more, of twelve evaluations for each draw in all, beside the trace's.

    Where the draws leave open what q is, or whether the quadratic limit is reached before the share, their
    number is doubled, to eight times `num_samples` at most. If that does not tell either, the limit counts as
    reached where the estimate says so, whatever its error.

    Args:
      key: PRNG key, as in `noise_stability_gap`.
      h: what `hessian` makes of the loss, as in `noise_stability_gap`; at trained weights, or those to start
        from.
      share: by how much of its absolute value the noise may change the loss.
      tolerance: by how much of the quadratic part the gap may differ from it. A very large one leaves only
        the share.
      num_samples: draws, as in `noise_stability_gap`; up to eight times as many where these are too few.
      num_products: Hessian-vector products for the trace, as in `trace`.
      method: of the trace, as in `trace`; "hutchinson" needs no memory for its products.
      sampler: noise of unit variance, as in `noise_stability_gap`; the one to train with.

    Returns:
      The `SigmaSuggestion`. A negative `gap`, as about a maximum, counts by its absolute value.

    Raises:
      TypeError: as `noise_stability_gap`.
      ValueError: `share` or `tolerance` is not positive and finite; the loss is zero, so that it has no
        shares; neither limit is reached up to 65,000 times the first sigma, as for a linear loss; one of
        them is exceeded down to a 65,000th of it; or as `noise_stability_gap`.
      FloatingPointError: the loss or a product of a batch is not finite.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from nso_jax import curvature, noise
      >>> def loss(params, batch):
      ...     return 1 + jnp.mean((batch @ params["w"]) ** 2) / 2
      >>> params, batch = {"w": jnp.zeros(3)}, jnp.diag(jnp.array([3.0, 6.0, 9.0]))
      >>> h = curvature.hessian(loss, params, batch)
      >>> found = curvature.suggest_sigma(jax.random.key(0), h, sampler=noise.rademacher)
      >>> round(found.sigma, 4), found.limit, round(found.gap, 3)  # sqrt(2 * 0.2 * 1 / 42)
      (0.0976, 'share', 0.2)

    References:
      Zhang, Li and Ju, Noise Stability Optimization for Finding Flat Minima, arXiv 2306.08553, 2023.
    """
    check_tolerance("share", share)
    check_tolerance("tolerance", tolerance)
    losses, estimate = noisy_losses_and_trace(
        key, h, num_samples=num_samples, num_products=num_products, method=method, sampler=sampler
    )
    loss = measure(losses, np.empty(0)).loss
    if loss == 0:
        raise ValueError("fun: the loss is 0, so no sigma changes it by a share; use noise_stability_gap.")
    limits = _Limits(share, tolerance, estimate)
    start = _start(losses, loss, estimate, share)
    ladder = start * _STEP ** np.arange(-_BELOW, _RUNGS - _BELOW)
    gaps = measure(losses, np.append(start / _REFERENCE, ladder))
    most = 2**_MAX_DOUBLINGS * num_samples
    while _beginning(gaps, estimate) == "doubtful" and len(losses.draws) < most:
        losses, gaps = _with_twice_the_draws(losses, gaps)
    gaps, limit, sigma = _find(losses, limits, gaps)
    while limit == "share" and limits.doubt and _may_be_beyond(gaps, limits, sigma):
        if len(losses.draws) < most:
            losses, gaps = _with_twice_the_draws(losses, gaps)
        else:
            limits = limits._replace(doubt=0)
        gaps, limit, sigma = _find(losses, limits, gaps)
    tried = table(gaps, estimate)
    index = int(np.searchsorted(gaps.sigma, sigma))
    return SigmaSuggestion(
        sigma, limit, float(tried.gap[index]), float(tried.standard_error[index]), loss, estimate, tried
    )


class _Limits(NamedTuple):
    """What forbids more noise."""

    share: float
    tolerance: float
    trace: Estimate
    doubt: float = _DOUBT


def _start(losses: NoisyLosses, loss: float, estimate: Estimate, share: float) -> float:
    """Where the trace puts the share or, where it is known to be zero, a tenth of the weights' own size."""
    size = max(abs(estimate.value), estimate.standard_error)
    if size > 0:
        return math.sqrt(2 * share * abs(loss) / size)
    weights = np.asarray(losses.h.ravel(losses.h.params), np.float64)
    return (float(np.sqrt(np.mean(weights**2))) if weights.any() else 1.0) / 10


def _with_twice_the_draws(losses: NoisyLosses, gaps: Gaps) -> tuple[NoisyLosses, Gaps]:
    """As many draws again at every sigma that has been measured."""
    count = len(losses.draws)
    more = measure(losses._replace(draws=range(count, 2 * count)), gaps.sigma)
    draws = np.concatenate([gaps.draws, more.draws], axis=1)
    rounding = np.maximum(gaps.rounding, more.rounding)
    return losses._replace(draws=range(2 * count)), Gaps(gaps.sigma, draws, rounding, gaps.loss)


def _beginning(gaps: Gaps, estimate: Estimate) -> str:
    """What knows how the gap begins to grow: the "draws" or the "trace"; or it is "flat", or "doubtful"."""
    mean, error = (float(x) for x in mean_and_error(gaps.draws[0]))
    half_square = gaps.sigma[0] ** 2 / 2
    by_trace, trace_error = half_square * estimate.value, half_square * estimate.standard_error
    if abs(by_trace) <= _DOUBT * trace_error:
        is_seen = abs(mean) > _DOUBT * error + gaps.rounding[0]
        if not is_seen or abs(by_trace) + _DOUBT * trace_error <= _NOTHING * abs(mean):
            return "flat"
    if abs(mean) > _KNOWN * error:
        return "draws"
    allowed = _DOUBT * math.hypot(error, trace_error) + gaps.rounding[0]
    return "trace" if abs(mean - by_trace) <= allowed and trace_error < error else "doubtful"


def _used(gaps: Gaps, limits: _Limits) -> dict[str, np.ndarray]:
    """How much of each limit is used up at each sigma: it is reached at 1."""
    mean, error = mean_and_error(gaps.draws.T)
    used = {"share": np.abs(mean) / (limits.share * abs(gaps.loss))}
    beginning = _beginning(gaps, limits.trace)
    if beginning == "draws" or (beginning == "doubtful" and abs(mean[0]) > _DOUBT * error[0]):
        used["quadratic"] = _used_beside_draws(gaps, limits)
    elif beginning != "flat":
        used["quadratic"] = _used_beside_trace(gaps, limits)
    return used


def _used_beside_draws(gaps: Gaps, limits: _Limits) -> np.ndarray:
    """Relative to the lowest sigma, with the same draws, so that most of their noise cancels."""
    growth = (gaps.sigma / gaps.sigma[0]) ** 2
    expected = growth * gaps.draws[0].mean()
    ratio = gaps.draws.mean(axis=1) / expected
    # The error of a ratio of means, by the delta method: of a gap that levels out, it goes to zero.
    error = mean_and_error((gaps.draws - np.outer(ratio * growth, gaps.draws[0])).T)[1]
    rounding = gaps.rounding + np.abs(ratio) * growth * gaps.rounding[0]
    doubt = (limits.doubt * error + rounding) / np.abs(expected)
    return (np.abs(ratio - 1) - doubt) / limits.tolerance


def _used_beside_trace(gaps: Gaps, limits: _Limits) -> np.ndarray:
    """Relative to the trace, which also says how far off the draws are that begin too high or too low."""
    half_squares = gaps.sigma**2 / 2
    expected = half_squares * limits.trace.value
    growth = (gaps.sigma / gaps.sigma[0]) ** 2
    begun = np.outer(growth, gaps.draws[0]) - expected[:, None]
    # How much of that a gap keeps, by regression: all of it where it is quadratic, none once it levels out.
    centered = gaps.draws[0] - gaps.draws[0].mean()
    kept = (gaps.draws @ centered) / np.maximum(begun @ centered, np.finfo(float).tiny)
    excess, error = mean_and_error((gaps.draws - expected[:, None] - kept[:, None] * begun).T)
    error = np.hypot(error, half_squares * limits.trace.standard_error)
    doubt = limits.doubt * error + gaps.rounding + np.abs(kept) * growth * gaps.rounding[0]
    return (np.abs(excess) - doubt) / (limits.tolerance * np.abs(expected))


def _may_be_beyond(gaps: Gaps, limits: _Limits, sigma: float) -> bool:
    """Whether, by the estimate without its error, the quadratic limit is exceeded at a sigma."""
    used = _used(gaps, limits._replace(doubt=0)).get("quadratic")
    return used is not None and bool(used[np.searchsorted(gaps.sigma, sigma)] > 1)


def _find(losses: NoisyLosses, limits: _Limits, gaps: Gaps) -> tuple[Gaps, str, float]:
    """The limit that is reached first, and the sigma that meets it, which is among those of the gaps."""
    measured = functools.partial(measure, losses)
    used = functools.partial(_used, limits=limits)
    gaps = _bracket(measured, used, gaps)
    for _ in range(_MAX_REFINEMENTS):
        limit, sigma = _first_crossing(gaps.sigma, used(gaps))
        gaps = _merge(gaps, measured(np.array([sigma])))
        if abs(used(gaps)[limit][np.searchsorted(gaps.sigma, sigma)] - 1) <= _CLOSE:
            break
    return gaps, limit, sigma


def _bracket(
    measured: Callable[[np.ndarray], Gaps], used: Callable[[Gaps], dict[str, np.ndarray]], gaps: Gaps
) -> Gaps:
    """Gaps on a ladder of sigmas that leaves the limits open at its lowest rung, and reaches one above it."""
    for _ in range(_MAX_EXTENSIONS):
        reached = _reached(used(gaps))
        if not reached.any():
            rungs = gaps.sigma[-1] * _STEP ** np.arange(1, _RUNGS + 1)
        elif _too_low(gaps, reached):
            if abs(gaps.draws[0].mean()) <= _CLEAR * gaps.rounding[0]:
                break
            rungs = gaps.sigma[0] * _STEP ** np.arange(-_RUNGS, 0)
        elif (steps := _steps_below(gaps, reached)) > 1:
            rungs = gaps.sigma[np.argmax(reached)] * _STEP ** np.arange(1 - steps, 0)
        else:
            return gaps
        gaps = _merge(gaps, measured(rungs))
    found = used(gaps)
    if not _reached(found).any():
        raise ValueError(
            f"No limit reached: up to sigma={gaps.sigma[-1]:.3g} noise changes the loss, {gaps.loss:.3g}, "
            "by less than `share` of it. It depends little or linearly on the chosen leaves; lower share."
        )
    if _too_low(gaps, _reached(found)):
        first = int(np.argmax(_reached(found)))
        limit = max(found, key=lambda name: found[name][first])
        remedy = "share" if limit == "share" else "tolerance, or num_samples"
        raise ValueError(
            f"The limit {limit!r} is exceeded down to sigma={gaps.sigma[first]:.3g}: the loss is not smooth "
            f"on that scale, or the params' precision is too coarse for it; raise {remedy}."
        )
    return gaps


def _steps_below(gaps: Gaps, reached: np.ndarray) -> int:
    """How many steps of the ladder lie between the first rung where a limit is reached and the one before."""
    first = int(np.argmax(reached))
    return round(math.log(gaps.sigma[first] / gaps.sigma[first - 1]) / math.log(_STEP))


def _too_low(gaps: Gaps, reached: np.ndarray) -> bool:
    """Whether a limit is reached so near the lowest sigma that this one says little of what is below it."""
    return bool(gaps.sigma[np.argmax(reached)] < _MARGIN * gaps.sigma[0])


def _reached(used: dict[str, np.ndarray]) -> np.ndarray:
    return np.max(list(used.values()), axis=0) >= 1


def _merge(first: Gaps, second: Gaps) -> Gaps:
    order = np.argsort(np.concatenate([first.sigma, second.sigma]), kind="stable")
    sigma, draws, rounding = (
        np.concatenate([a, b])[order] for a, b in zip(first[:3], second[:3], strict=True)
    )
    return Gaps(sigma, draws, rounding, first.loss)


def _first_crossing(sigma: np.ndarray, used: dict[str, np.ndarray]) -> tuple[str, float]:
    """The limit that is reached first, and where, between two neighbouring sigmas."""
    crossings = {limit: _crossing(sigma, values) for limit, values in used.items()}
    limit = min(crossings, key=lambda name: crossings[name])
    return limit, crossings[limit]


def _crossing(sigma: np.ndarray, used: np.ndarray) -> float:
    """Where `used`, a power of sigma or, from <= 0, linear in its logarithm, first reaches 1."""
    reached = used >= 1
    if not reached.any():
        return math.inf
    i = int(np.argmax(reached))
    low, high = used[i - 1], used[i]
    fraction = math.log(1 / low) / math.log(high / low) if low > 0 else (1 - low) / (high - low)
    return float(sigma[i - 1] * (sigma[i] / sigma[i - 1]) ** fraction)
