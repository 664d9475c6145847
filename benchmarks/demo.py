"""Trains a small network by each method at the same cost, and measures where that led."""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, get_args

import jax
from flax import nnx
from rich.console import Console
from rich.progress import Progress, TaskID

from benchmarks import arguments, checkpoints, data, measuring, methods, plots, report, table
from benchmarks.methods import METHODS, Method
from benchmarks.models import ConvNet

# One jitted step: `step(state, key, batch) -> state`.
Step = jax.stages.Wrapped

MethodName = Literal["sgd", "sam", "wp-sgd", "nso"]


@dataclasses.dataclass(frozen=True)
class Options:
    """Trains a small network on digits by each method at the same cost, and measures where that led.

    Attributes:
        methods: What to compare.
        seeds: Trainings of each method.
        steps: Steps of two gradient evaluations (sgd: twice as many of one).
        wrong_labels: Share of the training labels made wrong.
        out: Output folder.
    """

    methods: tuple[MethodName, ...] = get_args(MethodName)
    seeds: arguments.Count = 5
    steps: arguments.Count = 1200
    wrong_labels: arguments.Share = 0.2
    out: Path = Path("runs/demo")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run of the demo is made of.

    Attributes:
        methods: Names in `methods.METHODS`.
        seeds: How many trainings of each method, with the seeds 0, 1, ...
        steps: Steps of the methods that evaluate two gradients in each; SGD takes twice as many.
        num_train: Images to train on.
        wrong_labels: The share of them with a wrong label, so that it does harm to learn them by heart.
        batch_size: Images in a batch.
        num_points: How often to measure during training, at even distances.
        point_products: Hessian-vector products for the trace at each of these.
        final_products: Hessian-vector products for the trace at the end.
    """

    methods: tuple[str, ...]
    seeds: int
    steps: int
    num_train: int = 400
    wrong_labels: float = 0.2
    batch_size: int = 50
    num_points: int = 10
    point_products: int = 10
    final_products: int = 50

    @property
    def gradient_evaluations(self) -> int:
        """Of each training, whatever the method."""
        return 2 * self.steps

    def num_steps(self, method: Method) -> int:
        """How many steps that makes."""
        return self.gradient_evaluations // method.gradients_per_step


def demo(settings: Settings) -> dict[str, str | bytes]:
    """Runs the demo, showing its progress and then its table.

    Args:
        settings: What to run.

    Returns:
        The content of each file to write.
    """
    console = Console()
    with report.progress(console, "gradients") as progress:
        figures, networks = run(settings, progress)
        text = table.to_json(figures)
        # Read back, so that the table and the pictures show exactly what the file says.
        results = json.loads(text)
        files: dict[str, str | bytes] = {
            "results.json": text,
            "table.md": table.markdown(table, results),
            "training.png": plots.training(results),
            "surface.png": plots.surface(results),
            **networks,
        }
    report.print_table(console, table, results)
    return files


def run(settings: Settings, progress: Progress) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Trains and measures with every method and seed.

    Args:
        settings: What to run.
        progress: Where to show how far it is.

    Returns:
        All figures, ready for JSON; and the files of the networks of each method's first seed.
    """
    evaluations = settings.gradient_evaluations
    whole = progress.add_task("all trainings", total=evaluations * len(settings.methods) * settings.seeds)
    gauge = measuring.gauge(measuring.split_network(ConvNet(rngs=nnx.Rngs(0)))[0])
    runs, networks = [], {}
    for name in settings.methods:
        method = METHODS[name]
        step = compiled_step(method, settings)
        for seed in range(settings.seeds):
            present = progress.add_task(f"{name}, seed {seed}", total=evaluations)
            advance = functools.partial(_advance, progress, (whole, present))
            model, figures = train(method, step, seed, settings=settings, gauge=gauge, advance=advance)
            progress.remove_task(present)
            progress.console.print(
                f"{name}, seed {seed}: test accuracy {100 * figures['test_accuracy']:.1f} %, "
                f"Hessian trace {figures['trace']:.3g}, {figures['seconds']:.1f} s",
                highlight=False,
            )
            runs.append({"method": name, "seed": seed, **figures})
            if seed == 0:
                networks[f"{name}.safetensors"] = checkpoints.save(model, _metadata(name, seed, settings))
    counts = {run["gradient_evaluations"] for run in runs}
    assert counts == {evaluations}, f"the methods took {counts} gradient evaluations"  # noqa: S101
    return _describe(settings) | {"runs": runs}, networks


def new_state(
    method: Method, settings: Settings, seed: int
) -> tuple[nnx.GraphDef[Any], nnx.State, jax.Array]:
    """A fresh model with its optimizer, split into structure and state, and the key of the weight noise."""
    rngs = nnx.Rngs(seed)
    model = ConvNet(rngs=rngs)
    optimizer = nnx.Optimizer(model, methods.optimizer(method, settings.num_steps(method)), wrt=nnx.Param)
    graphdef, state = nnx.split((model, optimizer))
    return graphdef, state, rngs.noise()


def step_function(method: Method, graphdef: nnx.GraphDef[Any]) -> Step:
    """One step of the method as a pure function, which is compiled once for all seeds."""
    update = method.update(method.strength)

    @jax.jit
    def step(state: nnx.State, key: jax.Array, batch: data.Examples) -> nnx.State:
        model, optimizer = nnx.merge(graphdef, state)
        update(model, optimizer, jax.random.fold_in(key, optimizer.step[...]), batch)
        return nnx.state((model, optimizer))

    return step


def compiled_step(method: Method, settings: Settings) -> Step:
    """The step, run once so that no training's time has the compiler's in it."""
    graphdef, state, key = new_state(method, settings, seed=0)
    step = step_function(method, graphdef)
    examples = data.digits(0, settings.num_train).train
    step(state, key, next(data.batches(examples, settings.batch_size, seed=0)))
    return step


def train(
    method: Method,
    step: Step,
    seed: int,
    *,
    settings: Settings,
    gauge: measuring.Gauge,
    advance: Callable[[int], None],
) -> tuple[nnx.Module, dict[str, Any]]:
    """Trains once and measures on the way and at the end.

    Args:
        method: The method.
        step: Its compiled step.
        seed: Of the initial weights, the training images and their order, the dropout and the noise.
        settings: How long to train and how often to measure.
        gauge: How to measure.
        advance: Called after every step with the number of gradients that it evaluated.

    Returns:
        The network, and the figures at the end with `curve`, those during training.
    """
    split = data.digits(seed, settings.num_train, settings.wrong_labels)
    graphdef, state, key = new_state(method, settings, seed)
    batches = data.batches(split.train, settings.batch_size, seed)
    curve, seconds, done = [], 0.0, 0
    for point in _points(settings.num_steps(method), settings.num_points):
        start = time.perf_counter()
        for _ in range(point - done):
            state = step(state, key, next(batches))
            advance(method.gradients_per_step)
        jax.block_until_ready(state)
        seconds += time.perf_counter() - start
        done = point
        model = nnx.merge(graphdef, state)[0]
        network = measuring.split_network(model)[1]
        figures = measuring.measure_point(gauge, network, split, settings.point_products)
        curve.append({"gradient_evaluations": done * method.gradients_per_step, **figures})
    figures = measuring.measure_point(gauge, network, split, settings.final_products)
    return model, {
        "gradient_evaluations": done * method.gradients_per_step,
        "seconds": seconds,
        **figures,
        **measuring.measure_surface(gauge, network, split, seed),
        "curve": curve,
    }


def _points(num_steps: int, count: int) -> list[int]:
    """The steps after which to measure, the last one among them."""
    return sorted({max(1, round(num_steps * i / count)) for i in range(1, count + 1)})


def _metadata(name: str, seed: int, settings: Settings) -> checkpoints.Metadata:
    return checkpoints.Metadata(
        network=ConvNet.__name__,
        method=name,
        seed=seed,
        steps=settings.num_steps(METHODS[name]),
        num_train=settings.num_train,
        wrong_labels=settings.wrong_labels,
    )


def _describe(settings: Settings) -> dict[str, Any]:
    """What somebody needs to know to repeat the run."""
    chosen = {name: METHODS[name] for name in settings.methods}
    return report.environment() | {
        "settings": {
            **dataclasses.asdict(settings),
            "num_test": data.NUM_TEST,
            "gradient_evaluations": settings.gradient_evaluations,
            "momentum": methods.MOMENTUM,
            "weight_decay": methods.WEIGHT_DECAY,
            "learning_rate": {name: method.learning_rate for name, method in chosen.items()},
            "strength": {name: method.strength for name, method in chosen.items()},
            "gradients_per_step": {name: method.gradients_per_step for name, method in chosen.items()},
            "slice_distances": measuring.SLICE_DISTANCES,
        },
    }


def _advance(progress: Progress, tasks: Iterable[TaskID], count: int) -> None:
    for task in tasks:
        progress.advance(task, count)
