"""CLIP (arXiv:2103.00020): images and captions as vectors of one space, the contrastive loss, retrieval."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.tasks import bert, models
from benchmarks.tasks.bert import Tokens
from benchmarks.tasks.data import Examples

# At the start. With the published 0.07, for batches of 32,768, the loss of batches of 64 stays at ln 64 for
# twice as many steps (100 of Adam at 3e-4 on Flickr8k).
TEMPERATURE = 0.3
CHUNK = 250  # images or captions that are encoded at once


class Pairs(NamedTuple):
    """Images and a caption of each.

    Attributes:
        images: Of shape (n, height, width, channels), in 0 to 255.
        captions: Their tokens and mask, of shape (n, length).
    """

    images: jax.Array | np.ndarray
    captions: Tokens


class Clip(nnx.Module):
    """An encoder of images and one of captions, whose outputs are as wide, and a learnt temperature."""

    def __init__(self, image_encoder: nnx.Module, text_encoder: nnx.Module) -> None:
        self.image_encoder, self.text_encoder = image_encoder, text_encoder
        # The log of how often the temperature falls below its start: 0 there, where noise in proportion to
        # weights leaves it alone.
        self.log_fall = nnx.Param(jnp.zeros(()))

    def embed_images(self, images: jax.Array | np.ndarray) -> jax.Array:
        """Unit vectors, of shape (n, width)."""
        return _unit(self.image_encoder(jnp.asarray(images, jnp.float32) / 127.5 - 1))

    def embed_captions(self, captions: Tokens) -> jax.Array:
        """Unit vectors, of shape (n, width)."""
        return _unit(self.text_encoder(captions))

    def logits(self, vectors: jax.Array, others: jax.Array) -> jax.Array:
        """Cosines over the temperature, of shape (n, m)."""
        return vectors @ others.T * (jnp.exp(self.log_fall[...]) / TEMPERATURE)


def _unit(x: jax.Array) -> jax.Array:
    # Not x / norm(x): its gradient at 0 is NaN.
    return x * jax.lax.rsqrt(jnp.sum(x**2, axis=-1, keepdims=True) + 1e-12)


def small_clip(
    channels: int, vocabulary: int, length: int, *, widths: tuple[int, ...], width: int, rngs: nnx.Rngs
) -> Clip:
    """A residual network with group normalization and a BERT of two layers, for CPUs.

    Args:
        channels: Of the images.
        vocabulary: How many tokens there are.
        length: Of a caption.
        widths: Of the residual blocks; each but the first halves the image.
        width: Of the tokens' states and of the space.
        rngs: It draws the weights.
    """
    network = models.ResNet(
        width,
        channels=channels,
        widths=widths,
        blocks=(1,) * len(widths),
        norm="group",  # batch normalization would tie an image's vector to the other images
        stem_stride=2,
        rngs=rngs,
    )
    config = bert.Config(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=4 * width,
        max_position_embeddings=length,
        type_vocab_size=1,
        layer_norm_eps=1e-6,
        hidden_act="gelu_new",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return Clip(network, bert.Classifier(bert.Bert(config, rngs=rngs), width, rngs=rngs))


def info_nce(
    model: Clip, examples: Examples, smoothing: float | jax.Array = 0.0, axis_name: str | None = None
) -> jax.Array:
    """The mean cross-entropy of finding each image's caption among all of the batch, and the reverse.

        1/2n sum_i [-log softmax_j(u_i . v_j / t)_i - log softmax_j(v_i . u_j / t)_i]

    It is no mean over examples: parts of a batch have other negatives, and so another loss.

    Args:
        model: It gives the vectors u of images and v of captions, and the temperature t.
        examples: Their inputs are `Pairs`.
        smoothing: The share of each label that is spread evenly over the batch.
        axis_name: Under `shard_map`, the axis over which a larger batch is spread: negatives are those of all
            devices, and the mean over devices is the whole batch's loss.

    References:
        Radford et al., Learning Transferable Visual Models From Natural Language Supervision,
        arXiv 2103.00020, 2021.
    """

    def loss(vectors: jax.Array, others: jax.Array) -> jax.Array:
        own = jnp.arange(len(vectors))
        if axis_name is not None:
            others = jax.lax.all_gather(others, axis_name, tiled=True)
            own += jax.lax.axis_index(axis_name) * len(vectors)
        labels = jax.nn.one_hot(own, len(others))
        smoothed = optax.smooth_labels(labels, smoothing)
        return optax.softmax_cross_entropy(model.logits(vectors, others), smoothed).mean()

    images = model.embed_images(examples.inputs.images)
    captions = model.embed_captions(examples.inputs.captions)
    return (loss(images, captions) + loss(captions, images)) / 2


def matched(model: Clip, examples: Examples) -> jax.Array:
    """The share of the images and captions of a batch whose own partner is the nearest in it."""
    cosines = model.embed_images(examples.inputs.images) @ model.embed_captions(examples.inputs.captions).T
    own = jnp.arange(len(cosines))
    return (jnp.mean(cosines.argmax(axis=0) == own) + jnp.mean(cosines.argmax(axis=1) == own)) / 2


def retrieval(model: Clip, images: np.ndarray, captions: Tokens, depths: tuple[int, ...]) -> dict[str, float]:
    """Recall at some depths, both ways.

    Args:
        model: In evaluation mode.
        images: Of shape (n, height, width, channels).
        captions: Of shape (n, m, length): m of each image.
        depths: How many of the nearest to look at.

    Returns:
        `image_to_text_10` is the share of the images that have one of their own captions among the 10 nearest
        of all n m; `text_to_image_10` that of the captions that have their image among the 10 nearest of n.
    """
    number, each, _ = captions.tokens.shape
    flat = Tokens(*(array.reshape(number * each, -1) for array in captions))
    cosines = embedded_images(model, images) @ embedded_captions(model, flat).T
    own = np.arange(number)[:, None] == np.repeat(np.arange(number), each)
    ranked = {"image_to_text": ranks(cosines, own), "text_to_image": ranks(cosines.T, own.T)}
    return {
        f"{way}_{depth}": float(np.mean(found < depth)) for way, found in ranked.items() for depth in depths
    }


def ranks(cosines: np.ndarray, own: np.ndarray) -> np.ndarray:
    """How many items of others come before the first of its own, for each row.

    Args:
        cosines: Of shape (n, m): how near each item is.
        own: Of that shape: which items are the row's own.

    Returns:
        Of shape (n,). Of equally near items its own come last, so that equal vectors find nothing.
    """
    nearest = np.where(own, cosines, -np.inf).max(axis=1, keepdims=True)
    return (~own & ~(cosines < nearest)).sum(axis=1)


def zero_shot(model: Clip, examples: Examples, classes: Tokens) -> float:
    """The share of the images that are nearer to the caption of their own class than to any other.

    Args:
        model: In evaluation mode.
        examples: Images in 0 to 255 with the numbers of their classes.
        classes: A caption of each class.
    """
    cosines = embedded_images(model, examples.inputs) @ embedded_captions(model, classes).T
    return float(np.mean(cosines.argmax(axis=1) == examples.labels))


def embedded_images(model: Clip, images: np.ndarray) -> np.ndarray:
    """The vectors of many images, a chunk at a time."""
    return _in_chunks(_embed_images, model, images)


def embedded_captions(model: Clip, captions: Tokens) -> np.ndarray:
    """The vectors of many captions, a chunk at a time."""
    return _in_chunks(_embed_captions, model, captions)


_embed_images = nnx.jit(Clip.embed_images)
_embed_captions = nnx.jit(Clip.embed_captions)


def _in_chunks(embed: Callable[..., jax.Array], model: Clip, inputs: Any) -> np.ndarray:
    number = len(jax.tree.leaves(inputs)[0])
    parts = (
        jax.tree.map(lambda array, first=first: array[first : first + CHUNK], inputs)
        for first in range(0, number, CHUNK)
    )
    return np.concatenate([np.asarray(embed(model, part)) for part in parts])
