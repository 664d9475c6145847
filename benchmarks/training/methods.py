"""The methods that are compared, by name: each is one update of an NNX model, and an optimizer.

All of them see the same batches, and get as many gradient evaluations.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import nso_jax.nnx
from benchmarks.tasks.data import Examples
from benchmarks.training import regularizers
from benchmarks.training.regularizers import Loss, Update
from nso_jax import noise, sharpness

MOMENTUM = 0.9
SWA_START = 0.5  # of the steps
ARWP_ETA, ARWP_DECAY = 0.1, 0.99
RSAM_NOISE = 0.01  # over the root mean square of a filter's weights

Name = Literal[
    "sgd",
    "adam",
    "label-smoothing",
    "swa",
    "sam",
    "usam",
    "asam",
    "rsam",
    "bsam",
    "ivon",
    "wp-sgd",
    "lpf-sgd",
    "mrwp",
    "marwp",
    "nso",
    "nso-relative",
    "nso-micro",
    "wp-relative",
    "wp-micro",
    "wp-adaptive",
    "seht",
]
# What is compared unless somebody says otherwise: plain training, SAM and its scaled form, and noise.
COMPARED: tuple[Name, ...] = ("sgd", "sam", "asam", "wp-sgd", "nso", "nso-relative", "wp-micro")
# SEHT's second form and what its paper compares both with, on images; compared where they are asked for.
Regularizer = Literal["confidence", "jacobian", "cutout", "mixup", "seht-d"]

# `optimizer(learning_rate, weight_decay, strength, *, num_steps, num_examples, key)`, the first three traced.
Optimizer = Callable[..., optax.GradientTransformation]


class Method(NamedTuple):
    """A way to train.

    Attributes:
        update: `update(loss)`, one step.
        gradients_per_step: Gradient evaluations of a step, or what it is worth of them in time.
        strengths: What is tried of the one number that belongs to the method: SAM's rho, the noise's sigma.
        optimizer: Instead of the task's own.
        is_noise: Whether it is one of the ways to use weight noise.
        keeps_squares: Whether the noise is damped by the gradients' squares, which the optimizer then keeps.
        rate: Learning rates are multiplied by it, where the optimizer needs other ones than the task's own.
        between: Like `update`, for the steps between two by it.
    """

    update: Callable[[Loss], Update]
    gradients_per_step: float = 1
    strengths: tuple[float, ...] = (0.0,)
    optimizer: Optimizer | None = None
    is_noise: bool = False
    keeps_squares: bool = False
    rate: float = 1.0
    between: tuple[Callable[[Loss], Update], ...] = ()


def sgd(
    learning_rate: Any, weight_decay: Any, strength: Any, *, num_steps: int, **_: Any
) -> optax.GradientTransformation:
    """Momentum, weight decay and a cosine schedule."""
    del strength
    return _sgd(optax.cosine_decay_schedule(learning_rate, num_steps), weight_decay)


def adamw(
    learning_rate: Any, weight_decay: Any, strength: Any, *, num_steps: int, **_: Any
) -> optax.GradientTransformation:
    """Adam with decoupled weight decay and a cosine schedule."""
    del strength
    schedule = optax.cosine_decay_schedule(learning_rate, num_steps)
    return optax.adamw(schedule, weight_decay=weight_decay)


def _sgd(schedule: optax.Schedule, weight_decay: Any) -> optax.GradientTransformation:
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(schedule, momentum=MOMENTUM))


def _swa(
    learning_rate: Any, weight_decay: Any, strength: Any, *, num_steps: int, **_: Any
) -> optax.GradientTransformation:
    """SGD whose learning rate falls to a share of itself and stays there, while the weights are averaged."""
    start = round(SWA_START * num_steps)
    schedule = optax.cosine_decay_schedule(learning_rate, max(1, start), alpha=strength)
    return _averaging(_sgd(schedule, weight_decay), start)


def _bsam(
    learning_rate: Any,
    weight_decay: Any,
    strength: Any,
    *,
    num_steps: int,
    num_examples: int,
    key: jax.Array,
) -> optax.GradientTransformation:
    schedule = optax.cosine_decay_schedule(learning_rate, num_steps)
    return sharpness.bsam(
        schedule, num_examples=num_examples, key=key, rho=strength, weight_decay=weight_decay
    )


def _ivon(
    learning_rate: Any,
    weight_decay: Any,
    strength: Any,
    *,
    num_steps: int,
    num_examples: int,
    key: jax.Array,
) -> optax.GradientTransformation:
    """Its strength is the inverse of the Hessian at the start: of the first noise's variance."""
    schedule = optax.cosine_decay_schedule(learning_rate, num_steps)
    decay: Any = jnp.maximum(weight_decay, 1e-6)
    return sharpness.ivon(
        schedule,
        num_examples=num_examples,
        key=key,
        weight_decay=decay,
        initial_hessian=1 / strength,
        b2=1 - 1 / num_steps,
    )


class SquaresState(NamedTuple):
    """Of an optimizer that sums up squared gradients, of which older ones count less."""

    squares: Any
    inner: Any


def with_squares(make: Optimizer) -> Optimizer:
    """An optimizer that keeps what ARWP damps its noise by too: F <- decay * F + g^2."""

    def made(*knobs: Any, **options: Any) -> optax.GradientTransformation:
        optimizer = make(*knobs, **options)

        def init(params: Any) -> SquaresState:
            return SquaresState(optax.tree.zeros_like(params), optimizer.init(params))

        def update(updates: Any, state: SquaresState, params: Any) -> tuple[Any, SquaresState]:
            squares = jax.tree.map(lambda f, g: ARWP_DECAY * f + g**2, state.squares, updates)
            updates, inner = optimizer.update(updates, state.inner, params)
            return updates, SquaresState(squares, inner)

        return optax.GradientTransformation(init, update)

    return made


class AveragingState(NamedTuple):
    """Of an optimizer whose weights are averaged."""

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, as optax's own states do
    average: Any
    inner: Any


def _averaging(optimizer: optax.GradientTransformation, start: int) -> optax.GradientTransformation:
    """Keeps the mean of the weights after each step from `start` on."""

    def init(params: Any) -> AveragingState:
        return AveragingState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    def update(updates: Any, state: AveragingState, params: Any) -> tuple[Any, AveragingState]:
        updates, inner = optimizer.update(updates, state.inner, params)
        moved = optax.apply_updates(params, updates)
        share = 1 / (1 + jnp.maximum(state.count - start, 0))
        average = optax.incremental_update(moved, state.average, share)
        return updates, AveragingState(state.count + 1, average, inner)

    return optax.GradientTransformation(init, update)


def averaged(optimizer: nnx.Optimizer, params: nnx.State) -> nnx.State | None:
    """The mean of the weights that an optimizer has kept, if it does so."""
    states = jax.tree.leaves(optimizer.opt_state, is_leaf=lambda x: isinstance(x, AveragingState))
    kept = [state.average for state in states if isinstance(state, AveragingState)]
    return jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(kept[0])) if kept else None


def plain(loss: Loss) -> Update:
    """The loss's gradient."""

    def update(
        model: nnx.Module, optimizer: nnx.Optimizer, key: jax.Array, strength: jax.Array, batch: Examples
    ) -> None:
        del key, strength
        optimizer.update(model, nnx.grad(loss)(model, batch))

    return update


def _rival(method: Callable[..., Any]) -> Callable[[Loss], Update]:
    """A method of the family of SAM, whose strength is rho."""

    def of(loss: Loss) -> Update:
        def update(
            model: nnx.Module, optimizer: nnx.Optimizer, key: jax.Array, strength: jax.Array, batch: Examples
        ) -> None:
            value_and_grad = nso_jax.nnx.value_and_grad(loss, method=method, rho=strength)
            optimizer.update(model, value_and_grad(key, model, batch)[1])

        return update

    return of


def _rsam(fun: Callable[..., Any], *, rho: Any, **options: Any) -> Any:
    """RSAM with noise in proportion to each filter, as its authors have it."""
    return sharpness.rsam(fun, rho=rho, sigma=noise.relative(RSAM_NOISE, per="channel"), **options)


def _bayesian(loss: Loss) -> Update:
    def update(
        model: nnx.Module, optimizer: nnx.Optimizer, key: jax.Array, strength: jax.Array, batch: Examples
    ) -> None:
        del key, strength
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]  # flax types it so

        def grad_fn(params: nnx.State, _: jax.Array) -> nnx.State:
            return jax.grad(lambda params: loss(nnx.merge(graphdef, params, rest, copy=True), batch))(params)

        moved = nnx.merge(graphdef, params, rest, copy=True)
        loss(moved, batch)  # for what the forward pass does to statistics and random streams
        optimizer.update(model, params, grad_fn=grad_fn)
        nnx.update(model, nnx.state(moved, nnx.Not(nnx.Param)))

    return update


def _mixed(*, adapted: bool) -> Callable[[Loss], Update]:
    """m-RWP with noise for each filter, and m-ARWP, whose noise is damped where gradients are large."""

    def of(loss: Loss) -> Update:
        def update(
            model: nnx.Module, optimizer: nnx.Optimizer, key: jax.Array, strength: jax.Array, batch: Examples
        ) -> None:
            sigma: Any = noise.relative(strength, "filter")
            sigma = _damped(sigma, optimizer) if adapted else sigma
            value_and_grad = nso_jax.nnx.value_and_grad(loss, method=sharpness.mrwp, sigma=sigma)
            optimizer.update(model, value_and_grad(key, model, batch)[1])

        return update

    return of


def _damped(sigma: Any, optimizer: nnx.Optimizer) -> Any:
    """Noise that is smaller where gradients have been large, as ARWP has it."""
    return noise.adaptive(sigma, optax.tree.get(optimizer.opt_state, "squares"), ARWP_ETA)


def lazy(method: Method, every: int) -> Method:
    """A penalty in one step out of so many, as many times as strong, and plain steps in between."""

    def of(loss: Loss) -> Update:
        update = method.update(loss)
        return lambda model, optimizer, key, strength, batch: update(
            model, optimizer, key, every * strength, batch
        )

    cost = 1 + (method.gradients_per_step - 1) / every
    return method._replace(update=of, gradients_per_step=cost, between=(plain,) * (every - 1))


@functools.cache  # so that what is compiled for a method serves all that are alike
def nso(
    *,
    relative: bool = False,
    per: noise.Per = "weight",
    adapted: bool = False,
    num_microbatches: int = 1,
    strengths: tuple[float, ...] | None = None,
    **options: Any,
) -> Method:
    """Weight noise, the strength of which is sigma, or its ratio to the weights.

    Args:
        relative: Whether noise is in proportion to the weights.
        per: To which of them.
        adapted: Whether it is damped where gradients have been large.
        num_microbatches: Parts of a batch with fresh noise each.
        strengths: What is tried; there are defaults for both kinds of noise.
        **options: Further ones of `nso_jax.value_and_grad`: `num_samples`, `antithetic`, ...
    """

    def of(loss: Loss) -> Update:
        def update(
            model: nnx.Module, optimizer: nnx.Optimizer, key: jax.Array, strength: jax.Array, batch: Examples
        ) -> None:
            sigma = noise.relative(strength, per) if relative else strength
            sigma = _damped(sigma, optimizer) if adapted else sigma
            value_and_grad = nso_jax.nnx.value_and_grad(loss, sigma=sigma, **options)
            if num_microbatches > 1:
                value_and_grad = nso_jax.nnx.microbatch(value_and_grad, num_microbatches)
            optimizer.update(model, value_and_grad(key, model, batch)[1])

        return update

    evaluations = (2 if options.get("antithetic", True) else 1) * options.get("num_samples", 1)
    clean = options.get("clean_weight", 0.0) > 0
    tried = strengths or (RELATIVE if relative else (0.005, 0.01, 0.02, 0.04, 0.08))
    return Method(of, evaluations + clean, tried, is_noise=True, keeps_squares=adapted)


RHO = (0.05, 0.1, 0.2, 0.4, 0.8)
RELATIVE = (0.05, 0.1, 0.2, 0.4, 0.8)
FILTER_NOISE = (0.0025, 0.005, 0.01, 0.02, 0.04)
METHODS: dict[str, Method] = {
    "sgd": Method(plain, optimizer=sgd),
    "adam": Method(plain, optimizer=adamw, rate=0.02),
    "label-smoothing": Method(regularizers.label_smoothing, strengths=(0.025, 0.05, 0.1, 0.2, 0.4)),
    "swa": Method(plain, strengths=(0.05, 0.1, 0.25, 0.5, 1.0), optimizer=_swa),
    "sam": Method(_rival(sharpness.sam), 2, RHO),
    "usam": Method(_rival(sharpness.usam), 2, RHO),
    "asam": Method(_rival(sharpness.asam), 2, (0.25, 0.5, 1.0, 2.0, 4.0)),
    "rsam": Method(_rival(_rsam), 2, RHO),
    # The momentum of both is a mean of gradients, SGD's a sum that is ten times as large; IVON's steps grow
    # as its Hessian falls, threefold and more.
    "bsam": Method(_bayesian, 2, (0.01, 0.03, 0.1, 0.3, 1.0), _bsam, rate=10.0),
    "ivon": Method(_bayesian, 1, (0.003, 0.01, 0.03, 0.1, 0.3), _ivon, rate=3.0, is_noise=True),
    "wp-sgd": nso(antithetic=False),
    "lpf-sgd": nso(relative=True, per="filter", num_microbatches=4, antithetic=False, strengths=FILTER_NOISE),
    "mrwp": Method(_mixed(adapted=False), strengths=FILTER_NOISE, is_noise=True),
    "marwp": Method(_mixed(adapted=True), strengths=FILTER_NOISE, is_noise=True, keeps_squares=True),
    "nso": nso(),
    "nso-relative": nso(relative=True),
    "nso-micro": nso(relative=True, num_microbatches=4),
    "wp-relative": nso(relative=True, antithetic=False),
    "wp-micro": nso(relative=True, num_microbatches=4, antithetic=False),
    "wp-adaptive": nso(relative=True, adapted=True, num_microbatches=4, antithetic=False),
    # Its gradient is as dear as two: see results/rivals.json.
    "seht": Method(regularizers.penalized(regularizers.hessian_trace()), 3, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)),
    "seht-d": Method(
        regularizers.penalized(regularizers.hessian_trace(prob=regularizers.KEPT)),
        3,
        (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    ),
    "confidence": Method(regularizers.confidence, strengths=(0.01, 0.03, 0.1, 0.3, 1.0)),
    "jacobian": Method(regularizers.penalized(regularizers.jacobian), 2.5, (0.001, 0.003, 0.01, 0.03, 0.1)),
    "cutout": Method(regularizers.changed(regularizers.cutout), strengths=(0.1, 0.2, 0.3, 0.4, 0.5)),
    "mixup": Method(regularizers.changed(regularizers.mixup), strengths=(0.05, 0.1, 0.2, 0.4, 1.0)),
}
