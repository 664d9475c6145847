"""The study of pods, on eight simulated devices with a tiny decoder."""

import importlib.metadata
import json

import jax
import pytest
from rich.progress import Progress

from benchmarks.cost import compilers, pods
from benchmarks.tasks import decoder

TINY = decoder.Size(layers=2, width=32, heads=4, kv_heads=2, hidden=64, vocabulary=64)


LENGTH = 16


STEPS = ("plain", "nso", "one-sided-parts")


@pytest.fixture
def here(monkeypatch):
    """The compiler of this machine in place of the TPU's."""
    cases = {
        "160M": pods.Case("tiny", "v5e:2x4", sharded=False, methods=STEPS),
        "70B": pods.Case("tiny", "v5e:2x4", tensor=2, methods=STEPS),
    }
    monkeypatch.setattr(compilers, "tpu", lambda _: jax.devices())
    monkeypatch.setattr(
        compilers, "cost", lambda _: compilers.Cost(1.0, 1.0)
    )  # CPUs have loops without a count
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0")
    monkeypatch.setattr(pods, "CASES", cases)
    monkeypatch.setattr(pods, "LENGTH", LENGTH)
    monkeypatch.setitem(decoder.SIZES, "tiny", TINY)


@pytest.mark.slow
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
