"""What memory the compiler says."""

import functools

import jax.numpy as jnp
import pytest

from benchmarks.cost import memory
from benchmarks.tasks import models


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
