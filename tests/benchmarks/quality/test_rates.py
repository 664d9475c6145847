"""`rates`: problems and estimates against closed forms, the slopes, and the command at small size."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import __main__ as cli
from benchmarks.kit.files import RESULTS
from benchmarks.quality import rates
from benchmarks.quality.rates import CURVATURES, METHODS, PROBLEMS, RATES, Options, Run

SIGMA = 1.5
DRAWS = 4000


def weights_of(problem):
    return jnp.asarray(0.7 * problem.start, jnp.float32)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_gradient_of_the_smoothed_loss_is_the_mean_of_the_losss(name):
    problem = PROBLEMS[name]
    nodes, masses = np.polynomial.hermite_e.hermegauss(40)
    w = weights_of(problem)
    slopes = [jax.grad(lambda w: problem.loss(w).sum())(w + np.float32(SIGMA * node)) for node in nodes]
    expected = np.tensordot(masses / masses.sum(), np.asarray(slopes, float), axes=1)
    np.testing.assert_allclose(problem.gradient(w, SIGMA), expected, atol=2e-6)


@pytest.mark.parametrize("name", PROBLEMS)
def test_all_start_with_the_same_gap_and_within_the_lipschitz_constant(name):
    problem = PROBLEMS[name]
    start, low = jnp.asarray(problem.start), jnp.zeros(len(CURVATURES))
    np.testing.assert_allclose(problem.loss(start) - problem.loss(low), rates.GAP**2, rtol=1e-6)
    hessian = jax.vmap(jax.grad(jax.grad(lambda x, i: problem.loss(low.at[i].set(x))[i])), (0, 0))
    curved = hessian(jnp.zeros(len(CURVATURES)), jnp.arange(len(CURVATURES)))
    np.testing.assert_allclose(curved, CURVATURES, rtol=1e-6)


def sampled(problem, method, num_draws):
    """Estimates of the gradient, at the weights of the tests."""
    keys = jax.random.split(jax.random.key(1), (2, DRAWS))
    of = rates.estimate(PROBLEMS[problem], METHODS[method], num_draws, SIGMA)
    examples = jax.vmap(lambda key: jax.random.normal(key, (num_draws, len(CURVATURES))))(keys[1])
    weights = weights_of(PROBLEMS[problem])
    estimates = jax.jit(jax.vmap(of, (0, None, 0)))(keys[0], weights, examples)
    return np.asarray(weights, float), np.asarray(estimates, float), np.asarray(examples, float)


def injected_variance(problem, method, weights):
    """What one draw of weight noise adds to the variance, from the moments of a normal number."""
    v = CURVATURES * SIGMA**2
    if problem == "quadratic":
        return CURVATURES * v * (method == "one-sided")
    sine = np.sin(np.sqrt(CURVATURES) * weights)
    if method == "pairs":  # sin(b) cos(u)
        return CURVATURES * sine**2 * (1 - np.exp(-v)) ** 2 / 2
    return CURVATURES * ((1 - np.exp(-2 * v) * (1 - 2 * sine**2)) / 2 - np.exp(-v) * sine**2)  # sin(b + u)


@pytest.mark.parametrize("num_draws", [1, 3])
@pytest.mark.parametrize("method", ["pairs", "one-sided"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_estimate_has_the_mean_and_variance_of_the_closed_form(problem, method, num_draws):
    weights, estimates, _ = sampled(problem, method, num_draws)
    expected = (1 + injected_variance(problem, method, weights)) / num_draws
    mean = np.asarray(PROBLEMS[problem].gradient(jnp.asarray(weights), SIGMA), float)
    assert np.all(abs(estimates.mean(0) - mean) < 5 * np.sqrt(expected / DRAWS))
    squares = (estimates - mean) ** 2
    assert np.all(abs(squares.mean(0) - expected) < 5 * squares.std(0) / np.sqrt(DRAWS))


def test_pairs_add_nothing_to_a_quadratic():
    weights, estimates, examples = sampled("quadratic", "pairs", 2)
    np.testing.assert_allclose(estimates, CURVATURES * weights + examples.mean(1), atol=1e-5)


def second_moments(rate, momentum, variance, steps):
    """E[(curvature w)^2] before each of the steps, by the moments of (w, m), which the steps map linearly."""
    rate, found = rate * (1 - momentum), []
    for start, k, v in zip(PROBLEMS["quadratic"].start, CURVATURES, variance, strict=True):
        step = np.array([[1 - rate * k, -rate * momentum], [k, momentum]])
        noise = v * np.outer([-rate, 1], [-rate, 1])
        moments, squares = np.outer([start, 0], [start, 0]), []
        for _ in range(steps):
            squares.append(k**2 * moments[0, 0])
            moments = step @ moments @ step.T + noise
        found.append(squares)
    return np.array(found)


@pytest.mark.parametrize("method", METHODS)
def test_descents_have_the_moments_of_a_linear_recursion(method):
    options = Options(seeds=400, steps=32)
    found = rates.descend(Run("quadratic", method, SIGMA, 2), options)
    variance = (1 + (method == "one-sided") * (CURVATURES * SIGMA) ** 2) / 2
    for i in (0, 8, 20):
        expected = second_moments(RATES[i], METHODS[method].momentum, variance, 32)
        for of, first in (("all", 0), ("late", 16)):
            mine = found[of][:, i, :, -1]
            error = abs(mine.mean(0) - expected[:, first:].mean(1))
            assert np.all(error < 5 * mine.std(0) / 20 + 1e-6 * expected[:, 0]), of


def test_the_slope_of_a_power_law_is_its_exponent():
    x = np.array([256.0, 1024, 512, 65536])
    y = np.stack([3 * x**-0.5, 7 * x**-0.25])
    np.testing.assert_allclose(rates.slope(np.log(x), np.log(y)), [-0.5, -0.25], rtol=1e-12)


def test_the_worst_curvature_is_met_with_the_best_rate():
    squares = np.array([[[1.0, 4.0], [3.0, 2.0]], [[1.0, 8.0], [3.0, 6.0]]])[..., None]
    weights = np.array([[0.5, 0.5], [1.0, 0.0]])
    np.testing.assert_array_equal(rates.minimax(weights, squares), [[4.0], [3.0]])


def test_resamplings_are_means():
    weights = rates.resamplings(5)
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    np.testing.assert_allclose(weights[0], 0.2)


def test_the_bound_is_met_by_the_largest_curvature_and_falls_as_theory_says():
    """On a quadratic of curvature C the descent lemma is an equation; what is left is the gap at the end."""
    k, steps = 2, 512
    values = []
    for rate in RATES[8:]:
        squares = second_moments(rate, 0.0, np.full(len(CURVATURES), 1 / k), steps)[0]
        values.append(squares.mean())
    bound = rates.bound(k, steps)
    assert 0.97 * bound < min(values) <= bound
    assert rates.bound(4, 2**40) < 2 * rates.bound(1, 2**40)  # where the least of RATES is the best
    kt = np.array([1024.0, 4096.0, 16384.0])
    np.testing.assert_allclose(rates.bound(1.0, kt), np.sqrt(2 / kt), rtol=0.04)


def test_expected_advantages_are_roots_of_variances():
    assert rates.expected_advantage(3.0, "steps") == pytest.approx(10**0.5)
    assert rates.expected_advantage(1.0, "gradients") == pytest.approx(1.0)


def exact(variance, k, steps, first):
    """The minimax on the quadratic without momentum: sums of geometric series."""
    q = 1 - np.outer(RATES, CURVATURES)

    def series(count):
        return (1 - q ** (2 * count)) / (1 - q**2)

    geometric, number = series(steps) - series(first), steps - first
    noise = RATES[:, None] ** 2 * variance / k * (number - geometric) / (1 - q**2)
    squares = CURVATURES**2 * (geometric * PROBLEMS["quadratic"].start ** 2 + noise) / number
    return squares.max(axis=1).min()


@pytest.mark.parametrize("method", ["pairs", "one-sided"])
@pytest.mark.parametrize("of", rates.AVERAGED)
def test_the_published_gradients_are_those_of_the_closed_form(of, method):
    """Within five of their own standard errors; and the slope of the closed form is -1/2."""
    results = json.loads((RESULTS / "rates.json").read_text())
    sigma = results["settings"]["sigmas"][0]
    variance = 1 + (method == "one-sided") * (CURVATURES * sigma) ** 2
    points = rates._points(results, "quadratic", method)
    expected = [exact(variance, p["draws"], p["steps"], p["steps"] // 2 * (of == "late")) for p in points]
    value, low, high = (np.array([p[of][name] for p in points]) for name in ("value", "low", "high"))
    assert np.all(abs(value - expected) < 5 * (high - low) / (2 * 1.96))
    x = np.log([p["draws"] * p["steps"] for p in points])
    assert rates.slope(x, np.log(expected)) == pytest.approx(-0.5, abs=0.005)


def test_the_command_leaves_its_figures(measured):
    results = measured("rates", "--seeds", "3", "--steps", "32", "--draws", "1", "2", "--sigmas", "1", "2")
    assert len(results["points"]) == 5 * 2 * len(PROBLEMS) * (len(METHODS) + 2)
    assert {point["steps"] for point in results["points"]} == {2, 4, 8, 16, 32}
    rows = rates.rows(results)
    assert [row[:2] for row in rows[:2]] == [["quadratic", "pairs"], ["quadratic", "pairs, momentum"]]
    assert rows[len(PROBLEMS) * len(METHODS)][:2] == ["quadratic", "ratio, 1, steps"]
    assert all(len(row) == len(rates.HEADERS) for row in rows)


def test_too_few_steps_are_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["rates", "--steps", "8"])
    assert "expected a whole number of at least 32" in " ".join(capsys.readouterr().err.split())
