"""The identity that defines the method, Q^T A Q = T, with restarts."""

import numpy as np
import pytest

from nso_jax.curvature._lanczos import Lanczos, orthogonalise

RNG = np.random.default_rng(0)


def unit(vector):
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize("eigenvalues", [np.arange(9.0), [1, 1, 1, 2, 2, 3], [0, 0, 0, 0]], ids=str)
def test_the_matrix_is_tridiagonal_in_the_basis(eigenvalues):
    size = len(eigenvalues)
    rotation, _ = np.linalg.qr(RNG.normal(size=(size, size)))
    matrix = rotation @ np.diag(eigenvalues) @ rotation.T
    krylov, blocks = Lanczos(unit(RNG.normal(size=size)), floor=1e-10, capacity=2), []
    while len(krylov.diagonal) < size:
        krylov.extend(matrix @ krylov.vector)
        if not krylov.left:
            assert not krylov.vector.any()
            blocks.append(krylov.last_block()[0])
            if len(krylov.diagonal) < size:
                krylov.restart(unit(orthogonalise(RNG.normal(size=size), krylov.basis)))
    off_diagonal = krylov.off_diagonal[:-1]
    tridiagonal = np.diag(krylov.diagonal) + np.diag(off_diagonal, 1) + np.diag(off_diagonal, -1)
    np.testing.assert_allclose(krylov.basis @ krylov.basis.T, np.eye(size), atol=1e-14)
    np.testing.assert_allclose(krylov.basis @ matrix @ krylov.basis.T, tridiagonal, atol=1e-9)
    np.testing.assert_allclose(np.sort(np.concatenate(blocks)), np.sort(eigenvalues), atol=1e-9)
