"""`step-cost` and `memory` with small networks, from the command line to the files; and what they are made of."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import __main__ as cli
from benchmarks import registry
from benchmarks.cost import jax_steps, memory, step_cost
from benchmarks.kit import timing
from benchmarks.kit.timing import Ratio
from benchmarks.tasks import models
from benchmarks.tasks.data import Examples

HAS_TORCH = importlib.util.find_spec("torch") is not None
TORCH_STEPS = {"torch-plain", "torch-sam", "torch-nso"}


@pytest.fixture
def tiny_steps(monkeypatch):
    small = functools.partial(models.MLP, (64, 10))
    cases = {
        "mlp-64": jax_steps.Case("MLP, batch 4", small, (4, 8, 8, 1), without=("nso-k4", "nso-signs-k4"))
    }
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
    left_out = TORCH_STEPS | {"nso-k4", "nso-signs-k4"}
    gradients = {"plain-gradient", "nso-gradient", "nso-signs-gradient"}
    assert case["milliseconds"].keys() == (step_cost.LABELS.keys() - left_out) | gradients
    assert case["ratios"].keys() >= {"one-sided / plain", "one-sided / plain, both in parts"}
    assert case["over_plain_step"]["plain"] == {"median": 1, "low": 1, "high": 1}
    for times in (case["milliseconds"], case["ratios"], results["noise"]["ratios"]):
        for value in times.values():
            assert 0 < value["low"] <= value["median"] <= value["high"]
    assert step_cost.rows(results) == [
        ["MLP, batch 4", *_cells(case, list(step_cost.SHOWN)[:4]), "-", "-"],
    ]
    shown = capsys.readouterr().out
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


@pytest.mark.slow
def test_memory_reports_what_the_compiler_says(measured, monkeypatch):
    case = memory.Case("MLP", functools.partial(models.MLP, (64, 10)), (2, 64), jnp.float32)
    monkeypatch.setattr(memory, "CASES", {"mlp": case})
    results = measured("memory", "--cases", "mlp", "--samples", "2")
    assert set(results) == {"versions", "machine", "settings", "cases"}
    figures = results["cases"]["mlp"]
    assert figures["param_bytes"] == 4 * (64 * 10 + 10)
    draws = [(row["sampler"], row["num_samples"], row["chunk_size"]) for row in figures["averaged"]]
    assert draws == [(name, *sizes) for name in memory.SAMPLERS for sizes in ((2, 1), (2, 2))]
    for row in figures["averaged"]:
        extra = (row["temp_bytes"] - figures["plain_temp_bytes"]) / figures["param_bytes"]
        assert row["extra_over_params"] == pytest.approx(extra, rel=1e-5)
    table = memory.rows(results)
    assert [row[1:3] for row in table] == [[n, d] for n in memory.SAMPLERS for d in ("in turn", "at once")]
    for row in table:
        assert len(row) == len(memory.HEADERS)
        assert [cell != "-" for cell in row[3:]] == [k == 2 for k in memory.SAMPLES]


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
    assert sum(p.numel() for p in rival.parameters()) == _num_weights(model)


def test_torch_steps_train(torch_rivals):
    rng = np.random.default_rng(0)
    batch = Examples(rng.standard_normal((8, 8, 8, 1), np.float32), np.arange(8))
    options = {"sigma": 1e-3, "rho": 1e-3, "learning_rate": 0.01, "momentum": 0.9}
    _, calls = torch_rivals.steps("ConvNet", batch, "cpu", **options)
    assert calls.keys() == TORCH_STEPS
    for name, call in calls.items():
        losses = [call() for _ in range(20)]
        assert losses[-1] < losses[0], name


@pytest.mark.skipif(not HAS_TORCH, reason="needs torch")
def test_torch_is_used_where_it_is(monkeypatch):
    assert timing.torch_device() == ("cpu" if jax.default_backend() == "cpu" else "cuda")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert timing.torch_device() is None


def _num_weights(model):
    return sum(w.size for w in jax.tree.leaves(nnx.state(model, nnx.Param)))


def test_sizes_of_the_networks():
    assert _num_weights(models.MLP(rngs=nnx.Rngs(0))) == 669_706
    assert _num_weights(models.Transformer(rngs=nnx.Rngs(0))) == 5_014_026


def test_transformer_sees_all_tokens_and_their_places():
    model = models.Transformer(1, 16, 2, 16, vocabulary=10, length=8, rngs=nnx.Rngs(0))
    tokens = np.arange(8)[None]
    logits = model(tokens)
    assert logits.shape == (1, 10)
    assert not np.allclose(model(tokens[:, ::-1]), logits, atol=1e-6)
    assert not np.allclose(model(np.where(tokens == 3, 9, tokens)), logits, atol=1e-6)


def test_pure_loss_is_the_models_and_leaves_it_alone():
    model = models.ConvNet(dropout=0.0, rngs=nnx.Rngs(0))
    batch = Examples(jnp.ones((4, 8, 8, 1)), jnp.arange(4))
    statistics = jax.tree.map(jnp.copy, nnx.state(model, nnx.BatchStat))
    loss, params = models.pure_loss(model)
    value, grads = jax.jit(jax.value_and_grad(loss))(params, batch)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model, nnx.BatchStat), statistics)
    np.testing.assert_allclose(value, models.cross_entropy(model, batch), rtol=1e-6)


def test_times_are_taken_in_turns(monkeypatch):
    monkeypatch.setattr(timing, "LEAST_SECONDS", 0.0)
    called, measured = [], []
    calls = {name: functools.partial(called.append, name) for name in "abc"}
    seconds = timing.interleaved(calls, 3, lambda: measured.append(1))
    rounds = [called[i : i + 3] for i in range(6, 15, 3)]
    assert [sorted(names) for names in rounds] == [["a", "b", "c"]] * 3
    assert len(measured) == 3 + 9
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys("abc", 3)


def test_ratios_are_of_the_same_repetition():
    seconds = {"a": [1.0, 20.0, 3.0], "b": [1.0, 10.0, 1.0]}
    wanted = {"a/2b": Ratio("a", 2, "b"), "a/c": Ratio("a", 1, "c")}
    assert timing.ratios(seconds, wanted) == {"a/2b": {"median": 1.0, "low": 0.75, "high": 1.25}}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", "--xla_force_host_platform_device_count=8"),
        (
            "--xla_cpu_enable_fast_math=false",
            "--xla_cpu_enable_fast_math=false --xla_force_host_platform_device_count=8",
        ),
        ("--xla_force_host_platform_device_count=2", "--xla_force_host_platform_device_count=2"),
    ],
)
def test_devices_are_simulated_before_jax_is_imported(flags, expected, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", flags)
    imported = []
    monkeypatch.setattr(registry.importlib, "import_module", imported.append)
    registry.load("memory")
    assert cli.os.environ["XLA_FLAGS"] == flags
    registry.load("communication")
    assert cli.os.environ["XLA_FLAGS"] == expected
    assert imported == ["benchmarks.cost.memory", "benchmarks.cost.communication"]
