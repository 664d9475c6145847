"""What the commands do with files: checked before the work starts, written whole or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]  # of the repository
RESULTS = ROOT / "benchmarks" / "results"


class UserError(Exception):
    """A mistake that the command line answers with one line and no traceback."""


@contextlib.contextmanager
def output_folder(folder: Path) -> Iterator[None]:
    """Makes a folder and checks that it can be written to; takes it away again if nothing came of it.

    Args:
        folder: Where the body of the `with` statement writes its files.

    Yields:
        Nothing, with the folder in place.

    Raises:
        UserError: The folder cannot be made, or no file can be written into it.
    """
    made: list[Path] = []
    try:
        try:
            made = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            # Permission bits say little (root, read-only file systems), so a file is really written.
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"test")
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror}") from error
        yield
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # not empty: it stays
                path.rmdir()


def write_files(contents: Mapping[Path, bytes | str]) -> None:
    """Writes files under temporary names and renames them once all are complete.

    Args:
        contents: What goes into each file.

    Raises:
        UserError: A file cannot be written; then none of them is changed.
    """
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}") for path in contents}
    try:
        for path, content in contents.items():
            temporary[path].write_bytes(content.encode() if isinstance(content, str) else content)
        for path in contents:
            temporary[path].replace(path)
    except OSError as error:
        raise UserError(f"cannot write {error.filename}: {error.strerror}") from error
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def write_into(folder: Path, contents: Mapping[str, bytes | str]) -> None:
    """Writes files into a folder, and nowhere else.

    Args:
        folder: Where.
        contents: What goes into each file.

    Raises:
        UserError: A name leads elsewhere, or a file cannot be written; then none of them is changed.
    """
    for name in contents:
        if name != Path(name).name or name == "..":
            raise UserError(f"cannot write {name!r}: expected the plain name of a file")
    write_files({folder / name: content for name, content in contents.items()})


def read_file(path: Path) -> bytes:
    """The content of a file.

    Args:
        path: The file.

    Raises:
        UserError: It cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
