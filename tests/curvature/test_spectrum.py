"""The spectral density: exact moments, and an error band that is what it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import KEY, Loader, W, cubic, exact_mlp_hessian, mlp, mlp_loss, quadratic, split, symmetric

from nso_jax import curvature
from nso_jax.curvature import spectrum
from nso_jax.curvature._probes import random_signs


def smoothed(eigenvalues, grid, width):
    """Written out, without SciPy."""
    distances = (grid[:, None] - np.asarray(eigenvalues)) / width
    return np.mean(np.exp(-(distances**2) / 2), axis=1) / (width * np.sqrt(2 * np.pi))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "eigenvalues", [[0, 0, 0], [3], [2, 2, 2], [5, 0, 0, 0], [-1, 4], [1, -1, 1, -1]], ids=str
)
def test_few_eigenvalues_are_nodes(eigenvalues):
    h = curvature.hessian(quadratic, jnp.ones(len(eigenvalues)), symmetric(eigenvalues))
    density = curvature.spectral_density(KEY, h)
    for nodes, weights in zip(density.nodes, density.weights, strict=True):
        assert weights.sum() == pytest.approx(1, abs=1e-12)
        for node in nodes[weights > 1e-12]:
            assert np.abs(node - np.asarray(eigenvalues)).min() <= 1e-12
    assert np.trapezoid(density.density, density.grid) == pytest.approx(1, abs=1e-5)
    assert density.density.min() >= 0


@pytest.mark.usefixtures("x64")
def test_moments_are_those_of_the_probes():
    """Of degree up to 2m - 1, each probe's quadrature gives v^T H^p v / n exactly."""
    matrix = symmetric(np.linspace(-1, 3, 40))
    h = curvature.hessian(quadratic, jnp.ones(40), matrix)
    density = curvature.spectral_density(KEY, h, num_probes=3, num_steps=4)
    probes = random_signs(KEY, 0, 3, 40)
    for nodes, weights, probe in zip(density.nodes, density.weights, probes, strict=True):
        for power in range(8):
            exact = probe @ np.linalg.matrix_power(np.asarray(matrix), power) @ probe / 40
            assert weights @ nodes**power == pytest.approx(exact, rel=1e-10)
    assert density.num_products == 12


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("bases_bytes", [1, 2**29])
def test_unequal_batches_and_groups_of_probes(bases_bytes, monkeypatch):
    monkeypatch.setattr(spectrum, "_BASES_BYTES", bases_bytes)
    params, batch = mlp(jnp.float64)
    loader, counts = Loader(split(batch, 17, 13)), []
    h = curvature.hessian(mlp_loss, params, loader)
    density = curvature.spectral_density(KEY, h, num_probes=4, width=0.05, callback=counts.append)
    exact = np.linalg.eigvalsh(exact_mlp_hessian(jnp.float64))
    assert density.nodes.shape == density.weights.shape == (4, 25)
    assert abs(density.nodes[:, [0, -1]] - exact[[0, -1]]).max() <= 1e-8
    assert density.num_products == counts[-1] == loader.passes * (4 if bases_bytes > 1 else 1)
    assert density.width == 0.05


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_error_band_is_true():
    eigenvalues = np.concatenate([np.linspace(-1, 5, 110), np.linspace(10, 30, 10)])
    h, scores = curvature.hessian(quadratic, jnp.ones(120), symmetric(eigenvalues), chunk_size=16), []
    options = {"num_probes": 16, "num_steps": 50, "width": 0.6, "num_points": 120}
    for seed in range(200):
        density = curvature.spectral_density(jax.random.key(seed), h, **options)
        exact = smoothed(eigenvalues, density.grid, 0.6)
        bulk = (density.grid > 0) & (density.grid < 4)
        scores.append(((density.density - exact) / density.standard_error)[bulk])
    assert 0.8 <= np.std(scores) <= 1.25
    assert abs(np.mean(scores)) <= 0.2


def test_low_precision():
    params, batch = mlp(jnp.bfloat16)
    density = curvature.spectral_density(KEY, curvature.hessian(mlp_loss, params, batch))
    exact = np.linalg.eigvalsh(exact_mlp_hessian(jnp.bfloat16))
    assert density.nodes.max() == pytest.approx(exact[-1], rel=0.03)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_probes": 1}, "num_probes: expected an int >= 2, got 1"),
        ({"num_steps": 0}, "num_steps: expected an int >= 1, got 0"),
        ({"num_points": 1}, "num_points: expected an int >= 2, got 1"),
        ({"width": 0.0}, r"width: expected a positive, finite number, got 0\.0"),
    ],
)
def test_errors_in_options(options, message):
    with pytest.raises(ValueError, match=message):
        curvature.spectral_density(KEY, curvature.hessian(cubic, W, 1.0), **options)
