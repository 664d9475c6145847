"""`step-cost` with small networks, from the command line to the files; and the steps that it times."""

import functools
import importlib.util

import jax
import numpy as np
import pytest
from flax import nnx

from benchmarks.cost import jax_steps, step_cost
from benchmarks.kit import timing
from benchmarks.tasks import models
from benchmarks.tasks.data import Examples

HAS_TORCH = importlib.util.find_spec("torch") is not None
TORCH_STEPS = {"torch-plain", "torch-sam", "torch-nso"}


@pytest.fixture
def tiny_steps(monkeypatch):
    small = functools.partial(models.MLP, (64, 10))
    cases = {"mlp-64": jax_steps.Case("MLP, batch 4", small, (4, 8, 8, 1), without=("nso-signs-k4",))}
    monkeypatch.setattr(jax_steps, "CASES", cases)
    monkeypatch.setattr(jax_steps, "NOISE_SHAPE", (64, 64))
    monkeypatch.setattr(timing, "torch_device", lambda: None)
    monkeypatch.setattr(timing, "LEAST_SECONDS", 1e-3)


@pytest.mark.slow
def test_step_cost_reports_every_step_and_ratio(tiny_steps, measured, capsys):
    results = measured("step-cost", "--repetitions", "2")
    assert set(results) == {"versions", "machine", "settings", "cases", "noise"}
    assert results["settings"]["torch"] is None
    case = results["cases"]["mlp-64"]
    assert case["weights"] == 64 * 10 + 10
    assert case["repetitions"] == 2
    left_out = TORCH_STEPS | {"nso-signs-k4"}
    gradients = {"plain-gradient", "nso-gradient", "nso-signs-gradient"}
    assert case["milliseconds"].keys() == (step_cost.LABELS.keys() - left_out) | gradients
    assert case["ratios"].keys() >= {"one side / plain", "in parts / plain"}
    assert case["over_plain_step"]["plain"] == {"median": 1, "low": 1, "high": 1}
    for times in (case["milliseconds"], case["ratios"], results["noise"]["ratios"]):
        for value in times.values():
            assert 0 < value["low"] <= value["median"] <= value["high"]
    compiling = case["first_call_seconds"]
    assert step_cost.rows(results) == [
        [
            "MLP, batch 4",
            *_cells(case, step_cost.SHOWN),
            f"{compiling['nso-k4'] / compiling['nso']:.2f}",
        ],
    ]
    shown = " ".join(capsys.readouterr().out.split())
    assert all(cell in shown for cell in step_cost.rows(results)[0])
    assert "PyTorch is not installed" in shown


def _cells(case, ratios):
    return [
        f"{case['milliseconds']['plain']['median']:.3g}",
        *(f"{case['ratios'][name]['median']:.2f}" for name in ratios),
    ]


def test_step_cost_of_noise_alone(tiny_steps, measured):
    results = measured("step-cost", "--cases", "noise", "--repetitions", "1")
    assert results["cases"] == {}
    assert results["noise"]["milliseconds"].keys() == {"constant", "signs", "normal", "jax-normal"}
    assert step_cost.rows(results) == []


@pytest.mark.slow
def test_every_step_trains(tiny_steps):
    """Each goes on from where it was: the loss of a batch that is repeated comes down."""
    case = jax_steps.CASES["mlp-64"]
    for name, call in jax_steps.step_calls(case)[1].items():
        if not name.endswith("gradient"):
            losses = [float(call()[1]) for _ in range(200)]
            assert losses[-1] < losses[0], name


@pytest.fixture
def torch_rivals():
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two that wait for each other take long where other tests run too
    yield pytest.importorskip("benchmarks.cost.torch_steps")
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", jax_steps.CASES)
def test_torch_has_as_many_weights(name, torch_rivals):
    case = jax_steps.CASES[name]
    model = case.model(rngs=nnx.Rngs(0))
    rival = torch_rivals.MODELS[type(model).__name__]()
    assert sum(p.numel() for p in rival.parameters()) == sum(
        w.size for w in jax.tree.leaves(nnx.state(model, nnx.Param))
    )


def test_torch_steps_train(torch_rivals):
    rng = np.random.default_rng(0)
    batch = Examples(rng.standard_normal((8, 8, 8, 1), np.float32), np.arange(8))
    options = {"sigma": 1e-3, "rho": 1e-3, "learning_rate": 0.01, "momentum": 0.9}
    _, calls = torch_rivals.steps("ConvNet", batch, "cpu", **options)
    assert calls.keys() == TORCH_STEPS
    for name, call in calls.items():
        losses = [call() for _ in range(20)]
        assert losses[-1] < losses[0], name
