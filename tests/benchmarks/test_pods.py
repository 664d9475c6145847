"""The decoder, by identities, and the study of pods on eight simulated devices with a tiny one."""

import functools
import importlib.metadata
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.progress import Progress

from benchmarks import __main__ as cli
from benchmarks import compilers, decoder, pods
from benchmarks.decoder import Batch

TINY = decoder.Size(layers=2, width=32, heads=4, kv_heads=2, hidden=64, vocabulary=64)
EXAMPLES, LENGTH = 8, 16
STEPS = ("plain", "nso", "one-sided-parts")


@pytest.fixture(autouse=True)
def strict():
    """Instead of the fixture for the library's own tests: optax's moments need standard promotion."""


@pytest.fixture(scope="module")
def params():
    return decoder.init(jax.random.key(0), TINY)


@pytest.fixture(scope="module")
def batch():
    return Batch(*jax.random.randint(jax.random.key(1), (2, EXAMPLES, LENGTH), 0, TINY.vocabulary))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("160M", 162_417_408),
        ("1.3B", 1_345_423_360),
        ("7B", 6_738_415_616),
        ("34B", 33_743_970_304),
        ("70B", 68_976_648_192),
    ],
)
def test_sizes_are_the_published_ones(name, count):
    shapes = jax.eval_shape(lambda: decoder.init(jax.random.key(0), decoder.SIZES[name]))
    assert sum(w.size for w in jax.tree.leaves(shapes)) == count


def test_without_a_head_all_tokens_are_as_likely(params, batch):
    value = decoder.loss(params | {"head": jnp.zeros_like(params["head"])}, batch, size=TINY)
    assert float(value) == pytest.approx(np.log(TINY.vocabulary), rel=1e-6)


@pytest.mark.parametrize("place", [0, LENGTH - 1])
def test_a_token_is_predicted_from_those_before_it_alone(params, batch, place):
    """The price of another target at a place: whether it depends on what is read later."""

    def price(inputs):
        other = batch.targets.at[:, place].add(1) % TINY.vocabulary
        losses = [
            decoder.loss(params, Batch(inputs, y), size=TINY, dtype=jnp.float32)
            for y in (batch.targets, other)
        ]
        return float(losses[1] - losses[0])

    changed = batch.inputs.at[:, 1:].add(1) % TINY.vocabulary
    same = price(changed) == pytest.approx(price(batch.inputs), rel=1e-3)
    assert same == (place == 0)


def test_turned_queries_and_keys_know_their_distance_alone():
    query, key = jax.random.normal(jax.random.key(0), (2, 8))
    turned = [decoder._rotated(jnp.broadcast_to(x, (1, LENGTH, 1, 8)))[0, :, 0] for x in (query, key)]
    products = turned[0] @ turned[1].T
    for distance in range(LENGTH):
        np.testing.assert_allclose(jnp.diagonal(products, distance), products[0, distance], atol=1e-5)
    np.testing.assert_allclose(products[0, 0], query @ key, rtol=1e-5)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("tensor", [1, 2])
def test_sharded_and_whole_params_give_one_gradient(params, batch, tensor):
    mesh = _mesh(jax.devices()[:8], tensor)
    specs = decoder.partition(params, "data", "tensor")
    placed = jax.tree.map(lambda w, spec: jax.device_put(w, jax.NamedSharding(mesh, spec)), params, specs)
    assert {w.sharding.num_devices for w in jax.tree.leaves(placed)} == {8}
    split = jax.NamedSharding(mesh, jax.P("data"))
    loss = functools.partial(decoder.loss, size=TINY, dtype=jnp.float32)
    whole = jax.jit(jax.value_and_grad(loss))(params, batch)
    sharded = jax.jit(jax.value_and_grad(functools.partial(loss, sharding=split)))(
        placed, jax.device_put(batch, split)
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), sharded, whole)


def _mesh(devices, tensor):
    auto = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((8 // tensor, tensor), ("data", "tensor"), axis_types=auto, devices=devices)


@pytest.fixture
def here(monkeypatch):
    """The compiler of this machine in place of the TPU's."""
    cases = {
        "160M": pods.Case("tiny", "v5e:2x4", sharded=False, methods=STEPS),
        "70B": pods.Case("tiny", "v5e:2x4", tensor=2, methods=STEPS),
    }
    monkeypatch.setattr(compilers, "tpu", lambda _: jax.devices()[:8])
    monkeypatch.setattr(
        compilers, "cost", lambda _: compilers.Cost(1.0, 1.0)
    )  # CPUs have loops without a count
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0")
    monkeypatch.setattr(pods, "CASES", cases)
    monkeypatch.setattr(pods, "LENGTH", LENGTH)
    monkeypatch.setitem(decoder.SIZES, "tiny", TINY)


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_steps_of_a_tiny_decoder_are_compiled_and_told(here, tmp_path, monkeypatch):
    monkeypatch.setattr(pods, "_fits", lambda case, *_: case.examples <= 8)
    options = pods.Options(cases=tuple(pods.CASES), largest=("160M",), work=tmp_path)
    with Progress(disable=True) as progress:
        results = json.loads(json.dumps(pods.run(options, progress), allow_nan=False))
        assert progress.finished
    whole, sharded = results["cases"].values()
    assert whole["largest"] == dict.fromkeys(pods.SEARCHED, 8)
    weights = sum(
        w.size for w in jax.tree.leaves(jax.eval_shape(lambda: decoder.init(jax.random.key(0), TINY)))
    )
    assert [case["param_bytes_per_chip"] for case in (whole, sharded)] == [4 * weights, 4 * weights / 8]
    by_step = {step["step"]: step for step in whole["steps"]}
    # One mean in the end, of the gradient and the loss in float32.
    for step in STEPS:
        sent = by_step[step]["collectives"]
        assert {kind: each["bytes"] for kind, each in sent.items()} == {"all-reduce": 4 * (weights + 1)}
    rows = pods.rows(results)
    assert [row[1] for row in rows] == [
        pods.METHODS[s].label for case in pods.CASES.values() for s in case.methods
    ]
    assert all(len(row) == len(pods.HEADERS) for row in rows)
    assert "no time is measured" in pods.caption(results)
    assert "8 by NSO, k = 4" in pods.caption(results)
    assert pods.plot(results).startswith(b"\x89PNG")


def test_the_largest_batch_is_found_by_doubling(monkeypatch):
    case = pods.CASES["7B"]._replace(examples=4)
    for limit, found in ((4, 4), (20, 16)):
        monkeypatch.setattr(pods, "_fits", lambda case, *_, limit=limit: case.examples <= limit)
        assert pods._largest(case, pods.METHODS["nso"], 0.0) == {"examples": found}


def test_what_is_missing_is_told(monkeypatch, capsys, tmp_path):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(pods.importlib.metadata, "version", version)
    monkeypatch.setattr("benchmarks.report.environment", dict)
    assert cli.main(["pods", "--out", str(tmp_path)]) == 2
    assert "pip install 'jax[tpu]'" in capsys.readouterr().err
