"""What weight noise adds to a training step on TPU pods, by the TPU's own compiler; no time is measured."""

import dataclasses
import functools
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from matplotlib.figure import Figure
from rich.progress import Progress

import nso_jax
from benchmarks.cost import compilers
from benchmarks.kit import plots
from benchmarks.kit.files import UserError
from benchmarks.kit.journal import Journal
from benchmarks.kit.options import Resumable
from benchmarks.tasks import decoder
from benchmarks.tasks.decoder import Batch, Params
from nso_jax import noise, parallel, sharpness

SIGMA = 0.01
RHO = 0.05
NUM_DRAWS = 4
NUM_PARTS = 4
LENGTH = 2048
LEARNING_RATE = 1e-4
GIBIBYTE = 2**30

HEADERS = (
    "program",
    "step",
    "gradients",
    "GiB alive",
    "alive beyond plain (params)",
    "FLOPs / plain gradients",
    "bytes accessed / plain gradients",
    "bytes sent / plain",
    "sends / plain",
)

Gradient = Callable[[jax.Array, Params, Batch], tuple[jax.Array, Params]]


class Method(NamedTuple):
    """A way to compute the gradient of a step.

    Attributes:
        label: What it is called.
        function: Makes `gradient(key, params, batch)` of a loss.
        num_gradients: How many it takes of a batch.
        options: Its settings.
        num_parts: Microbatches.
        mapped: Whether chips that have whole params average once in the end, in float32; else jit decides.
    """

    label: str
    function: Callable[..., Gradient] = nso_jax.value_and_grad
    num_gradients: int = 1
    options: dict[str, Any] = {}  # noqa: RUF012  (never changed)
    num_parts: int = 1
    mapped: bool = True


def plain(loss: Callable[..., jax.Array]) -> Gradient:
    """The gradient without noise, in the form of the others."""
    return lambda _, params, batch: jax.value_and_grad(loss)(params, batch)


METHODS = {
    "plain": Method("plain", plain),
    "plain-jit": Method("plain, left to jit", plain, mapped=False),
    "plain-parts": Method(f"plain, {NUM_PARTS} parts", plain, num_parts=NUM_PARTS),
    "nso": Method("NSO", num_gradients=2, options={"sigma": SIGMA}),
    "nso-signs": Method("NSO, signs", num_gradients=2, options={"sigma": SIGMA, "sampler": noise.rademacher}),
    "nso-k4": Method(
        f"NSO, k = {NUM_DRAWS}",
        num_gradients=2 * NUM_DRAWS,
        options={"sigma": SIGMA, "num_samples": NUM_DRAWS},
    ),
    "one-sided": Method("one-sided", options={"sigma": SIGMA, "antithetic": False}),
    "one-sided-signs": Method(
        "one-sided, signs", options={"sigma": SIGMA, "antithetic": False, "sampler": noise.rademacher}
    ),
    "one-sided-parts": Method(
        f"one-sided, {NUM_PARTS} parts",
        options={"sigma": SIGMA, "antithetic": False},
        num_parts=NUM_PARTS,
    ),
    "sam": Method("SAM", sharpness.sam, num_gradients=2, options={"rho": RHO}),
}
SEARCHED = ("plain", "nso", "nso-k4")


class Case(NamedTuple):
    """A model on a slice of a pod.

    Attributes:
        model: The name of its size.
        topology: The slice.
        sharded: Whether the chips that share the batch share the params, too: FSDP, or else data parallelism.
        tensor: Over how many chips the heads and the hidden units of a layer are split.
        examples: For each such group of chips.
        methods: What is compiled.
    """

    model: str
    topology: str
    sharded: bool = True
    tensor: int = 1
    examples: int = 4
    methods: tuple[str, ...] = ("plain", "nso", "one-sided")


CASES = {
    "160M": Case("160M", "v5e:16x16", sharded=False, methods=tuple(METHODS)),
    "1.3B": Case("1.3B", "v5e:16x16"),
    "7B": Case("7B", "v5p:4x8x8", methods=tuple(name for name in METHODS if name != "plain-jit")),
    "34B": Case("34B", "v6e:16x16", examples=1),
    "70B": Case("70B", "v5p:8x8x16", tensor=8, examples=8),
}
COLOURS = dict(zip(CASES, (plots.GREY, plots.ORANGE, plots.BLUE, plots.SKY, plots.PURPLE), strict=True))
MARKERS = dict(zip(CASES, "Dvos^", strict=True))

CaseName = Literal["160M", "1.3B", "7B", "34B", "70B"]


@dataclasses.dataclass(frozen=True)
class Options(Resumable):
    """Compiles training steps for TPU pods and reads what they take; no time is measured.

    Attributes:
        cases: What to compile; 1.3B and 7B take longest.
        largest: The cases of which the largest batch is sought that the chips' memory has room for.
        effort: The compiler's, from -1 to 1. At -1 it takes a third of the time, but its schedules are worse
            than those of its default, and with them the memory alive.
    """

    cases: tuple[CaseName, ...] = ("160M", "34B", "70B")
    largest: tuple[CaseName, ...] = ()
    effort: float = 0.0
    work: Path = Path("runs/pods")


def run(options: Options, progress: Progress) -> dict[str, Any]:
    """Compiles all steps; none of them is run.

    Args:
        options: The settings.
        progress: Where to show how far it is.

    Returns:
        All figures, ready for JSON.
    """
    settings = _settings(options)
    journal = Journal(options.work, options.settings(), resume=options.resume)
    results: dict[str, Any] = {"settings": settings, "cases": {}}
    for name in options.cases:
        case = CASES[name]
        searched = [m for m in SEARCHED if name in options.largest]
        task = progress.add_task(name, total=len(case.methods) + len(searched))
        rows = []
        for method in case.methods:
            compute = functools.partial(_figures, case, METHODS[method], options.effort)
            rows.append({"step": method, **journal.once(f"{name} {method}", compute)})
            progress.advance(task)
        results["cases"][name] = _described(case) | {"steps": rows}
        if searched:
            results["cases"][name]["largest"] = largest = {}
            for method in searched:
                compute = functools.partial(_largest, case, METHODS[method], options.effort)
                largest[method] = journal.once(f"{name} {method} largest", compute)["examples"]
                progress.advance(task)
    return results


def rows(results: dict[str, Any]) -> list[list[str]]:
    """One row for each step of each case."""
    return [
        [
            _title(case),
            METHODS[step["step"]].label,
            str(METHODS[step["step"]].num_gradients),
            f"{step['peak'] / GIBIBYTE:.2f}",
            f"{round(_more_memory(case, step), 2) + 0:.2f}",  # no -0.00
            *(f"{ratio:.3f}" for ratio in _over_plain(case, step).values()),
        ]
        for case in results["cases"].values()
        for step in case["steps"]
    ]


def caption(results: dict[str, Any]) -> str:
    """What the table shows, in a few sentences."""
    settings = results["settings"]
    text = (
        "What one chip does in a training step of a decoder-only Transformer, as the TPU's own compiler "
        f"(libtpu {settings['libtpu']}) states it for programs that are compiled and not run: no time is "
        f"measured. {settings['dtype']}, Adam, examples of {settings['length']:,} tokens, layers scanned and "
        "computed again backward. FSDP: params and Adam's moments are split over all chips that share the "
        "batch; x t: and layers over t chips. Alive: memory for arguments and all else, at most; also "
        "beyond the plain step's, in units of a chip's share of the params in float32. Sent: results of "
        "collective operations, by bytes and number, with loops as often as they repeat. A step in parts is "
        f"compared with a plain one in as many. The compiler's effort: {settings['effort']:g}, of -1 to 1."
    )
    for case in results["cases"].values():
        if largest := case.get("largest"):
            found = ", ".join(f"{count} by {METHODS[step].label}" for step, count in largest.items())
            text += (
                f" Most examples for each chip that fit its memory, {_title(case)}, powers of two: {found}."
            )
    return text


def plot(results: dict[str, Any]) -> bytes:
    """What each step with more than a plain gradient takes, a panel for each figure."""
    cases = results["cases"]
    taken = {step["step"] for case in cases.values() for step in case["steps"]}
    shown = [name for name, method in METHODS.items() if method.function is not plain and name in taken]
    figure = Figure(figsize=(plots.WIDTH, 1.6 + 0.66 * len(shown)), layout="constrained")
    panels = figure.subplots(2, 2, sharey=True).ravel()
    for panel, (label, value) in zip(panels, PANELS.items(), strict=True):
        for i, (name, case) in enumerate(cases.items()):
            steps = [step for step in case["steps"] if step["step"] in shown]
            x = [value(case, step) for step in steps]
            # One below the other, so that none hides another.
            y = [shown.index(step["step"]) + 0.16 * (i - (len(cases) - 1) / 2) for step in steps]
            style = {"color": COLOURS[name], "marker": MARKERS[name], "markersize": 4.5}
            panel.plot(x, y, linestyle="", label=_title(case), **style)
        panel.set(xlabel=label, ylim=(len(shown) - 0.4, -0.6))
    panels[0].set_yticks(range(len(shown)), [METHODS[name].label for name in shown])
    for panel in panels[:2]:
        low, high = panel.get_xlim()
        panel.set(xlim=(min(low, 0.88), max(high, 1.12)), xticks=(0.9, 1, 1.1))
    panels[2].set_xscale("log", base=2)
    panels[2].xaxis.set_major_formatter("{x:g}")
    figure.suptitle("What a step on a TPU pod takes, by its compiler (no time)", fontsize="large")
    return plots.finish(figure, panels[0], columns=2)


def lowered(case: Case, method: Method) -> jax.stages.Lowered:
    """A training step of a case, ready to be compiled for its chips."""
    size = decoder.SIZES[case.model]
    chips = compilers.tpu(case.topology)
    axes = {"data": len(chips) // case.tensor, "tensor": case.tensor}
    auto = (jax.sharding.AxisType.Auto,) * len(axes)
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=auto, devices=chips)
    place = functools.partial(jax.NamedSharding, mesh)

    def placed(shapes: Any, specs: Any) -> Any:
        return jax.tree.map(
            lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(spec)), shapes, specs
        )

    shapes = jax.eval_shape(lambda: decoder.init(jax.random.key(0), size))
    specs = decoder.partition(shapes, "data" if case.sharded else None, "tensor")
    optimizer = optax.adamw(LEARNING_RATE)
    moments = jax.eval_shape(optimizer.init, shapes)
    of_moments = optax.tree.map_params(
        optimizer, lambda _, spec: spec, moments, specs, transform_non_params=lambda _: jax.P()
    )
    tokens: Any = jax.ShapeDtypeStruct(
        (axes["data"] * case.examples, LENGTH), jnp.int32, sharding=place(jax.P("data"))
    )
    # In data parallelism there is nothing to be told: a chip has all of the params and its own examples.
    activations = place(jax.P("data")) if case.sharded else None
    loss = functools.partial(decoder.loss, size=size, sharding=activations)
    gradient = _gradient(method, loss, mesh, sharded=case.sharded)

    def step(params: Params, state: Any, key: jax.Array, batch: Batch) -> tuple[Params, Any, jax.Array]:
        value, grads = gradient(key, params, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    args = (
        placed(shapes, specs),
        placed(moments, of_moments),
        placed(jax.eval_shape(lambda: jax.random.key(0)), jax.P()),
        Batch(tokens, tokens),
    )
    out_shardings = (*jax.tree.map(lambda x: x.sharding, args[:2]), None)
    return jax.jit(step, donate_argnums=(0, 1), out_shardings=out_shardings).lower(*args)


def _gradient(
    method: Method, loss: Callable[..., jax.Array], mesh: jax.sharding.Mesh, *, sharded: bool
) -> Gradient:
    """What people write for params that are sharded, or that are not."""
    if sharded or not method.mapped:
        return parallel.microbatch(method.function(loss, **method.options), method.num_parts)
    options = method.options | {"num_microbatches": method.num_parts}
    return parallel.value_and_grad(loss, mesh=mesh, method=method.function, **options)


def _compiled(case: Case, method: Method, effort: float) -> jax.stages.Compiled:
    options: Any = {"exec_time_optimization_effort": effort}  # typed for strings and bools alone
    return lowered(case, method).compile(compiler_options=options)


def _figures(case: Case, method: Method, effort: float) -> dict[str, Any]:
    """Of one chip."""
    program = _compiled(case, method, effort)
    text = program.as_text() or ""
    return {
        "memory": compilers.memory(program)._asdict(),
        "peak": program.memory_analysis().peak_memory_in_bytes,  # type: ignore[union-attr]
        **compilers.cost(text)._asdict(),
        "collectives": {kind: sent._asdict() for kind, sent in compilers.collectives(text).items()},
    }


def _largest(case: Case, method: Method, effort: float) -> dict[str, int]:
    """The most examples for which the compiler finds room: the case's, doubled as long as there is some."""
    while _fits(larger := case._replace(examples=2 * case.examples), method, effort):
        case = larger
    return {"examples": case.examples}


def _fits(case: Case, method: Method, effort: float) -> bool:
    try:
        _compiled(case, method, effort)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return False
    return True


def _settings(options: Options) -> dict[str, Any]:
    try:
        libtpu = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError("needs libtpu, the TPU's compiler: pip install 'jax[tpu]'") from error
    return {
        "libtpu": libtpu,
        "length": LENGTH,
        "dtype": "float32 params, bfloat16 products",
        "draws": NUM_DRAWS,
        "parts": NUM_PARTS,
        "effort": options.effort,
    }


def _described(case: Case) -> dict[str, Any]:
    shapes = jax.eval_shape(lambda: decoder.init(jax.random.key(0), decoder.SIZES[case.model]))
    weights = sum(w.size for w in jax.tree.leaves(shapes))
    chips = len(compilers.tpu(case.topology))
    shards = chips if case.sharded else 1
    about = {name: value for name, value in case._asdict().items() if name != "methods"}
    return about | {"weights": weights, "chips": chips, "param_bytes_per_chip": 4 * weights / shards}


def _title(case: dict[str, Any]) -> str:
    split = "FSDP" if case["sharded"] else "data parallel"
    return f"{case['model']}, {case['topology']}, {split}" + (
        f" x {case['tensor']}" if case["tensor"] > 1 else ""
    )


def _plain(case: dict[str, Any], step: dict[str, Any]) -> dict[str, Any]:
    """The plain step that another is compared with: in as many parts, where there is one."""
    by_name = {each["step"]: each for each in case["steps"]}
    in_parts = METHODS[step["step"]].num_parts > 1 and step["step"] != "plain-parts"
    return by_name.get("plain-parts", by_name["plain"]) if in_parts else by_name["plain"]


def _more_memory(case: dict[str, Any], step: dict[str, Any]) -> float:
    """What is alive at once beyond a plain step's, in units of a chip's share of the params."""
    return (step["peak"] - _plain(case, step)["peak"]) / case["param_bytes_per_chip"]


def _over_plain(case: dict[str, Any], step: dict[str, Any]) -> dict[str, float]:
    """FLOPs and bytes accessed over those of as many plain steps, and what is sent over what one sends."""

    def amounts(step: dict[str, Any], gradients: int) -> dict[str, float]:
        sent = step["collectives"].values()
        return {
            "flops": step["flops"] / gradients,
            "bytes_accessed": step["bytes_accessed"] / gradients,
            "bytes_sent": sum(kind["bytes"] for kind in sent),
            "sends": sum(kind["operations"] for kind in sent),
        }

    plain = amounts(_plain(case, step), 1)
    taken = amounts(step, METHODS[step["step"]].num_gradients)
    return {name: amount / plain[name] for name, amount in taken.items()}


PANELS: dict[str, Callable[[dict[str, Any], dict[str, Any]], float]] = {
    "FLOPs / plain gradients": lambda case, step: _over_plain(case, step)["flops"],
    "bytes accessed / plain gradients": lambda case, step: _over_plain(case, step)["bytes_accessed"],
    "bytes sent / plain step (log scale)": lambda case, step: _over_plain(case, step)["bytes_sent"],
    "memory beyond plain / params": _more_memory,
}
