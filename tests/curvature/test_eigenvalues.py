"""Eigenpairs against those of dense Hessians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import (
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

WHICH = {"largest": lambda values: -values, "smallest": lambda values: values, "magnitude": lambda v: -abs(v)}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("sizes", [(30,), (17, 13)])
def test_eigenpairs_are_those_of_the_dense_hessian(which, sizes):
    params, batch = mlp(jnp.float64)
    matrix = exact_mlp_hessian(jnp.float64)
    exact, exact_vectors = np.linalg.eigh(matrix)
    order = np.argsort(WHICH[which](exact))[:5]
    pairs = curvature.eigenvalues(KEY, curvature.hessian(mlp_loss, params, split(batch, *sizes)), which=which)
    np.testing.assert_allclose(pairs.values, exact[order], rtol=0, atol=1e-8)
    assert pairs.residuals.max() <= 1e-6 * np.abs(exact).max()
    assert pairs.values.dtype == pairs.residuals.dtype == np.float64
    for vector, value, residual, i in zip(pairs.vectors, pairs.values, pairs.residuals, order, strict=True):
        assert jax.tree.structure(vector) == jax.tree.structure(params)
        v = flat(vector)
        assert np.linalg.norm(v) == pytest.approx(1, abs=1e-12)
        assert abs(v @ exact_vectors[:, i]) == pytest.approx(1, abs=1e-8)
        assert np.linalg.norm(matrix @ v - value * v) == pytest.approx(residual, rel=1e-3, abs=1e-13)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize(
    "spectrum",
    [
        [0, 0, 0, 0, 0, 0],
        [2],
        [-3],
        [7, 7, 7, 7, 7],
        [5, 5, 2, 2, 1, 1, 0, 0],
        [5, 5, 3, 1],
        [5, 3, 3, 3, 0, 0, 0, 0],
        [-1, -1, -2, -4, -8],
        [1, 0, 0, 0, 0, 0, 0],
        [1, -1, 1, -1],
        [4, 3, 2, 1, 0.5, -0.5],
    ],
    ids=str,
)
def test_eigenvalues_are_found_as_often_as_they_are_there(spectrum, which):
    size = len(spectrum)
    h = curvature.hessian(quadratic, jnp.zeros(size), symmetric(spectrum))
    for k in sorted({1, min(2, size), size}):
        pairs = curvature.eigenvalues(KEY, h, k=k, which=which)
        exact = np.sort(WHICH[which](np.array(spectrum, float)))[:k]
        np.testing.assert_allclose(WHICH[which](pairs.values), exact, atol=1e-10)
        assert pairs.residuals.max() <= 1e-5
        assert pairs.num_products <= size + k
        vectors = np.stack([flat(vector) for vector in pairs.vectors])
        np.testing.assert_allclose(vectors @ vectors.T, np.eye(k), atol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("rest", "top", "most"),
    [(np.linspace(-0.1, 0.1, 295), [5, 4, 3, 2, 1], 25), (np.zeros(197), [2, 2, 1, 0], 13)],
    ids=["outliers", "low rank"],
)
def test_eigenvalues_take_few_products(rest, top, most):
    spectrum = np.concatenate([rest, top])
    h = curvature.hessian(quadratic, jnp.zeros(len(spectrum)), symmetric(spectrum))
    pairs = curvature.eigenvalues(KEY, h, k=len(top))
    np.testing.assert_allclose(pairs.values, top, atol=1e-10)
    assert pairs.num_products <= most


@pytest.mark.usefixtures("x64")
def test_eigenvectors_stay_orthogonal_over_many_products():
    """Large eigenvalues that have long converged come back as ghosts where orthogonality is lost."""
    spectrum = np.concatenate([np.linspace(0, 1, 195), [1e3, 1e4, 1e5, 1e6, 1e7]])
    h = curvature.hessian(quadratic, jnp.zeros(200), symmetric(spectrum))
    pairs = curvature.eigenvalues(KEY, h, k=20, tol=1e-13)
    np.testing.assert_allclose(pairs.values, spectrum[:-21:-1], atol=1e-6)
    vectors = np.stack(pairs.vectors)
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(20), atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 0.03)])
def test_eigenvalues_in_low_precision(dtype, tolerance):
    params, batch = mlp(dtype)
    pairs = curvature.eigenvalues(KEY, curvature.hessian(mlp_loss, params, split(batch, 17, 13)))
    exact = np.linalg.eigvalsh(exact_mlp_hessian(dtype))[:-6:-1]
    np.testing.assert_allclose(pairs.values, exact, atol=tolerance * exact[0])
    assert pairs.residuals.max() <= tolerance * exact[0]
    assert {leaf.dtype for leaf in jax.tree.leaves(pairs.vectors)} == {jnp.dtype(dtype)}


@pytest.mark.usefixtures("x64")
def test_eigenvalues_warn_where_the_products_run_out():
    matrix = symmetric(np.linspace(0, 1, 100))
    h = curvature.hessian(quadratic, jnp.zeros(100), matrix)
    with pytest.warns(
        UserWarning, match=r"after 10 products, before tol=1e-06.*Raise max_products"
    ) as caught:
        pairs = curvature.eigenvalues(KEY, h, k=3, max_products=10)
    assert caught[0].filename == __file__
    assert pairs.num_products == 10
    assert pairs.residuals.max() > 1e-3
    for vector, value, residual in zip(pairs.vectors, pairs.values, pairs.residuals, strict=True):
        assert np.linalg.norm(matrix @ vector - value * vector) == pytest.approx(residual, rel=1e-6)


def test_products_are_counted():
    params, batch = mlp(jnp.float32)
    loader, counts = Loader([batch]), []
    h = curvature.hessian(mlp_loss, params, loader)
    pairs = curvature.eigenvalues(KEY, h, k=2, callback=counts.append)
    assert counts == [*range(1, pairs.num_products - 1), pairs.num_products]
    assert loader.passes == pairs.num_products - 1  # both residuals in one pass


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("which", WHICH)
def test_eigenvalues_of_a_network(which):
    params, batch = network()
    exact = np.linalg.eigvalsh(exact_network_hessian())
    h = curvature.hessian(network_loss, params, split(batch, 70, 30))
    pairs = curvature.eigenvalues(KEY, h, which=which)
    np.testing.assert_allclose(pairs.values, exact[np.argsort(WHICH[which](exact))[:5]], rtol=0, atol=1e-8)
    images = np.stack([flat(vector) for vector in pairs.vectors]) @ exact_network_hessian()
    for image, value, vector, residual in zip(images, *pairs[:3], strict=True):
        assert np.linalg.norm(image - value * flat(vector)) == pytest.approx(residual, rel=1e-3, abs=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k: expected an int >= 1, got 0"),
        ({"k": True}, "k: expected a static int >= 1, got True"),
        ({"k": 4}, "k: expected at most the number of parameters, 3, got 4"),
        ({"which": "LA"}, "which: expected one of 'largest', 'smallest', .*got 'LA'"),
        ({"k": 1, "tol": -1.0}, "tol: expected a positive, finite number, got -1.0"),
        ({"k": 2, "max_products": 3}, "max_products: expected an int >= 4, got 3"),
    ],
)
def test_errors_in_options(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        curvature.eigenvalues(KEY, curvature.hessian(cubic, W, 1.0), **options)
