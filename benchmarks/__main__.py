"""The command line: `python -m benchmarks --help`.

Everything but the standard library is imported late, so that a missing package gives one clear line.
"""

import _thread
import argparse
import importlib
import json
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from benchmarks import arguments, table
from benchmarks.files import UserError, output_folder, read_file, write_files


class Benchmark(NamedTuple):
    """A command of the module that has its name.

    Attributes:
        help: What it measures.
        devices: How many devices a CPU is to be split into; None leaves that to the user.
    """

    help: str
    devices: int | None = None


METHODS = ("sgd", "sam", "wp-sgd", "nso")
BENCHMARKS = {
    "step-cost": Benchmark("times of whole training steps, beside plain ones, SAM and PyTorch"),
    "memory": Benchmark("memory that the averaged gradient takes beyond a plain one"),
    "communication": Benchmark("bytes that devices exchange in a training step", devices=8),
    "variance": Benchmark("variance of the averaged gradient, at equal cost", devices=8),
    "curvature": Benchmark(
        "how curved the loss of a saved network is: trace, eigenvalues, spectrum, layers, noise"
    ),
    "curvature-peers": Benchmark(
        "what a trace and the top eigenvalues cost to a given true error, beside PyHessian and curvlinops"
    ),
    "matrix-sensing": Benchmark("a low-rank matrix from few measurements: the problem of the paper"),
    "rivals": Benchmark("what SAM, its family and penalties cost, in gradients and memory"),
    "robustness": Benchmark("accuracy under attack, after training with input penalties or NSO"),
}
RESULTS = Path(__file__).parent / "results"
PUBLISHED = {
    "results.json": "demo.json",
    "training.png": "demo-training.png",
    "surface.png": "demo-surface.png",
    "sgd.safetensors": "demo-sgd.safetensors",
    "nso.safetensors": "demo-nso.safetensors",
}
# Those of the README, and the modules that make them from the results.
TABLES = {
    "demo": "table",
    "matrix-sensing": "matrix_sensing",
    "rivals": "rivals",
    "robustness": "robustness",
}
README = Path(__file__).parent.parent / "README.md"


def main(words: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        words: Those of the command line, by default.

    Returns:
        The exit code: 0, 2 after a mistake of the user's, 130 after Ctrl-C.
    """
    words = sys.argv[1:] if words is None else words
    command = words[0] if words else ""
    try:
        options = _parser(command).parse_args(words)
        options.run(options)
    except UserError as error:
        print(f"python -m benchmarks {command}: {error}", file=sys.stderr)
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


def _benchmark(options: argparse.Namespace) -> None:
    with output_folder(options.out):
        from benchmarks import report  # noqa: PLC0415

        files = report.measure(options.module, options.command, options)
        write_files({options.out / name: content for name, content in files.items()})
    print(f"{options.out}: {', '.join(files)}")


def _load(name: str) -> Any:
    """A benchmark's module, imported with as many devices as it needs: JAX reads the flag only once."""
    # Threads of NumPy's would wait for cores that those of XLA and PyTorch keep busy.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    flag, flags = "--xla_force_host_platform_device_count", os.environ.get("XLA_FLAGS", "")
    if (devices := BENCHMARKS[name].devices) and flag not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}={devices}".strip()
    try:
        return importlib.import_module(f"benchmarks.{name.replace('-', '_')}")
    except ImportError as error:
        raise _missing_package(error) from error


def _publish(options: argparse.Namespace) -> None:
    contents = {RESULTS / new: read_file(options.out / old) for old, new in PUBLISHED.items()}
    write_files(contents | {README: _readme_with({"demo": contents[RESULTS / "demo.json"]})})


def _readme(_: argparse.Namespace) -> None:
    write_files({README: _readme_with({})})


def _readme_with(fresh: dict[str, bytes]) -> str:
    """The README with tables of the results, some of which are not in their files yet."""
    text = read_file(README).decode()
    for name, module in TABLES.items():
        results = json.loads(fresh.get(name) or read_file(RESULTS / f"{name}.json"))
        made = importlib.import_module(f"benchmarks.{module}").markdown(results)
        text = table.replace_in(text, f"{name}-table", made)
    return text


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


def _parser(command: str) -> argparse.ArgumentParser:
    """The parser; of the benchmarks only the one that is called is imported, for its options."""
    parser = _Parser(prog="python -m benchmarks", description="What nso_jax claims, reproducible.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    defaults = argparse.ArgumentDefaultsHelpFormatter

    demo = commands.add_parser(
        "demo", help="four methods on small digits, in minutes", formatter_class=defaults
    )
    demo.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="what to compare")
    demo.add_argument("--seeds", type=arguments.count, default=5, help="trainings of each method")
    demo.add_argument(
        "--steps",
        type=arguments.count,
        default=1200,
        help="steps of two gradient evaluations (sgd: twice as many of one)",
    )
    demo.add_argument(
        "--wrong-labels", type=arguments.share, default=0.2, help="share of the training labels made wrong"
    )
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="output folder")
    demo.set_defaults(run=_demo)

    for name, benchmark in BENCHMARKS.items():
        measure = commands.add_parser(name, help=benchmark.help, formatter_class=defaults)
        if name == command:
            module = _load(name)
            module.add_options(measure)
            measure.set_defaults(run=_benchmark, module=module)
        measure.add_argument("--out", type=Path, default=RESULTS, help="output folder")

    publish = commands.add_parser(
        "publish", help="copies a demo's output to benchmarks/results and README.md"
    )
    publish.add_argument("--out", type=Path, default=Path("runs/demo"), help="the demo's output folder")
    publish.set_defaults(run=_publish)

    readme = commands.add_parser("readme", help="writes the tables of benchmarks/results to README.md")
    readme.set_defaults(run=_readme)
    return parser


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
