"""Steps with a penalty beside the loss, or with examples or labels changed, as functions `update(loss)`."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from benchmarks.tasks import augmentation
from benchmarks.tasks.data import Examples
from nso_jax import penalties

KEPT = 0.1  # the probability with which SEHT-D keeps a weight

Loss = Callable[..., jax.Array]  # `loss(model, batch)`, and `smoothing=` where labels are to be smoothed

# In place: `update(model, optimizer, key, strength, batch)`.
Update = Callable[[nnx.Module, nnx.Optimizer, jax.Array, jax.Array, Examples], None]

Penalty = Callable[[Loss, jax.Array, nnx.Module, Examples], jax.Array]  # `penalty(loss, key, model, batch)`

Change = Callable[
    [jax.Array, nnx.Module, Examples, jax.Array], Examples
]  # `change(key, model, batch, strength)`


def label_smoothing(loss: Loss) -> Update:
    """The gradient of the loss with labels of which a share is spread over all classes."""

    def update(
        model: nnx.Module, optimizer: nnx.Optimizer, key: jax.Array, strength: jax.Array, batch: Examples
    ) -> None:
        del key
        optimizer.update(model, nnx.grad(lambda model: loss(model, batch, smoothing=strength))(model))

    return update


def penalized(penalty: Penalty) -> Callable[[Loss], Update]:
    """The gradient of the loss and strength times a penalty."""

    def of(loss: Loss) -> Update:
        def update(
            model: nnx.Module, optimizer: nnx.Optimizer, key: jax.Array, strength: jax.Array, batch: Examples
        ) -> None:
            def total(model: nnx.Module) -> jax.Array:
                added = strength * penalty(loss, key, model, batch)  # first: the loss may move random streams
                return loss(model, batch) + added

            optimizer.update(model, nnx.grad(total)(model))

        return update

    return of


def changed(change: Change) -> Callable[[Loss], Update]:
    """The gradient of the loss over a batch that is changed at random."""

    def of(loss: Loss) -> Update:
        def update(
            model: nnx.Module, optimizer: nnx.Optimizer, key: jax.Array, strength: jax.Array, batch: Examples
        ) -> None:
            optimizer.update(model, nnx.grad(loss)(model, change(key, model, batch, strength)))

        return update

    return of


def hessian_trace(**options: Any) -> Penalty:
    """SEHT's: an estimate of the trace of the loss's Hessian, with these options of the library's."""

    def penalty(loss: Loss, key: jax.Array, model: nnx.Module, batch: Examples) -> jax.Array:
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]  # flax types it so
        of_params = lambda params: loss(nnx.merge(graphdef, params, rest, copy=True), batch)  # noqa: E731
        return penalties.hessian_trace(key, of_params, params, **options)

    return penalty


def jacobian(loss: Loss, key: jax.Array, model: nnx.Module, batch: Examples) -> jax.Array:
    """Half of the mean squared norm of the Jacobian of the logits with respect to the inputs."""
    del loss
    return penalties.jacobian(key, _logits(model), batch.inputs).mean() / 2


def confidence(loss: Loss) -> Update:
    """The gradient of the loss minus strength times the mean entropy of the predictions."""

    def update(
        model: nnx.Module, optimizer: nnx.Optimizer, key: jax.Array, strength: jax.Array, batch: Examples
    ) -> None:
        del key

        def total(model: nnx.Module) -> jax.Array:
            logits = model(batch.inputs)  # once, for both
            return loss(lambda _: logits, batch) + strength * penalties.confidence(logits).mean()

        optimizer.update(model, nnx.grad(total)(model))

    return update


def cutout(key: jax.Array, model: nnx.Module, batch: Examples, strength: jax.Array) -> Examples:
    """A black square in each image; strength: its side over the image's."""
    del model
    return augmentation.cutout(key, batch, strength)


def mixup(key: jax.Array, model: nnx.Module, batch: Examples, strength: jax.Array) -> Examples:
    """Means of pairs of examples; strength: alpha, of the distribution of their weights."""
    num_classes = jax.eval_shape(_logits(model), batch.inputs).shape[-1]
    return augmentation.mixup(key, batch, num_classes, strength)


def _logits(model: nnx.Module) -> Callable[[Any], jax.Array]:
    """The outputs as a function of the inputs, which leaves statistics and random streams as they are."""
    graphdef, state = nnx.split(model)

    def logits(inputs: Any) -> jax.Array:
        return nnx.merge(graphdef, state, copy=True)(inputs)

    return logits
