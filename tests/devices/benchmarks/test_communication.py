"""What devices send, with tiny settings: the figures that are exact are tested."""

import json

import jax
import pytest
from rich.progress import Progress

from benchmarks.cost import communication
from tests.benchmarks.conftest import assert_shown


@pytest.fixture(scope="module")
def sent():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(communication, "WIDTHS", (64, 32, 10))
        patch.setattr(communication, "NUM_MICROBATCHES", 2)
        # The fixture that makes JAX strict comes after those of a module.
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
            return _run(communication, samples=(2,))


def _run(module, **options):
    with Progress(disable=True) as progress:
        results = module.run(module.Options(**options), progress)
        assert progress.finished
    return json.loads(json.dumps(results, allow_nan=False))


def test_a_step_sends_what_a_plain_one_does_unless_left_to_the_compiler(sent):
    relative = {(row["step"], row["num_samples"]): row["relative"] for row in sent["data_parallel"]}
    assert relative.pop((communication.JIT, 2)) == 4
    assert relative == {
        ("plain, jit", 0): 1,
        ("plain, shard_map", 0): 1,
        (communication.SHARD_MAP, 2): 1,
        (communication.PARALLEL, 2): 1,
    }
    assert sent["data_parallel"][-1]["num_microbatches"] == 2


def test_the_plain_step_sends_its_gradient_and_the_loss(sent):
    weights = 64 * 32 + 32 + 32 * 10 + 10
    assert sent["settings"]["weights"] == weights
    reduced = sent["data_parallel"][0]["by_kind"]["all-reduce"]
    assert (reduced["arrays"], reduced["bytes"]) == (5, 4 * (weights + 1))


def test_noise_for_sharded_params_adds_nothing_to_what_is_sent(sent):
    assert len(sent["sharded"]) == 6
    for row in sent["sharded"]:
        assert row["added_arrays"] == row["added_bytes"] == 0
        assert row["arrays"] > 0


def test_table_and_picture_show_the_figures(sent):
    assert_shown(communication, sent)
