"""The trace and the diagonal of the Hessian of the mean loss, estimated from random probes."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy.linalg import qr

from nso_jax._checks import as_key, broadcast_prefix, check_count
from nso_jax.curvature.operators import Operator, check_tolerance, orthogonalise

# Probes between two looks at the error, which with fewer would itself be too uncertain: 26 % with eight.
_ROUND = 8
# The fewest products of a method: those of two probes.
_TRACE_METHODS = {"xtrace": 4, "hutch++": 6, "hutchinson": 2}
_DIAGONAL_METHODS = {"xdiag": 4, "hutchinson": 2}


class Estimate(NamedTuple):
    """A mean over random probes and how far off it may be.

    Attributes:
      value: the estimate.
      standard_error: one standard deviation of `value`, estimated from the probes.
      num_products: Hessian-vector products that it took.
      per_leaf: a pytree like `params`: each leaf's share of the trace, a number; or, with `param_labels`, a
        dict of each label's share.
      per_leaf_standard_error: one standard deviation of each number in `per_leaf`.
    """

    value: Any
    standard_error: Any
    num_products: int
    per_leaf: Any
    per_leaf_standard_error: Any


def trace(
    key: jax.Array,
    fun: Callable[[Any, Any], jax.Array],
    params: Any,
    batches: Any,
    *,
    method: str = "xtrace",
    num_products: int = 100,
    rtol: float | None = None,
    mask: Any = None,
    param_labels: Any = None,
    chunk_size: int | None = None,
    callback: Callable[[int], object] | None = None,
) -> Estimate:
    """Estimates the trace of the Hessian H of the mean loss, with its standard error.

    Hutchinson's estimate is the mean over m probes v of independent random signs of

        v^T H v,    standard error = sample standard deviation / sqrt(m).

    It has no bias, and a variance of 2/m times the sum of the squared off-diagonal entries of H: four times
    the probes halve the error. A few large eigenvalues make most of that sum. So the other methods spend
    part of the products on an orthonormal basis Q of the images H v of some vectors v, which catches these
    eigenvalues; with P = Q Q^T they compute Tr(P H) exactly, and estimate only Tr((I - P) H (I - P)).

    Each method's products of the params' float32 (or finer) are summed in float64.

    Args:
      key: PRNG key. Probe j depends on the key and on j alone.
      fun: `fun(params, batch)` is the mean loss over the batch, a real scalar, as in `hvp`; or a
        `GaussNewton`.
      params: any pytree of real arrays.
      batches: one batch, or a list or other re-iterable of batches, by the rule of `hvp`.
      method: "xtrace", where each probe serves both for the basis and, with the basis of the others, for the
        estimate; "hutch++", where a third of the products goes into each of basis, its image and other
        probes; or "hutchinson". For a network's Hessian XTrace takes a tenth of the products or less, but it
        and Hutch++ keep 16 bytes of host memory for each parameter and product, Hutchinson none.
      num_products: Hessian-vector products over all batches; the most of them when `rtol` is given. At
        least those of two probes: 4 for "xtrace", 6 for "hutch++", 2 for "hutchinson". An XTrace probe
        takes two, one of Hutch++ three. Fewer are taken when the result is exact before.
      rtol: stop as soon as the standard error is at most `rtol` times the absolute value of the estimate,
        looking after every 8 probes. Stopping at the first good-looking error makes it a little too small;
        the returned one shows whether the tolerance was reached. None: take all the products.
      mask: bools, a prefix pytree of `params` or a callable giving one: only these leaves' block of H.
      param_labels: a prefix pytree of labels for the leaves, or a callable giving one, as in
        `optax.partition`: `per_leaf` is then a dict of the shares of the labels, such as layers.
      chunk_size: probes multiplied side by side by vmap. None: one on CPU, where more are slower, else 8.
      callback: called with the number of products so far, whenever some are done: for a progress bar.

    Returns:
      An `Estimate`. `per_leaf` holds an unbiased estimate of the trace of each leaf's own block of H, from
      the same products, and adds up to `value`.

    Raises:
      TypeError: `key` is not a PRNG key, or `fun`, `params` or `batches` is none that `hvp` takes.
      ValueError: `method` is unknown, `num_products` is too small for it, `rtol` is not positive, `mask` or
        `param_labels` does not fit `params`, or `mask` selects nothing.
      FloatingPointError: the product of a batch is not finite.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from nso_jax import curvature
      >>> def loss(params, batch):
      ...     return jnp.mean((batch @ params["w"]) ** 2) / 2
      >>> params, batch = {"w": jnp.zeros(3)}, jnp.diag(jnp.array([3.0, 6.0, 9.0]))
      >>> estimate = curvature.trace(jax.random.key(0), loss, params, batch)
      >>> round(estimate.value, 3), round(estimate.standard_error, 3)  # all of three dimensions: exact
      (42.0, 0.0)

    References:
      Hutchinson, A stochastic estimator of the trace of the influence matrix for Laplacian smoothing
      splines, Communications in Statistics: Simulation and Computation 19(2), 1990.
      Meyer, Musco, Musco, Woodruff, Hutch++: Optimal Stochastic Trace Estimation, arXiv 2010.09649, 2020.
      Epperly, Tropp, Webber, XTrace: Making the most of every sample in stochastic trace estimation,
      arXiv 2301.07825, 2023.
    """
    key = as_key(key)
    _check_options(_TRACE_METHODS, method, num_products, rtol)
    operator = Operator(fun, params, batches, mask=mask, chunk_size=chunk_size, callback=callback)
    groups, tree = _grouping(param_labels, operator)
    if method == "hutchinson":
        estimator: _Hutchinson | _Deflation = _Hutchinson(key, operator)
    else:
        estimator = _Deflation(key, operator, leave_one_out=method == "xtrace")
    whole = [[leaf for group in groups for leaf in group]]
    for floor in estimator.rounds(num_products):
        if (floor or rtol) and _reached(rtol, floor, *estimator.shares(whole)):
            break
    (value,), (standard_error,) = estimator.shares(whole)
    shares, errors = estimator.shares(groups)
    return Estimate(float(value), float(standard_error), operator.num_products, tree(shares), tree(errors))


def diagonal(
    key: jax.Array,
    fun: Callable[[Any, Any], jax.Array],
    params: Any,
    batches: Any,
    *,
    method: str = "xdiag",
    num_products: int = 100,
    rtol: float | None = None,
    mask: Any = None,
    param_labels: Any = None,
    chunk_size: int | None = None,
    callback: Callable[[int], object] | None = None,
) -> Estimate:
    """Estimates the diagonal of the Hessian H of the mean loss, with a standard error for each entry.

    Hutchinson's estimate (of Bekas, Kokiopoulou and Saad) is the mean of `v * H v` over probes v of
    independent random signs. The other method splits H by the projection P on the images of the probes, the
    probe of each estimate left out as in XTrace:

        diag H = diag(P H + H P - P H P) + E[ v * (I - P) H (I - P) v ],

    so that its entries add up to XTrace's trace. (XDiag has `P H` and `v * (I - P) H v` instead; a symmetric
    H allows the projection on both sides, which leaves less to estimate.)

    Args:
      key: PRNG key. Probe j depends on the key and on j alone.
      fun: the loss, or a `GaussNewton`, as in `trace`.
      params: as in `trace`.
      batches: as in `trace`.
      method: "xdiag" or "hutchinson". XDiag keeps 16 bytes of host memory for each parameter and product,
        Hutchinson 16 for each parameter.
      num_products: Hessian-vector products, the most of them when `rtol` is given; at least 4 for "xdiag",
        which takes two for a probe, and 2 for "hutchinson".
      rtol: stop as soon as the standard errors are at most `rtol` times the estimate, both as Euclidean norms
        over all entries, looking after every 8 probes. None: take all the products.
      mask: as in `trace`; entries of other leaves are 0.
      param_labels: as in `trace`.
      chunk_size: as in `trace`.
      callback: as in `trace`.

    Returns:
      An `Estimate` whose `value` and `standard_error` are pytrees like `params`, in float64 NumPy arrays.
      `per_leaf` holds their sums, the shares of the trace, with standard errors of their own.

    Raises:
      TypeError: as `trace`.
      ValueError: as `trace`.
      FloatingPointError: the product of a batch is not finite.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from nso_jax import curvature
      >>> def loss(params, batch):
      ...     return jnp.mean((batch @ params["w"]) ** 2) / 2
      >>> params, batch = {"w": jnp.zeros(3)}, jnp.diag(jnp.array([3.0, 6.0, 9.0]))
      >>> estimate = curvature.diagonal(jax.random.key(0), loss, params, batch)
      >>> estimate.value["w"].round(3)
      array([ 3., 12., 27.])

    References:
      Bekas, Kokiopoulou, Saad, An estimator for the diagonal of a matrix, Applied Numerical Mathematics
      57(11-12), 2007.
      Epperly, Tropp, Webber, XTrace: Making the most of every sample in stochastic trace estimation,
      arXiv 2301.07825, 2023.
    """
    key = as_key(key)
    _check_options(_DIAGONAL_METHODS, method, num_products, rtol)
    operator = Operator(fun, params, batches, mask=mask, chunk_size=chunk_size, callback=callback)
    groups, tree = _grouping(param_labels, operator)
    if method == "hutchinson":
        estimator: _Hutchinson | _Deflation = _Hutchinson(key, operator)
    else:
        estimator = _Deflation(key, operator, leave_one_out=True)
    for floor in estimator.rounds(num_products):
        if (floor or rtol) and _reached(rtol, floor, *estimator.entries()):
            break
    value, standard_error = (_entry_tree(operator, vector) for vector in estimator.entries())
    shares, errors = estimator.shares(groups)
    return Estimate(value, standard_error, operator.num_products, tree(shares), tree(errors))


class _Hutchinson:
    """Probes v, of which only the sums of v * A v are kept: by leaf, and over the probes by entry."""

    def __init__(self, key: jax.Array, operator: Operator) -> None:
        self._key, self._operator = key, operator
        self._shares = np.empty((0, len(operator.flags)))
        self._mean = self._squares = np.zeros(operator.size)  # of v * A v; and the sum of (v * A v - mean)^2

    def rounds(self, num_products: int) -> Iterator[float]:
        """As `_Deflation.rounds`."""
        while (start := self._operator.num_products) < num_products:
            probes = self._operator.signs(self._key, start, min(_ROUND, num_products - start))
            terms = probes * self._operator.products(probes)
            shares = [leaf.sum(axis=1) for leaf in self._operator.split(terms)]
            self._shares = np.concatenate([self._shares, np.stack(shares, axis=1)])
            # The update of a mean and of the squares around it by Chan, Golub and LeVeque.
            weight = len(terms) / len(self._shares)
            shift = terms.mean(axis=0) - self._mean
            self._squares = self._squares + len(terms) * terms.var(axis=0) + start * weight * shift**2
            self._mean = self._mean + weight * shift
            yield 0.0

    def shares(self, groups: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """As `_Deflation.shares`."""
        return _mean_and_error(np.stack([self._shares[:, group].sum(axis=1) for group in groups], axis=1))

    def entries(self) -> tuple[np.ndarray, np.ndarray]:
        """As `_Deflation.entries`."""
        count = len(self._shares)
        return self._mean, np.sqrt(self._squares / (count - 1) / count)


class _Deflation:
    """Probes, and a subspace that is measured exactly, so that the probes estimate only what is outside.

    With P = Q Q^T for the orthonormal basis Q of the subspace, a probe v estimates the diagonal of A by that
    of `P A + A P - P A P`, which is known, plus `v * (I - P) A (I - P) v`. In XTrace the probes' own images
    span the subspace, and each probe gets the projection on the images of the others, `P - (Q s)(Q s)^T`: the
    unit vector s is orthogonal to the coefficients of the other images in the basis.
    """

    def __init__(self, key: jax.Array, operator: Operator, *, leave_one_out: bool) -> None:
        self._key, self._operator, self._leave_one_out = key, operator, leave_one_out
        self._probes = self._images = np.empty((0, operator.size))  # v and A v, in rows
        self._basis = self._basis_images = np.empty((0, operator.size))  # Q and A Q, transposed
        self._drawn = 0
        # Once images show nothing new beyond rounding, the subspace stays, and later probes are independent.
        self._closed, self._before_closing, self._rounding = False, 0, np.finfo(float).tiny

    def rounds(self, num_products: int) -> Iterator[float]:
        """Adds some probes at a time, for as long as the products last.

        Yields:
          The error below which there is nothing but rounding; 0 where that is not known.
        """
        while True:
            price = 1 if self._closed else 2 if self._leave_one_out else 3
            count = min(_ROUND, (num_products - self._operator.num_products) // price)
            if not count:
                return
            if self._closed:
                self._add(*self._measure(count))
            else:
                self._extend(count)
            yield self._floor()

    def shares(self, groups: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """What each group of leaves contributes to the trace, and the standard errors.

        The estimates e_i of XTrace's probes depend on one another, each having helped to choose the subspace
        of the others. But e_i has the same mean whatever the other probes are, so that the covariance of e_i
        and e_j is the mean of d_ij d_ji, where d_ij is what e_i loses when j is left out too. The variance of
        their mean is then estimated without bias by the usual one plus that covariance. Where noise makes
        the covariance negative, it counts as 0.
        """
        probes, images, left_out = self._independent()
        rows = (self._basis, self._basis_images, probes, images)
        leaves = [_Overlaps.of(*parts) for parts in zip(*map(self._operator.split, rows), strict=True)]
        overlaps = [_Overlaps.sum([leaves[i] for i in group]) for group in groups]
        whole = _Overlaps.sum(leaves)
        estimates = _estimates(whole, overlaps, left_out)
        value, error = _mean_and_error(estimates)
        if left_out.shape[1]:
            losses = [estimates - _estimates(whole, overlaps, pair) for pair in _with_another(left_out)]
            count = len(losses)
            covariance = np.einsum("jig,ijg->g", losses, losses) / (count * (count - 1))
            error = np.sqrt(error**2 + np.maximum(covariance, 0))
        return value, error

    def entries(self) -> tuple[np.ndarray, np.ndarray]:
        """The diagonal and its standard error, entry by entry, the estimates' covariance being ignored."""
        probes, images, left_out = self._independent()
        inside = self._basis @ self._basis_images.T
        s = left_out.sum(axis=1)
        tops = s @ inside.T
        c, d = _outside(left_out, inside, probes @ self._basis.T, probes @ self._basis_images.T)
        rows = (self._basis, self._basis_images, probes, images)
        leaves = []
        for q, aq, v, av in zip(*map(self._operator.split, rows), strict=True):
            sq = s @ q
            known = 2 * (np.sum(q * aq, axis=0) - sq * (s @ aq)) - np.sum(q * (inside @ q), axis=0)
            known += 2 * sq * (tops @ q) - np.sum(s * tops, axis=1, keepdims=True) * sq**2
            leaves.append(_mean_and_error(known + v * (av - c @ aq - d @ q)))
        value, error = (np.concatenate(parts) for parts in zip(*leaves, strict=True))
        return value, error

    def _measure(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """New probes and their images."""
        probes = self._operator.signs(self._key, self._drawn, count)
        self._drawn += count
        return probes, self._operator.products(probes)

    def _add(self, probes: np.ndarray, images: np.ndarray) -> None:
        self._probes = np.concatenate([self._probes, probes])
        self._images = np.concatenate([self._images, images])

    def _extend(self, count: int) -> None:
        """Takes the images of new probes into the subspace."""
        probes, images = self._measure(count)
        rest = orthogonalise(images, self._basis)
        directions, triangle, _ = qr(rest.T, mode="economic", pivoting=True)
        self._rounding = max(self._rounding, self._operator.epsilon * np.linalg.norm(images, axis=1).max())
        new = directions.T[np.abs(np.diag(triangle)) > 10 * self._rounding]
        self._basis = np.concatenate([self._basis, new])
        self._basis_images = np.concatenate([self._basis_images, self._operator.products(new)])
        self._closed = len(new) < count or len(self._basis) == self._operator.size
        self._add(*((probes, images) if self._leave_one_out else self._measure(count)))
        if self._leave_one_out and self._closed:
            self._before_closing = len(self._probes)

    def _floor(self) -> float:
        if len(self._basis) == self._operator.size:
            return np.inf
        return self._rounding if self._closed and len(self._probes) > self._before_closing else 0.0

    def _independent(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Probes v, A v, and for each an orthonormal set of coordinates to leave out: s, or an empty set."""
        start = self._before_closing if len(self._probes) > self._before_closing else 0
        probes, images = self._probes[start:], self._images[start:]
        if self._closed or not self._leave_one_out:
            return probes, images, np.zeros((len(probes), 0, len(self._basis)))
        left_out = np.linalg.inv(self._basis @ images.T)
        return probes, images, (left_out / np.linalg.norm(left_out, axis=1, keepdims=True))[:, None]


class _Overlaps(NamedTuple):
    """Products of rows with one another, over some of their entries."""

    q_q: np.ndarray  # (r, r)
    q_aq: np.ndarray  # (r, r)
    v_q: np.ndarray  # (m, r)
    v_aq: np.ndarray  # (m, r)
    v_av: np.ndarray  # (m,)

    @classmethod
    def of(cls, q: np.ndarray, aq: np.ndarray, v: np.ndarray, av: np.ndarray) -> "_Overlaps":
        """Of a basis, its image, probes and their images."""
        return cls(q @ q.T, q @ aq.T, v @ q.T, v @ aq.T, np.sum(v * av, axis=1))

    @classmethod
    def sum(cls, parts: list["_Overlaps"]) -> "_Overlaps":
        """Over the entries of all parts."""
        return cls(*(sum(fields) for fields in zip(*parts, strict=True)))


def _estimates(whole: _Overlaps, groups: list[_Overlaps], left_out: np.ndarray) -> np.ndarray:
    """Each probe's estimates of the groups' shares, (m, groups), its `left_out` (m, k, r) taken from P."""
    inside = whole.q_aq
    c, d = _outside(left_out, inside, whole.v_q, whole.v_aq)
    images = left_out @ inside.T
    inner = left_out @ images.swapaxes(1, 2)
    estimates = []
    for group in groups:
        gram = left_out @ group.q_q
        known = 2 * (np.trace(group.q_aq) - np.sum((left_out @ group.q_aq) * left_out, axis=(1, 2)))
        known += 2 * np.sum(gram * images, axis=(1, 2)) - np.sum(inside * group.q_q)
        known -= np.sum(inner * (gram @ left_out.swapaxes(1, 2)), axis=(1, 2))
        rest = group.v_av - np.sum(c * group.v_aq, axis=1) - np.sum(d * group.v_q, axis=1)
        estimates.append(known + rest)
    return np.stack(estimates, axis=1)


def _outside(
    left_out: np.ndarray, inside: np.ndarray, v_q: np.ndarray, v_aq: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates in Q of P v and of P A (I - P) v, P being without `left_out`."""

    def project(x: np.ndarray) -> np.ndarray:
        return x - np.einsum("mkr,mks,ms->mr", left_out, left_out, x, optimize=True)

    c = project(v_q)
    return c, project(v_aq - c @ inside.T)


def _with_another(left_out: np.ndarray) -> Iterator[np.ndarray]:
    """For each probe j, what each probe i leaves out together with the part of j, orthonormal: (m, 2, r)."""
    s = left_out[:, 0]
    for j in range(len(s)):
        rest = s[j] - (s @ s[j])[:, None] * s
        norm = np.linalg.norm(rest, axis=1, keepdims=True)
        norm[j] = np.inf  # i = j: nothing more
        yield np.stack([s, rest / norm], axis=1)


def _mean_and_error(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean over the first axis, and its standard error for independent samples."""
    return samples.mean(axis=0), samples.std(axis=0, ddof=1) / np.sqrt(len(samples))


def _reached(rtol: float | None, floor: float, value: np.ndarray, error: np.ndarray) -> bool:
    """Whether an error is small enough, or as small as rounding allows."""
    size = np.linalg.norm(error)
    return bool(size <= floor > 0) or (rtol is not None and bool(size <= rtol * np.linalg.norm(value)))


def _check_options(methods: dict[str, int], method: str, num_products: int, rtol: float | None) -> None:
    if method not in methods:
        raise ValueError(f"method: expected one of {', '.join(map(repr, methods))}, got {method!r}.")
    check_count("num_products", num_products, methods[method])
    if rtol is not None:
        check_tolerance("rtol", rtol)


def _entry_tree(operator: Operator, vector: np.ndarray) -> Any:
    """A pytree like params of NumPy arrays with a vector's entries, zero in leaves that are not chosen."""
    leaves, structure = jax.tree.flatten(operator.params)
    parts = zip(leaves, operator.flags, operator.split(vector), strict=True)
    filled = [part.reshape(leaf.shape) if flag else np.zeros(leaf.shape) for leaf, flag, part in parts]
    return jax.tree.unflatten(structure, filled)


def _grouping(param_labels: Any, operator: Operator) -> tuple[list[list[int]], Callable[[np.ndarray], Any]]:
    """The leaves that make each figure, and the function that puts the figures into a pytree or a dict."""
    if param_labels is None:
        structure = jax.tree.structure(operator.params)
        groups = [[leaf] for leaf in range(len(operator.flags))]
        return groups, lambda figures: jax.tree.unflatten(structure, figures.tolist())
    labels = broadcast_prefix("param_labels", param_labels, operator.params)
    names = list(dict.fromkeys(labels))
    groups = [[leaf for leaf, label in enumerate(labels) if label == name] for name in names]
    return groups, lambda figures: dict(zip(names, figures.tolist(), strict=True))
