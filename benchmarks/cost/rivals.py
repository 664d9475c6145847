"""What the rivals and the penalties cost: gradient evaluations and memory, all measured side by side."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from rich.progress import Progress

import nso_jax
from benchmarks.cost import compilers
from benchmarks.kit import plots, tables, timing
from benchmarks.kit.options import Count, Output
from benchmarks.kit.timing import Ratio
from benchmarks.tasks.data import Examples
from benchmarks.tasks.models import MLP, StridedConvNet, pure_loss
from nso_jax import noise, penalties, sharpness

STRENGTH = 0.01  # of noise, radii and penalties: what it is makes no difference to what they cost
FAMILIES = {
    "plain": plots.BLACK,
    "weight noise": plots.BLUE,
    "SAM's family": plots.ORANGE,
    "penalty": plots.VERMILLION,
}

Loss = Callable[[nnx.State, Examples], jax.Array]
Gradient = Callable[[jax.Array, nnx.State, Examples], Any]


class Problem(NamedTuple):
    """What a gradient is taken of.

    Attributes:
        loss: `loss(params, examples)`, the mean loss.
        losses: `losses(images, params, labels)`, the loss of each example.
        logits: `logits(images, params)`.
    """

    loss: Loss
    losses: Callable[..., jax.Array]
    logits: Callable[..., jax.Array]


Penalty = Callable[[Problem, jax.Array, nnx.State, Examples], jax.Array]


class Rival(NamedTuple):
    """A way to flatten a loss.

    Attributes:
        penalizes: What.
        line: The code that takes the place of `jax.value_and_grad(loss)`, or of the loss.
        gradient: Makes `gradient(key, params, examples)` of a problem.
    """

    penalizes: str
    line: str
    gradient: Callable[[Problem], Gradient]


class Case(NamedTuple):
    """A network and its batch of images of 28x28."""

    title: str
    model: Callable[..., nnx.Module]
    batch_size: int


CASES = {
    "convnet": Case("ConvNet", StridedConvNet, 128),
    "mlp": Case("MLP", functools.partial(MLP, (784, 512, 512, 10)), 512),
}


CaseName = Literal["convnet", "mlp"]


@dataclasses.dataclass(frozen=True)
class Options(Output):
    """Measures what SAM, its family and penalties cost, in gradients and memory.

    Attributes:
        cases: Networks.
        repetitions: Measurements of each time.
    """

    cases: tuple[CaseName, ...] = get_args(CaseName)
    repetitions: Count = 25


def run(options: Options, progress: Progress) -> dict[str, Any]:
    """Times all gradients, in turns, and reads what memory the compiled programs take."""
    settings = {"strength": STRENGTH, "repetitions": options.repetitions}
    results: dict[str, Any] = {"settings": settings, "cases": {}}
    for name in options.cases:
        task = progress.add_task(CASES[name].title, total=len(RIVALS) * (1 + options.repetitions))
        advance = functools.partial(progress.advance, task)
        results["cases"][name] = _measure(CASES[name], options.repetitions, advance)
    return results


def rows(results: dict[str, Any]) -> list[list[str]]:
    """One row for each rival: gradients and memory, for each network."""
    return [
        [
            name,
            *(
                cell
                for case in CASES
                for cell in _cells(results["cases"].get(case, {}).get("rivals", {}).get(name))
            ),
        ]
        for name in RIVALS
    ]


def caption(results: dict[str, Any]) -> str:
    """What the table shows, in a few sentences."""
    cases = "; ".join(
        f"{case['title']}: {case['weights']:,} weights, {case['batch_size']} images of 28x28, a plain "
        f"gradient {case['plain_milliseconds']:.2g} ms, {case['plain_temp_bytes'] / 2**20:.2g} MiB"
        for case in results["cases"].values()
    )
    return (
        "Gradients: the time of a value and gradient over that of a plain one; median of "
        f"{results['settings']['repetitions']} repetitions, all methods in turn, on "
        f"{results['machine']['cpu_count']} CPU cores ({results['machine']['device']}). Memory: temporary "
        f"memory of the compiled program over the plain one's. {cases}."
    )


def markdown(results: dict[str, Any]) -> str:
    """The table for readers who choose: what each penalizes, what it costs, and its line of code."""
    lines = [
        [name, rival.penalizes, *cells, f"`{rival.line}`"]
        for (name, *cells), rival in zip(rows(results), RIVALS.values(), strict=True)
    ]
    head = ["method", "penalizes", *HEADERS[1:], "in one line"]
    return tables.grid([head, *lines], texts=(0, 1, len(head) - 1)) + f"\n\n{caption(results)}\n"


def plot(results: dict[str, Any]) -> bytes:
    """Times over a plain gradient's with quartiles, a panel for each network."""
    cases = list(results["cases"].values())
    figure = Figure(
        figsize=(max(4.5, 1.4 + 2.5 * len(cases)), 1.4 + 0.27 * len(RIVALS)), layout="constrained"
    )
    panels = figure.subplots(1, len(cases), sharey=True, squeeze=False)[0]
    for panel, case in zip(panels, cases, strict=True):
        for i, name in enumerate(RIVALS):
            plots.bars(panel, {i: case["rivals"][name]["gradients"]}, ".1f", color=FAMILIES[_family(name)])
        panel.set(title=case["title"], xlabel="time / plain gradient's")
        panel.margins(x=0.2)
        panel.set_axisbelow(True)
    for family, colour in FAMILIES.items():
        panels[0].barh(0, 0, color=colour, label=family)
    panels[0].set_yticks(range(len(RIVALS)), list(RIVALS))
    panels[0].invert_yaxis()
    figure.suptitle("What a gradient costs: median and quartiles", fontsize="large")
    return plots.finish(figure, panels[0])


def _family(name: str) -> str:
    if name == "plain":
        return "plain"
    if name.startswith("NSO") or name in {"m-RWP", "IVON"}:
        return "weight noise"
    return "SAM's family" if name.endswith("SAM") else "penalty"


def _measure(case: Case, repetitions: int, advance: Callable[[], None]) -> dict[str, Any]:
    model = case.model(rngs=nnx.Rngs(0))
    problem, params = _problem(model)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.random((case.batch_size, 28, 28, 1), np.float32))
    batch = Examples(images, jnp.asarray(rng.integers(10, size=case.batch_size), jnp.int32))
    arguments = (jax.random.key(0), params, batch)
    programs = {
        name: jax.jit(rival.gradient(problem)).lower(*arguments).compile() for name, rival in RIVALS.items()
    }
    temp_bytes = {name: compilers.memory(program).temp for name, program in programs.items()}
    calls = {name: functools.partial(program, *arguments) for name, program in programs.items()}
    seconds = timing.interleaved(calls, repetitions, advance)
    over_plain = timing.ratios(seconds, {name: Ratio(name, 1, "plain") for name in RIVALS})
    return {
        "title": case.title,
        "weights": sum(w.size for w in jax.tree.leaves(params)),
        "batch_size": case.batch_size,
        "plain_milliseconds": 1e3 * float(np.median(seconds["plain"])),
        "plain_temp_bytes": temp_bytes["plain"],
        "rivals": {
            name: {"gradients": over_plain[name], "memory_over_plain": temp_bytes[name] / temp_bytes["plain"]}
            for name in RIVALS
        },
    }


def _problem(model: nnx.Module) -> tuple[Problem, nnx.State]:
    loss, params = pure_loss(model)
    graphdef, _, rest = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]  # flax types it so

    def logits(images: jax.Array, params: nnx.State) -> jax.Array:
        return nnx.merge(graphdef, params, rest)(images)

    def losses(images: jax.Array, params: nnx.State, labels: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits(images, params), labels)

    return Problem(loss, losses, logits), params


def _instead(method: Callable[..., Any], **options: Any) -> Callable[[Problem], Gradient]:
    return lambda problem: method(problem.loss, **options)


def _plain(problem: Problem) -> Gradient:
    return lambda _, params, batch: jax.value_and_grad(problem.loss)(params, batch)


def _updated(method: Callable[..., Any], **options: Any) -> Callable[[Problem], Gradient]:
    """A whole update, as that is what an optimizer gives."""

    def of(problem: Problem) -> Gradient:
        def update(key: jax.Array, params: nnx.State, batch: Examples) -> Any:
            optimizer = method(0.1, num_examples=10_000, key=key, **options)
            grad_fn = lambda params, _: jax.grad(problem.loss)(params, batch)  # noqa: E731
            return optimizer.update(params, optimizer.init(params), params, grad_fn=grad_fn)

        return update

    return of


def _plus(
    penalty: Callable[[Problem, jax.Array, nnx.State, Examples], jax.Array],
) -> Callable[[Problem], Gradient]:
    def gradient(problem: Problem) -> Gradient:
        def loss(params: nnx.State, key: jax.Array, batch: Examples) -> jax.Array:
            return problem.loss(params, batch) + STRENGTH * penalty(problem, key, params, batch)

        return lambda key, params, batch: jax.value_and_grad(loss)(params, key, batch)

    return gradient


def _hessian_trace(**options: Any) -> Callable[[Problem], Gradient]:
    return _plus(lambda p, key, params, batch: penalties.hessian_trace(key, p.loss, params, batch, **options))


def _confident(problem: Problem) -> Gradient:
    def loss(params: nnx.State, batch: Examples) -> jax.Array:
        logits = problem.logits(batch.inputs, params)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return jnp.mean(losses + STRENGTH * penalties.confidence(logits))

    return lambda _, params, batch: jax.value_and_grad(loss)(params, batch)


def _cells(figures: dict[str, Any] | None) -> list[str]:
    if figures is None:
        return ["-", "-"]
    return [f"{figures['gradients']['median']:.2f}", f"{figures['memory_over_plain']:.1f}"]


RIVALS = {
    "plain": Rival("nothing", "jax.value_and_grad(loss)", _plain),
    "NSO": Rival(
        "trace of the Hessian",
        "nso_jax.value_and_grad(loss, sigma=0.05)",
        _instead(nso_jax.value_and_grad, sigma=STRENGTH),
    ),
    "NSO, signs": Rival(
        "the same",
        "nso_jax.value_and_grad(loss, sigma=0.05, sampler=noise.rademacher)",
        _instead(nso_jax.value_and_grad, sigma=STRENGTH, sampler=noise.rademacher),
    ),
    "SAM": Rival("gradient norm", "sharpness.sam(loss, rho=0.05)", _instead(sharpness.sam, rho=STRENGTH)),
    "USAM": Rival(
        "squared gradient norm", "sharpness.usam(loss, rho=0.05)", _instead(sharpness.usam, rho=STRENGTH)
    ),
    "ASAM": Rival(
        "gradient norm in units of the weights",
        "sharpness.asam(loss, rho=1.0)",
        _instead(sharpness.asam, rho=STRENGTH),
    ),
    "RSAM": Rival(
        "gradient norm of a smoothed loss",
        "sharpness.rsam(loss, rho=0.05, sigma=0.01)",
        _instead(sharpness.rsam, rho=STRENGTH, sigma=STRENGTH),
    ),
    "m-RWP": Rival(
        "trace of the Hessian, on half of the batch",
        "sharpness.mrwp(loss, sigma=0.05)",
        _instead(sharpness.mrwp, sigma=STRENGTH),
    ),
    "BSAM": Rival(
        "a bound on a posterior's mean loss",
        "sharpness.bsam(0.1, num_examples=n, key=key)",
        _updated(sharpness.bsam, rho=STRENGTH),
    ),
    "IVON": Rival(
        "a posterior's mean loss",
        "sharpness.ivon(0.1, num_examples=n, key=key)",
        _updated(sharpness.ivon),
    ),
    "Hessian trace": Rival(
        "trace of the Hessian, explicitly",
        "loss(w, x) + c * penalties.hessian_trace(key, loss, w, x)",
        _hessian_trace(),
    ),
    "Hessian trace, by leaf": Rival(
        "the same, of half of the leaves at a time",
        'penalties.hessian_trace(key, loss, w, x, prob=0.5, drop="leaf")',
        _hessian_trace(prob=0.5, drop="leaf"),
    ),
    "input gradient": Rival(
        "loss's slope along the input",
        "loss(w, x) + c * penalties.input_gradient(losses, x).mean()",
        _plus(lambda p, _, params, b: penalties.input_gradient(p.losses, b.inputs, params, b.labels).mean()),
    ),
    "Jacobian": Rival(
        "outputs' slope along the input",
        "loss(w, x) + c * penalties.jacobian(key, outputs, x).mean()",
        _plus(lambda p, key, params, b: penalties.jacobian(key, p.logits, b.inputs, params).mean()),
    ),
    "input Hessian": Rival(
        "loss's curvature along the input",
        "loss(w, x) + c * penalties.input_hessian_norm(key, losses, x).mean()",
        _plus(
            lambda p, key, params, b: penalties.input_hessian_norm(
                key, p.losses, b.inputs, params, b.labels
            ).mean()
        ),
    ),
    "confidence": Rival(
        "low entropy of predictions",
        "mean(losses(outputs) + c * penalties.confidence(outputs))",
        _confident,
    ),
}
HEADERS: tuple[str, ...] = (
    "method",
    *(f"{case.title}: {figure}" for case in CASES.values() for figure in ("gradients", "memory")),
)
