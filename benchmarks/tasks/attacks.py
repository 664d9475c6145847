"""Attacks on a classifier: images moved by little, in the L-infinity ball, to where its loss is larger.

What they attack is `loss(images, labels)`, the losses of the examples, each a function of its own example
alone. As a `jax.tree_util.Partial` of a function and its params it is compiled once for all params.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

PerExample = Callable[[jax.Array, jax.Array], jax.Array]


def fgsm(loss: PerExample, images: jax.Array, labels: jax.Array, radius: float) -> jax.Array:
    """The fast gradient sign method: one step to the ball's edge, clip(x + radius sign(∇ loss(x)), 0, 1).

    Args:
        loss: Gives the losses, of shape (n,).
        images: Between 0 and 1, with the example as first axis.
        labels: Of shape (n,).
        radius: How far each entry of an image may move.

    Returns:
        The attacked images.

    References:
        Goodfellow, Shlens, Szegedy, Explaining and Harnessing Adversarial Examples, arXiv 1412.6572, 2014.
    """
    return _ascend(_as_tree(loss), images, labels, _box(images, radius), radius)


def pgd(  # noqa: PLR0917  # sizes in the order of the literature
    key: jax.Array,
    loss: PerExample,
    images: jax.Array,
    labels: jax.Array,
    radius: float,
    step_size: float | None = None,
    num_steps: int = 20,
    num_starts: int = 2,
    *,
    score: PerExample | None = None,
) -> jax.Array:
    """Projected gradient descent: steps along the gradient's sign, each back into the ball and the cube.

    Args:
        key: For the starts, which are uniform in the ball. More of them begin with the same ones.
        loss: Gives the losses, of shape (n,).
        images: Between 0 and 1, with the example as first axis.
        labels: Of shape (n,).
        radius: How far each entry of an image may move.
        step_size: How far one step moves it; 2.5 radius / num_steps by default, enough to cross the ball.
        num_steps: Steps from each start.
        num_starts: Random starts; 0 starts once, from the images themselves.
        score: Of each example the start that ends with the largest score is kept. The default is the loss. If
            it is the largest wrong logit minus the right one, then any start that fools the network counts.

    Returns:
        The attacked images.

    References:
        Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, arXiv 1706.06083, 2017.
    """
    loss = _as_tree(loss)
    step_size = 2.5 * radius / num_steps if step_size is None else step_size
    box, ends = _box(images, radius), []
    for i in range(max(1, num_starts)):
        attacked = _start(jax.random.fold_in(key, i), images, radius) if num_starts else images
        # Not a compiled loop: in one, XLA:CPU takes many times as long for a convolution.
        for _ in range(num_steps):
            attacked = _ascend(loss, attacked, labels, box, step_size)
        ends.append(attacked)
    return _strongest(loss if score is None else _as_tree(score), jnp.stack(ends), labels)


def _as_tree(fun: PerExample) -> jax.tree_util.Partial:
    return fun if isinstance(fun, jax.tree_util.Partial) else jax.tree_util.Partial(fun)


def _box(images: jax.Array, radius: float) -> tuple[jax.Array, jax.Array]:
    """Where the ball and the cube meet: the smallest and the largest entries."""
    return jnp.maximum(images - radius, 0), jnp.minimum(images + radius, 1)


@jax.jit
def _start(key: jax.Array, images: jax.Array, radius: float) -> jax.Array:
    moved = images + radius * jax.random.uniform(key, images.shape, images.dtype, -1, 1)
    return jnp.clip(moved, 0, 1)


@jax.jit
def _ascend(
    loss: jax.tree_util.Partial,
    attacked: jax.Array,
    labels: jax.Array,
    box: tuple[jax.Array, jax.Array],
    step_size: float,
) -> jax.Array:
    """One step, clipped to what lies between the two images of the box."""
    grads = jax.grad(lambda x: loss(x, labels).sum())(attacked)
    moved = attacked + step_size * jnp.sign(grads)
    return jnp.clip(moved, *box)


@jax.jit
def _strongest(score: jax.tree_util.Partial, ends: jax.Array, labels: jax.Array) -> jax.Array:
    """Of each example the image with the largest score, from the first axis."""
    scores = jnp.stack([score(end, labels) for end in ends])
    return ends[jnp.argmax(scores, axis=0), jnp.arange(len(labels))]
