"""The draws of a step: what `value_and_grad` and the optax adapter average over."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nso_jax import _backend, noise
from nso_jax._axes import Axes
from nso_jax._checks import PyTree, check_count, check_flag, check_sampler, check_scalar
from nso_jax._precision import cast_like, widen
from nso_jax.noise import Sampler, Sigma

Evaluate = Callable[[PyTree, jax.Array], tuple[PyTree, PyTree]]


@dataclasses.dataclass(frozen=True, eq=False)
class Draws:
    """Which noise is added to the weights, how often, and how much it counts.

    Attributes:
      sigma: standard deviation of one weight's noise, as in `nso_jax.value_and_grad`, like all that follow.
      num_samples: k.
      antithetic: whether to evaluate pairs.
      sampler: the noise.
      mask: the perturbed leaves.
      clean_weight: the share of the unperturbed evaluation.
      chunk_size: draws at once.
    """

    sigma: Sigma
    num_samples: int = 1
    antithetic: bool = True
    sampler: Sampler = noise.normal
    mask: PyTree = None
    clean_weight: Any = 0.0
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        """Raises TypeError or ValueError for what cannot be; `sigma` and `mask` need the params for that."""
        check_count("num_samples", self.num_samples)
        if self.chunk_size is not None:
            check_count("chunk_size", self.chunk_size)
        check_flag("antithetic", self.antithetic)
        check_sampler(self.sampler)
        check_scalar("clean_weight", self.clean_weight, lambda x: 0 <= x <= 1, "a number in [0, 1]")

    def mean(
        self,
        evaluate: Evaluate,
        key: jax.Array,
        params: PyTree,
        *,
        axes: Axes,
        clean: Callable[[PyTree], PyTree],
        like: PyTree,
    ) -> tuple[PyTree, PyTree]:
        """The mean of `evaluate` over a device's draws.

        Args:
          evaluate: `evaluate(params, i) -> (averaged, kept)` at perturbed params, i the evaluation's index in
            the order +1, -1, +2, -2, ...
          key: a typed PRNG key.
          params: the unperturbed params.
          axes: those along which the caller will average.
          clean: what `averaged` is at the unperturbed params; called only if it is weighted.
          like: a pytree like `averaged`, with the dtypes in which it is returned.

        Returns:
          `averaged`, its mean, and `kept`, with the evaluations stacked along a new leading axis.
        """
        specs = axes.specs(params, key)
        params, key = axes.localize(params, key)
        keys = jax.random.split(key, self.num_samples)

        def draw(center: PyTree, keys: jax.Array) -> PyTree:
            def one(key: jax.Array) -> PyTree:
                options = {"sampler": self.sampler, "mask": self.mask, "param_specs": specs}
                return noise.perturbation(key, center, self.sigma, **options)

            return _over_draws(one, len(keys))(keys)

        def add(
            total: PyTree, center: PyTree, u: PyTree, sign: int, indices: jax.Array
        ) -> tuple[PyTree, PyTree]:
            """`total` plus the sum over a chunk's draws of what is averaged; and what is kept of each."""

            def one(u: PyTree, index: jax.Array) -> tuple[PyTree, PyTree]:
                return evaluate(_backend.computed_once(noise.perturb(center, u, sign), key), index)

            averaged, kept = _over_draws(one, len(indices))(u, indices)
            return _backend.added(total, jax.tree.map(lambda x: jnp.sum(widen(x), axis=0), averaged)), kept

        def add_chunk(total: PyTree, first: Any, size: int) -> tuple[PyTree, PyTree]:
            """As `add`, for both sides of the draws first, ..., first + size - 1."""
            draws = first + jnp.arange(size, dtype=jnp.int32)
            center, of_draws = _backend.in_each_step(params, jax.lax.dynamic_slice_in_dim(keys, first, size))
            u = draw(center, of_draws)
            if not self.antithetic:
                return add(total, center, u, 1, draws)
            u = _backend.computed_once(u, key)
            total, kept = add(total, center, u, 1, 2 * draws)
            center, u, total = _backend.drawn_again(draw, center, of_draws, u, after=total)
            total, other = add(total, center, u, -1, 2 * draws + 1)
            return total, jax.tree.map(lambda *sides: _merge_axes(jnp.stack(sides, axis=1)), kept, other)

        with axes.copies():
            total, kept = self._sum_over_chunks(add_chunk, key)
            count = (2 if self.antithetic else 1) * self.num_samples
            mean = jax.tree.map(lambda x: x / count, total)
            if not _is_zero(self.clean_weight):
                mean = jax.tree.map(self._mixed, clean(params), mean)
        return cast_like(mean, like), kept

    def _sum_over_chunks(
        self, add_chunk: Callable[[PyTree, Any, int], tuple[PyTree, PyTree]], key: jax.Array
    ) -> tuple[PyTree, PyTree]:
        """Runs all chunks of draws, the last of which may be smaller, one after another."""
        size = min(self.chunk_size or 1, self.num_samples)
        whole, rest = divmod(self.num_samples, size)
        total, stacked = _backend.sum_over(lambda total, i: add_chunk(total, size * i, size), whole, key)
        kept = jax.tree.map(_merge_axes, stacked)
        if not rest:
            return total, kept
        total, first = _backend.barrier((total, jnp.int32(size * whole)), key)
        total, last = add_chunk(total, first, rest)
        return total, jax.tree.map(lambda x, y: jnp.concatenate([x, y]), kept, last)

    def _mixed(self, clean: Any, noisy: jax.Array) -> jax.Array:
        weight = jnp.asarray(self.clean_weight, noisy.dtype)
        return weight * widen(clean) + (1 - weight) * noisy


def _over_draws(fun: Callable[..., PyTree], size: int) -> Callable[..., PyTree]:
    """Maps `fun` over a chunk's draws; a chunk of one calls it as it is, so that it need not be vmappable."""
    if size > 1:
        return jax.vmap(fun)
    return lambda *args: jax.tree.map(
        lambda x: jnp.asarray(x)[None], fun(*jax.tree.map(lambda x: x[0], args))
    )


def _merge_axes(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _is_zero(weight: Any) -> bool:
    return not isinstance(weight, jax.core.Tracer) and jax.device_get(weight) == 0
