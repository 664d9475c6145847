"""`curvature-peers` with a small network, from the command line to the files; and what it is made of."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.curvature import libraries, peers, races, trained_networks
from benchmarks.curvature.trained_networks import Case
from benchmarks.kit import timing
from benchmarks.tasks import models
from benchmarks.tasks.data import Examples
from nso_jax import curvature

KEYS = {"library", "method", "products", "extrapolated", "repetitions", "seconds"}


@pytest.fixture
def one_thread():
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two that wait for each other take long where other tests run too
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny(monkeypatch):
    small = functools.partial(models.MLP, (64, 8, 10))
    monkeypatch.setattr(
        trained_networks,
        "NETWORKS",
        {"mlp": Case("MLP", small, ("xtrace", "hutch++"), seeds=2, probes=20, repetitions=2)},
    )
    monkeypatch.setattr(trained_networks, "NUM_EXAMPLES", 64)
    monkeypatch.setattr(trained_networks, "BATCH_SIZE", 16)
    monkeypatch.setattr(races, "NUMBERS", (12, 24, 120))
    monkeypatch.setattr(races, "TRACE_TARGET", 0.05)
    monkeypatch.setattr(races, "TOLERANCES", (1e-1, 1e-5))


def check(results, num_rivals):
    """What holds of every run, whatever the libraries."""
    assert set(results) == {"versions", "machine", "settings", "networks"}
    network = results["networks"]["mlp"]
    assert network["weights"] == 64 * 8 + 8 + 8 * 10 + 10
    assert (network["seeds"], network["repetitions"]) == (3, 1)
    assert max(network["reference"]["relative_residuals"]) < 1e-4
    for record in network["trace"] + network["eigenvalues"]:
        assert record.keys() >= KEYS
        assert record["repetitions"] == 1
        assert record["seconds"]["median"] > 0
    for record in network["trace"]:
        if record["extrapolated"]:
            wanted = math.ceil((record["relative_deviation"] / races.TRACE_TARGET) ** 2)
            assert record["products"] == pytest.approx(wanted, rel=1e-4)
        else:
            assert record["curve"][-1]["relative_error"] <= races.TRACE_TARGET
            assert record["products"] == record["curve"][-1]["products"]
    for record in network["eigenvalues"]:
        assert record["rungs"][-1]["largest_error"] <= races.EIGENVALUE_TARGET
    table = peers.rows(results)
    assert len(table) == 4 + num_rivals
    assert all(len(row) == len(peers.HEADERS) for row in table)
    ours = [row for row in table if row[2] in {"nso_jax, XTrace", "nso_jax, Lanczos"}]
    assert [row[5] for row in ours] == ["1", "1"]
    assert "-" not in {row[6] for row in ours}
    return network


@pytest.mark.slow
def test_alone_it_measures_ours(tiny, measured, monkeypatch, capsys):
    monkeypatch.setattr(timing, "torch_device", lambda: None)
    network = check(measured("curvature-peers", "--seeds", "3", "--repetitions", "1"), num_rivals=0)
    assert network["ratios"] == {"trace": {}, "eigenvalues": {}}
    assert "pyhessian_defaults" not in network
    shown = capsys.readouterr().out
    assert "other libraries: none" in " ".join(shown.split())


@pytest.mark.slow
def test_beside_the_rivals(tiny, measured, one_thread):
    in_torch = pytest.importorskip("benchmarks.curvature.torch_peers")
    if in_torch.PYHESSIAN is None or in_torch.CURVLINOPS is None:
        pytest.skip("needs PyHessian and curvlinops")
    network = check(measured("curvature-peers", "--seeds", "3", "--repetitions", "1"), num_rivals=6)
    assert network["pyhessian_defaults"]["eigenvalue_error"] < 1
    for ratios in network["ratios"].values():
        assert ratios.keys() == {"PyHessian", "curvlinops"}
    for task, ratios in network["ratios"].items():
        times = {(each["library"], each["method"]): each["times_ours"] for each in network[task]}
        for name, key in libraries.RATIOS[task].items():
            assert ratios[name] == pytest.approx(1 / times[key], rel=1e-4)


def problem(model):
    model.eval()
    rng = np.random.default_rng(0)
    images = [jnp.asarray(rng.uniform(size=(6, 8, 8, 1)), jnp.float32) for _ in range(2)]
    batches = [Examples(each, jnp.arange(6) + i) for i, each in enumerate(images)]
    return trained_networks.Problem(model, *models.pure_loss(model), batches)


def networks():
    """Small ones; batch normalization with statistics of its own, so that they count."""
    convnet = models.ConvNet(dropout=0.0, rngs=nnx.Rngs(0))
    convnet(np.random.default_rng(1).uniform(size=(20, 8, 8, 1)).astype(np.float32))
    return [problem(convnet), problem(models.MLP((64, 16, 12, 10), rngs=nnx.Rngs(0)))]


@pytest.mark.parametrize("index", [0, 1])
def test_torch_has_the_same_network(index, one_thread):
    in_torch = pytest.importorskip("benchmarks.curvature.torch_peers")
    ours = networks()[index]
    same = in_torch.problem(ours.model, ours.batches, "cpu")
    libraries.check_agreement(ours, same)
    same.model[-1].weight.data[0] += 0.1
    with pytest.raises(RuntimeError, match="is another one"):
        libraries.check_agreement(ours, same)


def test_exact_trace_is_that_of_the_hessian():
    ours = problem(models.MLP((64, 4, 10), rngs=nnx.Rngs(0)))
    leaves, structure = jax.tree.flatten(ours.params)
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]

    def loss(vector):
        parts = [part.reshape(leaf.shape) for part, leaf in zip(jnp.split(vector, ends), leaves, strict=True)]
        params = jax.tree.unflatten(structure, parts)
        return sum(ours.fun(params, batch) for batch in ours.batches) / len(ours.batches)

    vector = jnp.concatenate([leaf.ravel() for leaf in leaves])
    wanted = jnp.trace(jax.hessian(loss)(vector))
    assert trained_networks.exact_trace(ours.model, ours.batches) == pytest.approx(float(wanted), rel=1e-4)


def test_exact_trace_with_convolutions_and_statistics():
    ours = networks()[0]
    h = curvature.hessian(ours.fun, ours.params, ours.batches)
    estimate = curvature.trace(jax.random.key(0), h, method="xtrace", num_products=240)
    exact = trained_networks.exact_trace(ours.model, ours.batches)
    assert abs(estimate.value - exact) < 5 * estimate.standard_error
    assert estimate.standard_error < 0.08 * exact


def test_smallest_number_that_is_precise_enough():
    curve = [{"products": n, "relative_error": error} for n, error in ((8, 0.1), (16, 0.01), (24, 0.001))]
    assert races.smallest_number(curve) == 16
    assert races.smallest_number(curve[:1]) is None


def test_extrapolated_number():
    """The error of a mean falls with the root of the number."""
    assert races.extrapolated_number(0.4) == 1600
    assert races.extrapolated_number(0.005) == 1


def test_seeds_end_when_the_rest_cannot_help():
    assert not races.is_lost([0.019], num_seeds=4)
    assert races.is_lost([0.021], num_seeds=4)
    assert not races.is_lost([], num_seeds=1)


def test_methods_are_tried_until_they_are_precise_enough(monkeypatch):
    monkeypatch.setattr(races, "NUMBERS", (4, 400, 40_000))
    called = []

    def estimate(seed, number):
        called.append((seed, number))
        return 10 * (1 + (-1) ** seed / math.sqrt(number))

    advanced = []
    curves = races._curves({("a", "b"): estimate}, 10, 6, lambda: advanced.append(1))
    points = curves["a", "b"]
    assert [point["products"] for point in points] == [4, 400, 40_000]
    assert [point["seeds"] for point in points] == [3, 3, 6]
    assert [point["relative_error"] for point in points] == pytest.approx([0.5, 0.05, 0.005])
    assert [number for seed, number in called if seed == 5] == [40_000]
    assert len(advanced) == 3


def test_tolerances_are_tried_until_every_seed_meets_one(monkeypatch):
    monkeypatch.setattr(races, "TOLERANCES", (1e-2, 1e-4, 1e-6))
    called = []

    def eigenvalues(seed, tol):
        called.append((seed, tol))
        return [1.0, 2.0 + (2 * tol if seed == 1 else 0)], 7

    rungs = races._rungs(eigenvalues, [2.0, 1.0])
    assert called == [(0, 1e-2), (1, 1e-2), (0, 1e-4), (1, 1e-4), (2, 1e-4)]
    assert [rung["largest_error"] for rung in rungs] == pytest.approx([1e-2, 1e-4])


def test_no_repetition_begins_when_the_time_is_over(monkeypatch):
    times = iter([10.0, 10.0, 25.0, 10.0, 25.0, 10.0])
    monkeypatch.setattr(races, "_timed", lambda call: (None, call()))
    calls = {("a", "slow"): lambda: 31.0, ("b", "fast"): lambda: next(times)}
    seconds = races._turns(calls, 3, lambda: None)
    assert seconds == {("a", "slow"): [31.0], ("b", "fast"): [10.0, 10.0, 25.0]}


def test_a_target_that_is_never_met_leaves_gaps():
    record = races._record(("PyHessian", "power iteration"), products=None)
    records = {("nso_jax", "Lanczos"): record | {"seconds": {"median": 2.0}}, ("PyHessian", "power"): record}
    assert races.compared("eigenvalues", records) == {}
    assert peers._cells(record) == ["PyHessian, power iteration", "-", "-", "-", "-"]
