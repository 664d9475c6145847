"""The rivals of `nso_jax.curvature` in PyTorch: PyHessian and curvlinops, each as it is usually called."""

import contextlib
import importlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from flax import nnx
from scipy.sparse.linalg import eigsh
from torch import nn

from benchmarks.tasks.data import Examples

MOST_ITERATIONS = 1000  # of PyHessian, for each eigenvalue
# The layers with weights, in PyTorch's order.
_LAYERS = {"ConvNet": ("conv1", "norm1", "conv2", "norm2", "dense1", "dense2")}


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without warnings of what the rivals do inside."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.script", category=DeprecationWarning)
        # PyHessian breaks that cycle itself.
        warnings.filterwarnings("ignore", message="Using backward.* with create_graph", category=UserWarning)
        yield


def _module(name: str) -> Any:
    """A package, or None where it or what it needs is missing."""
    with _silent():
        try:
            return importlib.import_module(name)
        except ImportError:
            return None


PYHESSIAN = _module("pyhessian")
CURVLINOPS = _module("curvlinops")


class Passes(list[tuple[torch.Tensor, torch.Tensor]]):
    """Batches that count how often they are gone through: once for each product of the rivals."""

    num_passes = 0

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Counts."""
        self.num_passes += 1
        return super().__iter__()


class Problem(NamedTuple):
    """A network in evaluation mode, its loss and its data.

    Attributes:
        model: The network.
        criterion: The mean loss of its outputs.
        batches: Inputs and labels.
        operator: The Hessian as curvlinops has it, None where that is not installed.
    """

    model: nn.Module
    criterion: nn.Module
    batches: Passes
    operator: Any


def problem(model: nnx.Module, batches: Sequence[Examples], device: str) -> Problem:
    """The same network, loss and data in PyTorch.

    Args:
        model: A `models.ConvNet` without dropout or a `models.MLP`; its weights and statistics are copied.
        batches: The data.
        device: Where to compute.

    Returns:
        The problem.
    """
    copied = (_convnet() if type(model).__name__ == "ConvNet" else _mlp(model)).to(device).eval()
    with torch.no_grad():
        for parameter, value in zip(copied.parameters(), tensors(model), strict=True):
            parameter.copy_(value)
        for norm, source in zip(_norms(copied), _nnx_norms(model), strict=True):
            norm.running_mean.copy_(torch.tensor(np.asarray(source.mean[...])))
            norm.running_var.copy_(torch.tensor(np.asarray(source.var[...])))
    passes = Passes(_batch(batch, device) for batch in batches)
    criterion = nn.CrossEntropyLoss()
    operator = None
    if CURVLINOPS is not None:
        with _silent():
            operator = CURVLINOPS.HessianLinearOperator(copied, criterion, list(copied.parameters()), passes)
    return Problem(copied, criterion, passes, operator)


def tensors(model: nnx.Module, params: Any = None) -> list[torch.Tensor]:
    """Weights, or anything of their structure, in the order and the layout of PyTorch.

    Args:
        model: The network that they belong to.
        params: A pytree like its weights, or None for these.

    Returns:
        A tensor for each weight or bias.
    """
    layers = nnx.to_pure_dict(nnx.state(model, nnx.Param) if params is None else params)
    layers = layers.get("layers", layers)
    found = []
    for name in _LAYERS.get(type(model).__name__, sorted(layers)):
        layer = layers[name]
        weight = np.asarray(layer["kernel"] if "kernel" in layer else layer["scale"])
        if name == "dense1":  # its inputs are flattened channels first
            weight = weight.reshape(4, 4, 32, -1).transpose(2, 0, 1, 3).reshape(weight.shape)
        if weight.ndim > 1:
            weight = np.moveaxis(weight, (-1, -2), (0, 1))
        found += [torch.tensor(weight), torch.tensor(np.asarray(layer["bias"]))]
    return found


def loss_and_product(problem: Problem, tangent: Sequence[torch.Tensor]) -> tuple[float, list[torch.Tensor]]:
    """The mean loss over all batches, of equal size, and the product of its Hessian with a tangent."""
    params = list(problem.model.parameters())
    losses = [problem.criterion(problem.model(inputs), labels) for inputs, labels in problem.batches]
    loss = torch.stack(losses).mean()
    gradient = torch.autograd.grad(loss, params, create_graph=True)
    along = sum((g * t.to(g.device)).sum() for g, t in zip(gradient, tangent, strict=True))
    return loss.item(), [product.detach().cpu() for product in torch.autograd.grad(along, params)]


def pyhessian_probes(problem: Problem, seed: int, count: int, tol: float = 0.0) -> list[float]:
    """The estimates of PyHessian's single probes.

    Args:
        problem: Whose trace.
        seed: Of the probes.
        count: The most of them.
        tol: It stops when a probe changes their mean by less than this, relative to it.

    Returns:
        One number for each probe.
    """
    torch.manual_seed(seed)
    with _silent():
        return _hessian(problem).trace(maxIter=count, tol=tol)


def pyhessian_eigenvalues(
    problem: Problem, seed: int, tol: float, count: int, most: int = MOST_ITERATIONS
) -> tuple[list[float], int]:
    """So many eigenvalues by PyHessian's power iteration, and the products that they took."""
    torch.manual_seed(seed)
    before = problem.batches.num_passes
    with _silent():
        values, _ = _hessian(problem).eigenvalues(maxIter=most, tol=tol, top_n=count)
    return values, problem.batches.num_passes - before


def curvlinops_trace(problem: Problem, method: str, seed: int, num_products: int) -> float:
    """The trace by a method of curvlinops: "xtrace", "hutch++" or "hutchinson"."""
    names = {"xtrace": "xtrace", "hutch++": "hutchpp_trace", "hutchinson": "hutchinson_trace"}
    torch.manual_seed(seed)
    return getattr(CURVLINOPS, names[method])(problem.operator, num_products).item()


def curvlinops_eigenvalues(problem: Problem, seed: int, tol: float, count: int) -> tuple[list[float], int]:
    """So many eigenvalues by SciPy's `eigsh` with curvlinops' products, and how many of them it took."""
    operator = problem.operator.to_scipy()
    start = np.random.default_rng(seed).standard_normal(operator.shape[0])
    before = problem.batches.num_passes
    values = eigsh(operator, k=count, which="LA", tol=tol, v0=start, return_eigenvectors=False)
    return values.tolist(), problem.batches.num_passes - before


def _hessian(problem: Problem) -> Any:
    cuda = next(problem.model.parameters()).is_cuda
    return PYHESSIAN.hessian(problem.model, problem.criterion, dataloader=problem.batches, cuda=cuda)


def _convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def _mlp(model: nnx.Module) -> nn.Module:
    shapes = [leaf.shape for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)) if leaf.ndim == 2]
    layers = [layer for shape in shapes for layer in (nn.Linear(*shape), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers[:-1])


def _norms(model: nn.Module) -> list[Any]:
    return [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]


def _nnx_norms(model: nnx.Module) -> list[Any]:
    return [getattr(model, name) for name in ("norm1", "norm2") if hasattr(model, name)]


def _batch(batch: Examples, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.tensor(np.asarray(batch.inputs), device=device).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(np.asarray(batch.labels, np.int64), device=device)
