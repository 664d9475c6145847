"""The published results: their tables in the pages, and their pictures, drawn from the figures alone."""

import io
import json
import shutil

import pytest
from PIL import Image

from benchmarks import __main__ as cli
from benchmarks import publish, registry
from benchmarks.kit import files, report, tables
from benchmarks.kit.files import RESULTS
from benchmarks.quality import confirm, fronts

SUFFIXES = {"ablate": ("-forms",), "variance": ("-accuracy",)}


def read(name):
    return (RESULTS / f"{name}.json").read_text()


def drawn(name):
    return report.pictures(registry.module(name), name, json.loads(read(name)))


@pytest.mark.parametrize("name", publish.DRAWN)
def test_published_figures_are_drawn(name):
    """Of the size of those that lie beside them, or else these are of before: python -m benchmarks pictures."""
    for file, picture in drawn(name).items():
        fresh, published = (Image.open(io.BytesIO(x)) for x in (picture, (RESULTS / file).read_bytes()))
        assert fresh.size == published.size, file
        assert len(picture) < 150_000
        corners = {
            fresh.convert("RGB").getpixel((x, y)) for x in (0, fresh.width - 1) for y in (0, fresh.height - 1)
        }
        assert corners == {(255, 255, 255)}  # so that it can be read on a dark page


def test_no_published_picture_is_of_nothing():
    plotted = [name for name in publish.DRAWN if hasattr(registry.module(name), "plot")]
    made = {f"{name}{suffix}.png" for name in plotted for suffix in ("", *SUFFIXES.get(name, ()))}
    made |= {
        f"{name}-front.png"
        for name in publish.DRAWN
        if hasattr(registry.module(name), "plot_front") and fronts.has_front(json.loads(read(name)))
    }
    found = {path.name for path in RESULTS.glob("*.png") if not path.name.startswith("demo-")}
    assert found == made - {"reliability.png"}


def test_pictures_are_written_beside_their_figures(tmp_path, monkeypatch):
    (tmp_path / "precision.json").write_bytes((RESULTS / "precision.json").read_bytes())
    monkeypatch.setattr(publish, "RESULTS", tmp_path)
    assert cli.main(["pictures", "--names", "precision"]) == 0
    assert (tmp_path / "precision.png").read_bytes().startswith(b"\x89PNG")


def test_unknown_figures_are_refused(capsys):
    assert cli.main(["pictures", "--names", "prescision"]) == 2
    assert "argument --names prescision: expected some of ablate, " in capsys.readouterr().err


def test_publish_copies_results_of_other_commands(tmp_path, monkeypatch):
    out, results, page = tmp_path / "out", tmp_path / "results", tmp_path / "page.md"
    out.mkdir(), results.mkdir()
    for name in ("precision.json", "precision.png"):
        shutil.copy(RESULTS / name, out)
    (out / "precision.md").write_text("")
    page.write_text("<!-- precision-table --><!-- /precision-table -->\n")
    monkeypatch.setattr(publish, "RESULTS", results)
    monkeypatch.setattr(publish, "PAGES", (page,))
    monkeypatch.setattr(publish, "NAMES", ())  # so that these are the first of their name
    assert cli.main(["publish", "--out", str(out)]) == 0
    assert {path.name for path in results.iterdir()} == {"precision.json", "precision.png"}
    assert "| weights in | sigma 0.0001 |" in page.read_text()


def test_a_mark_of_no_results_is_refused(tmp_path, monkeypatch):
    (tmp_path / "page.md").write_text("<!-- demos-table --><!-- /demos-table -->")
    monkeypatch.setattr(publish, "PAGES", (tmp_path / "page.md",))
    with pytest.raises(files.UserError, match="demos-table -->: expected one of ablate, "):
        publish._pages_with({})


def test_the_pages_have_the_tables_of_the_published_results():
    pages = publish._pages_with({})
    for page, text in pages.items():
        assert page.read_text() == text, f"{page}: run python -m benchmarks tables"
    marked = {name for text in pages.values() for name in tables.marked(text)}
    in_one_table = {name for name in publish.NAMES if registry.study_of(name) == "confirm"}
    assert marked >= set(publish.NAMES) - in_one_table | {"summary", "confirmed"}
    (page,) = (text for text in pages.values() if "<!-- confirmed-table -->" in text)
    for name in in_one_table:
        assert " | ".join(confirm.rows(json.loads(read(name)))[0][1:]) in page
