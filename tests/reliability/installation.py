"""The package as strangers get it: a wheel in an environment of its own, without the repository."""

import contextlib
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.kit import timing
from benchmarks.kit.files import ROOT, UserError, write_into
from benchmarks.kit.timing import Ratio
from benchmarks.tasks import data
from tests.reliability.outcome import Advance, Outcome

IMPORT_LIMIT = 1.5  # over the time that `import optax` takes

# What the core dependencies are enough for.
CORE = """
import sys, jax, jax.numpy as jnp, optax
import nso_jax
assert nso_jax.__file__.startswith(sys.prefix), nso_jax.__file__
loss, w, key = lambda w, _=None: jnp.sum(w**4), jnp.ones(3), jax.random.key(0)
value, grads = jax.jit(nso_jax.value_and_grad(loss, sigma=0.1))(key, w)
optimizer = nso_jax.nso(optax.adam(0.1), 0.1, key=key)
optimizer.update(grads, optimizer.init(w), w, grad_fn=lambda w, i: jax.grad(loss)(w))
nso_jax.sharpness.sam(loss, rho=0.1)(key, w)
nso_jax.penalties.hessian_trace(key, loss, w)
assert nso_jax.curvature.trace(key, nso_jax.curvature.hessian(loss, w, ())).value > 0
"""
NO_FLAX = "ImportError: nso_jax.nnx needs flax: pip install 'nso-jax[flax]'\n"
NO_BENCHMARKS = "of the 'benchmarks' extra: in the checkout, pip install -e '.[benchmarks]'\n"

# Sources of data, the last part of which names the files that a command writes.
HOSTILE = (
    "..",
    "../..",
    "/",
    "../outside",
    "folder/../../outside",
    "~/outside",
    ".hidden",
    "hf://datasets/..",
    "hf://datasets/../../outside/",
    "hf://datasets/owner/..%2foutside",
    "line\nbreak",
    "back\\slash",
)


@contextlib.contextmanager
def clean_environment() -> Iterator[tuple[Path, Path]]:
    """A wheel of the repository, and the Python of a fresh environment with nothing but it installed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _run(
            Path(sys.executable),
            "-m",
            "pip",
            "wheel",
            "--no-deps",
            "--wheel-dir",
            name,
            str(ROOT),
            check=True,
        )
        (wheel,) = folder.glob("nso_jax-*.whl")
        venv.create(folder / "env", with_pip=True)
        python = folder / "env" / "bin" / "python"
        _run(python, "-m", "pip", "install", str(wheel), check=True)
        yield wheel, python


def wheel(wheel: Path, python: Path, advance: Advance = lambda _: None) -> Outcome:
    """The row of a wheel's installation: each check is a trial.

    Args:
        wheel: As `clean_environment` gives it, like what follows.
        python: That of the environment.
        advance: Called with 1 after each check.
    """
    checks: dict[str, Callable[[], bool]] = {
        "it holds the package alone": lambda: _holds_the_package(wheel),
        "its dependencies agree": lambda: _run(python, "-m", "pip", "check").returncode == 0,
        "all but NNX works with them": lambda: _run(python, "-c", CORE).returncode == 0,
        "Flax is asked for": lambda: _run(python, "-c", "import nso_jax.nnx").stderr.endswith(NO_FLAX),
        "so is the extra of the benchmarks": lambda: _asks_for_the_extra(python),
    }
    failed = []
    for name, check in checks.items():
        if not check():
            failed.append(name)
        advance(1)
    note = f"not so: {', '.join(failed)}" if failed else ", ".join(checks)
    return Outcome(
        "wheel in a clean environment, without the repository", len(checks), len(checks) - len(failed), note
    )


def imports(python: Path, repetitions: int, advance: Advance = lambda _: None) -> Outcome:
    """The row of the time that an import takes.

    Args:
        python: That of an environment with the package.
        repetitions: How often to import, in turn with optax.
        advance: Called with 1 after each import.
    """
    calls = {
        name: lambda name=name: _run(python, "-c", f"import {name}", check=True)
        for name in ("optax", "nso_jax")
    }
    seconds = timing.interleaved(calls, repetitions, lambda: advance(1))
    ratio = timing.ratios(seconds, {"import": Ratio("nso_jax", 1, "optax")})["import"]
    return Outcome(
        "import nso_jax beside import optax",
        repetitions,
        repetitions if ratio["median"] < IMPORT_LIMIT else 0,
        f"takes {ratio['median']:.2f} times as long, a median, where {IMPORT_LIMIT:g} is allowed",
    )


def paths(advance: Advance = lambda _: None) -> Outcome:
    """The row of data sources whose names lead out of the output folder."""
    survived = 0
    for source in HOSTILE:
        with tempfile.TemporaryDirectory() as name:
            out = Path(name) / "out"
            out.mkdir()
            with contextlib.suppress(UserError):
                write_into(out, {f"images-{data.name(source)}.json": "{}"})
            written = {path for path in Path(name).rglob("*") if path.is_file()}
            survived += written == set(out.glob("images-*.json"))
        advance(1)
    return Outcome(
        "data sources named to leave the output folder",
        len(HOSTILE),
        survived,
        "files are written into the output folder, or there is a line that says why not",
    )


def _holds_the_package(wheel: Path) -> bool:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    stem = "-".join(wheel.name.split("-")[:2])
    return "nso_jax/py.typed" in names and all(
        name.startswith(("nso_jax/", f"{stem}.dist-info/")) for name in names
    )


def _asks_for_the_extra(python: Path) -> bool:
    done = _run(python, "-m", "benchmarks", "demo", cwd=ROOT)
    return done.returncode == 2 and done.stderr.endswith(NO_BENCHMARKS) and done.stderr.count("\n") == 1


def _run(
    python: Path, *words: str, check: bool = False, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs Python elsewhere than in the repository, whose package it would import."""
    return subprocess.run(  # noqa: S603  # a command of ours
        [python, *words], cwd=cwd or python.parent, check=check, capture_output=True, text=True
    )
