"""The command line: `python -m benchmarks --help`.

Everything but the standard library is imported late, so that a missing package gives one clear line.
"""

import _thread
import dataclasses
import functools
import importlib
import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import table
from benchmarks.files import RESULTS, ROOT, UserError, output_folder, read_file, write_files, write_into


class Command(NamedTuple):
    """A command, of the module that has its name.

    Attributes:
        help: What it does.
        devices: How many devices a CPU is to be split into; None leaves that to the user.
    """

    help: str
    devices: int | None = None


COMMANDS = {
    "demo": Command("four methods on small digits, in minutes"),
    "step-cost": Command("times of whole training steps, beside SAM and PyTorch"),
    "memory": Command("memory that the averaged gradient takes beyond a plain one"),
    "communication": Command("bytes that devices exchange in a training step", devices=8),
    "variance": Command("variance of the averaged gradient, at equal cost", devices=8),
    "curvature": Command("how curved the loss of a saved network is"),
    "curvature-peers": Command("curvature to a given error, beside PyHessian and curvlinops"),
    "matrix-sensing": Command("the paper's problem: a matrix from few measurements"),
    "images": Command("methods compared in fine-tuning on images, with few examples"),
    "text": Command("methods compared in fine-tuning a pretrained encoder"),
    "ablate": Command("what each choice in noise stability optimization is worth"),
    "rivals": Command("what SAM, its family and penalties cost"),
    "robustness": Command("accuracy under attack, after input penalties or NSO"),
    "precision": Command("what 16-bit numbers do to small noise and to training"),
    "reliability": Command("faults and odd inputs, and what is lost by them", devices=8),
    "publish": Command("copies a demo's output to benchmarks/results and the pages"),
    "tables": Command("writes the tables of benchmarks/results to README.md and docs"),
}
PUBLISHED = {
    "results.json": "demo.json",
    "training.png": "demo-training.png",
    "surface.png": "demo-surface.png",
    "sgd.safetensors": "demo-sgd.safetensors",
    "nso.safetensors": "demo-nso.safetensors",
}
# The tables of README.md and docs, and the modules that make them from the results of the same name. A table
# stands where `<!-- demo-table -->` marks it; `<!-- precision-figures-table -->` is the table of all figures,
# where a module has a shorter one for readers too, and `<!-- summary-table -->` is made of many results.
TABLES = {
    "ablate": "ablate",
    "communication": "communication",
    "curvature": "curvature",
    "curvature-peers": "curvature_peers",
    "demo": "demo",
    "images-cifar10": "images",
    "images-digits": "images",
    "images-mnist": "images",
    "images-mnist-scratch": "images",
    "matrix-sensing": "matrix_sensing",
    "memory": "memory",
    "precision": "precision",
    "reliability": "reliability",
    "rivals": "rivals",
    "robustness": "robustness",
    "robustness-equal-steps": "robustness",
    "step-cost": "step_cost",
    "text-sst2": "text",
    "variance": "variance",
}
PAGES = (ROOT / "README.md", *sorted(path for path in ROOT.glob("docs/*/*.md") if path.parts[-2] != "_build"))


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
    commands = "\n".join(f"  {name:15}  {command.help}" for name, command in COMMANDS.items())
    return (
        "usage: python -m benchmarks COMMAND [--help] [OPTIONS]\n\n"
        f"What nso_jax claims, reproducible.\n\ncommands:\n{commands}"
    )


def _run(name: str, prog: str, words: Sequence[str]) -> None:
    if name not in COMMANDS:
        raise UserError(f"expected a command, one of {', '.join(COMMANDS)}")
    try:
        import tyro  # noqa: PLC0415

        if name in FUNCTIONS:
            tyro.cli(FUNCTIONS[name], prog=prog, args=words)
        else:
            module = _load(name)
            _measure(name, module, tyro.cli(module.Options, prog=prog, args=words))
    except ImportError as error:
        raise _missing_package(error) from error


def _measure(name: str, module: Any, options: Any) -> None:
    """Runs the demo or a benchmark, and writes its files."""
    for field in dataclasses.fields(options):
        if getattr(options, field.name) == () != field.default:
            raise UserError(f"argument --{field.name}: expected at least one value")
    folder = getattr(options, "folder", options.out)
    with output_folder(folder):
        if name == "demo":
            files = module.demo(options)
        else:
            from benchmarks import report  # noqa: PLC0415

            files = report.measure(module, name, options)
        write_into(folder, files)
        if hasattr(options, "work"):
            from benchmarks import journal  # noqa: PLC0415

            journal.finish(options.work)
    print(f"{folder}: {', '.join(files)}")


def _load(name: str) -> Any:
    """A command's module, imported with as many devices as it needs: JAX reads the flag only once."""
    # Threads of NumPy's would wait for cores that those of XLA and PyTorch keep busy.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    flag, flags = "--xla_force_host_platform_device_count", os.environ.get("XLA_FLAGS", "")
    if (devices := COMMANDS[name].devices) and flag not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}={devices}".strip()
    return importlib.import_module(f"benchmarks.{name.replace('-', '_')}")


def _publish(out: Path = Path("runs/demo")) -> None:
    """Copies a demo's output to benchmarks/results, and its table to README.md and docs.

    Args:
        out: The demo's output folder.
    """
    contents = {RESULTS / new: read_file(out / old) for old, new in PUBLISHED.items()}
    write_files({**contents, **_pages_with({"demo": contents[RESULTS / "demo.json"]})})


def _tables() -> None:
    """Writes the tables of benchmarks/results to README.md and docs."""
    write_files(_pages_with({}))


FUNCTIONS = {"publish": _publish, "tables": _tables}


def _pages_with(fresh: dict[str, bytes]) -> dict[Path, bytes | str]:
    """The pages with tables of the results, some of which are not in their files yet."""

    def results(name: str) -> dict[str, Any]:
        return json.loads(fresh.get(name) or read_file(RESULTS / f"{name}.json"))

    pages: dict[Path, bytes | str] = {}
    for page in PAGES:
        text = read_file(page).decode()
        for name in table.marked(text):
            text = table.replace_in(text, f"{name}-table", _markdown(name, results))
        pages[page] = text
    return pages


def _markdown(name: str, results: Callable[[str], dict[str, Any]]) -> str:
    """The table of a mark's name."""
    if name == "summary":
        from benchmarks import summary  # noqa: PLC0415

        return summary.markdown({task: results(task) for task in summary.TASKS})
    of = name.removesuffix("-figures")
    if of not in TABLES:
        raise UserError(f"<!-- {name}-table -->: expected one of {', '.join(TABLES)}")
    tabular = importlib.import_module(f"benchmarks.{TABLES[of]}")
    # Some have another table for readers than the one of all figures.
    shorter = None if of != name else getattr(tabular, "markdown", None)
    return (shorter or functools.partial(table.markdown, tabular))(results(of))


def _missing_package(error: ImportError) -> Exception:
    package = (error.name or "").partition(".")[0]
    if package in {"benchmarks", "nso_jax"}:
        return error
    return UserError(
        f"needs {package or error}, of the 'benchmarks' extra: pip install 'nso-jax[benchmarks]'"
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
