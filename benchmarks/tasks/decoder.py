"""A decoder-only Transformer as Llama is, in plain JAX, whose layers are scanned and computed again backward.

Its params are a dict of arrays, those of the layers stacked along a leading axis, so that a program of 80
layers compiles as one of a single layer does. They are kept in float32 and multiplied in bfloat16.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Params = dict[str, Any]

_INITIAL_DEVIATION = 0.02


class Size(NamedTuple):
    """The sizes of a decoder.

    Attributes:
        layers: How many.
        width: Of the residual stream.
        heads: Of queries.
        kv_heads: Of keys and values, each for several heads of queries where there are fewer.
        hidden: Width of the gated layer.
        vocabulary: Number of tokens.
        norm_epsilon: Added to the mean square that a norm divides by.
        rotary_base: The longest wavelength of a rotary embedding, over that of its first pair of entries.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    vocabulary: int = 32_000
    norm_epsilon: float = 1e-5
    rotary_base: float = 10_000.0


class Batch(NamedTuple):
    """Tokens, of shape (examples, length).

    Attributes:
        inputs: What is read.
        targets: What follows each of them.
    """

    inputs: jax.Array
    targets: jax.Array


# Those of JackFram/llama-160m, princeton-nlp/Sheared-LLaMA-1.3B, Llama 2 7B, Code Llama 34B and Llama 2 70B.
SIZES = {
    "160M": Size(12, 768, 12, 12, 3072),
    "1.3B": Size(24, 2048, 16, 16, 5504),
    "7B": Size(32, 4096, 32, 32, 11_008),
    "34B": Size(48, 8192, 64, 8, 22_016),
    "70B": Size(80, 8192, 64, 8, 28_672),
}


def init(key: jax.Array, size: Size) -> Params:
    """Initial params, in float32."""
    d, kv = size.width, size.width // size.heads * size.kv_heads
    shapes = {
        "query": (d, d),
        "key": (d, kv),
        "value": (d, kv),
        "output": (d, d),
        "gate": (d, size.hidden),
        "up": (d, size.hidden),
        "down": (size.hidden, d),
    }
    keys = iter(jax.random.split(key, len(shapes) + 2))

    def matrix(*shape: int) -> jax.Array:
        return _INITIAL_DEVIATION * jax.random.normal(next(keys), shape)

    layers = {name: matrix(size.layers, *shape) for name, shape in shapes.items()}
    norms = {name: jnp.ones((size.layers, d)) for name in ("attention_norm", "mlp_norm")}
    return {
        "embedding": matrix(size.vocabulary, d),
        "layers": layers | norms,
        "norm": jnp.ones(d),
        "head": matrix(d, size.vocabulary),
    }


def partition(params: Params, shards: str | None, tensor: str | None = None) -> Params:
    """Partition specs of params: the width split over one axis of a mesh, heads and hidden over the other.

    Args:
        params: What `init` gives, or its shapes.
        shards: The axis that the batch is split over too, of fully sharded data parallelism.
        tensor: The axis of tensor parallelism.
    """

    def spec(path: tuple[Any, ...], w: Any) -> jax.P:
        name = path[-1].key
        if name.endswith("norm"):
            axes: tuple[str | None, ...] = (shards,)
        else:
            axes = (tensor, shards) if name in {"embedding", "output", "down"} else (shards, tensor)
        return jax.P(*[None] * (w.ndim - len(axes)), *axes)

    return jax.tree.map_with_path(spec, params)


def loss(
    params: Params,
    batch: Batch,
    *,
    size: Size,
    dtype: Any = jnp.bfloat16,
    sharding: jax.sharding.Sharding | None = None,
) -> jax.Array:
    """The mean cross-entropy of the next token.

    Args:
        params: The weights.
        batch: The tokens.
        size: The sizes that shapes of the weights do not tell.
        dtype: In which weights and activations are multiplied.
        sharding: That of the residual stream, (examples, length, width), where the compiler is to be told.
    """

    def placed(x: jax.Array) -> jax.Array:
        return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)

    # Before the loop, so that the layers' weights are gathered, and their gradients stacked, in 16 bits.
    params = jax.tree.map(lambda w: w.astype(dtype), params)
    x = states(params, batch.inputs, size, again=True, placed=placed)
    return _cross_entropy(x, params["head"], batch.targets)


def states(
    params: Params,
    tokens: jax.Array,
    size: Size,
    *,
    again: bool = False,
    placed: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> jax.Array:
    """What the last layer leaves of each token, normalized, of shape (examples, length, width).

    Args:
        params: The weights. A layer's matrix `name` may have adapters of low rank, `name_a` and `name_b`,
            whose product is added to it.
        tokens: Of shape (examples, length).
        size: The sizes that shapes of the weights do not tell.
        again: Whether the layers are computed again backward, so that memory does not grow with their number.
        placed: Is applied to the residual stream.
    """

    def layer(x: jax.Array, w: Params) -> tuple[jax.Array, None]:
        x = placed(x + _attention(_rms_norm(x, w["attention_norm"], size), w, size))
        return placed(x + _gated(_rms_norm(x, w["mlp_norm"], size), w)), None

    x = placed(params["embedding"][tokens])
    x, _ = jax.lax.scan(jax.checkpoint(layer) if again else layer, x, params["layers"])
    return _rms_norm(x, params["norm"], size)


class Cache(NamedTuple):
    """Keys and values of the tokens so far, of shape (layers, examples, length, kv_heads, entries)."""

    keys: jax.Array
    values: jax.Array


def empty_cache(size: Size, examples: int, length: int) -> Cache:
    """One for so many tokens, in float32."""
    zeros = jnp.zeros((size.layers, examples, length, size.kv_heads, size.width // size.heads))
    return Cache(zeros, zeros)


def next_states(
    params: Params, tokens: jax.Array, place: jax.Array, cache: Cache, size: Size
) -> tuple[jax.Array, Cache]:
    """`states` of one more token of each example.

    Args:
        params: As there.
        tokens: Of shape (examples,).
        place: The number of these tokens in their rows.
        cache: Filled at all places before.
        size: As there.

    Returns:
        The states, of shape (examples, width), and the cache with this place filled too.
    """

    def layer(x: jax.Array, inputs: tuple[Params, Cache]) -> tuple[jax.Array, Cache]:
        w, cache = inputs
        query, *fresh = _heads(_rms_norm(x, w["attention_norm"], size), w, size, place)
        put = jax.lax.dynamic_update_slice_in_dim
        keys, values = (put(old, new, place, axis=1) for old, new in zip(cache, fresh, strict=True))
        known = jnp.full(len(tokens), place + 1)
        mixed = jax.nn.dot_product_attention(query, keys, values, key_value_seq_lengths=known)
        x += _projected(mixed.reshape(x.shape), w, "output")
        return x + _gated(_rms_norm(x, w["mlp_norm"], size), w), Cache(keys, values)

    x = params["embedding"][tokens][:, None]
    x, cache = jax.lax.scan(layer, x, (params["layers"], cache))
    return _rms_norm(x, params["norm"], size)[:, 0], cache


@jax.checkpoint
def _cross_entropy(x: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
    """Computed again backward, so that logits, the largest arrays of all, are never kept."""
    logits = jnp.matmul(x, head, preferred_element_type=jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def _rms_norm(x: jax.Array, scale: jax.Array, size: Size) -> jax.Array:
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + size.norm_epsilon)
    return (wide * inverse).astype(x.dtype) * scale


def _gated(x: jax.Array, w: Params) -> jax.Array:
    return (jax.nn.silu(x @ w["gate"]) * (x @ w["up"])) @ w["down"]


def _projected(x: jax.Array, w: Params, name: str) -> jax.Array:
    y = x @ w[name]
    return y + (x @ w[f"{name}_a"]) @ w[f"{name}_b"] if f"{name}_a" in w else y


def _attention(x: jax.Array, w: Params, size: Size) -> jax.Array:
    query, key, value = _heads(x, w, size)
    mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    return _projected(mixed.reshape(x.shape), w, "output")


def _heads(x: jax.Array, w: Params, size: Size, first: Any = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values of each head, for tokens from the place `first` on."""

    def heads(name: str, count: int) -> jax.Array:
        return _projected(x, w, name).reshape(*x.shape[:2], count, size.width // size.heads)

    places = first + jnp.arange(x.shape[1])
    query, key = heads("query", size.heads), heads("key", size.kv_heads)
    return _rotated(query, places, size), _rotated(key, places, size), heads("value", size.kv_heads)


def _rotated(x: jax.Array, places: jax.Array, size: Size) -> jax.Array:
    """Rotary embedding: entries i and i + entries/2 of a head turn by an angle that grows with the place."""
    entries = x.shape[-1]
    frequencies = jnp.exp(jnp.arange(0, entries, 2) * (-math.log(size.rotary_base) / entries))
    angles = places[:, None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)
