"""Many steps in one process: memory stays flat, and nothing is compiled again."""

import dataclasses
import gc
import json
import os
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import psutil
import scipy.stats
from flax import nnx

from benchmarks.kit.files import ROOT
from benchmarks.quality import demo, demo_options
from benchmarks.tasks.data import Examples
from benchmarks.training import loop
from tests.reliability.outcome import Outcome

NUM_RECORDS = 100
WARM_UP = 0.2  # of the steps: allocators and caches fill up first
LIMIT = 1.0  # MiB in 1,000 steps


class Soak(NamedTuple):
    """What a long training did to its process.

    Attributes:
        steps: After how many steps memory was read.
        mebibytes: What the process held of it.
        arrays: How many arrays of JAX's were alive.
        traced: How often the loss was traced after the first step.
    """

    steps: list[int]
    mebibytes: list[float]
    arrays: list[int]
    traced: int

    @property
    def warm(self) -> int:
        """The first record after the warm-up."""
        return int(WARM_UP * len(self.steps))

    @property
    def slope(self) -> float:
        """The growth of memory after the warm-up, in MiB per 1,000 steps.

        By Theil and Sen, the median of the slopes between all pairs, for which a single jump is none: malloc
        takes a few MiB from the system, or gives them back, at a time.
        """
        found = scipy.stats.theilslopes(self.mebibytes[self.warm :], self.steps[self.warm :])
        return 1000 * float(found.slope)


def soak(num_steps: int) -> Soak:
    """Trains the demo's network by noise stability optimization.

    Args:
        num_steps: How many steps, of two gradients each.
    """
    tuned = demo_options.METHODS["nso"]
    method, rate, strength = tuned.method, tuned.learning_rate, tuned.strength
    task, process = demo.make_task(wrong_labels=0.2), psutil.Process()
    traced, done = 0, 0
    steps, mebibytes, arrays = [], [], []

    def loss(model: nnx.Module, batch: Examples, **options: Any) -> jax.Array:
        nonlocal traced
        traced += 1
        return task.loss(model, batch, **options)

    def after_step(_: float) -> None:
        nonlocal traced, done
        done += 1
        if done == 1:
            traced = 0
        if done % max(1, num_steps // NUM_RECORDS) == 0:
            gc.collect()
            steps.append(done)
            mebibytes.append(process.memory_info().rss / 2**20)
            arrays.append(len(jax.live_arrays()))

    settings = loop.Settings(2 * num_steps, rate, demo_options.WEIGHT_DECAY, strength)
    loop.train(dataclasses.replace(task, loss=loss), method, settings, advance=after_step)
    return Soak(steps, mebibytes, arrays, traced)


def apart(num_steps: int) -> Soak:
    """The same in a process of its own, on one device, as users have it, and with one arena of malloc's.

    Of several arenas each grows when threads' turns first lead to it, which is late on a busy machine.
    """
    command = [sys.executable, "-m", "tests.reliability.soak", str(num_steps)]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["MALLOC_ARENA_MAX"] = "1"
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)  # noqa: S603
    return Soak(**json.loads(done.stdout))


def outcome(soaked: Soak) -> Outcome:
    """The row of a soak: its steps survived if nothing grew and nothing was compiled again."""
    steps, grown = soaked.steps[-1], soaked.arrays[-1] - soaked.arrays[soaked.warm]
    flat = soaked.slope < LIMIT and soaked.traced == grown == 0
    note = (
        f"memory grows by {soaked.slope:.2f} MiB in 1,000 steps, where {LIMIT:g} is allowed, to "
        f"{soaked.mebibytes[-1]:.0f} MiB; {soaked.traced} functions are traced again, and {grown} arrays left"
    )
    return Outcome("training steps in one process", steps, steps if flat else 0, note)


if __name__ == "__main__":
    print(json.dumps(soak(int(sys.argv[1]))._asdict()))  # noqa: T201
