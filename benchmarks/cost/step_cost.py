"""How long a whole training step takes: plain, by SAM and by NSO; in JAX and in PyTorch."""

import dataclasses
import functools
import importlib.metadata
import math
from typing import Any, Literal, get_args

import numpy as np
from matplotlib.figure import Figure
from rich.progress import Progress

from benchmarks.cost import jax_steps
from benchmarks.kit import plots, timing
from benchmarks.kit.options import Count, Output
from benchmarks.kit.timing import Call, Ratio

NOISE = "noise"  # a case of its own, beside those of `jax_steps`

# Every step with its label, under the library that makes it.
LIBRARIES = {
    "JAX and optax": {"plain": "plain", "plain-parts": "plain, in parts", "sam": "SAM"},
    "nso_jax": {
        "nso": "NSO",
        "nso-signs": "NSO, signs",
        "nso-k4": "NSO, k = 4",
        "nso-signs-k4": "NSO, signs, k = 4",
        "one-sided": "one-sided",
        "one-sided-signs": "one-sided, signs",
        "one-sided-parts": "one-sided, in parts",
    },
    "PyTorch": {"torch-plain": "PyTorch: plain", "torch-sam": "PyTorch: SAM", "torch-nso": "PyTorch: NSO"},
}
LABELS = {step: label for labels in LIBRARIES.values() for step, label in labels.items()}
COLOURS = {"JAX and optax": plots.ORANGE, "nso_jax": plots.BLUE, "PyTorch": "#999999"}

SHOWN = {
    "NSO / 2 gradients": Ratio("nso", 2, "plain-gradient"),
    "NSO / SAM": Ratio("nso", 1, "sam"),
    "one side / plain": Ratio("one-sided", 1, "plain"),
    "its signs / plain": Ratio("one-sided-signs", 1, "plain"),
    "in parts / plain": Ratio("one-sided-parts", 1, "plain-parts"),
    "k=4 / 4 x k=1": Ratio("nso-k4", 4, "nso"),
}
COMPILING = "build k=4 / k=1"
RATIOS = SHOWN | {
    "signs / 2 gradients": Ratio("nso-signs", 2, "plain-gradient"),
    "NSO / PyTorch NSO": Ratio("nso", 1, "torch-nso"),
    "signs / SAM": Ratio("nso-signs", 1, "sam"),
    "NSO gradient / 2 gradients": Ratio("nso-gradient", 2, "plain-gradient"),
    "signs gradient / 2 gradients": Ratio("nso-signs-gradient", 2, "plain-gradient"),
    "signs, k=4 / 4 x k=1": Ratio("nso-signs-k4", 4, "nso-signs"),
    "signs / PyTorch NSO": Ratio("nso-signs", 1, "torch-nso"),
}
HEADERS: tuple[str, ...] = ("case", "plain step (ms)", *SHOWN, COMPILING)


CaseName = Literal["convnet", "convnet-28", "mlp-64", "mlp-512", "transformer", "noise"]


@dataclasses.dataclass(frozen=True)
class Options(Output):
    """Times whole training steps: plain, by SAM and by NSO; in JAX and in PyTorch.

    Attributes:
        cases: What to time.
        repetitions: Measurements of each time.
    """

    cases: tuple[CaseName, ...] = get_args(CaseName)
    repetitions: Count = 25


def run(options: Options, progress: Progress) -> dict[str, Any]:
    """Times all steps."""
    results: dict[str, Any] = {"settings": _settings(), "cases": {}}
    for name, case in jax_steps.CASES.items():
        if name in options.cases:
            num_weights, calls = jax_steps.step_calls(case)
            compiling = timing.first_calls({name: calls[name] for name in ("nso", "nso-k4")})
            seconds = _timed(case.title, calls, options.repetitions, progress)
            results["cases"][name] = {
                "title": case.title,
                "weights": num_weights,
                "first_call_seconds": compiling,
                **_figures(seconds, RATIOS),
                "over_plain_step": timing.ratios(seconds, {step: Ratio(step, 1, "plain") for step in LABELS}),
            }
    if NOISE in options.cases:
        calls = jax_steps.noise_calls()
        seconds = _timed(NOISE, calls, options.repetitions, progress)
        results[NOISE] = _figures(seconds, {name: Ratio(name, 1, "constant") for name in calls})
    return results


def rows(results: dict[str, Any]) -> list[list[str]]:
    """One row for each case: a time, and ratios of times."""
    return [
        [
            case["title"],
            f"{case['milliseconds']['plain']['median']:.3g}",
            *(_ratio(case["ratios"].get(name)) for name in SHOWN),
            f"{case['first_call_seconds']['nso-k4'] / case['first_call_seconds']['nso']:.2f}",
        ]
        for case in results["cases"].values()
    ]


def caption(results: dict[str, Any]) -> str:
    """What the table shows, in a few sentences."""
    settings, machine = results["settings"], results["machine"]
    count = next(iter([*results["cases"].values(), results.get(NOISE, {})]))["repetitions"]
    text = (
        f"Medians of {count} repetitions, each of all steps of a case in turn, on "
        f"{machine['cpu_count']} CPU cores ({machine['device']}). A step: gradient and update, by SGD with "
        "momentum. NSO: k = 1, normal noise; signs: Rademacher noise. 2 gradients: twice a plain gradient, "
        "without an update. One side: one draw, one gradient, normal noise or signs; in parts: with noise "
        "relative to the weights, of 4 microbatches, over a plain step of as many. SAM: that of optax. "
        "Build: by the first call of a step. "
    )
    if settings["torch"]:
        text += (
            f"PyTorch: {settings['torch']}, not compiled, {settings['torch_threads']} threads; its NSO takes "
            "three passes forward and backward, as the authors' trainer does. "
        )
    else:
        text += "PyTorch is not installed, or lacks the device. "
    if NOISE in results:
        over = {name: _ratio(ratio) for name, ratio in results[NOISE]["ratios"].items()}
        text += (
            f"To add noise to {settings['noise_weights']:,} weights takes {over['signs']} (signs) and "
            f"{over['normal']} (normal) times as long as to add a constant; with jax.random.normal it takes "
            f"{over['jax-normal']} times as long."
        )
    return text.strip()


def plot(results: dict[str, Any]) -> bytes:
    """Times of the steps over the plain step's, a panel for each case, with quartiles."""
    cases = [(case["title"], case["over_plain_step"]) for case in results["cases"].values()]
    shown = [step for step in LABELS if any(step in times for _, times in cases)]
    lines = max(1, math.ceil(len(cases) / 2))
    figure = Figure(figsize=(plots.WIDTH, 1.2 + lines * (0.9 + 0.24 * len(shown))), layout="constrained")
    panels = figure.subplots(lines, 2, sharey=True, sharex=True).ravel()
    for panel, (title, times) in zip(panels, cases, strict=False):
        for library, labels in LIBRARIES.items():
            ratios = {shown.index(step): times[step] for step in labels if step in times}
            if ratios:
                plots.bars(panel, ratios, ".1f", color=COLOURS[library], label=library)
        for step in set(shown) - times.keys():
            panel.text(0.1, shown.index(step), "not measured", va="center", fontsize="small")
        panel.set(title=title)
        panel.margins(x=0.12)
        panel.set_axisbelow(True)
    for panel in panels[len(cases) :]:
        panel.set_visible(False)
    panels[0].set_yticks(range(len(shown)), [LABELS[step] for step in shown])
    panels[0].invert_yaxis()
    for panel in panels[-2:]:
        panel.set_xlabel("time / plain step in JAX")
    figure.suptitle("What a step costs: median and quartiles", fontsize="large")
    return plots.finish(figure, panels[0])


def _timed(
    title: str, calls: dict[str, Call], repetitions: int, progress: Progress
) -> dict[str, list[float]]:
    task = progress.add_task(title, total=len(calls) * (1 + repetitions))
    return timing.interleaved(calls, repetitions, functools.partial(progress.advance, task))


def _figures(seconds: dict[str, list[float]], ratios: dict[str, Ratio]) -> dict[str, Any]:
    milliseconds = {name: timing.quartiles([1e3 * time for time in times]) for name, times in seconds.items()}
    return {
        "repetitions": len(next(iter(seconds.values()))),
        "milliseconds": milliseconds,
        "ratios": timing.ratios(seconds, ratios),
    }


def _ratio(quartiles: dict[str, float] | None) -> str:
    return f"{quartiles['median']:.2f}" if quartiles else "-"


def _settings() -> dict[str, Any]:
    settings = {
        "optimizer": "SGD",
        "learning_rate": jax_steps.LEARNING_RATE,
        "momentum": jax_steps.MOMENTUM,
        "sigma": jax_steps.SIGMA,
        "rho": jax_steps.RHO,
        "relative_scale": jax_steps.RELATIVE_SCALE,
        "parts": jax_steps.NUM_PARTS,
        "dropout": 0.0,
        "noise_weights": int(np.prod(jax_steps.NOISE_SHAPE)),
        "torch": None,
        "torch_threads": None,
    }
    if timing.torch_device():
        import torch  # noqa: PLC0415

        settings |= {"torch": importlib.metadata.version("torch"), "torch_threads": torch.get_num_threads()}
    return settings
