"""What a step of a method costs, in the time of a plain one."""

import functools
import math
from collections.abc import Callable, Mapping

import jax
from flax import nnx

from benchmarks.kit import timing
from benchmarks.kit.timing import Ratio
from benchmarks.training import loop
from benchmarks.training.loop import Settings, Task
from benchmarks.training.methods import Method

REPETITIONS = 15


def measure(
    task: Task, methods: Mapping[str, Method], gradients: int, plain: str, advance: Callable[[], None]
) -> dict[str, dict[str, float]]:
    """Of each method the time of a step over a plain one's, as measured here and now.

    Args:
        task: What they train.
        methods: By their names.
        gradients: Of a training.
        plain: The name of the plain one.
        advance: Called `1 + REPETITIONS` times for each method.

    Returns:
        Medians and quartiles.
    """
    batch, key = next(task.batches(0, 0)), jax.random.key(0)

    def call(method: Method) -> Callable[[], nnx.State]:
        settings = Settings(gradients, learning_rate=0.1, strength=method.strengths[0])
        steps = loop.compiled(task, method, settings.gradients, settings.schedule)
        start = loop.initial_state(task, method, settings)
        turns = (steps.step, *steps.between)
        return lambda: functools.reduce(lambda state, step: step(state, key, batch), turns, start)

    calls = {name: call(method) for name, method in methods.items()}
    seconds = timing.interleaved(calls, REPETITIONS, advance)
    wanted = {name: Ratio(name, 1 + len(method.between), plain) for name, method in methods.items()}
    return timing.ratios(seconds, wanted)


def in_whole_steps(cost: float, gradients: int) -> float:
    """The cost nearest to a measured one of which a whole number makes the gradients, without rounding."""
    shares = (gradients / steps for steps in range(1, gradients + 1))
    exact = [share for share in shares if not gradients % share]
    return min(exact, key=lambda share: abs(math.log(share / cost)))
