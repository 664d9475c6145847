"""What every command reports."""

import pytest
from rich.console import Console

from benchmarks.kit import report


def test_the_time_left_follows_the_pace(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(report.time, "perf_counter", lambda: clock[0])
    with report.expected_progress(Console(quiet=True)) as shown:
        left = report.TimeLeft({"first": 30.0, "second": 60.0}, shown)
        assert str(left) == "about 90 s"
        left.advance(10.0)
        clock[0] = 30.0  # three times as slow
        assert left.seconds == pytest.approx(80 * (30 + 10) / (10 + 10))
        left.finish("first")
        clock[0] = 30.0 + report.PRIOR_SECONDS + 30.0
        assert left.seconds == pytest.approx(60 * 2)
        left.finish("second")
        assert left.seconds == 0
        assert str(left) == "about 5 s"
