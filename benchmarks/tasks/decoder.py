"""A decoder-only Transformer as Llama is, in plain JAX, whose layers are scanned and computed again backward.

Its params are a dict of arrays, those of the layers stacked along a leading axis, so that a program of 80
layers compiles as one of a single layer does. They are kept in float32 and multiplied in bfloat16.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Params = dict[str, Any]

_INITIAL_DEVIATION = 0.02
_NORM_EPSILON = 1e-5
_ROTARY_BASE = 10_000.0


class Size(NamedTuple):
    """The sizes of a decoder.

    Attributes:
        layers: How many.
        width: Of the residual stream.
        heads: Of queries.
        kv_heads: Of keys and values, each for several heads of queries where there are fewer.
        hidden: Width of the gated layer.
        vocabulary: Number of tokens.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    vocabulary: int = 32_000


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

    def layer(x: jax.Array, w: Params) -> tuple[jax.Array, None]:
        x = placed(x + _attention(_rms_norm(x, w["attention_norm"]), w, size))
        y = _rms_norm(x, w["mlp_norm"])
        return placed(x + (jax.nn.silu(y @ w["gate"]) * (y @ w["up"])) @ w["down"]), None

    # Before the loop, so that the layers' weights are gathered, and their gradients stacked, in 16 bits.
    params = jax.tree.map(lambda w: w.astype(dtype), params)
    x = placed(params["embedding"][batch.inputs])
    x, _ = jax.lax.scan(jax.checkpoint(layer), x, params["layers"])
    return _cross_entropy(_rms_norm(x, params["norm"]), params["head"], batch.targets)


@jax.checkpoint
def _cross_entropy(x: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
    """Computed again backward, so that logits, the largest arrays of all, are never kept."""
    logits = jnp.matmul(x, head, preferred_element_type=jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def _rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    size = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + _NORM_EPSILON)
    return (wide * size).astype(x.dtype) * scale


def _attention(x: jax.Array, w: Params, size: Size) -> jax.Array:
    def heads(name: str, count: int) -> jax.Array:
        return (x @ w[name]).reshape(*x.shape[:2], count, size.width // size.heads)

    query, key = _rotated(heads("query", size.heads)), _rotated(heads("key", size.kv_heads))
    mixed = jax.nn.dot_product_attention(query, key, heads("value", size.kv_heads), is_causal=True)
    return mixed.reshape(x.shape) @ w["output"]


def _rotated(x: jax.Array) -> jax.Array:
    """Rotary embedding: entries i and i + size/2 of a head turn by an angle that grows with the position."""
    _, length, _, size = x.shape
    frequencies = jnp.exp(jnp.arange(0, size, 2) * (-math.log(_ROTARY_BASE) / size))
    angles = jnp.arange(length)[:, None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)
