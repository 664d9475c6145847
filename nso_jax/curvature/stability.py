"""How much noise in the weights raises the loss, beside what the trace of the Hessian predicts."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nso_jax import noise
from nso_jax._checks import check_count
from nso_jax.curvature.operators import (
    GaussNewton,
    Weight,
    check_batches,
    check_call,
    check_function,
    check_params,
    check_tolerance,
    chosen_leaves,
    explained,
    is_jitted,
    starting_with_key,
    weighted,
)
from nso_jax.curvature.probes import mean_and_error
from nso_jax.curvature.trace import Estimate, trace

__all__ = ["SigmaSuggestion", "StabilityGap", "noise_stability_gap", "suggest_sigma"]

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
# What an error explains, in standard errors, and in roundings of a loss.
_DOUBT = 3
_ROUNDINGS = 4
# The lowest gap is known well where it is so many standard errors; if it is not, the trace may be.
_KNOWN = 8
# A trace that may be zero, and is less than this part of the lowest gap, has no part in it.
_NOTHING = 0.1
_MAX_DOUBLINGS = 3  # of the draws, where they leave it open whether a limit is reached


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


@starting_with_key
def noise_stability_gap(
    key: jax.Array,
    fun: Callable[[Any, Any], jax.Array],
    params: Any,
    batches: Any,
    *,
    sigmas: Sequence[float],
    num_samples: int = 16,
    num_products: int = 100,
    method: str = "xtrace",
    sampler: noise.Sampler = noise.normal,
    mask: Any = None,
    weight: Callable[[Any], Any] | None = None,
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

    The losses have the precision that `fun` gives them: in float32, a gap below 1e-6 of the loss is rounding.
    The noise is added in float32 (float64 for float64 leaves) and rounded once to the leaf's dtype, so
    that in bfloat16 a sigma below 1 % of a weight is not what the weight gets.

    Args:
      key: PRNG key. Draw j depends on the key and on j alone.
      fun: `fun(params, batch)` is the mean loss over the batch, a real scalar, as in `hvp`. A `GaussNewton`
        is taken as the plain loss that it is.
      params: any pytree of real arrays.
      batches: one batch, or a list or other re-iterable of batches, by the rule of `hvp`.
      sigmas: standard deviations of one weight's noise: positive numbers.
      num_samples: draws k, at least 2, each of two evaluations for each sigma. 16 of them know the standard
        error to a fifth.
      num_products: Hessian-vector products for the trace, as in `trace`.
      method: of the trace, as in `trace`; "hutchinson" needs no memory for its products.
      sampler: `sampler(key, shape, dtype)` of unit variance, as in `nso_jax.value_and_grad`. With
        `noise.rademacher` the diagonal of H enters without variance.
      mask: bools, a prefix pytree of `params` or a callable giving one: only these leaves get noise, and
        only their block of H counts.
      weight: `weight(batch)`, how much the mean loss of a batch counts, as in `hvp`: a mean over tokens needs
        it, `lambda batch: batch["mask"].sum()`. None: the number of examples.
      callback: called with the number of evaluations of `fun` so far, after each draw on a batch: for a
        progress bar. They come after the trace, `1 + 2 k len(sigmas)` for each batch.

    Returns:
      The `StabilityGap`. Its `gap` may be negative: about a maximum, or by chance where `standard_error` is
      as large.

    Raises:
      TypeError: `key` is not a PRNG key, `sigmas` is no sequence of numbers, or `fun`, `params`, `batches`
        or `weight` is none that `hvp` takes.
      ValueError: `sigmas` is empty or has an entry that is not positive and finite, `num_samples` is less
        than 2, `num_products` is too small for the trace, or `mask` does not fit `params` or selects nothing.
      FloatingPointError: the loss or a product of a batch is not finite.

    Example:
      For the loss `1 + w^T A w / 2` the gap is `sigma^2/2 Tr A`, here with a diagonal A and random signs.

      >>> import jax
      >>> import jax.numpy as jnp
      >>> from nso_jax import noise
      >>> from nso_jax.curvature.stability import noise_stability_gap
      >>> def loss(params, batch):
      ...     return 1 + jnp.mean((batch @ params["w"]) ** 2) / 2
      >>> params, batch = {"w": jnp.zeros(3)}, jnp.diag(jnp.array([3.0, 6.0, 9.0]))
      >>> table = noise_stability_gap(
      ...     jax.random.key(0), loss, params, batch, sigmas=[0.1, 0.2], sampler=noise.rademacher
      ... )
      >>> table.gap.round(3), table.quadratic.round(3)
      (array([0.21, 0.84]), array([0.21, 0.84]))

    References:
      Zhang, Li and Ju, Noise Stability Optimization for Finding Flat Minima, arXiv 2306.08553, 2023.
    """
    key = check_call(key)
    values = _check_sigmas(sigmas)
    problem, estimate = _prepare(
        key,
        fun,
        params,
        batches,
        num_samples=num_samples,
        num_products=num_products,
        method=method,
        sampler=sampler,
        mask=mask,
        weight=weight,
        callback=callback,
    )
    return _table(_measure(problem, values), estimate)


@starting_with_key
def suggest_sigma(
    key: jax.Array,
    fun: Callable[[Any, Any], jax.Array],
    params: Any,
    batches: Any,
    *,
    share: float = 0.2,
    tolerance: float = 0.5,
    num_samples: int = 16,
    num_products: int = 100,
    method: str = "xtrace",
    sampler: noise.Sampler = noise.normal,
    mask: Any = None,
    weight: Callable[[Any], Any] | None = None,
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
      fun: the mean loss over a batch, as in `noise_stability_gap`.
      params: any pytree of real arrays; trained ones, or those to start from.
      batches: one batch, or a list or other re-iterable of batches, by the rule of `hvp`.
      share: by how much of its absolute value the noise may change the loss.
      tolerance: by how much of the quadratic part the gap may differ from it. A very large one leaves only
        the share.
      num_samples: draws, as in `noise_stability_gap`; up to eight times as many where these are too few.
      num_products: Hessian-vector products for the trace, as in `trace`.
      method: of the trace, as in `trace`; "hutchinson" needs no memory for its products.
      sampler: noise of unit variance, as in `noise_stability_gap`; the one to train with.
      mask: the leaves that get noise, as in `noise_stability_gap`.
      weight: how much a batch counts, as in `noise_stability_gap`.

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
      >>> from nso_jax import noise
      >>> from nso_jax.curvature.stability import suggest_sigma
      >>> def loss(params, batch):
      ...     return 1 + jnp.mean((batch @ params["w"]) ** 2) / 2
      >>> params, batch = {"w": jnp.zeros(3)}, jnp.diag(jnp.array([3.0, 6.0, 9.0]))
      >>> found = suggest_sigma(jax.random.key(0), loss, params, batch, sampler=noise.rademacher)
      >>> round(found.sigma, 4), found.limit, round(found.gap, 3)  # sqrt(2 * 0.2 * 1 / 42)
      (0.0976, 'share', 0.2)

    References:
      Zhang, Li and Ju, Noise Stability Optimization for Finding Flat Minima, arXiv 2306.08553, 2023.
    """
    key = check_call(key)
    check_tolerance("share", share)
    check_tolerance("tolerance", tolerance)
    problem, estimate = _prepare(
        key,
        fun,
        params,
        batches,
        num_samples=num_samples,
        num_products=num_products,
        method=method,
        sampler=sampler,
        mask=mask,
        weight=weight,
    )
    loss = _measure(problem, np.empty(0)).loss
    if loss == 0:
        raise ValueError("fun: the loss is 0, so no sigma changes it by a share; use noise_stability_gap.")
    limits = _Limits(share, tolerance, estimate)
    start = _start(problem, loss, estimate, share)
    ladder = start * _STEP ** np.arange(-_BELOW, _RUNGS - _BELOW)
    gaps = _measure(problem, np.append(start / _REFERENCE, ladder))
    most = 2**_MAX_DOUBLINGS * num_samples
    while _beginning(gaps, estimate) == "doubtful" and len(problem.draws) < most:
        problem, gaps = _with_twice_the_draws(problem, gaps)
    gaps, limit, sigma = _find(problem, limits, gaps)
    while limit == "share" and limits.doubt and _may_be_beyond(gaps, limits, sigma):
        if len(problem.draws) < most:
            problem, gaps = _with_twice_the_draws(problem, gaps)
        else:
            limits = limits._replace(doubt=0)
        gaps, limit, sigma = _find(problem, limits, gaps)
    table = _table(gaps, estimate)
    index = int(np.searchsorted(gaps.sigma, sigma))
    return SigmaSuggestion(
        sigma, limit, float(table.gap[index]), float(table.standard_error[index]), loss, estimate, table
    )


class _Problem(NamedTuple):
    """What is measured, all but the sigmas."""

    evaluate: Callable[[Any, Any], jax.Array]
    draw: Callable[[int, Any], Any]
    params: Any
    flags: tuple[bool, ...]
    batches: Any
    weight: Weight | None
    draws: range
    callback: Callable[[int], object] | None


class _Limits(NamedTuple):
    """What forbids more noise."""

    share: float
    tolerance: float
    trace: Estimate
    doubt: float = _DOUBT


class _Gaps(NamedTuple):
    """The measured gaps."""

    sigma: np.ndarray
    draws: np.ndarray  # (sigmas, draws)
    rounding: np.ndarray  # (sigmas,): how far off a gap may be by the losses' rounding
    loss: float


def _prepare(
    key: jax.Array,
    fun: Callable[[Any, Any], jax.Array],
    params: Any,
    batches: Any,
    *,
    num_samples: int,
    num_products: int,
    method: str,
    sampler: noise.Sampler,
    mask: Any,
    weight: Weight | None,
    callback: Callable[[int], object] | None = None,
) -> tuple[_Problem, Estimate]:
    """What to measure, and the trace, with keys of their own."""
    check_count("num_samples", num_samples, 2)
    check_batches(batches)
    check_function(fun)
    params = check_params(params)
    flags = tuple(chosen_leaves(mask, params))
    loss = fun.__call__ if isinstance(fun, GaussNewton) else fun
    trace_key, noise_key = jax.random.split(key)
    estimate = trace(
        trace_key,
        loss,
        params,
        batches,
        method=method,
        num_products=num_products,
        mask=mask,
        weight=weight,
    )
    draw = functools.partial(_draw, noise_key, sampler=sampler, flags=flags)
    evaluate, draws = _compiled(loss), range(num_samples)
    return _Problem(evaluate, draw, params, flags, batches, weight, draws, callback), estimate


def _compiled(fun: Callable[[Any, Any], jax.Array]) -> Callable[[Any, Any], jax.Array]:
    """`fun`, jitted anew unless it is already: what a plain function closes over may have changed."""
    return fun if is_jitted(fun) else jax.jit(functools.partial(fun))


@functools.partial(jax.jit, static_argnames=("sampler", "flags"))
def _draw(
    key: jax.Array, index: jax.Array, params: Any, *, sampler: noise.Sampler, flags: tuple[bool, ...]
) -> Any:
    mask = jax.tree.unflatten(jax.tree.structure(params), flags)
    return noise.perturbation(jax.random.fold_in(key, index), params, 1.0, sampler=sampler, mask=mask)


_move = jax.jit(noise.perturb)


def _measure(problem: _Problem, sigmas: np.ndarray) -> _Gaps:
    """One pass over the data, batch by batch; the same draws for every sigma."""
    size = loss = epsilon = 0.0
    pairs = np.zeros((len(sigmas), len(problem.draws)))
    largest = np.zeros(len(sigmas))
    evaluations = 0
    for index, batch, weight in weighted(problem.batches, problem.weight):
        with explained(problem.evaluate, problem.batches):
            clean, noisy = _batch_losses(problem, jax.device_put(batch), sigmas, evaluations)
        _check_finite(clean, noisy, sigmas, index)
        evaluations += 1 + noisy.size
        size += weight
        loss += weight * float(clean)
        pairs += weight * noisy.mean(axis=2).T
        largest += weight * np.abs(noisy).max(axis=(0, 2))
        epsilon = float(jnp.finfo(clean.dtype).eps)
    loss /= size
    return _Gaps(sigmas, pairs / size - loss, _ROUNDINGS * epsilon * largest / size, loss)


def _batch_losses(
    problem: _Problem, batch: Any, sigmas: np.ndarray, evaluations: int
) -> tuple[np.ndarray, np.ndarray]:
    """The loss of one batch, and its noisy losses in float64, of shape (draws, sigmas, 2)."""
    clean = problem.evaluate(problem.params, batch)
    scales = [float(sign * sigma) for sigma in sigmas for sign in (1, -1)]
    rows: list[list[jax.Array]] = []
    for j in problem.draws if scales else ():
        direction = problem.draw(j, problem.params)
        rows.append([problem.evaluate(_move(problem.params, direction, scale), batch) for scale in scales])
        # At most two directions in memory: the device works on one while the next is on its way.
        jax.block_until_ready(rows[:-1][-1:])
        if problem.callback is not None:
            problem.callback(evaluations + 1 + len(rows) * len(scales))
    noisy = np.array(jax.device_get(rows), np.float64).reshape(len(problem.draws), len(sigmas), 2)
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


def _table(gaps: _Gaps, estimate: Estimate) -> StabilityGap:
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


def _start(problem: _Problem, loss: float, estimate: Estimate, share: float) -> float:
    """Where the trace puts the share or, where it is known to be zero, a tenth of the weights' own size."""
    size = max(abs(estimate.value), estimate.standard_error)
    if size > 0:
        return math.sqrt(2 * share * abs(loss) / size)
    pairs = zip(jax.tree.leaves(problem.params), problem.flags, strict=True)
    weights = np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf, flag in pairs if flag])
    return (float(np.sqrt(np.mean(weights**2))) if weights.any() else 1.0) / 10


def _with_twice_the_draws(problem: _Problem, gaps: _Gaps) -> tuple[_Problem, _Gaps]:
    """As many draws again at every sigma that has been measured."""
    count = len(problem.draws)
    more = _measure(problem._replace(draws=range(count, 2 * count)), gaps.sigma)
    draws = np.concatenate([gaps.draws, more.draws], axis=1)
    rounding = np.maximum(gaps.rounding, more.rounding)
    return problem._replace(draws=range(2 * count)), _Gaps(gaps.sigma, draws, rounding, gaps.loss)


def _beginning(gaps: _Gaps, estimate: Estimate) -> str:
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


def _used(gaps: _Gaps, limits: _Limits) -> dict[str, np.ndarray]:
    """How much of each limit is used up at each sigma: it is reached at 1."""
    mean, error = mean_and_error(gaps.draws.T)
    used = {"share": np.abs(mean) / (limits.share * abs(gaps.loss))}
    beginning = _beginning(gaps, limits.trace)
    if beginning == "draws" or (beginning == "doubtful" and abs(mean[0]) > _DOUBT * error[0]):
        used["quadratic"] = _used_beside_draws(gaps, limits)
    elif beginning != "flat":
        used["quadratic"] = _used_beside_trace(gaps, limits)
    return used


def _used_beside_draws(gaps: _Gaps, limits: _Limits) -> np.ndarray:
    """Relative to the lowest sigma, with the same draws, so that most of their noise cancels."""
    growth = (gaps.sigma / gaps.sigma[0]) ** 2
    expected = growth * gaps.draws[0].mean()
    ratio = gaps.draws.mean(axis=1) / expected
    # The error of a ratio of means, by the delta method: of a gap that levels out, it goes to zero.
    error = mean_and_error((gaps.draws - np.outer(ratio * growth, gaps.draws[0])).T)[1]
    rounding = gaps.rounding + np.abs(ratio) * growth * gaps.rounding[0]
    doubt = (limits.doubt * error + rounding) / np.abs(expected)
    return (np.abs(ratio - 1) - doubt) / limits.tolerance


def _used_beside_trace(gaps: _Gaps, limits: _Limits) -> np.ndarray:
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


def _may_be_beyond(gaps: _Gaps, limits: _Limits, sigma: float) -> bool:
    """Whether, by the estimate without its error, the quadratic limit is exceeded at a sigma."""
    used = _used(gaps, limits._replace(doubt=0)).get("quadratic")
    return used is not None and bool(used[np.searchsorted(gaps.sigma, sigma)] > 1)


def _find(problem: _Problem, limits: _Limits, gaps: _Gaps) -> tuple[_Gaps, str, float]:
    """The limit that is reached first, and the sigma that meets it, which is among those of the gaps."""
    measure = functools.partial(_measure, problem)
    used = functools.partial(_used, limits=limits)
    gaps = _bracket(measure, used, gaps)
    for _ in range(_MAX_REFINEMENTS):
        limit, sigma = _first_crossing(gaps.sigma, used(gaps))
        gaps = _merge(gaps, measure(np.array([sigma])))
        if abs(used(gaps)[limit][np.searchsorted(gaps.sigma, sigma)] - 1) <= _CLOSE:
            break
    return gaps, limit, sigma


def _bracket(
    measure: Callable[[np.ndarray], _Gaps], used: Callable[[_Gaps], dict[str, np.ndarray]], gaps: _Gaps
) -> _Gaps:
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
        gaps = _merge(gaps, measure(rungs))
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


def _steps_below(gaps: _Gaps, reached: np.ndarray) -> int:
    """How many steps of the ladder lie between the first rung where a limit is reached and the one before."""
    first = int(np.argmax(reached))
    return round(math.log(gaps.sigma[first] / gaps.sigma[first - 1]) / math.log(_STEP))


def _too_low(gaps: _Gaps, reached: np.ndarray) -> bool:
    """Whether a limit is reached so near the lowest sigma that this one says little of what is below it."""
    return bool(gaps.sigma[np.argmax(reached)] < _MARGIN * gaps.sigma[0])


def _reached(used: dict[str, np.ndarray]) -> np.ndarray:
    return np.max(list(used.values()), axis=0) >= 1


def _merge(first: _Gaps, second: _Gaps) -> _Gaps:
    order = np.argsort(np.concatenate([first.sigma, second.sigma]), kind="stable")
    sigma, draws, rounding = (
        np.concatenate([a, b])[order] for a, b in zip(first[:3], second[:3], strict=True)
    )
    return _Gaps(sigma, draws, rounding, first.loss)


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
