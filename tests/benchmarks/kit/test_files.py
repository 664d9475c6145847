"""Files are written whole or not at all, and pages where they are marked."""

import pytest

from benchmarks.kit import files, tables


def test_files_are_written_all_or_none(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(files.UserError, match="cannot write"):
        files.write_files({tmp_path / "a": "new", tmp_path / "none" / "b": b"new"})
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"
    files.write_files({tmp_path / "a": "new"})
    assert (tmp_path / "a").read_text() == "new"


@pytest.mark.parametrize("page", ["# nso_jax\n", "<!-- demo-table -->\n", "<!-- /demo-table -->\n"])
def test_a_page_without_both_marks_is_refused(page):
    with pytest.raises(files.UserError, match="demo-table"):
        tables.replace_in(page, "demo-table", "")


@pytest.mark.parametrize("name", ["../x.json", "/x.json", "a/b.json", "..", "."])
def test_files_are_written_into_their_folder_or_not_at_all(name, tmp_path):
    with pytest.raises(files.UserError, match="expected the plain name of a file"):
        files.write_into(tmp_path / "out", {"good.json": "{}", name: "{}"})
    assert list(tmp_path.rglob("*")) == []
