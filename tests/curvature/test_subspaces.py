"""Overlaps of subspaces that are known."""

import jax.numpy as jnp
import numpy as np
import pytest

from nso_jax.curvature import subspace_overlap


def orthonormal(k, n, seed=0):
    return list(np.linalg.qr(np.random.default_rng(seed).normal(size=(n, k)))[0].T)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_overlap_with_itself_is_one_in_any_basis(k):
    vectors = np.stack(orthonormal(k, 7))
    mixed = np.random.default_rng(1).normal(size=(k, k)) @ vectors
    np.testing.assert_allclose(subspace_overlap(list(vectors), list(mixed)), 1, rtol=1e-12)


def test_overlap_with_the_complement_is_zero():
    vectors = orthonormal(6, 6)
    np.testing.assert_allclose(subspace_overlap(vectors[:3], vectors[3:]), 0, atol=1e-15)


def test_overlap_of_rotated_planes():
    x, y, z, w = np.eye(4)
    for first, second in ((0.3, 0.0), (0.4, 1.1)):
        turned = [np.cos(first) * x + np.sin(first) * z, np.cos(second) * y + np.sin(second) * w]
        expected = (np.cos(first) ** 2 + np.cos(second) ** 2) / 2
        np.testing.assert_allclose(subspace_overlap([x, y], turned), expected, rtol=1e-12)
        np.testing.assert_allclose(subspace_overlap(turned, [x, y]), expected, rtol=1e-12)


def test_overlap_of_random_subspaces_is_their_share_of_the_space():
    found = [
        subspace_overlap(orthonormal(3, 20, seed), orthonormal(3, 20, 1000 + seed)) for seed in range(200)
    ]
    assert abs(np.mean(found) - 3 / 20) < 4 * np.std(found, ddof=1) / np.sqrt(len(found))


def test_overlap_of_pytrees_is_that_of_their_entries():
    first, second = (np.random.default_rng(seed).normal(size=(2, 7)).astype(np.float32) for seed in range(2))
    trees = [
        [{"a": jnp.asarray(v[:6].reshape(2, 3)), "b": v[6], "c": None} for v in rows]
        for rows in (first, second)
    ]
    np.testing.assert_allclose(subspace_overlap(*trees), subspace_overlap(first, second), rtol=1e-12)
    assert isinstance(subspace_overlap(*trees), float)


X, Y, Z = np.eye(3)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ([], [X], "first: expected at least one vector, got none."),
        ([X], [], "second: expected at least one vector, got none."),
        ([X, Y], [X], "second: expected as many vectors as in first, 2, got 1."),
        ([X, Y[:2]], [X, Y], r"first\[1\]: expected shape \(3,\) as in first\[0\], got \(2,\)."),
        ([X], [X[None]], r"second\[0\]: expected shape \(3,\) as in first\[0\], got \(1, 3\)."),
        (
            [{"a": X}],
            [{"a": 1.0}],
            r"second\[0\]: expected shape \(3,\) for leaf \['a'\] as in first\[0\], got \(\).",
        ),
        ([{"a": X}], [{"b": X}], r"second\[0\]: expected a pytree like first\[0\]"),
        ([X, 2 * X], [X, Y], "first: the 2 vectors are linearly dependent; give a basis."),
        ([X, Y], [0 * X, Y], "second: the 2 vectors are linearly dependent"),
        ([X[:1]] * 2, [X[:1]] * 2, "first: the 2 vectors are linearly dependent"),
        ([X], [np.nan * Y], "second: expected finite vectors, got NaN or infinity in one."),
    ],
)
def test_overlap_errors_say_argument_and_value(first, second, message):
    with pytest.raises(ValueError, match=message):
        subspace_overlap(first, second)
