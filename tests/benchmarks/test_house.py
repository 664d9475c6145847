"""The map of the house: imports run downward, studies do not import one another, and the picture shows it."""

import itertools
import runpy
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
HOUSE = runpy.run_path(str(ROOT / "docs" / "house.py"))
FLOORS = [floor for floor in HOUSE["FLOORS"] if floor != ("benchmarks",)]
STUDIES = ("benchmarks/cost", "benchmarks/quality", "benchmarks/curvature")


@pytest.mark.parametrize("floor", range(len(FLOORS)))
def test_a_room_imports_only_what_is_below_it(floor):
    below = set(itertools.chain.from_iterable(FLOORS[:floor]))
    for room in FLOORS[floor]:
        assert set(HOUSE["uses"]()[room]) <= below, room


def test_the_floors_are_those_of_the_house():
    assert [len(floor) for floor in FLOORS] == [1, 1, 1, 1, 3, 1]
    assert STUDIES in FLOORS
    packages = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "benchmarks").rglob("*.py")}
    assert packages == {room for floor in HOUSE["FLOORS"] for room in floor if room.startswith("benchmarks")}


@pytest.mark.parametrize(
    "text", ["import benchmarks.cost.memory", "from benchmarks import cost", "x = 'benchmarks.cost.memory'"]
)
def test_every_form_of_use_is_seen(text, tmp_path):
    (tmp_path / "module.py").write_text(f"def function():\n    {text}\n")
    assert {HOUSE["_room_of"](name) for name in HOUSE["_named"](tmp_path / "module.py")} == {
        "benchmarks/cost"
    }


def test_the_librarys_own_tests_do_without_the_benchmarks():
    """They are in the sdist, where there are none."""
    for path in itertools.chain(
        *(ROOT.glob(f"{folder}/*.py") for folder in ("tests", "tests/curvature", "tests/devices"))
    ):
        rooms = {HOUSE["_room_of"](name) for name in HOUSE["_named"](path)}
        assert rooms <= {"nso_jax", None}, path


def test_the_picture_is_of_this_house():
    with Image.open(HOUSE["PICTURE"]) as picture:
        assert picture.text["Description"] == HOUSE["described"](), "run python docs/house.py"
