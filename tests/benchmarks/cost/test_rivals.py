"""`rivals` with a small network, from the command line to the files and the README's table."""

import ast
import functools

import jax
import numpy as np
import pytest
from flax import nnx

from benchmarks.cost import rivals
from benchmarks.kit import timing
from benchmarks.tasks import models
from benchmarks.tasks.data import Examples

pytestmark = pytest.mark.usefixtures("as_strict_as_the_library")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    model = functools.partial(models.MLP, (784, 8, 10))
    monkeypatch.setattr(rivals, "CASES", {"mlp": rivals.Case("MLP", model, 4)})
    monkeypatch.setattr(timing, "LEAST_SECONDS", 1e-3)


@pytest.mark.slow
def test_every_rival_is_timed_and_weighed(measured, capsys):
    results = measured("rivals", "--cases", "mlp", "--repetitions", "2")
    case = results["cases"]["mlp"]
    assert case["rivals"].keys() == rivals.RIVALS.keys()
    assert case["weights"] == 784 * 8 + 8 + 8 * 10 + 10
    assert case["rivals"]["plain"] == {
        "gradients": {"median": 1, "low": 1, "high": 1},
        "memory_over_plain": 1,
    }
    for figures in case["rivals"].values():
        assert (
            0 < figures["gradients"]["low"] <= figures["gradients"]["median"] <= figures["gradients"]["high"]
        )
        assert figures["memory_over_plain"] > 0
    shown = capsys.readouterr().out
    for name, *cells in rivals.rows(results):
        assert name in shown
        assert cells == [
            f"{case['rivals'][name]['gradients']['median']:.2f}",
            f"{case['rivals'][name]['memory_over_plain']:.1f}",
        ]


@pytest.mark.slow
def test_every_rival_changes_the_gradient():
    """What is timed is no plain gradient under another name; BSAM and IVON give updates."""
    problem, params = rivals._problem(models.MLP((784, 8, 10), rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    batch = Examples(rng.random((16, 28, 28, 1), np.float32), rng.integers(10, size=16).astype(np.int32))
    with jax.numpy_rank_promotion("allow"):
        found = {
            name: jax.tree.leaves(jax.jit(rival.gradient(problem))(jax.random.key(0), params, batch)[1])
            for name, rival in rivals.RIVALS.items()
            if name not in {"BSAM", "IVON"}
        }
    plain = np.concatenate([np.ravel(leaf) for leaf in found["plain"]])
    for name, leaves in found.items():
        gradient = np.concatenate([np.ravel(leaf) for leaf in leaves])
        assert np.isfinite(gradient).all()
        assert np.allclose(gradient, plain, rtol=1e-6) == (name == "plain"), name


def test_lines_are_python_and_fit_a_table():
    for rival in rivals.RIVALS.values():
        ast.parse(rival.line)
        assert "|" not in rival.line + rival.penalizes


def test_a_network_that_was_left_out_has_dashes():
    results = {"cases": {}}
    assert rivals.rows(results) == [[name, "-", "-"] for name in rivals.RIVALS]
