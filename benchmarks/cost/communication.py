"""What a training step on eight devices sends between them, read from the compiled program."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.progress import Progress

import nso_jax
from benchmarks.cost import compilers
from benchmarks.kit import plots
from benchmarks.kit.options import Count, Output
from benchmarks.tasks import models
from benchmarks.tasks.data import Examples
from nso_jax import noise, parallel
from nso_jax.noise import Sampler

NUM_DEVICES = 8
BATCH_SIZE = 64
WIDTHS = (784, 512, 512, 10)
NUM_MICROBATCHES = 4
SIGMA = 0.05
LEARNING_RATE = 0.1

JIT, SHARD_MAP, PARALLEL = "value_and_grad, jit", "value_and_grad, shard_map", "parallel.value_and_grad"
LAYOUTS = {"rows": jax.P("data"), "columns": jax.P(None, "data")}
SAMPLERS: dict[str, Sampler] = {
    "normal": noise.normal,
    "rademacher": noise.rademacher,
    "centered binomial": noise.centered_binomial,
}

HEADERS = ("step", "k", "arrays", "MB", "of plain", "added by noise")

Gradient = Callable[[jax.Array, nnx.State, Examples], tuple[jax.Array, nnx.State]]


class Step(NamedTuple):
    """A way to train with whole params on each device and a batch that they share.

    Attributes:
        name: What it is called in the table.
        gradient: `gradient(key, params, examples) -> (value, grads)`.
        num_samples: k, or 0 without noise.
        num_microbatches: m.
    """

    name: str
    gradient: Gradient
    num_samples: int = 0
    num_microbatches: int = 1


@dataclasses.dataclass(frozen=True)
class Options(Output):
    """Counts the bytes that eight devices exchange in a training step.

    Attributes:
        samples: Numbers of draws, k.
    """

    samples: tuple[Count, ...] = (1, 2, 4, 8)


def run(options: Options, progress: Progress) -> dict[str, Any]:
    """Compiles training steps and counts what they send; none of them is run."""
    loss, params = models.pure_loss(models.MLP(WIDTHS, rngs=nnx.Rngs(0)))
    steps = data_parallel_steps(loss, options.samples)
    task = progress.add_task("communication", total=len(steps) + len(LAYOUTS) * (1 + len(SAMPLERS)))
    advance = functools.partial(progress.advance, task)
    return {
        "settings": {
            "devices": NUM_DEVICES,
            "batch_size": BATCH_SIZE,
            "weights": sum(w.size for w in jax.tree.leaves(params)),
            "dtype": "float32",
            "samples": list(options.samples),
        },
        "data_parallel": _data_parallel(steps, params, advance),
        "sharded": [row for layout in LAYOUTS for row in _sharded(loss, params, layout, advance)],
    }


def rows(results: dict[str, Any]) -> list[list[str]]:
    """One row for each step: first those with whole params on each device, then those with sharded ones."""
    whole = [
        [_name(row), str(row["num_samples"] or ""), *_sizes(row), f"{row['relative']:.2f}", ""]
        for row in results["data_parallel"]
    ]
    sharded = [
        [f"sharded by {row['layout']}, {row['sampler']}", "1", *_sizes(row), "", str(row["added_arrays"])]
        for row in results["sharded"]
    ]
    return whole + sharded


def caption(results: dict[str, Any]) -> str:
    """What the table shows, in a few sentences."""
    settings = results["settings"]
    return (
        f"What one training step of an MLP of {settings['weights']:,} weights in {settings['dtype']} sends "
        f"between {settings['devices']} devices, which share a batch of {settings['batch_size']}: the "
        "results of all-reduce, all-gather, reduce-scatter, all-to-all and collective-permute in the program "
        "that XLA compiled for simulated CPU devices. k: draws, of two gradients each. Parts: microbatches "
        "on each device. Of plain: bytes over those of the plain gradient under jit, where the compiler "
        "decides what to send. In the last rows it decides too, for value_and_grad with weight matrices that "
        "are split over the devices by rows or by columns. Added by noise: arrays beyond those of the same "
        "step with a constant in place of the noise."
    )


def plot(results: dict[str, Any]) -> bytes:
    """Bytes per step against k, as PNG."""
    figure = Figure(figsize=(plots.WIDTH, 3.8), layout="constrained")
    axes = figure.subplots()
    for name, colour, marker in ((JIT, plots.VERMILLION, "o"), (PARALLEL, plots.BLUE, "s")):
        _line(axes, [row for row in results["data_parallel"] if row["step"] == name], colour, marker)
    plots.label_powers_of_two(axes)
    axes.set(
        title=f"What a step on {results['settings']['devices']} devices sends",
        xlabel="draws k, of two gradients each (log scale)",
        ylabel="bytes / a plain gradient's (log scale)",
        xticks=results["settings"]["samples"],
    )
    axes.margins(y=0.15)
    return plots.finish(figure, axes)


def data_parallel_steps(loss: Callable[..., jax.Array], samples: Sequence[int]) -> list[Step]:
    """The plain gradient first, then each way to average it over draws."""
    mesh = _mesh()
    here = functools.partial(nso_jax.value_and_grad, loss, sigma=SIGMA)
    everywhere = functools.partial(parallel.value_and_grad, loss, sigma=SIGMA, mesh=mesh)

    def plain(_: jax.Array, params: nnx.State, examples: Examples) -> tuple[jax.Array, nnx.State]:
        return jax.value_and_grad(loss)(params, examples)

    def plain_mean(*args: Any) -> tuple[jax.Array, nnx.State]:
        return jax.lax.pmean(plain(*args), "data")

    return [
        Step("plain, jit", plain),
        Step("plain, shard_map", _in_shard_map(plain_mean, mesh)),
        *[Step(JIT, here(num_samples=k), k) for k in samples],
        *[Step(SHARD_MAP, _in_shard_map(here(num_samples=k, axis_name="data"), mesh), k) for k in samples],
        *[Step(PARALLEL, everywhere(num_samples=k), k) for k in samples],
        Step(
            PARALLEL,
            everywhere(num_samples=samples[0], num_microbatches=NUM_MICROBATCHES),
            samples[0],
            NUM_MICROBATCHES,
        ),
    ]


def _data_parallel(steps: list[Step], params: nnx.State, advance: Callable[[], None]) -> list[dict[str, Any]]:
    measured = []
    for step in steps:
        sent = _sent(step.gradient, _placed(params, jax.P()))
        counts = {"num_samples": step.num_samples, "num_microbatches": step.num_microbatches}
        measured.append({"step": step.name, **counts, **sent})
        advance()
    plain = measured[0]["bytes"]
    return [row | {"relative": row["bytes"] / plain} for row in measured]


def _sharded(
    loss: Callable[..., jax.Array], params: nnx.State, layout: str, advance: Callable[[], None]
) -> list[dict[str, Any]]:
    """With weights split over the devices: what the noise adds to what a constant in its place sends."""

    def sent(sampler: Sampler) -> dict[str, Any]:
        gradient = nso_jax.value_and_grad(loss, sigma=SIGMA, sampler=sampler)
        figures = _sent(gradient, _placed(params, LAYOUTS[layout]))
        advance()
        return figures

    # Ones: with zeros the compiler might see that the two evaluations of a pair are the same.
    constant = sent(lambda _, shape, dtype: jnp.ones(shape, dtype))
    measured = {name: sent(sampler) for name, sampler in SAMPLERS.items()}
    return [
        {
            "layout": layout,
            "sampler": name,
            **figures,
            "added_arrays": figures["arrays"] - constant["arrays"],
            "added_bytes": figures["bytes"] - constant["bytes"],
        }
        for name, figures in measured.items()
    ]


def _sent(gradient: Gradient, params: nnx.State) -> dict[str, Any]:
    """What a step of gradient descent sends: arrays and bytes, in all and by kind."""

    def step(key: jax.Array, params: nnx.State, examples: Examples) -> tuple[jax.Array, nnx.State]:
        value, grads = gradient(key, params, examples)
        return value, jax.tree.map(lambda w, g: w - LEARNING_RATE * g, params, grads)

    key = jax.eval_shape(lambda: jax.random.key(0))
    images = _array((BATCH_SIZE, WIDTHS[0]), jnp.float32, jax.P("data"))
    labels = _array((BATCH_SIZE,), jnp.int32, jax.P("data"))
    out_shardings = (None, jax.tree.map(lambda w: w.sharding, params))
    lowered = jax.jit(step, out_shardings=out_shardings).lower(key, params, Examples(images, labels))
    # XLA chooses what to send before it generates code, which need not be good code here.
    compiled = lowered.compile(compiler_options={"xla_backend_optimization_level": "0"})
    by_kind = {kind: sent._asdict() for kind, sent in compilers.collectives(compiled).items()}
    totals: dict[str, Any] = {
        what: sum(kind[what] for kind in by_kind.values()) for what in ("arrays", "bytes")
    }
    return {**totals, "by_kind": by_kind}


def _in_shard_map(gradient: Gradient, mesh: jax.sharding.Mesh) -> Gradient:
    specs = (jax.P(), jax.P(), jax.P("data"))
    return jax.shard_map(gradient, mesh=mesh, in_specs=specs, out_specs=jax.P(), check_vma=False)


def _mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((NUM_DEVICES,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def _placed(params: nnx.State, spec: jax.P) -> nnx.State:
    """The shapes of params whose matrices are split by `spec`, or by rows where it does not divide them."""

    def place(w: jax.Array) -> Any:
        if spec == jax.P() or w.ndim == 1:
            return _array(w.shape, w.dtype, jax.P())
        return _array(w.shape, w.dtype, spec if w.shape[1] % NUM_DEVICES == 0 else LAYOUTS["rows"])

    return jax.tree.map(place, params)


def _array(shape: tuple[int, ...], dtype: Any, spec: jax.P) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(_mesh(), spec))


def _line(axes: Axes, chosen: list[dict[str, Any]], colour: str, marker: str) -> None:
    points = [(row["num_samples"], row["relative"]) for row in chosen if row["num_microbatches"] == 1]
    axes.plot(*zip(*points, strict=True), color=colour, marker=marker, linewidth=2, label=chosen[0]["step"])
    for point in points:
        text = f"{point[1]:g}"
        axes.annotate(text, point, (0, 7), textcoords="offset points", ha="center", color=colour)


def _name(row: dict[str, Any]) -> str:
    parts = row["num_microbatches"]
    return row["step"] if parts == 1 else f"{row['step']}, {parts} parts"


def _sizes(row: dict[str, Any]) -> list[str]:
    return [str(row["arrays"]), f"{row['bytes'] / 1e6:.2f}"]
