"""The studies: the commands that measure, by the rooms of the house that they stand in."""

import importlib
import os
from typing import Any, NamedTuple


class Study(NamedTuple):
    """A command that measures, of a module that is a `kit.report.Benchmark` with `Options`.

    Attributes:
        module: Where it stands.
        help: What it does.
        minutes: That it takes on two CPU cores, by default.
        devices: How many devices a CPU is to be split into; None leaves that to the user.
        compiles: Whether it compiles for chips that are not there, so that JAX itself is to stay on the CPU.
    """

    module: str
    help: str
    minutes: int
    devices: int | None = None
    compiles: bool = False


class Room(NamedTuple):
    """Studies of one claim.

    Attributes:
        claim: What they are of.
        studies: By their names on the command line.
    """

    claim: str
    studies: dict[str, Study]


ROOMS = {
    "quality": Room(
        "where training leads",
        {
            "demo": Study("benchmarks.quality.demo", "four methods on small digits, with wrong labels", 1),
            "images": Study("benchmarks.quality.images", "methods compared in fine-tuning on few images", 25),
            "text": Study("benchmarks.quality.text", "methods compared in fine-tuning on sentences", 30),
            "confirm": Study(
                "benchmarks.quality.confirm", "whether a published gain holds, from many more seeds", 4
            ),
            "contrastive": Study(
                "benchmarks.quality.contrastive", "methods compared on photographs and captions", 30
            ),
            "reasoning": Study(
                "benchmarks.quality.reasoning", "methods compared in LoRA training of a language model", 30
            ),
            "ablate": Study("benchmarks.quality.ablate", "what each choice in weight noise is worth", 20),
            "variance": Study(
                "benchmarks.quality.variance", "variance of the averaged gradient, at equal cost", 15, 8
            ),
            "matrix-sensing": Study(
                "benchmarks.quality.matrix_sensing", "the paper's problem: a matrix from few measurements", 10
            ),
            "robustness": Study(
                "benchmarks.quality.robustness", "accuracy under attack, after input penalties or NSO", 40
            ),
            "rates": Study("benchmarks.quality.rates", "how fast gradients fall, beside theory", 5),
            "regularizers": Study(
                "benchmarks.quality.regularizers", "SEHT, its rivals and NSO, at equal time", 15
            ),
            "precision": Study(
                "benchmarks.quality.precision", "what 16-bit numbers do to small noise and to training", 1
            ),
        },
    ),
    "cost": Room(
        "time, memory, communication",
        {
            "step-cost": Study(
                "benchmarks.cost.step_cost", "times of training steps, beside SAM and PyTorch", 10
            ),
            "memory": Study(
                "benchmarks.cost.memory", "memory of the averaged gradient beyond a plain one", 5
            ),
            "communication": Study(
                "benchmarks.cost.communication", "bytes that devices exchange in a training step", 1, 8
            ),
            "pods": Study(
                "benchmarks.cost.pods", "training steps on TPU pods, by the TPU's compiler", 30, compiles=True
            ),
            "rivals": Study("benchmarks.cost.rivals", "what SAM, its family and penalties cost", 10),
        },
    ),
    "curvature": Room(
        "how curved a loss is",
        {
            "curvature": Study(
                "benchmarks.curvature.saved_network", "how curved the loss of a saved network is", 1
            ),
            "curvature-peers": Study(
                "benchmarks.curvature.peers", "curvature, beside PyHessian and curvlinops", 5
            ),
        },
    ),
    "reliability": Room(
        "what is lost when something goes wrong; in tests/reliability",
        {
            "reliability": Study(
                "tests.reliability.command", "faults and odd inputs, and what is lost by them", 28, 8
            )
        },
    ),
}
STUDIES = {name: study for room in ROOMS.values() for name, study in room.studies.items()}


def load(name: str) -> Any:
    """A study's module, imported with as many devices as it needs: JAX reads the flag only once."""
    # Threads of NumPy's would wait for cores that those of XLA and PyTorch keep busy.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    flag, flags = "--xla_force_host_platform_device_count", os.environ.get("XLA_FLAGS", "")
    if (devices := STUDIES[name].devices) and flag not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}={devices}".strip()
    if STUDIES[name].compiles:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    return module(name)


def module(name: str) -> Any:
    """The module of a study, or of results of it: those on some data have its name after the study's."""
    return importlib.import_module(STUDIES[study_of(name) or name].module)


def study_of(results: str) -> str | None:
    """The study that results are of, `images` for `images-digits`; None if there is none."""
    named = [name for name in STUDIES if results == name or results.startswith(f"{name}-")]
    return max(named, key=len, default=None)
