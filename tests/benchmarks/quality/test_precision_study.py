"""`precision` from the command line to the files, and the figures that the README tells."""

import math
import re

import pytest

from benchmarks.quality import precision, rounding


def test_the_documented_shares_of_weights_that_do_not_move():
    """Within 4 standard errors of a share of so many weights."""
    shares = rounding.still()
    for sigma, share in (("0.0001", 0.6), ("0.001", 0.089)):
        error = math.sqrt(share * (1 - share) / rounding.NUM_WEIGHTS)
        assert shares["bfloat16"][sigma] == pytest.approx(share, abs=4 * error)
    assert max(shares["float32"].values()) < 1e-4


@pytest.mark.slow
def test_the_command_measures_every_mode_and_sigma(measured):
    results = measured("precision", "--seeds", "1", "--steps", "30", "--draws", "4")
    records = results["records"]
    assert len(records) == len(precision.rows(results)) == len(rounding.MODES) * len(precision.TRAINED_SIGMAS)
    for record in records:
        assert record["error"] < (3 if "bfloat16" in record["mode"] else 0.3)
        if record["sigma"]:
            still = record["sigma"] == 1e-3 and "16" in record["mode"]
            assert (record["still"] > 1) == still
    assert all(record["error"] < 1e-2 for record in records if record["mode"] == "float32")
    assert re.search(r"\| bfloat16 \| 60\.0 % \| [89]\.\d % \|", precision.markdown(results))  # by the draws
