"""Draws docs/_static/house.png, the map of the house, from its modules' imports: `python docs/house.py`."""

import ast
import json
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "_static" / "house.png"
# From the ground up: a room may use what is below it, and nothing beside it.
FLOORS = (
    ("nso_jax",),
    ("benchmarks/kit",),
    ("benchmarks/tasks",),
    ("benchmarks/training",),
    ("benchmarks/cost", "benchmarks/quality", "benchmarks/curvature"),
    ("tests/reliability",),
    ("benchmarks",),
)
WIDTH, GAP, LINE = 10.0, 0.8, 0.14  # inches


def modules() -> dict[str, list[str]]:
    """The modules of each room, by their paths in it."""
    return {
        room: sorted(
            path.relative_to(ROOT / room).with_suffix("").as_posix()
            for path in (ROOT / room).glob("*.py" if room == "benchmarks" else "**/*.py")
            if not path.name.startswith(("__init__", "test_"))
        )
        for floor in FLOORS
        for room in floor
    }


def uses() -> dict[str, list[str]]:
    """The rooms that the modules of each room import, or name as the registry names the studies."""
    found = {}
    for room, names in modules().items():
        named = {module for name in names for module in _named(ROOT / room / f"{name}.py")}
        found[room] = sorted({_room_of(module) for module in named} - {room, None})
    return found


def _named(path: Path) -> set[str]:
    """What a module imports, `a.b.c` for `from a.b import c`, and what dotted names it has as text."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and re.fullmatch(r"(benchmarks|tests)(\.\w+)+", str(node.value)):
            found.add(node.value)
    return found


def _room_of(module: str) -> str | None:
    """The innermost room on the path to a module."""
    path = module.replace(".", "/")
    rooms = [room for floor in FLOORS for room in floor if path == room or path.startswith(f"{room}/")]
    return max(rooms, key=len, default=None)


def arrows() -> list[tuple[str, str]]:
    """Each room with those that it uses, but for what one of these uses already."""
    used = uses()

    def below(room: str) -> set[str]:
        return set(used[room]).union(*(below(other) for other in used[room]))

    return [
        (room, other)
        for room, others in used.items()
        for other in others
        if not any(other in below(between) for between in others)
    ]


def described() -> str:
    """What the picture shows, which it carries with it as text."""
    return json.dumps({"modules": modules(), "arrows": arrows()})


def main() -> None:
    """Draws the rooms floor by floor, with their modules."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    names = {
        room: textwrap.fill("   ".join(modules()[room]), 110 if len(floor) == 1 else 42)
        for floor in FLOORS
        for room in floor
    }
    heights = [GAP + LINE * max(names[room].count("\n") for room in floor) for floor in FLOORS]
    figure = Figure(figsize=(WIDTH, sum(heights)), dpi=110)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, sum(heights)))
    axes.axis("off")
    box = {"boxstyle": "round,pad=0.6", "facecolor": "#eef4fa", "edgecolor": "#0072B2"}
    rooms = {}
    for number, floor in enumerate(FLOORS):
        y = sum(heights[:number]) + heights[number] / 2
        for i, room in enumerate(floor):
            title = rf"$\bf{{{room}}}$".replace("_", r"\_")
            text = f"{title}\n{names[room]}"
            place = WIDTH * (i + 0.5) / len(floor), y
            rooms[room] = axes.text(*place, text, ha="center", va="center", fontsize=8, bbox=box)
    figure.draw_without_rendering()  # places the boxes
    for room, other in arrows():
        ends = [rooms[name].get_position() for name in (other, room)]
        boxes = {"patchA": rooms[room].get_bbox_patch(), "patchB": rooms[other].get_bbox_patch()}
        look = {"arrowstyle": "-|>", "color": "#707070", "shrinkA": 0, "shrinkB": 2}
        axes.annotate("", *ends, arrowprops=look | boxes, zorder=0)
    figure.savefig(PICTURE, metadata={"Description": described()})


if __name__ == "__main__":
    main()
