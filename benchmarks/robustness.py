"""Accuracy under attack, after plain training, with a penalty on the loss around each image, and by NSO."""

import dataclasses
import functools
import itertools
import operator
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from jax.tree_util import Partial
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.progress import Progress

import nso_jax
from benchmarks import arguments, attacks, augmentation, data, plots, timing
from benchmarks.augmentation import Augment
from benchmarks.data import Examples
from benchmarks.files import UserError
from benchmarks.models import StridedConvNet
from benchmarks.timing import Ratio
from nso_jax import noise, penalties

BATCH_SIZE = 50
LEARNING_RATE = 1e-3
DIGITS_TRAIN = 600  # of the 797 that are not for the test
LEAST_SHARE = 7  # of the rows of a small data set, one in so many is for validation
COST_REPETITIONS = 15
TOLERATED_LOSS = 0.01  # of clean accuracy, where strengths are chosen
MATCHED_WITHIN = 0.003
RIVALS = ("input-hessian", "input-gradient")  # that the claim is about

Losses = Callable[[nnx.State, Any, Any], jax.Array]  # of the params, images and labels
Gradient = Callable[[Losses, jax.Array, jax.Array, nnx.State, Examples], nnx.State]
Penalty = Callable[[Losses, jax.Array, nnx.State, Examples], jax.Array]


class Method(NamedTuple):
    """A way to train.

    Attributes:
        strengths: What is tried: factors of the penalty, or sigma for NSO.
        cost: Time of a step over that of a plain one, to a quarter.
        gradient: `gradient(losses, strength, key, params, batch) -> grads`, of the loss without the penalty.
        penalty: `penalty(losses, key, params, batch)`, the number that the strength multiplies, if any.
    """

    strengths: tuple[float, ...]
    cost: float
    gradient: Gradient
    penalty: Penalty | None = None

    def mean_cost(self, penalty_every: int) -> float:
        """The cost of a step where the penalty's gradient is computed in every n-th one."""
        return 1 + (self.cost - 1) / penalty_every if self.penalty else self.cost

    def num_steps(self, budget: int, penalty_every: int) -> int:
        """How many steps take as long as so many plain ones."""
        return max(1, int(budget / self.mean_cost(penalty_every)))


class Problem(NamedTuple):
    """Images to learn and to attack."""

    name: str
    train: Examples
    validation: Examples
    test: Examples
    num_classes: int


class Network(NamedTuple):
    """Functions of the params, images and labels, for all networks of a shape.

    Attributes:
        initial: `initial(seed) -> params`.
        losses: The examples' cross-entropies.
        margins: The largest wrong logit minus the right one: positive where the network is wrong.
    """

    initial: Callable[[int], nnx.State]
    losses: Losses
    margins: Losses


class State(NamedTuple):
    """Of a training, with the gradient of the penalty that was computed last."""

    params: nnx.State
    optimizer_state: optax.OptState
    key: jax.Array
    penalty_grads: nnx.State


Step = Callable[[State, float, Examples], State]


class Training(NamedTuple):
    """A compiled training.

    Attributes:
        start: `start(params, key) -> state`.
        steps: To be taken in turns, over and over, as `step(state, strength, batch) -> state`.
        num_steps: How many.
    """

    start: Callable[[nnx.State, jax.Array], State]
    steps: tuple[Step, ...]
    num_steps: int


MethodName = Literal["input-gradient", "input-hessian", "nso", "hessian-trace"]


@dataclasses.dataclass(frozen=True)
class Options(arguments.Output):
    """Attacks networks that were trained plainly, with a penalty on the loss around each image, or by NSO.

    Attributes:
        data: Folders of Parquet files, instead of scikit-learn's digits.
        augment: What is done to images to train on.
        equal: What all trainings have the same of.
        methods: What to compare, beside plain training.
        seeds: Trainings with each strength.
        budget: Plain steps that a training may take as long as, or `--equal steps` its steps.
        penalty_every: Steps for which a penalty's gradient is used.
        train_images: Images to train on.
        validation_images: Images to choose strengths by.
        test_images: Images to test and attack.
        pgd_steps: Steps of an attack.
        starts: Random starts of an attack.
        radius: How far an attack may move each pixel.
    """

    data: Annotated[tuple[Path, ...] | None, tyro.conf.arg(metavar="PATH [PATH ...]")] = None
    augment: augmentation.Name = "none"
    equal: Literal["time", "steps"] = "time"
    methods: tuple[MethodName, ...] = ("input-gradient", "input-hessian", "nso")
    seeds: arguments.Count = 3
    budget: arguments.Count = 8000
    penalty_every: arguments.Count = 1
    train_images: arguments.Count = 10_000
    validation_images: arguments.Count = 1000
    test_images: arguments.Count = 2000
    pgd_steps: arguments.Count = 20
    starts: arguments.Count = 2
    radius: arguments.Share = 0.1


def run(options: Options, progress: Progress) -> dict[str, Any]:
    """Trains with every method, strength and seed, and attacks the networks.

    Args:
        options: The settings.
        progress: Where to show how far it is.

    Returns:
        All figures, ready for JSON.

    Raises:
        UserError: A folder does not hold the images.
    """
    problems = _problems(options)
    for problem in problems:
        if (number := len(problem.train.labels)) < BATCH_SIZE:
            raise UserError(f"{problem.name}: {number} images to train on, fewer than a batch")
    names = [name for name in METHODS if name in ("plain", *options.methods)]
    costs = {problem.name: _costs(problem, names, options, progress) for problem in problems}
    trainings = [
        (problem, name, strength, seed)
        for problem, name in itertools.product(problems, names)
        for strength, seed in itertools.product(METHODS[name].strengths, range(options.seeds))
    ]
    task = progress.add_task("trainings", total=len(trainings))
    runs = []
    for problem, name, strength, seed in trainings:
        figures = _train_and_attack(problem, name, strength, seed, options)
        runs.append({"data": problem.name, "method": name, "strength": strength, "seed": seed, **figures})
        progress.console.print(_line(runs[-1]), highlight=False, soft_wrap=True)
        progress.advance(task)
    per_data = {problem.name: [run for run in runs if run["data"] == problem.name] for problem in problems}
    return {
        "settings": _settings(options, problems, names),
        "costs": costs,
        "chosen": {name: choose(runs) for name, runs in per_data.items()},
        "claim": {name: match(runs) for name, runs in per_data.items()},
        "runs": runs,
    }


def rows(results: dict[str, Any]) -> list[list[str]]:
    """For each data set its name, then one row for each method at the strength chosen."""
    lines = []
    for name, chosen in results["chosen"].items():
        lines.append([name, *[""] * (len(HEADERS) - 1)])
        runs = [run for run in results["runs"] if run["data"] == name]
        lines.extend(_row(method, strength, runs, results["settings"]) for method, strength in chosen.items())
    return lines


def caption(results: dict[str, Any]) -> str:
    """What the table shows, in a few sentences."""
    settings, machine = results["settings"], results["machine"]
    sizes = "; ".join(
        f"{name}: {of['train']:,} images to train on, {of['validation']:,} for validation, {of['test']:,} to "
        "test and attack"
        for name, of in settings["data"].items()
    )
    every, budget = settings["penalty_every"], f"{settings['budget']:,}"
    equal = f"takes {budget} steps"
    if settings["equal"] == "time":
        equal = f"may take as long as {budget} plain steps"
    held = f"A penalty's gradient is used for {every} steps. " if every > 1 else ""
    if settings["augment"] != "none":
        held += f"Images to train on are changed by {settings['augment']}. "
    return (
        f"Mean ± standard deviation over {settings['seeds']} seeds: of the initial weights, the order of the "
        f"images and the noise. {sizes}. Every training {equal} "
        f"on {settings['batch_size']} images each; cost: a step's time over a plain one's. {held}FGSM "
        f"and PGD: accuracy where an attack may move each pixel by {settings['radius']:g}; PGD with "
        f"{settings['pgd_steps']} steps from each of {settings['starts']} random starts, of which one is "
        "enough to fool the network. Behind a method stands its strength, the factor of the penalty or sigma "
        "of NSO (of random signs): the one of the best accuracy under PGD on the validation images, among "
        f"those that lose at most {100 * settings['tolerated_loss']:g} point of clean accuracy there (filled "
        "in the picture); -: there is none. "
        f"{_claims(results)}Time: to train one seed, without compiling, on {machine['cpu_count']} CPU cores "
        f"({machine['device']})."
    )


def plot(results: dict[str, Any]) -> bytes:
    """Clean accuracy against that under PGD, a panel for each data set, a line for each method, as PNG."""
    names = list(results["chosen"])
    figure = Figure(figsize=(2 + 4 * len(names), 4), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        runs = [run for run in results["runs"] if run["data"] == name]
        for method in results["settings"]["methods"]:
            _plot_method(panel, method, runs, results["chosen"][name][method])
        panel.set(title=name, xlabel="clean accuracy (%)")
    panels[0].set_ylabel(f"accuracy under PGD, radius {results['settings']['radius']:g} (%)")
    return plots.finish(figure, panels[0])


def choose(runs: list[dict[str, Any]]) -> dict[str, float | None]:
    """The strength of each method that is most robust on the validation images and keeps clean accuracy.

    Args:
        runs: Those of one data set, plain ones among them.

    Returns:
        For each method the strength of the best accuracy under PGD, among those whose clean accuracy is at
        most `TOLERATED_LOSS` below plain training's; None if there are none.
    """
    names = dict.fromkeys(run["method"] for run in runs)
    points = {
        name: {strength: _means(mine, "validation") for strength, mine in _by_strength(runs, name).items()}
        for name in names
    }
    least = points["plain"][0.0][0] - TOLERATED_LOSS - 1e-9
    chosen = {}
    for name in names:
        kept = {strength: pgd for strength, (clean, pgd) in points[name].items() if clean >= least}
        chosen[name] = max(kept, key=kept.__getitem__) if kept else None
    return chosen


def match(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pairs of the `RIVALS`' strengths whose clean test accuracies differ by at most `MATCHED_WITHIN`.

    Args:
        runs: Those of one data set.

    Returns:
        A record for each pair, with the difference of their accuracies under PGD on the test images, the mean
        and that of each seed. Those come first whose strengths are both worth taking: no other strength of
        the same method is better in clean accuracy and under PGD.
    """
    first, second = (_by_strength(runs, name) for name in RIVALS)
    fronts = _front(first), _front(second)
    pairs = []
    for strengths in itertools.product(first, second):
        both = first[strengths[0]], second[strengths[1]]
        clean, pgd = (_difference(*both, attack) for attack in ("clean", "pgd"))
        if abs(clean.mean()) <= MATCHED_WITHIN + 1e-9:
            pairs.append(
                {
                    "strengths": dict(zip(RIVALS, strengths, strict=True)),
                    "worth_taking": all(map(operator.contains, fronts, strengths)),
                    "clean_difference": clean.mean().item(),
                    "pgd_difference": pgd.mean().item(),
                    "pgd_difference_by_seed": pgd.tolist(),
                }
            )
    return sorted(pairs, key=lambda pair: not pair["worth_taking"])


def _difference(runs: list[dict[str, Any]], others: list[dict[str, Any]], attack: str) -> np.ndarray:
    mine, theirs = ([run["test"][attack] for run in group] for group in (runs, others))
    return np.subtract(mine, theirs)


def _front(by_strength: dict[float, list[dict[str, Any]]]) -> list[float]:
    """The strengths to which no other one is superior in mean test accuracy, clean and under PGD."""
    points = {strength: _means(runs, "test") for strength, runs in by_strength.items()}
    return [
        strength
        for strength, (clean, pgd) in points.items()
        if not any(c >= clean and p >= pgd and (c, p) != (clean, pgd) for c, p in points.values())
    ]


def _means(runs: list[dict[str, Any]], part: str) -> tuple[float, float]:
    """The mean accuracies, clean and under PGD."""
    clean, pgd = (statistics.mean(run[part][attack] for run in runs) for attack in ("clean", "pgd"))
    return clean, pgd


def _problems(options: Options) -> list[Problem]:
    if options.data is None:
        digits = data.digits(0, min(options.train_images, DIGITS_TRAIN))
        sizes = {"validation": options.validation_images, "test": options.test_images}
        parts = {part: _part(getattr(digits, part), 0, size) for part, size in sizes.items()}
        return [Problem("digits", digits.train, **parts, num_classes=10)]
    names = [folder.resolve().name for folder in options.data]
    if len(set(names)) < len(names):
        raise UserError(f"argument --data: expected folders of different names, got {', '.join(names)}")
    return [_problem(name, folder, options) for name, folder in zip(names, options.data, strict=True)]


def _problem(name: str, folder: Path, options: Options) -> Problem:
    """The images of a folder. If there are fewer than asked for, most of them are for training."""
    wanted = options.train_images + options.validation_images
    train, test, class_names = data.load_images(folder, wanted, options.test_images)
    total = len(train.labels)
    most = max(total - total // LEAST_SHARE, total - options.validation_images)
    num_train = min(options.train_images, most)
    largest = max(int(part.labels.max()) for part in (train, test))
    return Problem(
        name,
        _part(train, 0, num_train),
        _part(train, num_train),
        test,
        max(len(class_names), largest + 1),
    )


def _part(examples: Examples, first: int, end: int | None = None) -> Examples:
    return Examples(examples.inputs[first:end], examples.labels[first:end])


@functools.cache
def _network(shape: tuple[int, int, int], num_classes: int) -> Network:
    def initial(seed: int) -> nnx.State:
        return nnx.state(StridedConvNet(shape, num_classes, rngs=nnx.Rngs(seed)), nnx.Param)

    model = StridedConvNet(shape, num_classes, rngs=nnx.Rngs(0))
    graphdef, _, rest = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]  # flax types it so

    def logits(params: nnx.State, images: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params, rest, copy=True)(images)

    def losses(params: nnx.State, images: jax.Array, labels: jax.Array) -> jax.Array:
        of = logits(params, images)
        if labels.ndim == of.ndim:  # probabilities
            return optax.softmax_cross_entropy(of, labels)
        return optax.softmax_cross_entropy_with_integer_labels(of, labels)

    def margins(params: nnx.State, images: jax.Array, labels: jax.Array) -> jax.Array:
        of = logits(params, images)
        right = jax.nn.one_hot(labels, num_classes, dtype=bool)
        return jnp.where(right, -jnp.inf, of).max(axis=1) - jnp.where(right, of, -jnp.inf).max(axis=1)

    return Network(initial, losses, margins)


def _network_for(problem: Problem) -> Network:
    _, *shape = problem.train.inputs.shape
    return _network(tuple(shape), problem.num_classes)


def _training_of(name: str, network: Network, options: Options) -> Training:
    method, every = METHODS[name], options.penalty_every
    num_steps = method.num_steps(options.budget, every) if options.equal == "time" else options.budget
    return _training(method, network, num_steps, every)


@functools.cache
def _training(method: Method, network: Network, num_steps: int, penalty_every: int) -> Training:
    """The steps of a method, compiled once for all strengths and seeds, and for networks of one shape."""
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, num_steps))

    def start(params: nnx.State, key: jax.Array) -> State:
        return State(params, optimizer.init(params), key, jax.tree.map(jnp.zeros_like, params))

    @functools.partial(jax.jit, static_argnames="refresh")
    def step(state: State, strength: jax.Array, batch: Examples, *, refresh: bool) -> State:
        key, *keys = jax.random.split(state.key, 3)
        grads = method.gradient(network.losses, strength, keys[0], state.params, batch)
        penalty_grads = state.penalty_grads
        if method.penalty and refresh:
            of_params = functools.partial(method.penalty, network.losses, keys[1])
            penalty_grads = jax.grad(of_params)(state.params, batch)
        if method.penalty:
            grads = jax.tree.map(lambda g, h: g + strength * h, grads, penalty_grads)
        updates, optimizer_state = optimizer.update(grads, state.optimizer_state, state.params)
        return State(optax.apply_updates(state.params, updates), optimizer_state, key, penalty_grads)

    refreshed, held = (functools.partial(step, refresh=refresh) for refresh in (True, False))
    steps = (refreshed, *[held] * (penalty_every - 1)) if method.penalty else (refreshed,)
    return Training(start, steps, num_steps)


def _costs(
    problem: Problem, names: list[str], options: Options, progress: Progress
) -> dict[str, dict[str, float]]:
    """Of each method the time of a step over a plain one's, as measured here and now."""
    network, batch = _network_for(problem), next(data.batches(problem.train, BATCH_SIZE, seed=0))

    def call(name: str) -> Callable[[], State]:
        training = _training_of(name, network, options)
        state = training.start(network.initial(0), jax.random.key(0))
        strength = METHODS[name].strengths[0]

        def cycle() -> State:
            return functools.reduce(lambda state, step: step(state, strength, batch), training.steps, state)

        return cycle

    task = progress.add_task(f"costs, {problem.name}", total=len(names) * (1 + COST_REPETITIONS))
    advance = functools.partial(progress.advance, task)
    seconds = timing.interleaved({name: call(name) for name in names}, COST_REPETITIONS, advance)
    every = {name: options.penalty_every if METHODS[name].penalty else 1 for name in names}
    return timing.ratios(seconds, {name: Ratio(name, every[name], "plain") for name in names})


def _train_and_attack(
    problem: Problem, name: str, strength: float, seed: int, options: Options
) -> dict[str, Any]:
    network = _network_for(problem)
    training = _training_of(name, network, options)
    augment = augmentation.named(options.augment, problem.num_classes)
    begin = time.perf_counter()
    params = train(training, network, problem.train, strength, seed, augment=augment)
    seconds = time.perf_counter() - begin
    return {
        "steps": training.num_steps,
        "seconds": seconds,
        "validation": _accuracies(network, params, problem.validation, options, ("clean", "pgd")),
        "test": _accuracies(network, params, problem.test, options, ("clean", "fgsm", "pgd")),
    }


def train(
    training: Training,
    network: Network,
    examples: Examples,
    strength: float,
    seed: int,
    *,
    augment: Augment = augmentation.unchanged,
) -> nnx.State:
    """Trains once.

    Args:
        training: The steps.
        network: What it trains.
        examples: What it trains on.
        strength: That of the method.
        seed: Of the initial weights, the order of the images, what is done to them, and the noise.
        augment: What is done to each batch.

    Returns:
        The params.
    """
    key = jax.random.key(seed)
    state = training.start(network.initial(seed), key)
    batches = data.batches(examples, BATCH_SIZE, seed)
    for i, step in enumerate(itertools.islice(itertools.cycle(training.steps), training.num_steps)):
        state = step(state, strength, augment(key, i, next(batches)))
    return jax.block_until_ready(state.params)


def _accuracies(
    network: Network,
    params: nnx.State,
    examples: Examples,
    options: Options,
    wanted: tuple[str, ...],
) -> dict[str, float]:
    loss, margin = Partial(network.losses, params), Partial(network.margins, params)
    images, labels = map(jnp.asarray, examples)
    radius, key = options.radius, jax.random.key(0)

    def attacked(attack: str) -> jax.Array:
        if attack == "fgsm":
            return attacks.fgsm(loss, images, labels, radius)
        if attack == "pgd":
            sizes = {"num_steps": options.pgd_steps, "num_starts": options.starts}
            return attacks.pgd(key, loss, images, labels, radius, score=margin, **sizes)
        return images

    return {attack: float(_share_right(margin, attacked(attack), labels)) for attack in wanted}


@jax.jit
def _share_right(margin: Partial, images: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(margin(images, labels) < 0)


def _by_strength(runs: list[dict[str, Any]], method: str) -> dict[float, list[dict[str, Any]]]:
    """A method's runs by its strengths, both in the order that they came in."""
    mine = [run for run in runs if run["method"] == method]
    return {
        strength: [run for run in mine if run["strength"] == strength]
        for strength in dict.fromkeys(run["strength"] for run in mine)
    }


def _settings(options: Options, problems: list[Problem], names: list[str]) -> dict[str, Any]:
    """What somebody needs to know to repeat the run."""
    wanted = ("seeds", "equal", "budget", "penalty_every", "augment", "radius", "pgd_steps", "starts")
    methods = {
        name: {
            "strengths": list(METHODS[name].strengths),
            "cost": METHODS[name].mean_cost(options.penalty_every),
        }
        for name in names
    }
    sizes = {
        problem.name: {
            "shape": list(problem.train.inputs.shape[1:]),
            **{part: len(getattr(problem, part).labels) for part in ("train", "validation", "test")},
        }
        for problem in problems
    }
    return {
        **{option: getattr(options, option) for option in wanted},
        "batch_size": BATCH_SIZE,
        "learning_rate": LEARNING_RATE,
        "tolerated_loss": TOLERATED_LOSS,
        "matched_within": MATCHED_WITHIN,
        "methods": methods,
        "data": sizes,
    }


def _line(run: dict[str, Any]) -> str:
    clean, fgsm, pgd = (f"{100 * run['test'][attack]:.1f}" for attack in ("clean", "fgsm", "pgd"))
    return (
        f"{run['data']}, {run['method']} {run['strength']:g}, seed {run['seed']}: clean {clean} %, "
        f"FGSM {fgsm} %, PGD {pgd} %, {run['seconds']:.1f} s"
    )


def _row(
    method: str, strength: float | None, runs: list[dict[str, Any]], settings: dict[str, Any]
) -> list[str]:
    """A method's cells; without accuracies if it has no strength that was chosen."""
    by_strength = _by_strength(runs, method)
    mine = next(iter(by_strength.values())) if strength is None else by_strength[strength]
    cells = [_spread([100 * run["test"][attack] for run in mine]) for attack in ("clean", "fgsm", "pgd")]
    shown = "-" if strength is None else f"{strength:g}"
    return [
        method if method == "plain" else f"{method} {shown}",
        *(["-"] * len(cells) if strength is None else cells),
        f"{settings['methods'][method]['cost']:.3g}",
        f"{mine[0]['steps']:,}",
        f"{statistics.mean(run['seconds'] for run in mine):.3g}",
    ]


def _spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def _claims(results: dict[str, Any]) -> str:
    """What the run says about the claim, if both rivals were trained."""
    if not set(RIVALS) <= results["settings"]["methods"].keys():
        return ""
    text = (
        f"Pairs of strengths of {' and '.join(RIVALS)} whose clean test accuracies differ by at most "
        f"{100 * results['settings']['matched_within']:g} points, and by how much the first is better under "
        "PGD (of strengths that no other one beats in both accuracies):"
    )
    for name, pairs in results["claim"].items():
        told = [_pair(pair) for pair in pairs if pair["worth_taking"]]
        text += f" {name}, {', '.join(told) or 'none'}."
    return f"{text} "


def _pair(pair: dict[str, Any]) -> str:
    first, second = pair["strengths"].values()
    difference = _spread([100 * difference for difference in pair["pgd_difference_by_seed"]])
    return f"{first:g} and {second:g} by {difference}"


def _plot_method(axes: Axes, method: str, runs: list[dict[str, Any]], chosen: float | None) -> None:
    """A line through the method's strengths, with standard deviations; the chosen one is filled."""
    by_strength = _by_strength(runs, method)
    accuracies = np.array(
        [
            [[100 * run["test"][attack] for run in group] for attack in ("clean", "pgd")]
            for group in by_strength.values()
        ]
    )
    (x, y), (xerr, yerr) = accuracies.mean(axis=2).T, _deviations(accuracies).T
    colour, marker = STYLES[method]
    axes.errorbar(
        x,
        y,
        yerr,
        xerr,
        color=colour,
        marker=marker,
        markerfacecolor="white",
        linewidth=1.5,
        elinewidth=0.8,
        capsize=2,
        label=method,
    )
    for i, strength in enumerate(by_strength):
        if strength == chosen:
            axes.plot(x[i], y[i], marker=marker, color=colour, zorder=3)


def _deviations(accuracies: np.ndarray) -> np.ndarray:
    return accuracies.std(axis=2, ddof=min(1, accuracies.shape[2] - 1))


def _plain(
    losses: Losses, strength: jax.Array, key: jax.Array, params: nnx.State, batch: Examples
) -> nnx.State:
    del strength, key
    return jax.grad(lambda params: losses(params, *batch).mean())(params)


def _nso(
    losses: Losses, strength: jax.Array, key: jax.Array, params: nnx.State, batch: Examples
) -> nnx.State:
    fun = lambda params: losses(params, *batch).mean()  # noqa: E731
    # Signs, because at this batch size normal noise for all weights takes as long as a gradient.
    return nso_jax.value_and_grad(fun, sigma=strength, sampler=noise.rademacher)(key, params)[1]


def _input_gradient(losses: Losses, key: jax.Array, params: nnx.State, batch: Examples) -> jax.Array:
    del key
    fun = lambda images: losses(params, images, batch.labels)  # noqa: E731
    return penalties.input_gradient(fun, batch.inputs).mean()


def _input_hessian(losses: Losses, key: jax.Array, params: nnx.State, batch: Examples) -> jax.Array:
    fun = lambda images: losses(params, images, batch.labels)  # noqa: E731
    return penalties.input_hessian_norm(key, fun, batch.inputs).mean()


def _hessian_trace(losses: Losses, key: jax.Array, params: nnx.State, batch: Examples) -> jax.Array:
    fun = lambda params: losses(params, *batch).mean()  # noqa: E731
    return penalties.hessian_trace(key, fun, params)


# Costs: medians on two CPU cores, for images of 28x28. Strengths: from a small effect to a loss of accuracy.
METHODS = {
    "plain": Method((0.0,), 1.0, _plain),
    "input-gradient": Method((0.1, 0.3, 0.6, 1.0, 2.0, 3.0, 5.0, 8.0), 2.5, _plain, _input_gradient),
    "input-hessian": Method((0.03, 0.1, 0.3, 1.0, 2.0, 4.0), 4.75, _plain, _input_hessian),
    "nso": Method((0.04, 0.08, 0.1, 0.12, 0.16), 2.0, _nso),
    "hessian-trace": Method((1e-4, 1e-3, 3e-3, 1e-2), 3.0, _plain, _hessian_trace),
}
# Colours of Okabe and Ito.
STYLES = {
    "plain": ("#000000", "*"),
    "input-gradient": ("#E69F00", "o"),
    "input-hessian": ("#D55E00", "s"),
    "nso": ("#0072B2", "^"),
    "hessian-trace": ("#009E73", "v"),
}
HEADERS: tuple[str, ...] = (
    "method",
    "clean (%)",
    "FGSM (%)",
    "PGD (%)",
    "cost",
    "steps",
    "time (s)",
)
