"""The suggested sigma against losses for which it is known, where few draws would tell it badly as well."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import KEY, W, affine_quadratic, cubic, per_example, quartic, small_network, split, symmetric
from scipy.optimize import brentq

from nso_jax import noise
from nso_jax.curvature import hessian, noise_stability_gap, suggest_sigma


def suggested(fun, params, batches, **options):
    return suggest_sigma(KEY, hessian(fun, params, batches), **options)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("share", "scale"), [(0.2, 1.0), (0.01, 1e4), (3.0, 1e-4)])
def test_suggestion_for_a_quadratic_loss(share, scale, sign):
    matrix, w = sign * scale * symmetric(np.linspace(1, 3, 30)), jnp.zeros(30)
    found = suggested(affine_quadratic, w, matrix, share=share, num_samples=64)
    assert found.limit == "share"
    # The gap is a chi-square's, with a relative deviation of about sqrt(2 / (30 * 64)).
    assert found.sigma == pytest.approx(math.sqrt(2 * share * 2 / (60 * scale)), rel=0.08)
    assert sign * found.gap == pytest.approx(share * 2, rel=0.06)
    assert found.loss == 2
    index = list(found.table.sigma).index(found.sigma)
    assert found.gap == found.table.gap[index]
    assert found.standard_error == found.table.standard_error[index]
    assert (np.diff(found.table.sigma) > 0).all()
    assert found.trace is found.table.trace


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("share", [0.05, 30.0])
@pytest.mark.parametrize("sampler", [noise.normal, noise.rademacher])
def test_suggestion_for_a_quartic_loss_is_the_first_limit(share, sampler):
    """Of 400 weights: the gap is `400 (sigma^2/2 + kurtosis c sigma^4)`, and 1.5 quadratic at .25 / (k c)."""
    kurtosis = {noise.normal: 3, noise.rademacher: 1}[sampler]
    c = 2.0
    found = suggested(quartic, jnp.zeros(400), jnp.asarray(c), share=share, sampler=sampler)
    a = kurtosis * c * 400
    at_share = math.sqrt((-200 + math.sqrt(200**2 + 4 * a * share)) / (2 * a))
    broken = math.sqrt(0.25 / (kurtosis * c))
    expected = min((at_share, "share"), (broken, "quadratic"))
    assert found.limit == expected[1]
    assert found.sigma == pytest.approx(expected[0], rel=0.12 if sampler is noise.normal else 0.05)


@pytest.mark.usefixtures("x64")
def test_suggestion_is_found_far_below_and_above_the_first_guess():
    def steep(w, _):  # the trace is 2, but the gap soon grows with exp(200 sigma)
        return 1 + jnp.sum(w**2 + 1e-8 * jnp.cosh(200 * w))

    def flat(w, _):  # the trace is 400, but the gap soon grows with log(sigma)
        return 1 + 0.02 * jnp.sum(jnp.log1p(1e4 * w**2))

    options = {"sampler": noise.rademacher, "tolerance": 1e9}
    low = suggested(steep, jnp.zeros(1), None, **options)
    assert steep(jnp.array([low.sigma]), None) - steep(jnp.zeros(1), None) == pytest.approx(0.2, rel=0.06)
    high = suggested(flat, jnp.zeros(1), None, **options)
    assert 0.02 * math.log1p(1e4 * high.sigma**2) == pytest.approx(0.2, rel=0.06)
    assert high.limit == low.limit == "share"


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("center", [0.0, 1e-3, 10.0])
def test_suggestion_where_the_trace_is_zero(center):
    """`w^4` about 0, in 100 weights, has the gap `300 sigma^4`; there is no quadratic picture to break."""
    w = jnp.full(100, center)
    found = suggested(lambda w, _: 1 + jnp.sum((w - center) ** 4), w, None)
    assert found.limit == "share"
    assert found.sigma == pytest.approx((0.2 / 300) ** 0.25, rel=0.06)
    assert found.gap == pytest.approx(0.2, rel=0.06)


def test_suggestion_for_a_network_in_float32():
    params, x = small_network(jnp.float32)
    found = suggested(per_example, params, split(x, 20, 10), share=0.01)
    h = hessian(per_example, params, x)
    again = noise_stability_gap(KEY, h, sigmas=[found.sigma], num_samples=200)
    error = math.hypot(found.standard_error, again.standard_error[0])
    assert abs(found.gap - again.gap[0]) <= 4 * error
    if found.limit == "share":
        assert abs(found.gap) == pytest.approx(0.01 * found.loss, rel=0.06)


@jax.jit
def levelling(w, scales):
    """Rises by less than 1 for each weight: the gap in some directions is `sum(1 - (1 + 2 c sigma^2)^-1/2)`."""
    return 10 + jnp.sum(1 - jnp.exp(-scales * w**2))


@pytest.mark.parametrize(
    "scales",
    [[1, 1], [1, 1] + 48 * [0], [1, 0.8] + 3 * [1e-3], [1], [1, 1, 1]],
    ids=["two", "two of fifty", "two and small ones", "one", "three"],
)
def test_suggestion_where_few_eigenvalues_dominate(scales):
    """The gap is half the quadratic part near .85; 3 standard errors of 16 draws beyond that, near 1.3, .3 of it.

    The share, 2, is never reached, or far beyond.
    """
    c = np.asarray(scales, np.float32)
    h = hessian(levelling, jnp.zeros(len(c)), c)
    for seed in range(30):
        found = suggest_sigma(jax.random.key(seed), h)
        assert found.limit == "quadratic"
        assert found.sigma >= 0.85
        assert found.sigma in found.table.sigma
        true = np.sum(1 - 1 / np.sqrt(1 + 2 * c * found.sigma**2))
        assert 0.3 <= true / (found.sigma**2 * c.sum()) <= 0.52


@pytest.mark.parametrize("tolerance", [0.2, 0.9])
@pytest.mark.parametrize("method", ["xtrace", "hutchinson"])
def test_suggestion_where_few_eigenvalues_dominate_at_other_tolerances(tolerance, method):
    """For two equal weights: `1 - (1 + 2 s)^-1/2 = (1 - tolerance) s`, s being sigma^2."""
    expected = brentq(lambda s: 1 - (1 + 2 * s) ** -0.5 - (1 - tolerance) * s, 0.01, 100) ** 0.5
    h = hessian(levelling, jnp.zeros(2), jnp.ones(2))
    options = {"tolerance": tolerance, "method": method, "num_products": 20}
    for seed in range(15):
        found = suggest_sigma(jax.random.key(seed), h, **options)
        assert found.limit == "quadratic"
        assert expected <= found.sigma <= 2 * expected


def test_suggestion_beside_a_trace_of_too_few_products():
    """Six products do not tell the trace, 8, of a Hessian with large off-diagonal entries from zero."""
    basis = symmetric([1.0] * 2 + [0.0] * 28).astype(jnp.float32)

    def projected(w, _):
        return 10 + 2 * (1 - jnp.exp(-(w @ basis @ w)))

    unknown, h = 0, hessian(projected, jnp.zeros(30), None)
    for seed in range(20):
        found = suggest_sigma(jax.random.key(seed), h, method="hutchinson", num_products=6)
        unknown += abs(found.trace.value) <= 3 * found.trace.standard_error
        assert found.limit == "quadratic"
        assert found.sigma <= 1.3  # the gap, 2 - 2 / (1 + 2 sigma^2), is half the quadratic part at .71
    assert unknown >= 5


def test_suggestion_takes_more_draws_where_it_is_in_doubt_and_no_more_elsewhere():
    """The gap of one quartic weight has a long tail: 16 draws cannot say that it is not quadratic."""
    evaluations = []

    def counted(size):
        h = hessian(quartic, jnp.zeros(size), jnp.asarray(2.0))
        h.programs.evaluate = lambda params, batch: (evaluations.append(1), quartic(params, batch))[1]
        return h

    suggest_sigma(KEY, counted(400), share=0.05)
    plain = len(evaluations)
    assert plain <= 2 + 1 + 2 * 16 * 7  # once, with the ladder, and twice again
    sigmas, counts, h = [], [], counted(1)
    for seed in range(15):
        evaluations.clear()
        found = suggest_sigma(jax.random.key(seed), h, share=30)
        sigmas.append(found.sigma)
        counts.append(len(evaluations))
        assert found.limit == "quadratic"
    # The quadratic limit is .2, and the share, which 16 draws alone would give, 1.5.
    assert min(sigmas) >= 0.2
    assert np.median(sigmas) <= 0.45
    assert max(sigmas) <= 1.0
    assert max(counts) <= 8 * 16 * 2 * 40


def test_suggestion_beside_an_uncertain_trace_of_both_signs():
    """Twelve positive and eight negative eigenvalues: the draws know the gap badly, the trace does not."""

    def saddle(w, _):
        return 10 + jnp.sum(jnp.where(jnp.arange(20) < 12, 1.0, -1.0) * (1 - jnp.exp(-(w**2))))

    h = hessian(saddle, jnp.zeros(20), None)
    for seed in range(10):
        found = suggest_sigma(jax.random.key(seed), h)
        assert found.sigma <= 1.3  # where the gap of each weight has less than half its quadratic part


# Errors


@pytest.mark.parametrize("name", ["share", "tolerance"])
@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf])
def test_errors_in_limits(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected a positive, finite number, got {value}"):
        suggested(cubic, W, 1.0, **{name: value})


@pytest.mark.parametrize("center", [0.0, 1.0])
def test_error_where_the_loss_is_linear(center):
    with pytest.raises(
        ValueError, match=r"No limit reached: up to sigma=.* noise changes the loss, 7, by less"
    ):
        suggested(lambda w, _: 7 + jnp.sum(w - center), jnp.full(5, center), None)


def test_error_where_the_loss_is_zero():
    with pytest.raises(ValueError, match="the loss is 0, so no sigma changes it by a share"):
        suggested(lambda w, _: jnp.sum(w**2), jnp.zeros(3), None)


def test_error_where_the_loss_has_a_kink():
    """The gap `|sigma u|` is above any multiple of the quadratic part, at any small sigma."""
    kinked = functools.partial(lambda w, _: 1 + jnp.sum(jnp.abs(w) + w**2))
    with pytest.raises(
        ValueError, match=r"The limit 'quadratic' is exceeded down to sigma=.*raise tolerance"
    ):
        suggested(kinked, jnp.zeros(5), None)
