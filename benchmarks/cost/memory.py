"""What memory the averaged gradient takes beyond the plain one, read from the compiled program."""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.progress import Progress

import nso_jax
from benchmarks.cost import compilers
from benchmarks.kit import plots
from benchmarks.kit.options import Output
from benchmarks.tasks.data import Examples
from benchmarks.tasks.models import MLP, Transformer, pure_loss
from nso_jax import noise

SIGMA = 0.01
SAMPLES = (1, 2, 4, 8, 16)
MOST_AT_ONCE = 8  # draws in a chunk
SAMPLERS = {"normal": noise.normal, "rademacher": noise.rademacher}
COLOURS = {"normal": plots.BLUE, "rademacher": plots.PURPLE}
MEBIBYTE = 2**20

HEADERS: tuple[str, ...] = ("model", "noise", "draws", *(f"k={k}" for k in SAMPLES))


class Case(NamedTuple):
    """A network and its batch.

    Attributes:
        title: What it is called.
        model: Makes the network.
        shape: Of the batch, which is small, so that weights and not examples count.
        dtype: Of its images or tokens.
    """

    title: str
    model: Callable[..., nnx.Module]
    shape: tuple[int, ...]
    dtype: Any


# One layer, because 32 evaluations of six, one after another, compile for many minutes.
CASES = {
    "mlp": Case("MLP", functools.partial(MLP, (512, 1024, 512, 10)), (8, 512), jnp.float32),
    "transformer": Case("Transformer, 1 layer", functools.partial(Transformer, 1), (2, 64), jnp.int32),
}


CaseName = Literal["mlp", "transformer"]
NumSamples = Literal[1, 2, 4, 8, 16]


@dataclasses.dataclass(frozen=True)
class Options(Output):
    """Reads from compiled programs what memory the averaged gradient takes beyond a plain one.

    Attributes:
        cases: Networks.
        samples: Numbers of draws, k.
    """

    cases: tuple[CaseName, ...] = get_args(CaseName)
    samples: tuple[NumSamples, ...] = get_args(NumSamples)


def run(options: Options, progress: Progress) -> dict[str, Any]:
    """Compiles gradients and reads what memory they take; none of them is run."""
    results: dict[str, Any] = {
        "settings": {"sigma": SIGMA, "dtype": "float32", "devices": jax.device_count()},
        "cases": {},
    }
    for name in options.cases:
        case = CASES[name]
        draws = [(sampler, k, size) for sampler in SAMPLERS for k in options.samples for size in _chunks(k)]
        task = progress.add_task(case.title, total=1 + len(draws))
        results["cases"][name] = _measure(case, draws, functools.partial(progress.advance, task))
    return results


def rows(results: dict[str, Any]) -> list[list[str]]:
    """One row for each network, noise, and order of the draws; a column for each number of draws."""
    return [
        [case["title"], sampler, draws, *(_cell(case, sampler, k, size) for k, size in sizes.items())]
        for case in results["cases"].values()
        for sampler in SAMPLERS
        for draws, sizes in (("in turn", dict.fromkeys(SAMPLES, 1)), ("at once", {k: k for k in SAMPLES}))
    ]


def caption(results: dict[str, Any]) -> str:
    """What the table shows, in a few sentences."""
    sizes = " and ".join(
        f"{case['title']}, {case['param_bytes'] / MEBIBYTE:.1f} MiB" for case in results["cases"].values()
    )
    return (
        "Temporary memory of the averaged gradient beyond that of the plain one, in units of the params "
        f"({sizes}, {results['settings']['dtype']}), as XLA states it for the compiled program "
        f"({results['machine']['device']}). Draws in turn: chunk_size=1, the default; at once: "
        "chunk_size=k."
    )


def plot(results: dict[str, Any]) -> bytes:
    """The extra memory against k, a panel for each network."""
    cases = list(results["cases"].values())
    figure = Figure(figsize=(max(4, 3.2 * len(cases)), 4), layout="constrained")
    panels = figure.subplots(1, len(cases), sharey=True, squeeze=False)[0]
    for panel, case in zip(panels, cases, strict=True):
        for sampler, colour in COLOURS.items():
            _line(
                panel, case, sampler, at_once=True, style={"color": colour, "linestyle": "--", "marker": "o"}
            )
            _line(panel, case, sampler, at_once=False, style={"color": colour, "marker": "s"})
        plots.label_powers_of_two(panel)
        size = f"{case['param_bytes'] / MEBIBYTE:.1f} MiB of weights"
        panel.set(title=f"{case['title']}\n{size}", xlabel="draws k (log scale)")
    panels[0].set(ylabel="extra memory / weights (log scale)")
    return plots.finish(figure, panels[0], columns=2)


def _chunks(num_samples: int) -> list[int]:
    """The chunk sizes that are compared: 1 and all draws."""
    return [1, num_samples] if 1 < num_samples <= MOST_AT_ONCE else [1]


def _measure(
    case: Case, draws: Sequence[tuple[str, int, int]], advance: Callable[[], None]
) -> dict[str, Any]:
    loss, params = pure_loss(case.model(rngs=nnx.Rngs(0)))
    arguments = (params, Examples(jnp.zeros(case.shape, case.dtype), jnp.zeros(case.shape[:1], jnp.int32)))
    param_bytes = sum(w.nbytes for w in jax.tree.leaves(params))
    plain = _gradient_bytes(jax.value_and_grad(loss), *arguments)
    advance()

    def averaged(sampler: str, num_samples: int, chunk_size: int) -> dict[str, Any]:
        options: dict[str, Any] = {"num_samples": num_samples, "chunk_size": chunk_size}
        gradient = nso_jax.value_and_grad(loss, sigma=SIGMA, sampler=SAMPLERS[sampler], **options)
        taken = _gradient_bytes(gradient, jax.random.key(0), *arguments)
        advance()
        extra = (taken - plain) / param_bytes
        return {"sampler": sampler, **options, "temp_bytes": taken, "extra_over_params": extra}

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return {
            "title": case.title,
            "batch_shape": case.shape,
            "param_bytes": param_bytes,
            "plain_temp_bytes": plain,
            "averaged": list(threads.map(averaged, *zip(*draws, strict=True))),
        }


def _gradient_bytes(fun: Callable[..., Any], *args: Any) -> int:
    return compilers.memory(jax.jit(fun).lower(*args).compile()).temp


def _extra(case: dict[str, Any], sampler: str, num_samples: int, chunk_size: int) -> float | None:
    wanted = {"sampler": sampler, "num_samples": num_samples, "chunk_size": chunk_size}
    found = (row["extra_over_params"] for row in case["averaged"] if wanted.items() <= row.items())
    return next(found, None)


def _cell(case: dict[str, Any], sampler: str, num_samples: int, chunk_size: int) -> str:
    extra = _extra(case, sampler, num_samples, chunk_size)
    return "-" if extra is None else f"{extra:.2f}"


def _line(panel: Axes, case: dict[str, Any], sampler: str, *, at_once: bool, style: dict[str, Any]) -> None:
    extras = {k: _extra(case, sampler, k, k if at_once else 1) for k in SAMPLES}
    points = {k: extra for k, extra in extras.items() if extra is not None}
    label = f"{sampler}, {'at once' if at_once else 'in turn'}"
    panel.plot(list(points), list(points.values()), label=label, **style)
