"""The command line: `python -m benchmarks --help`.

Everything but the standard library is imported late, so that a missing package gives one clear line.
"""

import _thread
import dataclasses
import functools
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import publish, registry
from benchmarks.kit.files import UserError, output_folder, write_into
from benchmarks.registry import ROOMS, STUDIES

MAINTENANCE: dict[str, Callable[..., None]] = {
    "publish": publish.publish,
    "pictures": publish.pictures,
    "tables": publish.write_tables,
}


def main(words: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        words: Those of the command line, by default.

    Returns:
        The exit code: 0, 2 after a mistake of the user's, 130 after Ctrl-C.
    """
    name, *rest = (sys.argv[1:] if words is None else words) or [""]
    prog = f"python -m benchmarks {name}".strip()
    if name in {"-h", "--help"}:
        print(_help())
        return 0
    try:
        _run(name, prog, rest)
    except UserError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _help() -> str:
    text = (
        "usage: python -m benchmarks COMMAND [--help] [OPTIONS]\n\n"
        "What nso_jax claims, reproducible. Figures, tables and pictures go to the folder\n"
        "runs, or where --out says. Minutes are rough, and of two CPU cores.\n"
    )
    for title, room in ROOMS.items():
        text += f"\n{title}: {room.claim}\n"
        text += "".join(
            f"  {name:15}  {each.minutes:2} min  {each.help}\n" for name, each in room.studies.items()
        )
    helps = {name: (function.__doc__ or "").partition("\n")[0] for name, function in MAINTENANCE.items()}
    return f"{text}\nfor maintainers:\n" + "\n".join(f"  {name:15}  {text}" for name, text in helps.items())


def _run(name: str, prog: str, words: Sequence[str]) -> None:
    if name not in STUDIES.keys() | MAINTENANCE.keys():
        raise UserError(f"expected a command, one of {', '.join([*STUDIES, *MAINTENANCE])}")
    try:
        import tyro  # noqa: PLC0415

        if name in MAINTENANCE:
            tyro.cli(MAINTENANCE[name], prog=prog, args=words)
            return
        if not {"-h", "--help"} & set(words):
            print("Loading JAX and Flax ...", flush=True)  # takes seconds
        study = registry.load(name)
        first, minutes = study.Options.__doc__.partition("\n")[0], STUDIES[name].minutes
        duration = f"{minutes} minutes" if minutes > 1 else "a minute"
        description = f"{first} Takes about {duration} on two CPU cores."
        parse = functools.partial(tyro.cli, study.Options, prog=prog, description=description)
        if hasattr(study, "defaults"):
            first = parse(args=[word for word in words if word not in {"-h", "--help"}])
            parse = functools.partial(parse, default=study.defaults(first))
        _measure(name, study, parse(args=words))
    except ImportError as error:
        raise _missing_package(error) from error


def _measure(name: str, study: Any, options: Any) -> None:
    """Runs a study, and writes its files."""
    for field in dataclasses.fields(options):
        if getattr(options, field.name) == () != field.default:
            raise UserError(f"argument --{field.name}: expected at least one value")
    with output_folder(options.folder):
        from benchmarks.kit import journal, report  # noqa: PLC0415

        measure = getattr(study, "measure", functools.partial(report.measure, study, name))
        files = measure(options)
        write_into(options.folder, files)
        if hasattr(options, "work"):
            journal.finish(options.work)
    print(f"{options.folder}: {', '.join(files)}")


def _missing_package(error: ImportError) -> Exception:
    package = (error.name or "").partition(".")[0]
    if package in {"benchmarks", "nso_jax", "tests"}:
        return error
    return UserError(
        f"needs {package or error}, of the 'benchmarks' extra: "
        "in the checkout, pip install -e '.[benchmarks]'"
    )


def _interrupt_again(lost: Any) -> None:
    """Repeats a Ctrl-C that was lost in a callback of the garbage collector (JAX has one)."""
    if lost.exc_type is KeyboardInterrupt:
        threading.Timer(0.05, _thread.interrupt_main).start()
    else:
        sys.__unraisablehook__(lost)


if __name__ == "__main__":
    sys.unraisablehook = _interrupt_again
    code = main()
    if code == 130:
        # Compiled code that was cut short can crash the interpreter while it cleans up.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
