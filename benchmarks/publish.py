"""What is published of the studies' results: files in benchmarks/results, tables in README.md and docs.

A table stands where `<!-- images-digits-table -->` marks it, by the name of its results. `-figures-table` is
that of all figures, where a study has a shorter one for readers too; `images-digits-front-table` is what the
study's `markdown_front` makes; those of `summary`, `fronts` and `recipes` are of many results.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import registry
from benchmarks.kit import tables
from benchmarks.kit.files import RESULTS, ROOT, UserError, read_file, write_files

PAGES = (ROOT / "README.md", *sorted(path for path in ROOT.glob("docs/*/*.md") if path.parts[-2] != "_build"))
NAMES = tuple(sorted(path.stem for path in RESULTS.glob("*.json")))
DRAWN = tuple(name for name in NAMES if name != "demo")  # `publish` copies the demo's pictures


def publish(out: Path = Path("runs/demo-full")) -> None:
    """Copies what a command wrote to benchmarks/results and pages.

    Args:
        out: The command's output folder: a full demo's, or one with results of other commands.
    """
    files = [path for path in sorted(out.glob("*.*")) if registry.study_of(path.stem)]
    contents = {path.name: read_file(path) for path in files if path.suffix in {".json", ".png"}}
    contents = contents or registry.module("demo").published(out)
    fresh = {Path(name).stem: content for name, content in contents.items() if name.endswith(".json")}
    write_files({**{RESULTS / name: content for name, content in contents.items()}, **_pages_with(fresh)})


def pictures(names: tuple[str, ...] = DRAWN) -> None:
    """Draws the pictures of benchmarks/results anew.

    Args:
        names: Of the figures; all but the demo's by default, whose pictures `publish` copies.
    """
    from benchmarks.kit import report  # noqa: PLC0415

    for name in names:
        if name not in NAMES:
            raise UserError(f"argument --names {name}: expected some of {', '.join(NAMES)}")
        results = json.loads(read_file(RESULTS / f"{name}.json"))
        drawn = report.pictures(registry.module(name), name, results)
        write_files({RESULTS / file: picture for file, picture in drawn.items()})


def write_tables() -> None:
    """Writes the tables of benchmarks/results to README and docs."""
    write_files(_pages_with({}))


def _pages_with(fresh: dict[str, bytes]) -> dict[Path, bytes | str]:
    """The pages with tables of the results, some of which are not in their files yet."""

    @functools.cache  # many tables are of the same results
    def results(name: str) -> dict[str, Any]:
        return json.loads(fresh.get(name) or read_file(RESULTS / f"{name}.json"))

    pages: dict[Path, bytes | str] = {}
    for page in PAGES:
        text = read_file(page).decode()
        for name in tables.marked(text):
            text = tables.replace_in(text, f"{name}-table", _markdown(name, results, {*NAMES, *fresh}))
        pages[page] = text
    return pages


def _markdown(name: str, results: Callable[[str], dict[str, Any]], known: set[str]) -> str:
    """The table of a mark's name, one of the results that are known."""
    if name == "summary":
        from benchmarks.quality import summary  # noqa: PLC0415

        return summary.markdown({task: results(task) for task in summary.TASKS})
    if name in {"fronts", "recipes"}:
        from benchmarks.quality import fronts, recipes, summary  # noqa: PLC0415

        titles = {task: row.task for task, row in summary.TASKS.items() if fronts.has_front(results(task))}
        table = fronts.summary if name == "fronts" else recipes.markdown
        return table({task: results(task) for task in titles}, titles)
    if name == "confirmed":
        from benchmarks.quality import confirm  # noqa: PLC0415

        return confirm.all_tasks([results(of) for of in sorted(known) if registry.study_of(of) == "confirm"])
    of = name.removesuffix("-figures").removesuffix("-front")
    if of not in known:
        raise UserError(f"<!-- {name}-table -->: expected one of {', '.join(sorted(known))}")
    study = registry.module(of)
    if name.endswith("-front"):
        return str(study.markdown_front(results(of)))
    shorter = None if of != name else getattr(study, "markdown", None)
    return (shorter or functools.partial(tables.markdown, study))(results(of))
