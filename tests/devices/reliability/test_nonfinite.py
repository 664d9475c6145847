import pytest

from tests.reliability import nonfinite


@pytest.mark.slow
def test_no_fault_is_averaged_away_and_training_goes_on():
    advances = []
    outcome = nonfinite.nonfinite(1, advances.append)
    assert outcome.survived == outcome.tried == len(advances) == sum(advances) > 50
