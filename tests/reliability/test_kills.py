"""Trainings that are killed, or whose files are damaged, end with the same bits as without that."""

import functools
import random
import sys
import warnings

import pytest

from tests.reliability import kills, outcome


@pytest.fixture(autouse=True)
def strict():
    """Instead of the fixture for the library's own tests: optax's schedules need standard promotion."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "row",
    [
        functools.partial(kills.harness, 1),
        functools.partial(kills.script, 1),
        kills.damaged,
        functools.partial(kills.damaged_lines, 1),
    ],
    ids=["harness", "script", "damaged", "lines"],
)
def test_nothing_is_lost(row):
    done = []
    made = row(done.append)
    assert isinstance(made, outcome.Outcome)
    assert made.survived == made.tried == sum(done) >= 1


@pytest.mark.slow
def test_a_program_that_does_not_go_on_is_found_out(tmp_path):
    """One that counts its starts: after a kill it ends with another number."""
    path = tmp_path / "counts.py"
    path.write_text(
        "import pathlib, sys, time\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "folder.mkdir(exist_ok=True)\n"
        "with (folder / 'starts').open('a') as file:\n"
        "    file.write('x')\n"
        "for step in range(3):\n"
        "    (folder / f'{step}.orbax-checkpoint-tmp').mkdir(exist_ok=True)\n"
        "    time.sleep(2)\n"
    )
    program = kills.Program("counts", (sys.executable, str(path)), _unused, _unused, "starts")
    row = kills._killed(program, 2, lambda _: None)
    assert (row.tried, row.survived) == (2, 0)
    assert "2 of the kills cut" in row.note


def _unused(_):
    raise NotImplementedError


@pytest.mark.slow
def test_a_program_that_fails_is_told():
    program = kills.Program("broken", (sys.executable, "-c", "1 / 0"), _unused, _unused, "")
    with pytest.raises(RuntimeError, match=r"broken failed:\n(.|\n)*ZeroDivisionError"):
        kills._killed(program, 1, lambda _: None)


@pytest.mark.parametrize(("told", "right"), [(False, False), (False, True), (True, False), (True, True)])
def test_damage_that_is_not_told_or_not_survived_is_found_out(told, right):
    def main(folder):
        folder.mkdir(exist_ok=True)
        state = folder / "state"
        if state.exists() and told:
            warnings.warn(f"{state} is damaged", stacklevel=1)
        (folder / "result").write_text("good" if right or not state.exists() else state.read_text())
        state.touch()

    program = kills.Program("writes", (), main, main, "result")
    with kills._stopped(program) as (folder, goes_on):
        assert goes_on((folder / "state").relative_to(folder), b"bad", "state is damaged") == (told and right)


def test_a_flip_changes_one_bit_and_a_cut_leaves_a_start():
    rng, content = random.Random(0), bytes(range(20))  # noqa: S311
    for _ in range(100):
        changed = kills._flipped(content, rng)
        assert sum((a ^ b).bit_count() for a, b in zip(content, changed, strict=True)) == 1
        short = kills._cut(content, rng)
        assert len(short) < len(content)
        assert content.startswith(short)
