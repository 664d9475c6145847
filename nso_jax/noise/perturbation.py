"""A perturbation of a whole pytree."""

import hashlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nso_jax._axes import axes_of
from nso_jax._checks import (
    PyTree,
    as_key,
    broadcast_prefix,
    check_inexact,
    check_mapped,
    check_real,
    check_sampler,
    describe,
    leaf_mask,
    leaf_name,
)
from nso_jax._precision import widen
from nso_jax.noise.samplers import Sampler, normal
from nso_jax.noise.scales import Sigma, check_deviation, leaf_deviations

__all__ = ["perturb", "perturbation"]


def perturbation(
    key: jax.Array,
    params: PyTree,
    sigma: Sigma,
    *,
    sampler: Sampler = normal,
    mask: PyTree = None,
    param_specs: PyTree = None,
) -> PyTree:
    """One draw of noise for every leaf: U_l = sigma_l * sampler(key_l, shape_l).

    key_l depends on `key` and on the leaf's path alone: adding, removing or reordering other leaves leaves
    a leaf's noise as it was. A complex leaf gets noise with E|u|^2 = sigma^2, half of it in each part.

    Args:
      key: a PRNG key, typed or legacy.
      params: a pytree with inexact leaves.
      sigma: standard deviation of one weight's noise: a scalar, a prefix pytree of `params`, or a
        function from `params` to such a prefix. Each leaf broadcasts to the leaf that it scales.
      sampler: `sampler(key, shape, dtype)` of unit variance.
      mask: which leaves get noise: bools, a prefix pytree of `params` or a function from it to one. The
        default, None, is all of them.
      param_specs: inside `shard_map`: the partition specs of `params`, a prefix pytree; each shard of a leaf
        then gets its own noise. The default, None, is for leaves that are whole.

    Returns:
      A pytree like `params`, in float32 (float64 for float64 leaves), with None where `mask` is False.

    Raises:
      TypeError: a leaf is not inexact, `key` is not a PRNG key, `sigma` or what the sampler returned is not
        real, or `mask` has other leaves than bools and `param_specs` others than partition specs.
      ValueError: `sigma` is negative, NaN or does not fit, `mask` or `param_specs` does not fit, or the
        sampler returned another shape than it was asked for.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from nso_jax import noise
      >>> params = {"w": jnp.zeros((2, 3)), "b": jnp.zeros(3)}
      >>> u = noise.perturbation(jax.random.key(0), params, 0.1, mask={"w": True, "b": False})
      >>> u["w"].shape, u["b"]
      ((2, 3), None)
    """
    key = as_key(key)
    check_sampler(sampler)
    check_inexact(params)
    deviations = leaf_deviations(sigma, params)
    flags = leaf_mask(mask, params)
    specs = broadcast_prefix("param_specs", jax.P() if param_specs is None else param_specs, params)
    _check_specs(specs)
    leaves, treedef = jax.tree.flatten_with_path(params)
    if not leaves:
        return params
    keys = _leaf_keys(key, [jax.tree_util.keystr(path) for path, _ in leaves])
    draws = [
        _scaled_draw(_shard_key(leaf_key, spec), leaf, deviation, sampler, leaf_name(path)) if flag else None
        for leaf_key, spec, (path, leaf), deviation, flag in zip(
            keys, specs, leaves, deviations, flags, strict=True
        )
    ]
    return jax.tree.unflatten(treedef, draws)


def perturb(params: PyTree, noise: PyTree, sign: Any = 1) -> PyTree:
    """W + sign * U, added in float32 (float64 for float64 leaves) and rounded once to the leaf's dtype.

    A finite weight that this takes beyond the dtype's range becomes NaN, and not infinite: at infinite
    weights a loss that saturates, and its gradient, may well be finite.

    Args:
      params: a pytree with inexact leaves.
      noise: what `perturbation` returned for it: None leaves stay as they are.
      sign: a scalar, +1 or -1.

    Returns:
      A pytree like `params`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from nso_jax import noise
      >>> params = {"w": jnp.zeros(3)}
      >>> u = noise.perturbation(jax.random.key(0), params, 0.1, sampler=noise.rademacher)
      >>> abs(noise.perturb(params, u)["w"])
      Array([0.1, 0.1, 0.1], dtype=float32)
    """

    def add(u: jax.Array | None, w: Any) -> Any:
        if u is None:
            return w
        moved = (widen(w) + jnp.asarray(sign, u.dtype) * u).astype(jnp.result_type(w))
        # Infinity minus itself is NaN, and what stays in range loses nothing.
        return moved - jnp.where(jnp.isinf(moved) & jnp.isfinite(w), moved, 0)

    return jax.tree.map(add, noise, params, is_leaf=lambda u: u is None)


def _leaf_keys(key: jax.Array, paths: list[str]) -> jax.Array:
    """One key per path, from 64 bits of its hash; with 32, leaves of a large model might well collide."""
    digests = b"".join(hashlib.blake2b(path.encode(), digest_size=8).digest() for path in paths)
    words = np.frombuffer(digests, "<u4").reshape(len(paths), 2).astype(np.uint32)
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    return jax.vmap(jax.random.fold_in)(fold(key, words[:, 0]), words[:, 1])


def _shard_key(key: jax.Array, spec: jax.P) -> jax.Array:
    axes = axes_of(spec)
    return jax.random.fold_in(key, jax.lax.axis_index(axes)) if axes else key


def _check_specs(specs: list[Any]) -> None:
    for spec in specs:
        if not isinstance(spec, jax.P):
            raise TypeError(f"param_specs: expected partition specs, got {describe(spec)}.")
        check_mapped("param_specs", axes_of(spec))


def _scaled_draw(key: jax.Array, leaf: Any, sigma: Any, sampler: Sampler, path: str) -> jax.Array:
    w = widen(leaf)
    real = jnp.finfo(w.dtype).dtype
    check_deviation(sigma, path, w.shape)

    def draw(key: jax.Array) -> jax.Array:
        u = _sampled(sampler, key, w.shape, real)
        check_real("sampler", u, f" for each weight of leaf {path}")
        if jnp.shape(u) != w.shape:
            raise ValueError(f"sampler: returned shape {jnp.shape(u)} for leaf {path} of shape {w.shape}.")
        return jnp.asarray(sigma).astype(real) * jnp.asarray(u, real)

    if jnp.iscomplexobj(w):
        return jax.lax.complex(*map(draw, jax.random.split(key))) / math.sqrt(2.0)
    return draw(key)


def _sampled(sampler: Sampler, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> Any:
    try:
        return sampler(key, shape, dtype)
    except Exception as error:
        error.add_note(
            "sampler: it was called as sampler(key, shape, dtype), for draws of mean 0 and variance 1. "
            "Random signs are nso_jax.noise.rademacher."
        )
        raise
