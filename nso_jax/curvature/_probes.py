"""Random probes of a symmetric matrix A, and what they tell of its diagonal: plain, or beside a subspace."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.linalg import qr

from nso_jax import noise
from nso_jax.curvature import _vectors
from nso_jax.curvature._estimators import Products
from nso_jax.curvature._lanczos import orthogonalise

# Probes between two looks at the error, which with fewer would itself be too uncertain: 26 % with eight.
_ROUND = 8
_SIGNED_SUMS = 8  # for the covariance of the estimates of a diagonal


def random_signs(key: jax.Array, first: int, count: int, size: int) -> np.ndarray:
    """Random signs, a row for each of the probes from `first` on; a probe depends on its number alone."""
    rows = [_signs(jax.random.fold_in(key, first + i), size) for i in range(count)]
    return np.stack(rows, dtype=np.float64)


@functools.partial(jax.jit, static_argnums=1)
def _signs(key: jax.Array, size: int) -> jax.Array:
    # In whole words of 32, which one draw of random bits fills.
    return noise.rademacher(key, (32 * -(-size // 32),), jnp.float32)[:size]


class Hutchinson:
    """Probes v, of which only the sums of v * A v are kept: by leaf, and over the probes by entry."""

    def __init__(self, key: jax.Array, products: Products) -> None:
        self._key, self._products = key, products
        self._shares = np.empty((0, len(products.h.flags)))
        self._mean = self._squares = np.zeros(
            products.h.size
        )  # of v * A v; and the sum of (v * A v - mean)^2

    def rounds(self, num_products: int) -> Iterator[float]:
        """As `Deflation.rounds`."""
        h = self._products.h
        while (start := self._products.count) < num_products:
            probes = random_signs(self._key, start, min(_ROUND, num_products - start), h.size)
            terms = probes * self._products(probes)
            shares = [leaf.sum(axis=1) for leaf in _vectors.split(terms, h.params, h.flags)]
            self._shares = np.concatenate([self._shares, np.stack(shares, axis=1)])
            # The update of a mean and of the squares around it by Chan, Golub and LeVeque.
            weight = len(terms) / len(self._shares)
            shift = terms.mean(axis=0) - self._mean
            self._squares = self._squares + len(terms) * terms.var(axis=0) + start * weight * shift**2
            self._mean = self._mean + weight * shift
            yield 0.0

    def shares(self, groups: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """As `Deflation.shares`."""
        return mean_and_error(np.stack([self._shares[:, group].sum(axis=1) for group in groups], axis=1))

    def entries(self) -> tuple[np.ndarray, np.ndarray]:
        """As `Deflation.entries`."""
        count = len(self._shares)
        return self._mean, np.sqrt(self._squares / (count - 1) / count)


class Deflation:
    """Probes, and a subspace that is measured exactly, so that the probes estimate only what is outside.

    With P = Q Q^T for the orthonormal basis Q of the subspace, a probe v estimates the diagonal of A by that
    of `P A + A P - P A P`, which is known, plus `v * (I - P) A (I - P) v`. In XTrace the probes' own images
    span the subspace, and each probe gets the projection on the images of the others, `P - (Q s)(Q s)^T`: the
    unit vector s is orthogonal to the coefficients of the other images in the basis.
    """

    def __init__(self, key: jax.Array, products: Products, *, leave_one_out: bool) -> None:
        self._key, self._products, self._leave_one_out = key, products, leave_one_out
        self._probes = self._images = np.empty((0, products.h.size))  # v and A v, in rows
        self._basis = self._basis_images = np.empty((0, products.h.size))  # Q and A Q, transposed
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
            count = min(_ROUND, (num_products - self._products.count) // price)
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
        probes, images, s = self._independent()
        leaves = [_GramMatrices.of(*parts) for parts in self._by_leaf(probes, images)]
        sums = [_GramMatrices.sum([leaves[i] for i in group]) for group in groups]
        value, variance, covariance = _moments(_GramMatrices.sum(leaves), sums, s)
        return value, np.sqrt(variance + np.maximum(covariance, 0))

    def entries(self) -> tuple[np.ndarray, np.ndarray]:
        """The diagonal and its standard error, entry by entry.

        What the covariance adds to the variance is estimated for the sum of all entries under random signs,
        in whose mean over the signs all entries count alike, and taken to be the same share for all of them.
        """
        probes, images, s = self._independent()
        rows = (self._basis, self._basis_images, probes, images)
        whole = _GramMatrices.of(*rows)
        inside = whole.q_aq
        tops = s @ inside.T
        c, d = _outside(s, inside, whole.v_q, whole.v_aq)
        leaves = []
        for q, aq, v, av in self._by_leaf(probes, images):
            sq = s @ q
            known = 2 * (np.sum(q * aq, axis=0) - sq * (s @ aq)) - np.sum(q * (inside @ q), axis=0)
            known += 2 * sq * (tops @ q) - _dots(s, tops)[:, None] * sq**2
            leaves.append(mean_and_error(known + v * (av - c @ aq - d @ q)))
        value, error = (np.concatenate(parts) for parts in zip(*leaves, strict=True))
        signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(_SIGNED_SUMS, self._products.h.size))
        sums = [_GramMatrices.of(*rows, signs=row) for row in signs]
        _, variance, covariance = _moments(whole, sums, s)
        if variance.sum() > 0:
            error *= np.sqrt(1 + max(0.0, covariance.sum() / variance.sum()))
        return value, error

    def _by_leaf(self, probes: np.ndarray, images: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
        """The stretches of the basis, its image, probes and images that belong to each leaf."""
        h, rows = self._products.h, (self._basis, self._basis_images, probes, images)
        return zip(*(_vectors.split(row, h.params, h.flags) for row in rows), strict=True)

    def _measure(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """New probes and their images."""
        probes = random_signs(self._key, self._drawn, count, self._products.h.size)
        self._drawn += count
        return probes, self._products(probes)

    def _add(self, probes: np.ndarray, images: np.ndarray) -> None:
        self._probes = np.concatenate([self._probes, probes])
        self._images = np.concatenate([self._images, images])

    def _extend(self, count: int) -> None:
        """Takes the images of new probes into the subspace."""
        probes, images = self._measure(count)
        rest = orthogonalise(images, self._basis)
        directions, triangle, _ = qr(rest.T, mode="economic", pivoting=True)
        self._rounding = max(self._rounding, self._products.h.epsilon * np.linalg.norm(images, axis=1).max())
        new = directions.T[np.abs(np.diag(triangle)) > 10 * self._rounding]
        self._basis = np.concatenate([self._basis, new])
        self._basis_images = np.concatenate([self._basis_images, self._products(new)])
        self._closed = len(new) < count or len(self._basis) == self._products.h.size
        self._add(*((probes, images) if self._leave_one_out else self._measure(count)))
        if self._leave_one_out and self._closed:
            self._before_closing = len(self._probes)

    @property
    def _late(self) -> int:
        """How many probes were drawn after the subspace, if they are enough for an error."""
        late = len(self._probes) - self._before_closing
        return late if self._closed and late > 1 else 0

    def _floor(self) -> float:
        if len(self._basis) == self._products.h.size:
            return np.inf
        return self._rounding if self._late else 0.0

    def _independent(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Probes v, A v, and the coordinates s that each of them leaves out, 0 where there are none."""
        start = self._before_closing if self._late else 0
        probes, images = self._probes[start:], self._images[start:]
        if self._closed or not self._leave_one_out:
            return probes, images, np.zeros((len(probes), len(self._basis)))
        left_out = np.linalg.inv(self._basis @ images.T)
        return probes, images, left_out / np.linalg.norm(left_out, axis=1, keepdims=True)


class _GramMatrices(NamedTuple):
    """Products of rows with one another, over some of their entries."""

    q_q: np.ndarray  # (r, r)
    q_aq: np.ndarray  # (r, r)
    v_q: np.ndarray  # (m, r)
    v_aq: np.ndarray  # (m, r)
    v_av: np.ndarray  # (m,)

    @classmethod
    def of(
        cls, q: np.ndarray, aq: np.ndarray, v: np.ndarray, av: np.ndarray, signs: np.ndarray | None = None
    ) -> "_GramMatrices":
        """Of a basis, its image, probes and their images, the terms of the entries with signs if given."""
        left_q, left_v = (q, v) if signs is None else (q * signs, v * signs)
        return cls(
            left_q @ q.T, left_q @ aq.T, left_v @ q.T, left_v @ aq.T, np.einsum("mi,mi->m", left_v, av)
        )

    @classmethod
    def sum(cls, parts: list["_GramMatrices"]) -> "_GramMatrices":
        """Over the entries of all parts."""
        return cls(*(np.sum(fields, axis=0) for fields in zip(*parts, strict=True)))


class _LeaveTwoOut(NamedTuple):
    """For each two probes i and j, the part t_ij that i leaves out besides s_i if j is left out as well."""

    s: np.ndarray  # (m, r)
    cosine: np.ndarray  # s_i . s_j
    sine: np.ndarray  # the norm of s_j - cosine s_i, which is t_ij sine; infinite for i = j, where t_ij is 0

    @classmethod
    def of(cls, s: np.ndarray) -> "_LeaveTwoOut":
        """Of the unit vectors that are left out."""
        cosine = s @ s.T
        sine = np.sqrt(np.maximum(1 - cosine**2, np.finfo(float).eps))
        np.fill_diagonal(sine, np.inf)
        return cls(s, cosine, sine)

    def with_rows(self, x: np.ndarray) -> np.ndarray:
        """t_ij . x_i, the vectors x in rows."""
        products = x @ self.s.T
        return (products - self.cosine * np.diag(products)[:, None]) / self.sine

    def with_one(self, matrix: np.ndarray) -> np.ndarray:
        """s_i . matrix t_ij, for a symmetric matrix."""
        return self.with_rows(self.s @ matrix)

    def with_both(self, matrix: np.ndarray) -> np.ndarray:
        """t_ij . matrix t_ij."""
        forms = self.s @ matrix @ self.s.T
        own = np.diag(forms)
        return (own - self.cosine * (forms + forms.T) + self.cosine**2 * own[:, None]) / self.sine**2


def _moments(
    whole: _GramMatrices, sums: list[_GramMatrices], s: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mean estimate of each sum over some entries, its variance if independent, the covariance."""
    estimates = np.stack([_estimates(whole, part, s) for part in sums], axis=1)
    value, error = mean_and_error(estimates)
    covariance = np.zeros_like(value)
    if s.any():
        count = len(s)
        pairs = _LeaveTwoOut.of(s)
        changes = (_changes(whole, part, pairs) for part in sums)
        covariance = np.array([np.sum(change * change.T) for change in changes]) / (count * (count - 1))
    return value, error**2, covariance


def _estimates(whole: _GramMatrices, part: _GramMatrices, s: np.ndarray) -> np.ndarray:
    """Each probe's estimate of the sum of some entries, with s taken from P."""
    inside = whole.q_aq
    tops = s @ inside.T
    c, d = _outside(s, inside, whole.v_q, whole.v_aq)
    gram = s @ part.q_q
    known = 2 * (np.trace(part.q_aq) - _dots(s @ part.q_aq, s)) - np.sum(inside * part.q_q)
    known += 2 * _dots(gram, tops) - _dots(s, tops) * _dots(s, gram)
    return known + part.v_av - _dots(c, part.v_aq) - _dots(d, part.v_q)


def _changes(whole: _GramMatrices, part: _GramMatrices, pairs: _LeaveTwoOut) -> np.ndarray:
    """What each probe's estimate, in rows, loses when another one, in columns, is left out too."""
    inside = whole.q_aq
    c, _ = _outside(pairs.s, inside, whole.v_q, whole.v_aq)
    weight = pairs.with_rows(whole.v_q)  # of v in t
    top, both = pairs.with_one(inside), pairs.with_both(inside)
    known = 2 * pairs.with_both(part.q_aq) - 2 * pairs.with_both(part.q_q @ inside)
    known += 2 * top * pairs.with_one(part.q_q) + both * pairs.with_both(part.q_q)
    along = pairs.with_rows(part.v_q)
    rest = pairs.with_rows(part.v_q @ inside) - _dots(pairs.s, part.v_q)[:, None] * top - along * both
    rest = weight * rest - weight * pairs.with_rows(part.v_aq)
    return known + rest - along * pairs.with_rows(whole.v_aq - c @ inside.T)


def _outside(
    s: np.ndarray, inside: np.ndarray, v_q: np.ndarray, v_aq: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates in Q of P v and of P A (I - P) v, P being without s."""
    c = v_q - _dots(s, v_q)[:, None] * s
    d = v_aq - c @ inside.T
    return c, d - _dots(s, d)[:, None] * s


def _dots(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The products of the rows of a with those of b."""
    return np.einsum("ij,ij->i", a, b)


def mean_and_error(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean over the first axis, and its standard error for independent samples."""
    return samples.mean(axis=0), samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
