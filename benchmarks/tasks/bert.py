"""A BERT encoder (arXiv:1810.04805) with weights from Hugging Face's files, and a classifier on it."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.kit.files import UserError

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(nnx.gelu, approximate=False),
    "gelu_new": nnx.gelu,
    "relu": nnx.relu,
}

"""Where a model's files are: a folder, `hf://owner/name` with or without a folder in it, or `PACKAGE`."""


class Tokens(NamedTuple):
    """Sentences as numbers.

    Attributes:
        tokens: Of shape (n, length), int32.
        mask: Of that shape: 1 where a token is the sentence's, 0 where it is padding.
    """

    tokens: jax.Array | np.ndarray
    mask: jax.Array | np.ndarray


class Config(NamedTuple):
    """What an encoder is built from, under the names of `config.json`."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float
    hidden_act: str
    hidden_dropout_prob: float
    attention_probs_dropout_prob: float

    @classmethod
    def parse(cls, words: dict[str, Any]) -> Self:
        """The configuration among the words of a `config.json`.

        Args:
            words: Its entries; those that are not needed are passed over.

        Raises:
            UserError: An entry is missing, or asks for what `Bert` is not.
        """
        if missing := [name for name in ("model_type", *cls._fields) if name not in words]:
            raise UserError(f"lacks {', '.join(missing)}")
        for name, known in _KNOWN.items():
            if name in words and words[name] not in known:
                only = ", ".join(map(str, known))
                raise UserError(f"has the {name} {words[name]!r}, and only {only} is known")
        for name, kind in cls.__annotations__.items():
            _check_kind(name, words[name], kind)
        if words["hidden_size"] % words["num_attention_heads"]:
            raise UserError("has a hidden_size that is no multiple of num_attention_heads")
        return cls(*(words[name] for name in cls._fields))

    def without_dropout(self) -> Self:
        """The same with both probabilities 0."""
        return self._replace(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def _check_kind(name: str, value: Any, kind: type) -> None:
    if kind is int and (type(value) is not int or value < 1):
        raise UserError(f"has the {name} {value!r}, and a positive int is needed")
    if kind is float and (type(value) not in {int, float} or not 0 <= value < 1):
        raise UserError(f"has the {name} {value!r}, and a number from 0 to below 1 is needed")


_KNOWN = {
    "model_type": ("bert",),
    "is_decoder": (False,),
    "position_embedding_type": ("absolute",),
    "hidden_act": tuple(ACTIVATIONS),
}


class Bert(nnx.Module):
    """Embeddings and layers of attention, for single sentences: every token is of the first type."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        self.width = config.hidden_size
        embed = functools.partial(
            nnx.Embed, features=self.width, embedding_init=nnx.initializers.normal(0.02), rngs=rngs
        )
        self.words = embed(config.vocab_size)
        self.positions = embed(config.max_position_embeddings)
        self.types = embed(config.type_vocab_size)
        self.norm = _norm(config, rngs)
        self.dropout = nnx.Dropout(config.hidden_dropout_prob, rngs=rngs)
        self.layers = nnx.List([Layer(config, rngs=rngs) for _ in range(config.num_hidden_layers)])

    def __call__(self, tokens: jax.Array | np.ndarray, mask: jax.Array | np.ndarray) -> jax.Array:
        """The last layer's states, of shape (n, length, width).

        Args:
            tokens: Their numbers, of shape (n, length).
            mask: Of that shape: zero where a token is padding, which no other token attends to.

        Raises:
            ValueError: There are more tokens in a row than positions.
        """
        length, longest = tokens.shape[1], self.positions.num_embeddings
        if length > longest:
            raise ValueError(f"expected at most {longest} tokens in a row, got {length}")
        places = self.positions.embedding[None, :length] + self.types.embedding[None, :1]
        x = self.dropout(self.norm(self.words(jnp.asarray(tokens)) + places))
        for layer in self.layers:
            x = layer(x, jnp.asarray(mask, bool))
        return x


class Layer(nnx.Module):
    """Self-attention and two dense layers, each added to what it gets and then normalized."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        width, inner = config.hidden_size, config.intermediate_size
        self.activation = ACTIVATIONS[config.hidden_act]
        self.attention = Attention(config, rngs=rngs)
        self.norm1 = _norm(config, rngs)
        self.dense1 = _linear(width, inner, rngs)
        self.dense2 = _linear(inner, width, rngs)
        self.norm2 = _norm(config, rngs)
        self.dropout = nnx.Dropout(config.hidden_dropout_prob, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """What comes out of the layer for x of shape (n, length, width), of the same shape."""
        x = self.norm1(x + self.dropout(self.attention(x, mask)))
        return self.norm2(x + self.dropout(self.dense2(self.activation(self.dense1(x)))))


class Attention(nnx.Module):
    """Self-attention with several heads, among the tokens that are no padding."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.query = _linear(width, width, rngs)
        self.key = _linear(width, width, rngs)
        self.value = _linear(width, width, rngs)
        self.out = _linear(width, width, rngs)
        self.dropout = nnx.Dropout(config.attention_probs_dropout_prob, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """A mix of the values for each token, of the shape of x, (n, length, width)."""
        query, key, value = (
            project(x).reshape(*x.shape[:2], self.num_heads, -1)
            for project in (self.query, self.key, self.value)
        )
        scores = jnp.einsum("nqhd,nkhd->nhqk", query, key) / math.sqrt(query.shape[-1])
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(scores.dtype).min)
        weights = self.dropout(nnx.softmax(scores))
        return self.out(jnp.einsum("nhqk,nkhd->nqhd", weights, value).reshape(x.shape))


def _linear(width: int, out: int, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(width, out, kernel_init=nnx.initializers.normal(0.02), rngs=rngs)


def _norm(config: Config, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, rngs=rngs)


class Classifier(nnx.Module):
    """A copy of an encoder, in the same mode, and a linear head on the mean of its states.

    Args:
        encoder: It stays as it is, so many classifiers can start from it.
        num_classes: As many logits.
        rngs: For the head's weights and for the copy's dropout.
    """

    def __init__(self, encoder: Bert, num_classes: int, *, rngs: nnx.Rngs) -> None:
        self.encoder = nnx.clone(encoder)
        reseed(self.encoder, rngs)
        self.head = _linear(encoder.width, num_classes, rngs)

    def __call__(self, inputs: Tokens) -> jax.Array:
        """The logits, of shape (n, num_classes)."""
        states = self.encoder(inputs.tokens, inputs.mask)
        return self.head(states.mean(axis=1, where=jnp.asarray(inputs.mask, bool)[..., None]))


def reseed(module: nnx.Module, rngs: nnx.Rngs) -> None:
    """Gives every dropout layer in a module a random stream of its own."""
    for _, layer in nnx.iter_modules(module):
        if isinstance(layer, nnx.Dropout):
            layer.rngs = rngs.dropout.fork()
