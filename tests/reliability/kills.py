"""Whether trainings that are killed, or whose files are damaged, end with the same bits as without that."""

import contextlib
import functools
import glob
import hashlib
import importlib.util
import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import optax
from flax import nnx

from benchmarks.kit.files import ROOT, write_files
from benchmarks.kit.journal import CHECKPOINTS, LINES, Journal, finish
from benchmarks.tasks import checkpoints, data
from benchmarks.tasks.models import MLP
from benchmarks.training import loop
from benchmarks.training.loop import Settings, Task
from benchmarks.training.methods import METHODS
from tests.reliability.outcome import Advance, Outcome

SCRIPT = ROOT / "examples" / "resume.py"
NAMES = ("adam", "nso")
GRADIENTS, POINTS = 300, 30
# Seconds at the most from the first checkpoint that a process begins to write to its end: about what it takes
# to write it, for one half of the kills, and time for some more, for the other.
DELAYS = (0.05, 1.0)


class Program(NamedTuple):
    """A training that goes on where it was stopped.

    Attributes:
        name: What it is called.
        words: Its command, before the folder.
        main: Does the same in this process.
        stop: Leaves in a folder what it may have left when it was stopped, with two checkpoints.
        result: The file in the folder that there is in the end.
    """

    name: str
    words: tuple[str, ...]
    main: Callable[[Path], None]
    stop: Callable[[Path], None]
    result: str

    def same(self, one: Path, other: Path) -> bool:
        """Whether it ended with the same bits in two folders."""
        return (one / self.result).read_bytes() == (other / self.result).read_bytes()


def train(folder: Path, advance: Advance = lambda _: None) -> None:
    """Trains a small network by two methods in the benchmarks' harness, with a checkpoint at each point.

    Args:
        folder: Where the figures are in the end, and what it takes to go on until then.
        advance: As in `training.train`.
    """
    journal = Journal(folder, {"gradients": GRADIENTS}, resume=True, pause=0)
    settings = Settings(GRADIENTS, 0.05, 1e-3, 0.5, num_points=POINTS)

    def measure(model: nnx.Module) -> dict[str, float]:
        return {"norm": float(optax.tree.norm(nnx.state(model, nnx.Param)))}

    def compute(name: str) -> dict[str, Any]:
        trained = loop.train(
            _task(), METHODS[name], settings, measure=measure, journal=journal, advance=advance
        )
        weights = hashlib.sha256(checkpoints.dump(trained.model)).hexdigest()
        return {"curve": trained.curve, "weights": weights}

    results = {name: journal.once(name, functools.partial(compute, name)) for name in NAMES}
    write_files({folder / HARNESS.result: json.dumps(results)})
    finish(folder)


def harness(times: int, advance: Advance = lambda _: None) -> Outcome:
    """Kills the training of `train`, in processes of its own.

    Args:
        times: How often.
        advance: Called with 1 after each kill.

    Returns:
        The kills, by SIGKILL at random moments after a process began to write a checkpoint: one after another
        in a run until it ends, and then in one more. All in a run were survived if it ended with the bits of
        a run without any, for any that was not would have changed these.
    """
    return _killed(HARNESS, times, advance)


def script(times: int, advance: Advance = lambda _: None) -> Outcome:
    """Kills `examples/resume.py`, as `harness` does.

    Args:
        times: How often.
        advance: Called with 1 after each kill.

    Returns:
        The kills, as of `harness`.
    """
    return _killed(_script(), times, advance)


def damaged(advance: Advance = lambda _: None) -> Outcome:
    """Damages the last checkpoint of `train` and of `examples/resume.py`.

    Each of its files is cut short at a random byte, and then, instead, has a random bit flipped.

    Args:
        advance: Called with 1 after each damage.

    Returns:
        The damages. Those were survived after which a warning named the checkpoint, and the run ended with
        the bits of one without any.
    """
    rng, survived = random.Random(0), []  # noqa: S311
    for program in (HARNESS, _script()):
        with _stopped(program) as (folder, goes_on):
            steps = [path for path in (folder / CHECKPOINTS).rglob("*") if path.name.isdecimal()]
            last = max(steps, key=lambda path: int(path.name)).relative_to(folder)
            files = sorted(path for path in (folder / last).rglob("*") if path.is_file())
            for file, damage in itertools.product(files, (_cut, _flipped)):
                content = damage(file.read_bytes(), rng)
                survived.append(goes_on(file.relative_to(folder), content, f"{last} is damaged"))
                advance(1)
    note = "the checkpoint is named, and with the one before it the run ends with the same bits"
    return Outcome(
        "file of a checkpoint cut short, or with a flipped bit", len(survived), sum(survived), note
    )


def damaged_lines(times: int, advance: Advance = lambda _: None) -> Outcome:
    """Flips bits of the benchmarks' `metrics.jsonl`.

    Args:
        times: How many, in as many lines after the first.
        advance: Called with 1 after each.

    Returns:
        The flips. Those were survived after which a warning named the line, and the run ended with the bits
        of one without any.
    """
    rng, survived = random.Random(0), []  # noqa: S311
    with _stopped(HARNESS) as (folder, goes_on):
        content = (folder / LINES).read_bytes().split(b"\n")
        for number in rng.sample(range(1, len(content) - 1), times):
            changed = [*content[:number], _flipped(content[number], rng), *content[number + 1 :]]
            told = f"{LINES}, line {number + 1} is damaged"
            survived.append(goes_on(Path(LINES), b"\n".join(changed), told))
            advance(1)
    note = "the line is named, and what it said is computed again with the same bits"
    return Outcome("flipped bit in a line of metrics.jsonl", len(survived), sum(survived), note)


@functools.cache
def _task() -> Task:
    examples = data.digits(0, 100).train
    batches = functools.partial(data.batches, examples, 20)
    return Task(lambda seed: MLP((64, 128, 10), rngs=nnx.Rngs(seed)), batches, len(examples.labels))


class _StopError(Exception):
    """As if the process had died."""


def _stop(folder: Path) -> None:
    done: list[float] = []

    def advance(count: float) -> None:
        done.append(count)
        if sum(done) > 1.95 * GRADIENTS:
            raise _StopError

    with contextlib.suppress(_StopError):
        train(folder, advance)


HARNESS = Program(
    "the benchmarks' harness", (sys.executable, "-m", "tests.reliability.kills"), train, _stop, "results.json"
)


@functools.cache
def _script() -> Program:
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def main(folder: Path) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            module.main(folder)

    # Its last checkpoints are there when it has ended too.
    return Program("examples/resume.py", (sys.executable, str(SCRIPT)), main, main, "weights.safetensors")


def _killed(program: Program, times: int, advance: Advance) -> Outcome:
    rng, tried, survived, writing = random.Random(0), 0, 0, 0  # noqa: S311
    with tempfile.TemporaryDirectory() as made:
        whole = Path(made) / "whole"
        _run(program, whole, 0, rng, advance)
        while tried < times:
            folder = Path(made) / str(tried)
            kills = _run(program, folder, times - tried, rng, advance)
            tried, writing = tried + len(kills), writing + sum(kills)
            survived += len(kills) * program.same(folder, whole)
    note = f"the run ends with the same bits; {writing} of the kills cut the writing of a checkpoint short"
    return Outcome(f"SIGKILL of {program.name}", tried, survived, note)


def _run(program: Program, folder: Path, most: int, rng: random.Random, advance: Advance) -> list[bool]:
    """Runs a program to its end, with kills; returns of each whether it cut a checkpoint's writing short."""
    command = [*program.words, str(folder)]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    options: dict[str, Any] = {"cwd": ROOT, "env": os.environ | {"PYTHONPATH": paths}, "text": True}
    options |= {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    kills: list[bool] = []
    while True:
        before = _unfinished(folder)
        with subprocess.Popen(command, **options) as process:  # noqa: S603
            while len(kills) < most and process.poll() is None:
                if _unfinished(folder) - before:
                    time.sleep(rng.choice(DELAYS) * rng.random())
                    process.kill()
                    break
                time.sleep(0.002)
            _, errors = process.communicate()
        if process.returncode == 0:
            return kills
        if process.returncode != -signal.SIGKILL:
            raise RuntimeError(f"{program.name} failed:\n{errors}")
        kills.append(bool(_unfinished(folder) - before))
        advance(1)


def _unfinished(folder: Path) -> set[tuple[str, int]]:
    """The names that Orbax gives to checkpoints until they are whole, with the times of their last change."""
    found = set()
    # Unlike Path.rglob, glob bears with folders that go away meanwhile.
    for name in glob.glob(f"{folder}/**/*.orbax-checkpoint-tmp*", recursive=True):  # noqa: PTH207
        with contextlib.suppress(FileNotFoundError):
            found.add((name, Path(name).stat().st_mtime_ns))
    return found


@contextlib.contextmanager
def _stopped(program: Program) -> Iterator[tuple[Path, Callable[[Path, bytes, str], bool]]]:
    """The folder of a stopped run, and what says whether damage to a file in it is told and survived."""
    with tempfile.TemporaryDirectory() as made:
        whole, folder, copy = (Path(made) / name for name in ("whole", "stopped", "copy"))
        program.main(whole)
        program.stop(folder)

        def goes_on(file: Path, content: bytes, told: str) -> bool:
            shutil.copytree(folder, copy)
            (copy / file).write_bytes(content)
            (copy / program.result).unlink(missing_ok=True)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                program.main(copy)
            named = any(str(copy / told) in str(warning.message) for warning in caught)
            same = program.same(copy, whole)
            shutil.rmtree(copy)
            return named and same

        yield folder, goes_on


def _cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def _flipped(content: bytes, rng: random.Random) -> bytes:
    changed, bit = bytearray(content), rng.randrange(8 * len(content))
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


if __name__ == "__main__":
    train(Path(sys.argv[1]))
