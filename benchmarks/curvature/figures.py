"""The figures of a network's curvature: each function measures one kind, and shows how far it is."""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import numpy as np
import optax
from flax import nnx
from rich.progress import Progress

from benchmarks.kit.files import UserError
from benchmarks.tasks import checkpoints, data
from benchmarks.tasks.data import Examples
from nso_jax import curvature
from nso_jax.curvature import CurvatureMatrix, Eigenpairs, LayerStructure

TOLERANCE = 1e-4  # of an eigenvalue's residual, over the largest eigenvalue
NUM_SAMPLES = 64  # draws of weight noise
SIGMAS = np.geomspace(1 / 8, 2, 9)  # over the suggested one, which is among them
BOUND_PROBES = 50
GRID_POINTS = 21  # along each of two directions
OUTLIER = 0.01  # an eigenvalue above this share of the largest one counts as large


class Problem(NamedTuple):
    """What is measured.

    Attributes:
        hessian: That of the mean loss over what the network was trained on.
        gauss_newton: The Gauss-Newton matrix of the same.
        initial_params: The weights before training.
    """

    hessian: CurvatureMatrix
    gauss_newton: CurvatureMatrix
    initial_params: nnx.State


def load(path: Path) -> tuple[nnx.Module, checkpoints.Metadata]:
    """A network that the demo saved, and how it was trained."""
    if not path.exists():
        raise UserError(f"no network in {path}: `python -m benchmarks demo` saves some in runs/demo")
    return checkpoints.load(path)


def problem(network: nnx.Module, metadata: checkpoints.Metadata) -> Problem:
    """The network's mean loss over what it was trained on."""
    graphdef, params, rest = nnx.split(network, nnx.Param, ...)  # type: ignore[misc]  # flax types it so

    def logits(params: nnx.State, examples: Examples) -> jax.Array:
        return nnx.merge(graphdef, params, rest, copy=True)(examples.inputs)

    def loss(logits: jax.Array, examples: Examples) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits, examples.labels).mean()

    initial_params = nnx.state(checkpoints.initial(metadata), nnx.Param)
    train = data.digits(metadata.seed, metadata.num_train, metadata.wrong_labels).train
    matrix = curvature.gauss_newton(logits, loss, params, train, mask=_matrices)
    return Problem(curvature.hessian(matrix.fun, params, train), matrix, initial_params)


class _Bar:
    """A bar of the display, called with how much is done: how much there is may turn out only at the end."""

    def __init__(self, progress: Progress, title: str, total: int | None = None) -> None:
        self.done = 0
        self._progress, self._id = progress, progress.add_task(title, total=total)

    def __call__(self, done: int) -> None:
        self.done = done
        self._progress.update(self._id, completed=done)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.update(self._id, total=self.done)


def trace(problem: Problem, products: int, progress: Progress) -> dict[str, Any]:
    """The trace, and each layer's share of it."""
    with _Bar(progress, "trace", products) as task:
        trace = curvature.trace(
            jax.random.key(0),
            problem.hessian,
            num_products=products,
            param_labels=_layer_names,
            callback=task,
        )
    errors = trace.per_leaf_standard_error
    layers = {name: _measured(share, errors[name]) for name, share in trace.per_leaf.items()}
    return _measured(trace.value, trace.standard_error, num_products=trace.num_products, layers=layers)


def _layer_names(params: nnx.State) -> Any:
    return jax.tree.map_with_path(lambda path, _: path[0].key, params)


def eigenvalues(problem: Problem, which: str, k: int, progress: Progress) -> Eigenpairs:
    """The eigenvalues of the Hessian at one end."""
    with _Bar(progress, f"{which} eigenvalues") as task:
        return curvature.eigenvalues(
            jax.random.key(1),
            problem.hessian,
            k=k,
            which=which,
            tol=TOLERANCE,
            callback=task,
        )


def without_vectors(pairs: Eigenpairs) -> dict[str, Any]:
    """Eigenvalues, their residuals and what they took, ready for JSON."""
    return {
        "values": pairs.values.tolist(),
        "residuals": pairs.residuals.tolist(),
        "num_products": pairs.num_products,
    }


def density(problem: Problem, probes: int, steps: int, largest: float, progress: Progress) -> dict[str, Any]:
    """The spectral density, and how many eigenvalues are large by it."""
    with _Bar(progress, "spectral density", probes * steps) as task:
        density = curvature.spectral_density(
            jax.random.key(2),
            problem.hessian,
            num_probes=probes,
            num_steps=steps,
            num_points=500,
            callback=task,
        )
    shares = np.sum(density.weights, axis=1, where=density.nodes > OUTLIER * largest)
    counts = num_weights(problem) * shares
    error = float(counts.std(ddof=1)) / math.sqrt(len(counts))
    return _listed(density._asdict()) | {"large": _measured(float(counts.mean()), error)}


def layers(problem: Problem, k: int, progress: Progress) -> dict[str, Any]:
    """The dense layers' blocks of the Gauss-Newton matrix, by the path of their weights."""
    with _Bar(progress, "layers") as task:
        structures = curvature.layer_structure(jax.random.key(3), problem.gauss_newton, k=k, callback=task)
    leaves = checkpoints.named(problem.hessian.params)
    names = [name for name, leaf in leaves.items() if leaf.ndim == 2]
    blocks = {name: _block(found) for name, found in zip(names, structures.values(), strict=True)}
    return {"num_products": task.done, "blocks": blocks}


def _matrices(params: nnx.State) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim == 2, params)


def _block(structure: LayerStructure) -> dict[str, Any]:
    kronecker = structure.kronecker
    assert kronecker, structure.reason  # noqa: S101
    return without_vectors(structure.eigenpairs) | {
        "kronecker_eigenvalues": kronecker.eigenvalues.tolist(),
        "kronecker_error": _measured(kronecker.error, kronecker.error_standard_error),
        "overlap": kronecker.overlap,
    }


def noise(problem: Problem, products: int, progress: Progress) -> dict[str, Any]:
    """How much noise the loss bears, and how much it rises with noise of about that size."""
    key, h = jax.random.key(4), problem.hessian
    with _Bar(progress, "suggested sigma"):
        found = curvature.suggest_sigma(key, h, num_samples=NUM_SAMPLES, num_products=products)
    sigmas = (found.sigma * SIGMAS).tolist()
    with _Bar(progress, "noise", 1 + 2 * NUM_SAMPLES * len(sigmas)) as task:
        gap = curvature.noise_stability_gap(
            key, h, sigmas=sigmas, num_samples=NUM_SAMPLES, num_products=products, callback=task
        )
    return {
        "suggested": {
            "sigma": found.sigma,
            "gap": _measured(found.gap, found.standard_error),
            "quadratic": _measured(
                found.sigma**2 / 2 * found.trace.value, found.sigma**2 / 2 * found.trace.standard_error
            ),
            "tried": found.table.sigma.tolist(),
        },
        "num_samples": NUM_SAMPLES,
        "num_evaluations": task.done,
        "trace": _measured(gap.trace.value, gap.trace.standard_error, num_products=gap.trace.num_products),
        **_listed({name: value for name, value in gap._asdict().items() if name not in {"loss", "trace"}}),
    }


def bound(problem: Problem, progress: Progress) -> dict[str, Any]:
    """A PAC-Bayes bound with all its parts."""
    leaves = len(jax.tree.leaves(problem.hessian.params))
    with _Bar(progress, "PAC-Bayes bound", BOUND_PROBES * leaves) as task:
        bound = curvature.pac_bayes_bound(
            jax.random.key(5),
            problem.hessian,
            initial_params=problem.initial_params,
            num_probes=BOUND_PROBES,
            callback=task,
        )
    parts = {name: checkpoints.named(getattr(bound, name)) for name in ("leaf_traces", "leaf_distances")}
    return bound._asdict() | parts | {"num_derivatives": task.done}


def surface(problem: Problem, pairs: Eigenpairs, loss: float, progress: Progress) -> dict[str, Any]:
    """The losses on a grid in the plane of the top two eigenvectors.

    Along the first one, a quadratic loss would triple towards the edge.
    """
    h = problem.hessian
    edge = 2 * math.sqrt(loss / float(pairs.values[0]))
    distances = np.linspace(-edge, edge, GRID_POINTS)
    directions = pairs.vectors[:2]
    losses = np.empty((GRID_POINTS, GRID_POINTS))
    with _Bar(progress, "surface", losses.size) as task:
        for done, (i, j) in enumerate(np.ndindex(losses.shape), start=1):
            steps = distances[i], distances[j]
            losses[i, j] = _loss_beside(h.fun, h.params, directions, steps, h.batches)
            task(done)
    # Eigenvectors have no sign: the steeper side goes to the right, and up.
    if losses[0].mean() > losses[-1].mean():
        losses = losses[::-1]
    if losses[:, 0].mean() > losses[:, -1].mean():
        losses = losses[:, ::-1]
    return {"distances": distances.tolist(), "losses": losses.tolist()}


@functools.partial(jax.jit, static_argnames="loss")
def _loss_beside(
    loss: Callable[[nnx.State, Examples], jax.Array],
    params: nnx.State,
    directions: list[nnx.State],
    steps: tuple[float, float],
    examples: Examples,
) -> jax.Array:
    moved = jax.tree.map(lambda w, u, v: w + steps[0] * u + steps[1] * v, params, *directions)
    return loss(moved, examples)


def num_weights(problem: Problem) -> int:
    """How many weights the network has."""
    return sum(leaf.size for leaf in jax.tree.leaves(problem.hessian.params))


def _measured(value: float, error: float, **more: Any) -> dict[str, Any]:
    return {"value": value, "standard_error": error, **more}


def _listed(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: np.asarray(value).tolist() for name, value in figures.items()}
