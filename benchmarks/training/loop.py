"""One training of any model by any method: measured as it runs, and resumed to the bit."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks.kit.journal import Journal
from benchmarks.tasks.data import Examples
from benchmarks.tasks.models import cross_entropy
from benchmarks.training import methods
from benchmarks.training.methods import Method

REFRESHING_BATCHES = 50  # for the batch statistics of averaged weights

# How a method's strength changes over a training, as a function of the share that is done.
SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "constant": lambda _: 1.0,
    "falling": lambda done: 0.5 + 0.5 * jnp.cos(jnp.pi * done),
    "rising": lambda done: 0.5 - 0.5 * jnp.cos(jnp.pi * done),
}

Measure = Callable[[nnx.Module], dict[str, float]]
Step = Callable[[nnx.State, jax.Array, Examples], nnx.State]


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """What is to be learnt.

    Attributes:
        model: `model(seed)`, as it is before the training.
        batches: `batches(seed, first)`, the endless batches of a training from number `first` on.
        num_examples: How many there are to train on.
        optimizer: Of the methods that bring none of their own.
        loss: The mean loss of a model over a batch.
    """

    model: Callable[[int], nnx.Module]
    batches: Callable[[int, int], Iterator[Examples]]
    num_examples: int
    optimizer: methods.Optimizer = methods.sgd
    loss: methods.Loss = cross_entropy


@dataclasses.dataclass(frozen=True)
class Settings:
    """Those of one training.

    Attributes:
        gradients: Gradient evaluations, whatever the method.
        learning_rate: Where the optimizer's schedule starts.
        weight_decay: For all weights.
        strength: Of the method: see `methods.Method`.
        schedule: Of the strength: see `SCHEDULES`.
        seed: Of the initial weights, the order of the examples, the dropout and the noise.
        num_points: How often to measure, at even distances, the last time at the end.
    """

    gradients: int
    learning_rate: float
    weight_decay: float = 0.0
    strength: float = 0.0
    schedule: str = "constant"
    seed: int = 0
    num_points: int = 1


class Steps(NamedTuple):
    """The compiled steps of a method.

    Attributes:
        num_steps: How many make a training.
        graphdef: The structure of the model and its optimizer, of which `step` changes the state.
        step: `step(state, key, batch) -> state`.
        between: Like it, the steps between two of it.
    """

    num_steps: int
    graphdef: nnx.GraphDef[Any]
    step: Step
    between: tuple[Step, ...] = ()

    def at(self, number: int) -> Step:
        """The step of a number in the training, from 0 on."""
        return (self.step, *self.between)[number % (1 + len(self.between))]


class Trained(NamedTuple):
    """What a training leaves.

    Attributes:
        model: The network.
        curve: What was measured, a record for each point with the gradient `evaluations` until then.
        seconds: In the steps alone, since it was last resumed.
    """

    model: nnx.Module
    curve: list[dict[str, float]]
    seconds: float


def train(
    task: Task,
    method: Method,
    settings: Settings,
    *,
    measure: Measure = lambda _: {},
    journal: Journal | None = None,
    advance: Callable[[float], None] = lambda _: None,
) -> Trained:
    """Trains once.

    Args:
        task: What to learn.
        method: How.
        settings: With which numbers.
        measure: What to measure of the model, in evaluation mode, at each point.
        journal: Keeps what was measured, and the state at each point; an interrupted training goes on from
            the last one.
        advance: Called with the number of gradient evaluations, as they are done.

    Returns:
        The network and the figures.
    """
    steps = compiled(task, method, settings.gradients, settings.schedule)
    state = initial_state(task, method, settings)
    key = jax.random.key(settings.seed)
    curve: list[dict[str, float]] = []
    done = 0
    if journal and (saved := journal.restore(state)):
        done, state, curve = saved
        advance(done * method.gradients_per_step)
    batches, seconds = task.batches(settings.seed, done), 0.0
    for point in points(steps.num_steps, settings.num_points):
        if point <= done:
            continue
        start = time.perf_counter()
        for number in range(done, point):
            state = steps.at(number)(state, key, next(batches))
            advance(method.gradients_per_step)
        jax.block_until_ready(state)
        seconds += time.perf_counter() - start
        done = point
        figures = measure(evaluated(task, steps.graphdef, state, settings.seed))
        curve.append({"evaluations": done * method.gradients_per_step, **figures})
        if journal:
            journal.save(done, state, curve[-1])
    return Trained(evaluated(task, steps.graphdef, state, settings.seed), curve, seconds)


def initial_state(task: Task, method: Method, settings: Settings) -> nnx.State:
    """The state of a fresh model and its optimizer."""
    return nnx.state(_model_and_optimizer(task, method, settings))


@functools.cache
def compiled(task: Task, method: Method, gradients: int, schedule: str) -> Steps:
    """The steps of a method, for all seeds, strengths, learning rates and weight decays."""
    settings = Settings(gradients, learning_rate=0.0)
    count = num_steps(method, gradients)
    graphdef = nnx.graphdef(_model_and_optimizer(task, method, settings))

    @functools.cache
    def made(of: Callable[[methods.Loss], methods.Update]) -> Step:
        update = of(task.loss)

        @jax.jit
        def step(state: nnx.State, key: jax.Array, batch: Examples) -> nnx.State:
            model, optimizer = nnx.merge(graphdef, state)
            number = optimizer.step[...]
            strength = optimizer.opt_state.hyperparams["strength"][...] * SCHEDULES[schedule](number / count)
            update(model, optimizer, jax.random.fold_in(key, number), strength, batch)
            return nnx.state((model, optimizer))

        return step

    steps = Steps(count, graphdef, made(method.update), tuple(map(made, method.between)))
    # Called here, so that no training's time has the compiler's in it.
    state, batch = initial_state(task, method, settings), next(task.batches(0, 0))
    for number in range(1 + len(steps.between)):
        steps.at(number)(state, jax.random.key(0), batch)
    return steps


def num_steps(method: Method, gradients: int) -> int:
    """How many steps so many gradient evaluations make."""
    return max(1, int(gradients / method.gradients_per_step))


def points(count: int, num_points: int) -> list[int]:
    """The steps after which to measure, the last one among them."""
    return sorted({max(1, round(count * i / num_points)) for i in range(1, num_points + 1)})


def evaluated(task: Task, graphdef: nnx.GraphDef[Any], state: nnx.State, seed: int) -> nnx.Module:
    """The model in evaluation mode; with averaged weights, if its optimizer averages them."""
    model, optimizer = nnx.merge(graphdef, state)
    mean = methods.averaged(optimizer, nnx.state(model, nnx.Param))
    if mean is not None:
        nnx.update(model, mean)
        _refresh_statistics(model, task.batches(seed, 0))
    model.eval()
    return model


def _model_and_optimizer(task: Task, method: Method, settings: Settings) -> tuple[nnx.Module, nnx.Optimizer]:
    model = task.model(settings.seed)
    model.train()
    make = method.optimizer or task.optimizer
    make = methods.with_squares(make) if method.keeps_squares else make

    @optax.inject_hyperparams  # type: ignore[untyped-decorator]
    def optimizer(learning_rate: Any, weight_decay: Any, strength: Any) -> optax.GradientTransformation:
        return make(
            learning_rate,
            weight_decay,
            strength,
            num_steps=num_steps(method, settings.gradients),
            num_examples=task.num_examples,
            key=jax.random.key(settings.seed),
        )

    scale = method.rate if method.optimizer is not task.optimizer else 1.0
    knobs = settings.learning_rate * scale, settings.weight_decay, settings.strength
    return model, nnx.Optimizer(model, optimizer(*knobs), wrt=nnx.Param)


def _refresh_statistics(model: nnx.Module, batches: Iterator[Examples]) -> None:
    """Batch statistics belong to the weights they were taken with."""
    if nnx.state(model, nnx.BatchStat):
        forward = nnx.jit(lambda model, inputs: model(inputs))
        model.train()
        for _ in range(REFRESHING_BATCHES):
            forward(model, next(batches).inputs)
