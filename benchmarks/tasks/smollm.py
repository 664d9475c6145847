"""A language model such as SmolLM2 (arXiv:2502.02737), whose weights stay as they are, with LoRA adapters."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.tasks import decoder
from benchmarks.tasks.data import Examples
from benchmarks.tasks.decoder import Params, Size
from benchmarks.tasks.models import Frozen

ADAPTED = ("query", "key", "value", "output")
SCALE = 2.0  # of an adapter's product: LoRA's alpha over its rank


class Rows(NamedTuple):
    """Tokens to be read, and how much what follows each of them counts.

    Attributes:
        tokens: Of shape (n, length), int32.
        weights: Of that shape, float32: 0 where the next token is given or padding; elsewhere 1 over the mean
            number of others in a row. So the mean over rows of a weighted sum is a mean over tokens, whether
            it is taken at once or as a mean over equal parts of the rows.
    """

    tokens: jax.Array | np.ndarray
    weights: jax.Array | np.ndarray


class SmolLM(nnx.Module):
    """A decoder, of which adapters of low rank alone are trained: W + 2 A B, with B zero at first.

    References:
        Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685, 2021.
    """

    def __init__(self, size: Size, params: Params, rank: int, *, rngs: nnx.Rngs) -> None:
        """The decoder of these weights, which are shared and not copied, with fresh adapters.

        Args:
            size: Its sizes.
            params: As `decoder.init` gives them, without a head: the embedding is used for it.
            rank: Of the adapters.
            rngs: For their first factors.
        """
        self.size = size
        self.embedding, self.norm = Frozen(params["embedding"]), Frozen(params["norm"])
        self.layers = nnx.Dict({name: Frozen(w) for name, w in params["layers"].items()})
        self.adapters = nnx.Dict(_adapters(params["layers"], rank, rngs))

    def params(self) -> Params:
        """The weights, as the functions of `decoder` take them."""
        layers = {name: w[...] for name, w in self.layers.items()}
        layers |= {name: w[...] * (SCALE if name.endswith("_b") else 1) for name, w in self.adapters.items()}
        return {"embedding": self.embedding[...], "norm": self.norm[...], "layers": layers}

    def __call__(self, rows: Rows) -> jax.Array:
        """The logits of each next token, of shape (n, length, vocabulary)."""
        params = self.params()
        return decoder.states(params, jnp.asarray(rows.tokens), self.size) @ params["embedding"].T


def _adapters(layers: Params, rank: int, rngs: nnx.Rngs) -> dict[str, nnx.Param[jax.Array]]:
    made: dict[str, nnx.Param[jax.Array]] = {}
    for name in ADAPTED:
        number, inputs, outputs = layers[name].shape
        factor = jax.random.normal(rngs.params(), (number, inputs, rank)) / math.sqrt(inputs)
        made |= {f"{name}_a": nnx.Param(factor), f"{name}_b": nnx.Param(jnp.zeros((number, rank, outputs)))}
    return made


def loss(model: SmolLM, examples: Examples, smoothing: float | jax.Array = 0.0) -> jax.Array:
    """The mean cross-entropy over those tokens that count.

    Args:
        model: It gives the logits.
        examples: Their inputs are `Rows`, their labels the next tokens, of shape (n, length).
        smoothing: The share of each label that is spread evenly over the vocabulary.
    """
    logits = model(examples.inputs)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, examples.labels)
    if not (isinstance(smoothing, float) and smoothing == 0):
        evenly = jax.nn.logsumexp(logits, axis=-1) - logits.mean(axis=-1)
        losses += smoothing * (evenly - losses)
    return _mean(losses, examples)


def accuracy(model: SmolLM, examples: Examples) -> jax.Array:
    """The share of those tokens that count which the model finds likeliest."""
    return _mean(jnp.argmax(model(examples.inputs), axis=-1) == examples.labels, examples)


def _mean(values: jax.Array, examples: Examples) -> jax.Array:
    return jnp.sum(values * examples.inputs.weights) / len(values)


def greedy(model: SmolLM, prompts: list[list[int]], length: int, end: int) -> list[list[int]]:
    """What the model says to each prompt, always by the likeliest token.

    Args:
        model: The model.
        prompts: Their tokens.
        length: Of a prompt and what follows together, at most.
        end: The token after which it says no more; it is left out.
    """
    given = np.array([len(prompt) for prompt in prompts])
    tokens = np.array([prompt + [end] * (length - len(prompt)) for prompt in prompts], np.int32)
    said = np.asarray(_continued(model.params(), tokens, given, size=model.size))
    rows = [row[number:].tolist() for row, number in zip(said, given, strict=True)]
    return [row[: row.index(end)] if end in row else row for row in rows]


@functools.partial(jax.jit, static_argnames="size")
def _continued(params: Params, tokens: jax.Array, given: jax.Array, *, size: Size) -> jax.Array:
    """The tokens, all but the given ones of each row replaced by the likeliest."""

    def step(carry: Any, place: jax.Array) -> tuple[Any, jax.Array]:
        read, cache = carry
        x, cache = decoder.next_states(params, read, place, cache, size)
        likeliest = jnp.argmax(x @ params["embedding"].T, axis=-1).astype(tokens.dtype)
        follows = jnp.where(place + 1 < given, tokens[:, place + 1], likeliest)
        return (follows, cache), follows

    start = tokens[:, 0], decoder.empty_cache(size, *tokens.shape)
    _, said = jax.lax.scan(step, start, jnp.arange(tokens.shape[1] - 1))
    return jnp.concatenate([tokens[:, :1], said.T], axis=1)
