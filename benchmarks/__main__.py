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
        minutes: That it takes on two CPU cores, by default.
        devices: How many devices a CPU is to be split into; None leaves that to the user.
        compiles: Whether it compiles for chips that are not there, so that JAX itself is to stay on the CPU.
    """

    help: str
    minutes: int
    devices: int | None = None
    compiles: bool = False


MEASUREMENTS = {
    "demo": Command("four methods on small digits, with wrong labels", 1),
    "step-cost": Command("times of training steps, beside SAM and PyTorch", 10),
    "memory": Command("memory of the averaged gradient beyond a plain one", 5),
    "communication": Command("bytes that devices exchange in a training step", 1, devices=8),
    "pods": Command("training steps on TPU pods, by the TPU's compiler", 40, compiles=True),
    "variance": Command("variance of the averaged gradient, at equal cost", 15, devices=8),
    "curvature": Command("how curved the loss of a saved network is", 1),
    "curvature-peers": Command("curvature, beside PyHessian and curvlinops", 5),
    "matrix-sensing": Command("the paper's problem: a matrix from few measurements", 10),
    "images": Command("methods compared in fine-tuning on few images", 45),
    "text": Command("methods compared in fine-tuning on sentences", 40),
    "ablate": Command("what each choice in weight noise is worth", 20),
    "rivals": Command("what SAM, its family and penalties cost", 10),
    "robustness": Command("accuracy under attack, after input penalties or NSO", 40),
    "precision": Command("what 16-bit numbers do to small noise and to training", 1),
    "reliability": Command("faults and odd inputs, and what is lost by them", 28, devices=8),
}
MAINTENANCE = {
    "publish": Command("copies what a command wrote to benchmarks/results and pages", 0),
    "pictures": Command("draws the pictures of benchmarks/results anew", 0),
    "tables": Command("writes the tables of benchmarks/results to README.md and docs", 0),
}
COMMANDS = MEASUREMENTS | MAINTENANCE
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
    "pods": "pods",
    "precision": "precision",
    "reliability": "reliability",
    "rivals": "rivals",
    "robustness": "robustness",
    "robustness-equal-steps": "robustness",
    "step-cost": "step_cost",
    "text-sst2": "text",
    "variance": "variance",
}
DRAWN = tuple(name for name in TABLES if name != "demo")  # `publish` copies the demo's pictures
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
    measurements = "\n".join(
        f"  {name:15}  {each.minutes:2} min  {each.help}" for name, each in MEASUREMENTS.items()
    )
    maintenance = "\n".join(f"  {name:15}  {each.help}" for name, each in MAINTENANCE.items())
    return (
        "usage: python -m benchmarks COMMAND [--help] [OPTIONS]\n\n"
        "What nso_jax claims, reproducible. Figures, tables and pictures go to the folder\n"
        "runs, or where --out says. Minutes are rough, and of two CPU cores.\n\n"
        f"commands:\n{measurements}\n\nfor maintainers:\n{maintenance}"
    )


def _run(name: str, prog: str, words: Sequence[str]) -> None:
    if name not in COMMANDS:
        raise UserError(f"expected a command, one of {', '.join(COMMANDS)}")
    try:
        import tyro  # noqa: PLC0415

        if name in FUNCTIONS:
            tyro.cli(FUNCTIONS[name], prog=prog, args=words)
        else:
            if name == "demo" and not {"-h", "--help"} & set(words):
                print("Loading JAX and Flax ...", flush=True)  # takes seconds
            module = _load(name)
            first = module.Options.__doc__.partition("\n")[0]
            description = f"{first} Takes about {_minutes(name)} on two CPU cores."
            _measure(name, module, tyro.cli(module.Options, prog=prog, args=words, description=description))
    except ImportError as error:
        raise _missing_package(error) from error


def _minutes(name: str) -> str:
    count = COMMANDS[name].minutes
    return f"{count} minutes" if count > 1 else "a minute"


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
    if COMMANDS[name].compiles:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    return importlib.import_module(f"benchmarks.{name.replace('-', '_')}")


def _publish(out: Path = Path("runs/demo-full")) -> None:
    """Copies what a command wrote to benchmarks/results, and its tables to README.md and docs.

    Args:
        out: The command's output folder: a full demo's, or one with results of other commands.
    """
    names = [name for name in TABLES if (out / f"{name}.json").exists()]
    files = {f"{name}{suffix}": f"{name}{suffix}" for name in names for suffix in (".json", ".png")}
    if names:
        contents = {RESULTS / new: read_file(out / old) for old, new in files.items() if (out / old).exists()}
    else:
        contents = {RESULTS / new: read_file(out / old) for old, new in PUBLISHED.items()}
        names = ["demo"]
        _check_full(out, json.loads(contents[RESULTS / "demo.json"]))
    write_files({**contents, **_pages_with({name: contents[RESULTS / f"{name}.json"] for name in names})})


def _check_full(out: Path, results: dict[str, Any]) -> None:
    from benchmarks import demo  # noqa: PLC0415

    size = tuple(results["settings"][name] for name in demo.Size._fields)
    if size != demo.FULL:
        raise UserError(f"{out} has a quick demo: `python -m benchmarks demo --full` makes what is published")


def _tables() -> None:
    """Writes the tables of benchmarks/results to README.md and docs."""
    write_files(_pages_with({}))


def _pictures(names: tuple[str, ...] = DRAWN) -> None:
    """Draws the pictures of benchmarks/results anew from its figures.

    Args:
        names: Of the figures; all but the demo's by default, whose pictures `publish` copies.
    """
    from benchmarks import report  # noqa: PLC0415

    for name in names:
        if name not in TABLES:
            raise UserError(f"argument --names {name}: expected some of {', '.join(TABLES)}")
        module = importlib.import_module(f"benchmarks.{TABLES[name]}")
        drawn = report.pictures(module, name, json.loads(read_file(RESULTS / f"{name}.json")))
        write_files({RESULTS / file: picture for file, picture in drawn.items()})


FUNCTIONS: dict[str, Callable[..., None]] = {"publish": _publish, "pictures": _pictures, "tables": _tables}


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
