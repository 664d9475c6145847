"""Lanczos' method: orthonormal bases in which a symmetric matrix is tridiagonal."""

import numpy as np
from scipy.linalg import eigh_tridiagonal


def orthogonalise(vectors: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """A vector, or rows of them, without what lies in the span of a basis with orthonormal rows."""
    # Twice, because the first pass leaves rounding errors of the size of what it removed.
    for _ in range(2):
        vectors = vectors - (vectors @ basis.T) @ basis
    return vectors


class Lanczos:
    """A basis Q that grows by the product with its last vector, and the tridiagonal T = Q^T H Q.

    Each product is made orthogonal to all vectors before it. Where nothing is left of one, the basis spans an
    invariant subspace, and the next vector is zero; `restart` may give another. T then falls into blocks.

    Attributes:
      vector: the next one to multiply.
      left: the norm of what was left of the last product, 0 where that is nothing.
      diagonal: of T.
      off_diagonal: of T, one entry longer after each step than T's own: the last one is `left`.
    """

    def __init__(self, start: np.ndarray, *, floor: float, capacity: int) -> None:
        """Begins with a vector.

        Args:
          start: of norm 1.
          floor: what is left of a product is taken for nothing at this, relative to the largest product.
          capacity: vectors to make room for at first.
        """
        self.vector, self.left = start, 0.0
        self.diagonal: list[float] = []
        self.off_diagonal: list[float] = []
        self._rows = np.empty((capacity, len(start)))
        self._floor, self._scale, self._first = floor, 0.0, 0

    @property
    def basis(self) -> np.ndarray:
        """The vectors that have been multiplied, in rows."""
        return self._rows[: len(self.diagonal)]

    def extend(self, image: np.ndarray) -> None:
        """Takes in the product with `vector`."""
        size = len(self.diagonal) + 1
        if size > len(self._rows):
            self._rows = np.concatenate([self._rows, np.empty_like(self._rows)])
        self._rows[size - 1] = self.vector
        self.diagonal.append(float(self.vector @ image))
        self._scale = max(self._scale, float(np.linalg.norm(image)))
        rest = orthogonalise(image, self.basis)
        norm = float(np.linalg.norm(rest))
        self.left = norm if norm > self._floor * self._scale else 0.0
        self.off_diagonal.append(self.left)
        self.vector = rest / norm if self.left else np.zeros_like(rest)

    def restart(self, start: np.ndarray) -> None:
        """Goes on with a vector of norm 1 that is orthogonal to the basis, in a new block of T."""
        self.vector, self._first = start, len(self.diagonal)

    def last_block(self) -> tuple[np.ndarray, np.ndarray]:
        """The eigenvalues of T's last block, and its eigenvectors in columns."""
        first = self._first
        values, vectors = eigh_tridiagonal(self.diagonal[first:], self.off_diagonal[first:-1])
        return values, vectors
