"""The spectral density of a curvature matrix: how many eigenvalues lie where."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from scipy.linalg import eigh_tridiagonal
from scipy.stats import norm

from nso_jax._checks import check_count
from nso_jax.curvature._checks import check_tolerance
from nso_jax.curvature._estimators import Products, estimator
from nso_jax.curvature._lanczos import Lanczos
from nso_jax.curvature._probes import mean_and_error, random_signs
from nso_jax.curvature.operators import CurvatureMatrix

__all__ = ["Density", "spectral_density"]

# Probes go side by side as long as their bases take no more than this together.
_BASES_BYTES = 2**29


class Density(NamedTuple):
    """A smoothed density of eigenvalues, with what it was made from.

    Attributes:
      grid: eigenvalues, ascending, of shape (num_points,).
      density: the share of eigenvalues per unit at each of them; its integral is 1.
      standard_error: one standard deviation of `density`, from the differences between the probes.
      width: standard deviation of the Gaussian that smooths the density.
      nodes: Ritz values of each probe, of shape (num_probes, num_steps).
      weights: the share of eigenvalues that each node stands for; a probe's add up to 1.
      num_products: Hessian-vector products that it took.
    """

    grid: np.ndarray
    density: np.ndarray
    standard_error: np.ndarray
    width: float
    nodes: np.ndarray
    weights: np.ndarray
    num_products: int


@estimator
def spectral_density(
    key: jax.Array,
    h: CurvatureMatrix,
    *,
    num_probes: int = 10,
    num_steps: int = 64,
    width: float | None = None,
    num_points: int = 1000,
    callback: Callable[[int], object] | None = None,
) -> Density:
    """Estimates the density of the eigenvalues of the Hessian H of the mean loss, with its error band.

    Stochastic Lanczos quadrature: m steps of Lanczos' method from a random vector v of signs give a
    tridiagonal T with eigenvalues theta_k and eigenvectors s_k. With n eigenvalues lambda_i in all,

        (1/n) sum_i g(lambda_i)  =  E[v^T g(H) v] / n  ~  mean over probes of  sum_k s_k[0]^2 g(theta_k),

    exact for polynomials g of degree up to 2m - 1 but for the probes' noise. The density has for g a Gaussian
    of standard deviation `width` around each point of the grid.

    All orthogonal bases are kept in host memory in float64, 8 bytes for each parameter and step, for several
    probes at once while they fit into 512 MiB.

    Args:
      key: PRNG key. Probe j depends on the key and on j alone.
      h: the matrix, as `hessian` or `gauss_newton` makes it.
      num_probes: random vectors, at least 2 for an error; the error falls with their square root.
      num_steps: m, products for each probe. More resolve the dense part better; the outermost eigenvalues
        are sharp after a few dozen.
      width: of the Gaussian, in units of the eigenvalues. Finer details than that are not shown. None: 1 % of
        the range of the nodes.
      num_points: points of the grid, which reaches five widths beyond the outermost nodes.
      callback: called with the number of products so far, whenever some are done: for a progress bar.

    Returns:
      A `Density`. Where the density is far below its error, read it as zero.

    Raises:
      TypeError: `key` is not a PRNG key, or `h` is not a `CurvatureMatrix`.
      ValueError: `num_probes` or `num_points` is less than 2, `num_steps` less than 1, or `width` is not
        positive.
      FloatingPointError: the product of a batch is not finite.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from nso_jax import curvature
      >>> def loss(params, batch):
      ...     return jnp.mean((batch @ params["w"]) ** 2) / 2
      >>> params, batch = {"w": jnp.zeros(3)}, jnp.diag(jnp.array([3.0, 6.0, 9.0]))
      >>> density = curvature.spectral_density(jax.random.key(0), curvature.hessian(loss, params, batch))
      >>> density.nodes[0].round(3)
      array([ 3., 12., 27.])
      >>> float(np.trapezoid(density.density, density.grid).round(3))
      1.0

    References:
      Ubaru, Chen, Saad, Fast estimation of tr(f(A)) via stochastic Lanczos quadrature, SIAM Journal on
      Matrix Analysis and Applications 38(4), 2017.
      Ghorbani, Krishnan, Xiao, An Investigation into Neural Net Optimization via Hessian Eigenvalue Density,
      arXiv 1901.10159, 2019.
    """
    check_count("num_probes", num_probes, 2)
    check_count("num_steps", num_steps, 1)
    check_count("num_points", num_points, 2)
    if width is not None:
        check_tolerance("width", width)
    products = Products(h, callback)
    steps = min(num_steps, h.size)
    together = max(1, _BASES_BYTES // (8 * h.size * steps))
    quadratures = []
    for first in range(0, num_probes, together):
        probes = random_signs(key, first, min(together, num_probes - first), h.size)
        quadratures += [_quadrature(krylov, steps) for krylov in _krylov(products, probes, steps)]
    nodes, weights = map(np.stack, zip(*quadratures, strict=True))
    if width is None:
        width = 0.01 * float(np.ptp(nodes) or np.abs(nodes).max() or 1)
    grid = np.linspace(nodes.min() - 5 * width, nodes.max() + 5 * width, num_points)
    densities = np.stack([w @ norm.pdf(grid, x[:, None], width) for x, w in zip(nodes, weights, strict=True)])
    density, error = mean_and_error(densities)
    return Density(grid, density, error, width, nodes, weights, products.count)


def _krylov(products: Products, probes: np.ndarray, steps: int) -> list[Lanczos]:
    """Lanczos' method from each probe, side by side, until all bases span invariant subspaces."""
    h = products.h
    starts = probes / np.linalg.norm(probes, axis=1, keepdims=True)
    krylovs = [Lanczos(start, floor=10 * h.epsilon, capacity=steps) for start in starts]
    for _ in range(steps):
        images = products(np.stack([krylov.vector for krylov in krylovs]))
        for krylov, image in zip(krylovs, images, strict=True):
            krylov.extend(image)
        if not any(krylov.left for krylov in krylovs):
            break
    return krylovs


def _quadrature(krylov: Lanczos, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The nodes and weights of Gauss' rule that belongs to a tridiagonal matrix.

    After the steps that were made, zeros follow; they have no weight.
    """
    missing = steps - len(krylov.diagonal)
    diagonal, off_diagonal = (np.pad(x, (0, missing)) for x in (krylov.diagonal, krylov.off_diagonal))
    nodes, vectors = eigh_tridiagonal(diagonal, off_diagonal[:-1])
    return nodes, vectors[0] ** 2
