"""`matrix-sensing` on a small matrix, from the command line to the files; the loss against the formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nso_jax
from benchmarks.quality import matrix_sensing

pytestmark = pytest.mark.usefixtures("as_strict_as_the_library")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(matrix_sensing, "SIZE", 6)
    monkeypatch.setattr(matrix_sensing, "RANK", 2)
    monkeypatch.setattr(matrix_sensing, "NUM_MEASUREMENTS", 15)
    methods = {name: method._replace(num_steps=7) for name, method in matrix_sensing.METHODS.items()}
    monkeypatch.setattr(matrix_sensing, "METHODS", methods)
    monkeypatch.setattr(matrix_sensing, "NUM_POINTS", 3)
    jax.clear_caches()  # the sizes are no arguments of what is compiled
    yield
    jax.clear_caches()


def whole(entries):
    """The symmetric matrix, from its entries on and above the diagonal."""
    matrix = np.zeros((6, 6))
    matrix[np.triu_indices(6)] = entries
    return matrix + np.triu(matrix, 1).T


def problem():
    """The problem with its matrices whole, and the factor that a run starts from."""
    made = matrix_sensing.make_problem(jax.random.key(0))
    halved = np.where(np.equal(*np.triu_indices(6)), 1, 0.5)
    measuring = [np.array([whole(row) for row in np.asarray(part) * halved]) for part in made[1:]]
    return made, whole(made.truth), *measuring, jax.random.normal(jax.random.key(1), (6, 6))


def test_loss_and_errors_are_those_of_the_paper():
    made, truth, train, validation, start = problem()
    factor = np.asarray(start, np.float64)
    assert np.linalg.matrix_rank(truth, tol=1e-4) == 2
    residual = np.einsum("mij,ij->m", train, factor @ factor.T - truth)
    expected = np.einsum("m,mij->ij", residual, train) @ factor / len(residual)
    np.testing.assert_allclose(jax.grad(matrix_sensing.loss)(start, made), expected, rtol=1e-4, atol=1e-4)
    errors = matrix_sensing._errors(made, start)
    for key, measuring in (("training", train), ("validation", validation)):
        found, true = (np.einsum("mij,ij->m", measuring, x) for x in (factor @ factor.T, truth))
        assert errors[key] == pytest.approx(np.mean((found - true) ** 2) / np.mean(true**2), rel=1e-4)
    distance = np.linalg.norm(factor @ factor.T - truth) / np.linalg.norm(truth)
    assert errors["distance"] == pytest.approx(distance, rel=1e-4)


def test_measuring_matrices_are_symmetric_means_of_normal_ones():
    drawn = [matrix_sensing.make_problem(jax.random.key(seed)).train for seed in range(200)]
    variances = np.var(np.concatenate(drawn), axis=0)
    expected = np.where(np.equal(*np.triu_indices(6)), 1, 2)  # doubled, off the diagonal: 4 times 1/2
    np.testing.assert_allclose(variances, expected, rtol=5 * (2 / 3000) ** 0.5)


def test_steps_are_those_of_the_library():
    made, *_, start = problem()
    key, method = jax.random.key(3), matrix_sensing.METHODS["two-sided"]
    counts = []
    curve = matrix_sensing.descend(method, made, start, key, counts.append)
    assert [point["step"] for point in curve] == [0, 2, 4, 6, 7]
    assert counts == [2, 2, 2, 1]
    fn = jax.jit(nso_jax.value_and_grad(matrix_sensing.loss, sigma=matrix_sensing.SIGMA))
    factor = start
    for i in range(7):
        factor -= 0.0025 * fn(jax.random.fold_in(key, i), factor, made)[1]
    assert curve[-1]["training"] == pytest.approx(matrix_sensing._errors(made, factor)["training"], rel=1e-3)


def test_every_method_and_seed_is_reported(measured, capsys):
    results = measured("matrix-sensing", "--seeds", "2")
    done = [(run["method"], run["seed"]) for run in results["runs"]]
    assert done == [(name, seed) for seed in range(2) for name in matrix_sensing.METHODS]
    shown = capsys.readouterr().out
    for row in matrix_sensing.rows(results):
        assert all(cell in shown for cell in row)
    assert jnp.isfinite(results["runs"][0]["curve"][-1]["distance"])
