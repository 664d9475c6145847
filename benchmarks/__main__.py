"""The command line: `python -m benchmarks --help`.

Everything but the standard library is imported late, so that a missing package gives one clear line.
"""

import _thread
import argparse
import json
import math
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from benchmarks import table
from benchmarks.files import UserError, output_folder, read_file, write_files

METHODS = ("sgd", "sam", "wp-sgd", "nso")
RESULTS = Path(__file__).parent / "results"
PUBLISHED = {
    "results.json": "demo.json",
    "training.png": "demo-training.png",
    "surface.png": "demo-surface.png",
}
README = Path(__file__).parent.parent / "README.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: Those of the command line, by default.

    Returns:
        The exit code: 0, 2 after a mistake of the user's, 130 after Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except UserError as error:
        print(f"python -m benchmarks {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _demo(options: argparse.Namespace) -> None:
    with output_folder(options.out):
        try:
            from benchmarks import demo  # noqa: PLC0415
        except ImportError as error:
            raise _missing_package(error) from error
        methods = tuple(dict.fromkeys(options.methods))
        settings = demo.Settings(methods, options.seeds, options.steps, wrong_labels=options.wrong_labels)
        files = demo.demo(settings)
        write_files({options.out / name: content for name, content in files.items()})
    print(f"{options.out}: {', '.join(files)}")


def _publish(options: argparse.Namespace) -> None:
    contents = {RESULTS / new: read_file(options.out / old) for old, new in PUBLISHED.items()}
    write_files(contents | {README: _readme_with(contents[RESULTS / "demo.json"])})


def _readme(_: argparse.Namespace) -> None:
    write_files({README: _readme_with(read_file(RESULTS / "demo.json"))})


def _readme_with(results: bytes) -> str:
    return table.replace_in(read_file(README).decode(), json.loads(results))


def _missing_package(error: ImportError) -> Exception:
    package = (error.name or "").partition(".")[0]
    if package in {"benchmarks", "nso_jax"}:
        return error
    return UserError(
        f"needs {package or error}, of the 'benchmarks' extra: pip install 'nso-jax[benchmarks]'"
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage."""
        self.exit(2, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m benchmarks", description="What nso_jax claims, reproducible.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    defaults = argparse.ArgumentDefaultsHelpFormatter

    demo = commands.add_parser(
        "demo", help="four methods on small digits, in minutes", formatter_class=defaults
    )
    demo.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="what to compare")
    demo.add_argument("--seeds", type=_count, default=5, help="trainings of each method")
    demo.add_argument(
        "--steps",
        type=_count,
        default=1200,
        help="steps of two gradient evaluations (sgd: twice as many of one)",
    )
    demo.add_argument(
        "--wrong-labels", type=_share, default=0.2, help="share of the training labels made wrong"
    )
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="output folder")
    demo.set_defaults(run=_demo)

    publish = commands.add_parser(
        "publish", help="copies a demo's output to benchmarks/results and README.md"
    )
    publish.add_argument("--out", type=Path, default=Path("runs/demo"), help="the demo's output folder")
    publish.set_defaults(run=_publish)

    readme = commands.add_parser(
        "readme", help="writes the table of benchmarks/results/demo.json to README.md"
    )
    readme.set_defaults(run=_readme)
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}")
    return share


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
