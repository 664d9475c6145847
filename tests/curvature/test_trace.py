"""Traces and diagonals: exact where they must be, and with errors that are what they say elsewhere."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import (
    FIRST_LAYER,
    KEY,
    Loader,
    W,
    cubic,
    exact_mlp_hessian,
    exact_network_hessian,
    flat,
    mlp,
    mlp_loss,
    network,
    network_loss,
    quadratic,
    split,
    symmetric,
)

from nso_jax import curvature
from nso_jax.curvature._probes import random_signs

METHODS = ("xtrace", "hutch++", "hutchinson")
SPECTRA = {
    "flat": np.linspace(-1, 5, 100),
    "decaying": 0.93 ** np.arange(100),
    "negative": -1 / (1 + np.arange(100)) ** 2,
    "outliers": np.concatenate([np.linspace(-0.1, 0.1, 95), [10, 9, 8, -7, 6]]),
}


def calibrated(errors, standard_errors):
    """Whether 200 errors are as large as they were said to be."""
    scores = np.asarray(errors) / np.asarray(standard_errors)
    assert 0.8 <= scores.std() <= 1.25
    assert abs(scores.mean()) <= 0.5


@functools.cache
def runs(method, spectrum):
    with jax.enable_x64(True):
        matrix, params = symmetric(SPECTRA[spectrum]), {"a": jnp.ones(40), "b": jnp.ones(60)}
        h = curvature.hessian(two_leaves, params, matrix, chunk_size=8)
        estimates = [
            curvature.trace(jax.random.key(i), h, method=method, num_products=90) for i in range(200)
        ]
        return np.asarray(matrix), estimates


@jax.jit
def two_leaves(params, matrix):
    return quadratic(jnp.concatenate([params["a"], params["b"]]), matrix)


def pairs(methods, quick):
    """All methods with all spectra, of which the quick run has some."""
    return [
        pytest.param(*pair, marks=() if pair in quick else pytest.mark.slow)
        for pair in itertools.product(methods, SPECTRA)
    ]


@pytest.mark.parametrize(
    ("method", "spectrum"),
    pairs(METHODS, {("xtrace", "decaying"), ("hutch++", "outliers"), ("hutchinson", "negative")}),
)
def test_standard_error_is_true(method, spectrum):
    matrix, estimates = runs(method, spectrum)
    calibrated([run.value - np.trace(matrix) for run in estimates], [run.standard_error for run in estimates])
    calibrated(
        [run.per_leaf["a"] - np.trace(matrix[:40, :40]) for run in estimates],
        [run.per_leaf_standard_error["a"] for run in estimates],
    )
    for run in estimates:
        assert run.num_products == 90
        assert sum(run.per_leaf.values()) == pytest.approx(run.value, rel=1e-9, abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("spectrum", ["decaying", "negative", "outliers"])
def test_deflation_pays(spectrum):
    """With the same products, root mean square errors over 200 seeds."""
    errors = {}
    for method in METHODS:
        matrix, estimates = runs(method, spectrum)
        errors[method] = np.sqrt(np.mean([(run.value - np.trace(matrix)) ** 2 for run in estimates]))
    assert errors["xtrace"] < errors["hutch++"] < errors["hutchinson"]


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_trace_of_a_network():
    params, batch = network()
    matrix, h = exact_network_hessian(), curvature.hessian(network_loss, params, batch)
    estimates = [curvature.trace(jax.random.key(i), h, num_products=32) for i in range(100)]
    scores = [(run.value - np.trace(matrix)) / run.standard_error for run in estimates]
    assert np.abs(scores).max() <= 5
    assert 0.8 <= np.std(scores) <= 1.25
    first = slice(0, 32)  # the leaf b1 comes first
    for leaf, part in (("b1", first), ("w1", slice(42, 42 + 2048))):
        exact = np.trace(matrix[part, part])
        scores = [(run.per_leaf[leaf] - exact) / run.per_leaf_standard_error[leaf] for run in estimates]
        assert 0.8 <= np.std(scores) <= 1.25


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", ["xtrace", "hutch++"])
@pytest.mark.parametrize(
    "spectrum",
    [[0, 0, 0, 0, 0], [3], [-3], [0], [-2, -1], [1, -1, 1, -1], [5, 4, -3] + [0] * 97, [2] * 30],
    ids=str,
)
def test_exact_where_a_subspace_holds_everything(spectrum, method):
    matrix = symmetric(spectrum)
    h = curvature.hessian(quadratic, jnp.ones(len(spectrum)), matrix)
    run = curvature.trace(KEY, h, method=method, num_products=200)
    assert run.value == pytest.approx(sum(spectrum), abs=1e-12)
    assert run.standard_error <= 1e-12
    assert run.num_products <= 100
    diagonal = curvature.diagonal(KEY, h, num_products=200)
    np.testing.assert_allclose(diagonal.value, np.diag(matrix), atol=1e-12)


def test_what_little_is_left_after_large_eigenvalues_is_not_lost():
    """In float32 the images of the probes show no more than the large eigenvalues."""
    spectrum = np.concatenate([[1e7, -3e7], np.full(300, 1.0)])
    matrix, w = jnp.asarray(np.diag(spectrum), jnp.float32), jnp.ones(302)
    h = curvature.hessian(lambda w, d: jnp.sum(jnp.diag(d) * w**2) / 2, w, matrix)
    run = curvature.trace(KEY, h)
    assert abs(run.value - spectrum.sum()) <= 1e-6 * 1e7


@pytest.mark.usefixtures("x64")
def test_hutchinson_with_two_probes_and_more():
    """`v^T H v` is 2 or 10, so the estimate of two probes tells both, and a third adds one of these."""
    h = curvature.hessian(quadratic, jnp.ones(2), jnp.asarray([[1.0, 2.0], [2.0, 5.0]]))
    for seed in range(8):
        two, three = (
            curvature.trace(jax.random.key(seed), h, method="hutchinson", num_products=n) for n in (2, 3)
        )
        assert {two.value - two.standard_error, two.value + two.standard_error} <= {2, 10}
        assert round(3 * three.value - 2 * two.value, 9) in {2, 10}


@pytest.mark.usefixtures("x64")
def test_xtrace_and_its_error_by_definition():
    """Each estimate with an orthonormal basis made anew of the other probes' images; and of the others but one."""
    matrix, count = symmetric(SPECTRA["decaying"]), 6
    probes = random_signs(KEY, 0, count, 100)
    exact = np.asarray(matrix)

    def estimate(i, *others):
        basis, _ = np.linalg.qr(exact @ np.delete(probes, [i, *others], axis=0).T)
        rest = probes[i] - basis @ (basis.T @ probes[i])
        return np.trace(basis.T @ exact @ basis) + rest @ exact @ rest

    estimates = np.array([estimate(i) for i in range(count)])
    pairs = itertools.permutations(range(count), 2)
    covariance = np.mean(
        [(estimates[i] - estimate(i, j)) * (estimates[j] - estimate(j, i)) for i, j in pairs]
    )
    h = curvature.hessian(quadratic, jnp.ones(100), matrix)
    run = curvature.trace(KEY, h, num_products=2 * count + 1)
    assert run.num_products == 2 * count
    assert run.value == pytest.approx(estimates.mean(), rel=1e-10)
    variance = estimates.var(ddof=1) / count + max(covariance, 0)
    assert run.standard_error == pytest.approx(np.sqrt(variance), rel=1e-8)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", METHODS)
def test_unequal_batches_are_one_data_set(method):
    params, batch = mlp(jnp.float64)
    whole, parts = (
        curvature.trace(KEY, curvature.hessian(mlp_loss, params, batches), method=method, num_products=30)
        for batches in (batch, Loader(split(batch, 17, 9, 4)))
    )
    np.testing.assert_allclose(jax.tree.leaves(whole), jax.tree.leaves(parts), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 0.02)])
def test_trace_adds_up_over_leaves(dtype, tolerance, method):
    params, batch = mlp(dtype)
    h = curvature.hessian(mlp_loss, params, split(batch, 17, 13))
    estimate = curvature.trace(KEY, h, method=method)
    assert jax.tree.structure(estimate.per_leaf) == jax.tree.structure(params)
    assert sum(jax.tree.leaves(estimate.per_leaf)) == pytest.approx(estimate.value, rel=1e-9)
    assert estimate.per_leaf["unused"] == estimate.per_leaf_standard_error["unused"] == 0
    exact = np.trace(exact_mlp_hessian(dtype))
    assert abs(estimate.value - exact) <= 5 * estimate.standard_error + tolerance * abs(exact)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "mask",
    [
        {"layers": [True, False], "scale": False, "unused": False},
        lambda params: {name: [True, False] if name == "layers" else False for name in params},
    ],
    ids=["prefix", "callable"],
)
@pytest.mark.parametrize("method", METHODS)
def test_mask_restricts_to_a_block(mask, method):
    params, batch = mlp(jnp.float64)
    block = exact_mlp_hessian(jnp.float64)[FIRST_LAYER, FIRST_LAYER]
    h = curvature.hessian(mlp_loss, params, batch, mask=mask)
    estimate = curvature.trace(KEY, h, method=method)
    assert abs(estimate.value - np.trace(block)) <= 5 * estimate.standard_error + 1e-10
    assert estimate.per_leaf["scale"] == 0


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", METHODS)
def test_shares_of_labels(method):
    params, batch = mlp(jnp.float64)
    matrix = exact_mlp_hessian(jnp.float64)
    labels = {"layers": ["first", "rest"], "scale": "rest", "unused": "none"}
    h = curvature.hessian(mlp_loss, params, batch)
    estimate = curvature.trace(KEY, h, method=method, num_products=24, param_labels=labels)
    exact = {
        "first": np.trace(matrix[FIRST_LAYER, FIRST_LAYER]),
        "rest": np.trace(matrix[16:, 16:]),
        "none": 0,
    }
    assert list(estimate.per_leaf) == list(exact)
    for label, value in exact.items():
        allowed = 5 * estimate.per_leaf_standard_error[label]
        assert abs(estimate.per_leaf[label] - value) <= allowed + 1e-10
    assert sum(estimate.per_leaf.values()) == pytest.approx(estimate.value, rel=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_trace_stops_at_rtol(method):
    matrix, w = jnp.asarray(symmetric(np.linspace(1, 5, 400)), jnp.float32), jnp.ones(400)
    trace = functools.partial(curvature.trace, KEY, curvature.hessian(quadratic, w, matrix), method=method)
    loose, counts = trace(rtol=0.02, num_products=1000), []
    assert 8 <= loose.num_products < 150
    assert loose.standard_error <= 0.02 * loose.value
    strict = trace(rtol=1e-6, num_products=48, callback=counts.append)
    assert strict.standard_error > 1e-6 * strict.value
    assert strict.num_products == counts[-1] == 48
    assert sorted(counts) == counts


def test_trace_of_a_linear_loss_is_zero():
    h = curvature.hessian(lambda w, _: jnp.sum(w), jnp.ones(3), None)
    estimate = curvature.trace(KEY, h, rtol=0.1)
    assert estimate == (0.0, 0.0, 8, 0.0, 0.0)


# The diagonal


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("method", "spectrum"),
    pairs(["xdiag", "hutchinson"], {("xdiag", "decaying"), ("hutchinson", "outliers")}),
)
def test_diagonal_and_its_errors(method, spectrum):
    """The scores of a run's 100 entries are taken together."""
    matrix, params = symmetric(SPECTRA[spectrum]), {"a": jnp.ones((5, 8)), "b": jnp.ones(60)}

    @jax.jit
    def loss(params, matrix):
        return quadratic(jnp.concatenate([params["a"].ravel(), params["b"]]), matrix)

    h, scores = curvature.hessian(loss, params, matrix, chunk_size=8), []
    for seed in range(50):
        run = curvature.diagonal(jax.random.key(seed), h, method=method, num_products=48)
        scores.append((flat_numpy(run.value) - np.diag(matrix)) / flat_numpy(run.standard_error))
        assert run.value["a"].shape == run.standard_error["a"].shape == (5, 8)
        assert run.value["a"].dtype == np.float64
        sums = {name: leaf.sum() for name, leaf in run.value.items()}
        assert run.per_leaf == pytest.approx(sums, rel=1e-9, abs=1e-12)
    assert 0.8 <= np.std(scores) <= 1.25
    if method == "xdiag":
        trace = curvature.trace(jax.random.key(49), h, num_products=48)
        assert sum(run.per_leaf.values()) == pytest.approx(trace.value, rel=1e-9)
        assert run.per_leaf_standard_error == pytest.approx(trace.per_leaf_standard_error, rel=1e-6)


def flat_numpy(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.mark.usefixtures("x64")
def test_diagonal_of_a_network_in_batches_with_mask_and_labels():
    params, batch = mlp(jnp.float64)
    mask = {"layers": [True, False], "scale": True, "unused": False}
    h = curvature.hessian(mlp_loss, params, Loader(split(batch, 17, 13)), mask=mask)
    labels = {"layers": "layers", "scale": "scale", "unused": "unused"}
    run = curvature.diagonal(KEY, h, param_labels=labels)
    exact = np.diag(exact_mlp_hessian(jnp.float64)).copy()
    exact[16:24] = 0
    np.testing.assert_allclose(flat(run.value), exact, atol=1e-10)
    assert run.per_leaf == pytest.approx({"layers": exact[:24].sum(), "scale": exact[24], "unused": 0})


@pytest.mark.parametrize("method", ["xdiag", "hutchinson"])
def test_diagonal_stops_at_rtol(method):
    matrix = jnp.asarray(symmetric(np.linspace(4, 5, 200)), jnp.float32)
    h = curvature.hessian(quadratic, jnp.ones(200), matrix)
    run = curvature.diagonal(KEY, h, method=method, rtol=0.05, num_products=1000)
    assert np.linalg.norm(run.standard_error) <= 0.05 * np.linalg.norm(run.value)
    assert run.num_products < 400
    # Exact for a diagonal Hessian, whatever the probes: signs have squares of 1.
    cubes = curvature.hessian(lambda w, _: jnp.sum(w**3), jnp.arange(3.0), None)
    exact = curvature.diagonal(KEY, cubes, method="hutchinson")
    np.testing.assert_allclose(exact.value, [0, 6, 12], rtol=1e-6)
    assert exact.num_products == 100


@pytest.mark.parametrize(
    ("estimator", "options", "message"),
    [
        (
            curvature.trace,
            {"method": "exact"},
            r"method: expected one of 'xtrace', 'hutch\+\+', 'hutchinson', got 'exact'",
        ),
        (curvature.trace, {"num_products": 3}, "num_products: expected an int >= 4, got 3"),
        (
            curvature.trace,
            {"num_products": 5, "method": "hutch++"},
            "num_products: expected an int >= 6, got 5",
        ),
        (curvature.trace, {"num_products": 1, "method": "hutchinson"}, "num_products: expected an int >= 2"),
        (curvature.trace, {"num_products": 8.5}, "num_products: expected a static int >= 4, got 8.5"),
        (curvature.trace, {"rtol": 0}, "rtol: expected a positive, finite number, got 0"),
        (curvature.trace, {"rtol": float("nan")}, "rtol: .*got nan"),
        (curvature.trace, {"param_labels": {"v": "a"}}, "param_labels: not a prefix"),
        (
            curvature.diagonal,
            {"method": "xtrace"},
            "method: expected one of 'xdiag', 'hutchinson', got 'xtrace'",
        ),
        (curvature.diagonal, {"num_products": 3}, "num_products: expected an int >= 4, got 3"),
        (curvature.diagonal, {"rtol": -1}, "rtol: expected a positive, finite number, got -1"),
    ],
)
def test_errors_in_options(estimator, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        estimator(KEY, curvature.hessian(cubic, W, 1.0), **options)
