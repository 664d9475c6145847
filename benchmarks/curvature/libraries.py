"""The libraries that estimate a trace and find eigenvalues: nso_jax, PyHessian, curvlinops."""

import functools
import importlib.metadata
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from benchmarks.curvature import trained_networks
from benchmarks.curvature.trained_networks import Problem
from benchmarks.kit import timing
from nso_jax import curvature

# A library and a method of it.
Key = tuple[str, str]
Trace = Callable[[int, int], float]
Eigenvalues = Callable[[int, float], tuple[Sequence[float], int]]


class Library(NamedTuple):
    """What a library offers. Its random streams are numbered: a `seed` is a whole number.

    Attributes:
        traces: `estimate(seed, num_products)` for each method that needs few products.
        hutchinson: The same for Hutchinson's method.
        deviation: `deviation(seed, num_probes)`: the standard deviation of one of its probes.
        solver: How it finds eigenvalues.
        eigenvalues: `eigenvalues(seed, tol)`: the largest, and how many products that took.
    """

    traces: Mapping[str, Trace]
    hutchinson: Trace
    deviation: Trace
    solver: str
    eigenvalues: Eigenvalues


OURS, PYHESSIAN, CURVLINOPS = "nso_jax", "PyHessian", "curvlinops"
PYHESSIAN_DEFAULTS = {"maxIter": 100, "tol": 1e-3}
PACKAGES = {"torch": "torch", PYHESSIAN: "PyHessian", CURVLINOPS: "curvlinops-for-pytorch"}
METHODS = {"xtrace": "XTrace", "hutch++": "Hutch++", "hutchinson": "Hutchinson"}
# What is ours, and whose times are compared with it.
BASES: dict[str, Key] = {"trace": (OURS, "xtrace"), "eigenvalues": (OURS, "Lanczos")}
RATIOS: dict[str, dict[str, Key]] = {
    "trace": {PYHESSIAN: (PYHESSIAN, "hutchinson"), CURVLINOPS: (CURVLINOPS, "xtrace")},
    "eigenvalues": {PYHESSIAN: (PYHESSIAN, "power iteration"), CURVLINOPS: (CURVLINOPS, "eigsh")},
}


def ours(problem: Problem) -> Library:
    """With a loss that is compiled anew."""
    h = curvature.hessian(problem.fun, problem.params, problem.batches)

    def estimate(method: str, seed: int, num_products: int) -> curvature.Estimate:
        return curvature.trace(jax.random.key(seed), h, method=method, num_products=num_products)

    def value(method: str, seed: int, num_products: int) -> float:
        return float(estimate(method, seed, num_products).value)

    def deviation(seed: int, num_probes: int) -> float:
        return float(estimate("hutchinson", seed, num_probes).standard_error) * math.sqrt(num_probes)

    def eigenvalues(seed: int, tol: float) -> tuple[Sequence[float], int]:
        pairs = curvature.eigenvalues(jax.random.key(seed), h, k=trained_networks.NUM_EIGENVALUES, tol=tol)
        return pairs.values.tolist(), pairs.num_products

    traces = {method: functools.partial(value, method) for method in METHODS if method != "hutchinson"}
    hutchinson = functools.partial(value, "hutchinson")
    return Library(traces, hutchinson, deviation, BASES["eigenvalues"][1], eigenvalues)


def rivals(problem: Problem) -> dict[str, Library]:
    """Those that are installed, after a check that they have the same network."""
    device = timing.torch_device()
    if device is None:
        return {}
    from benchmarks.curvature import torch_peers as peers  # noqa: PLC0415

    same = peers.problem(problem.model, problem.batches, device)
    check_agreement(problem, same)
    rivals = {}
    if peers.PYHESSIAN is not None:
        probes = functools.partial(peers.pyhessian_probes, same)
        rivals[PYHESSIAN] = Library(
            {},
            lambda seed, number: float(np.mean(probes(seed, number))),
            lambda seed, number: float(np.std(probes(seed, number), ddof=1)),
            RATIOS["eigenvalues"][PYHESSIAN][1],
            functools.partial(peers.pyhessian_eigenvalues, same, count=trained_networks.NUM_EIGENVALUES),
        )
    if peers.CURVLINOPS is not None:
        traces = {method: functools.partial(peers.curvlinops_trace, same, method) for method in METHODS}
        hutchinson = traces.pop("hutchinson")
        rivals[CURVLINOPS] = Library(
            traces,
            hutchinson,
            lambda seed, number: float(np.std([hutchinson(seed + i, 1) for i in range(number)], ddof=1)),
            RATIOS["eigenvalues"][CURVLINOPS][1],
            functools.partial(peers.curvlinops_eigenvalues, same, count=trained_networks.NUM_EIGENVALUES),
        )
    return rivals


def check_agreement(problem: Problem, same: Any) -> None:
    """Raises RuntimeError unless the loss, and a Hessian-vector product, are the same in PyTorch.

    Args:
        problem: The network in JAX.
        same: Its `torch_peers.Problem`.
    """
    from benchmarks.curvature import torch_peers as peers  # noqa: PLC0415

    fun, params, batches = jax.jit(problem.fun), problem.params, problem.batches
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(trained_networks.REFERENCE_SEED), len(leaves))
    drawn = [jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    tangent = jax.tree.unflatten(structure, drawn)
    product = curvature.hessian(fun, params, batches)(tangent)
    theirs_loss, theirs = peers.loss_and_product(same, peers.tensors(problem.model, tangent))
    loss = float(np.mean([fun(params, batch) for batch in batches]))
    pairs = zip(peers.tensors(problem.model, product), theirs, strict=True)
    distance = math.sqrt(sum(float(((a - b) ** 2).sum()) for a, b in pairs))
    norm = float(optax.tree.norm(product))
    if not (abs(loss - theirs_loss) <= 1e-5 and distance <= 1e-3 * norm):
        raise RuntimeError(
            f"The network in PyTorch is another one: its loss is {theirs_loss:.7g}, not {loss:.7g}, and its "
            f"Hessian-vector product is {distance:.2g} away from one of norm {norm:.2g}."
        )


def version(package: str) -> str | None:
    """That of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
