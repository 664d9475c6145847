"""What is measured of a network: loss, accuracy, the curvature of the loss, slices of its surface.

All of it in evaluation mode, without dropout and with batch normalization frozen, so that the loss is one
function of the weights.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from benchmarks.tasks import models
from benchmarks.tasks.data import Examples, Split
from benchmarks.training.loop import CHUNK
from benchmarks.training.regularizers import Loss
from nso_jax import curvature, noise
from nso_jax.curvature import CurvatureMatrix

SLICE_DISTANCES = {
    "random": np.linspace(-0.5, 0.5, 21).tolist(),
    "eigenvector": np.linspace(-0.1, 0.1, 21).tolist(),
}


class Network(NamedTuple):
    """A network's weights, and the rest of its state (batch statistics, random streams)."""

    params: nnx.State
    rest: nnx.State


# Examples with a network's `rest`.
Batch = tuple[Examples, nnx.State]


@dataclasses.dataclass
class Gauge:
    """Compiled functions of params and a batch, and the Hessian of the first one.

    Attributes:
        loss: The mean loss over a batch.
        accuracy: The share of a batch that is right.
        chunk: How many examples to have in a batch.
    """

    loss: Callable[[nnx.State, Batch], jax.Array]
    accuracy: Callable[[nnx.State, Batch], jax.Array]
    chunk: int = CHUNK
    _first: CurvatureMatrix | None = None

    def hessian(self, params: nnx.State, batches: Batch | list[Batch]) -> CurvatureMatrix:
        """The Hessian of the mean loss, whose programs all networks and data share."""
        if self._first is None:
            number = lambda batch: len(batch[0].labels)  # noqa: E731  # the rest's leading axes count nothing
            self._first = curvature.hessian(self.loss, params, batches, weight=number)
        return self._first.at(params).on(batches)


def split_network(model: nnx.Module) -> tuple[nnx.GraphDef[Any], Network]:
    """The model's structure in evaluation mode, and its state."""
    model.eval()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]  # flax types it so
    return graphdef, Network(params, rest)


def gauge(
    graphdef: nnx.GraphDef[Any],
    loss: Loss = models.cross_entropy,
    accuracy: Callable[..., jax.Array] = models.accuracy,
    chunk: int = CHUNK,
) -> Gauge:
    """Functions for all networks of one structure: whatever the method and seed, they are compiled once.

    Args:
        graphdef: The structure.
        loss: `loss(model, examples)`, a mean over the examples.
        accuracy: Like it, the share that is right.
        chunk: How many examples to evaluate at once.
    """

    def of_params(fun: Callable[..., jax.Array]) -> Callable[[nnx.State, Batch], jax.Array]:
        def compiled(params: nnx.State, batch: Batch) -> jax.Array:
            examples, rest = batch
            return fun(nnx.merge(graphdef, params, rest), examples)

        return jax.jit(compiled)

    return Gauge(of_params(loss), of_params(accuracy), chunk)


def measure_point(gauge: Gauge, network: Network, split: Split, num_products: int) -> dict[str, float]:
    """The figures followed over training: losses, test accuracy, the trace of the training loss's Hessian."""
    params, rest = network
    train, test, mislabelled = ((part, rest) for part in (split.train, split.test, split.mislabelled_test))
    # The same probes for all networks, so that differences between them are less noisy than each.
    trace = curvature.trace(jax.random.key(0), gauge.hessian(params, train), num_products=num_products)
    train_loss = float(gauge.loss(params, train))
    return {
        "test_accuracy": float(gauge.accuracy(params, test)),
        "train_loss": train_loss,
        "test_loss": float(gauge.loss(params, test)),
        "loss_gap": float(gauge.loss(params, mislabelled)) - train_loss,
        "trace": trace.value,
        "trace_standard_error": trace.standard_error,
    }


def measure_surface(gauge: Gauge, network: Network, split: Split, seed: int) -> dict[str, Any]:
    """The largest eigenvalue of the training loss's Hessian, and the losses along two lines.

    One line follows a random direction in which each filter moves in proportion to its own size (after Li et
    al., arXiv 1712.09913), biases and batch normalization staying; the other follows the top eigenvector.
    """
    params, rest = network
    key = jax.random.fold_in(jax.random.key(0), seed)
    pairs = curvature.eigenvalues(key, gauge.hessian(params, (split.train, rest)), k=1, tol=1e-3)
    directions = {"random": _random_direction(key, params), "eigenvector": pairs.vectors[0]}
    slices = {
        name: {
            part: _along(gauge, params, direction, SLICE_DISTANCES[name], (examples, rest))
            for part, examples in (("train", split.train), ("test", split.test))
        }
        for name, direction in directions.items()
    }
    # An eigenvector has no sign: the steeper side goes to the right.
    train = slices["eigenvector"]["train"]
    if train[0] > train[-1]:
        slices["eigenvector"] = {part: losses[::-1] for part, losses in slices["eigenvector"].items()}
    return {
        "largest_eigenvalue": float(pairs.values[0]),
        "eigenvalue_residual": float(pairs.residuals[0]),
        "slices": slices,
    }


@jax.jit
def _random_direction(key: jax.Array, params: nnx.State) -> Any:
    kernels = jax.tree.map(lambda w: w.ndim > 1, params)
    return noise.perturbation(key, params, noise.relative(1.0, per="channel"), mask=kernels)


_moved = jax.jit(noise.perturb)


def _along(
    gauge: Gauge,
    params: nnx.State,
    direction: Any,
    distances: Sequence[float],
    batch: Batch,
) -> list[float]:
    return [float(gauge.loss(_moved(params, direction, t), batch)) for t in distances]
