"""What the benchmarks' tests share, for those that need several devices."""

from tests.benchmarks.conftest import strict

__all__ = ["strict"]
