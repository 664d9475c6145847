"""The study of pods, on eight simulated devices with a tiny decoder."""

import importlib.metadata

from benchmarks import __main__ as cli
from benchmarks.cost import pods


def test_the_largest_batch_is_found_by_doubling(monkeypatch):
    case = pods.CASES["7B"]._replace(examples=4)
    for limit, found in ((4, 4), (20, 16)):
        monkeypatch.setattr(pods, "_fits", lambda case, *_, limit=limit: case.examples <= limit)
        assert pods._largest(case, pods.METHODS["nso"], 0.0) == {"examples": found}


def test_what_is_missing_is_told(monkeypatch, capsys, tmp_path):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(pods.importlib.metadata, "version", version)
    monkeypatch.setattr("benchmarks.kit.report.environment", dict)
    assert cli.main(["pods", "--out", str(tmp_path)]) == 2
    assert "pip install 'jax[tpu]'" in capsys.readouterr().err
