"""Times are taken in turns, and compared within a turn."""

import functools
import importlib.util

import jax
import pytest

from benchmarks.kit import timing
from benchmarks.kit.timing import Ratio

HAS_TORCH = importlib.util.find_spec("torch") is not None


@pytest.mark.skipif(not HAS_TORCH, reason="needs torch")
def test_torch_is_used_where_it_is(monkeypatch):
    assert timing.torch_device() == ("cpu" if jax.default_backend() == "cpu" else "cuda")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert timing.torch_device() is None


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
