"""The averaged gradient for Flax NNX modules, whose state moves once per step and not once per evaluation."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

try:
    from flax import nnx
except ImportError as error:
    raise ImportError("nso_jax.nnx needs flax: pip install 'nso-jax[flax]'") from error

from nso_jax import gradients, parallel
from nso_jax._axes import Axes, AxisName
from nso_jax._callers import takes_batch, unwrapped
from nso_jax._calls import as_loss, named_after
from nso_jax._checks import PyTree, as_key, check_function
from nso_jax._parts import (
    Batch,
    Parts,
    Weight,
    batch_numbers,
    check_whole,
    join,
    select_batch,
)

__all__ = ["microbatch", "value_and_grad"]


def value_and_grad(
    fun: Callable[..., Any],
    *,
    method: Callable[..., Any] = gradients.value_and_grad,
    wrt: nnx.filterlib.Filter = nnx.Param,
    has_aux: bool = False,
    aux: PyTree = "mean",
    mesh: jax.sharding.Mesh | None = None,
    batch_argnums: int | Sequence[int] = (1,),
    num_microbatches: int = 1,
    weight: Weight | None = None,
    **options: Any,
) -> Callable[..., tuple[Any, nnx.State]]:
    """Like `nnx.value_and_grad`, of the loss smoothed by weight noise: see `nso_jax.value_and_grad`.

        g = 1/(2k) sum_j [grad f(W + U_j) + grad f(W - U_j)],    W the variables that `wrt` selects

    All evaluations start from the model's present state. Its other variables (batch statistics, counters,
    random streams), and those of modules and `nnx.Rngs` among the arguments, are never perturbed and move
    once per call: float ones to the mean over the evaluations, which for batch statistics is right to
    O(sigma^2), others to what the first evaluation gave. Hence dropout masks are the same in all evaluations
    of a call and new in the next. With a method of `nso_jax.sharpness` they move as the evaluation at W says.

    Args:
      fun: `fun(model, *args, **kwargs)` returning a real scalar, or a pair of that and auxiliary output.
      method: `nso_jax.value_and_grad`, or one of its rivals: `sharpness.sam`, `.usam`, `.asam`, `.rsam`,
        `.mrwp`.
      wrt: an NNX filter, the variables that are perturbed and differentiated; the same as the optimizer's.
      has_aux: as in `nso_jax.value_and_grad`.
      aux: a mode of the method, such as "mean" or "sum", or a prefix pytree of them. "clean" takes the
        model's new state from the forward pass at W too, as the authors' code does with batch statistics.
      mesh: a mesh of devices, for plain `nnx.jit` on many of them: the same as
        `nso_jax.parallel.value_and_grad`, which says what this does and what the next three are for. Each
        device has batch statistics of its own examples, which are averaged, and dropout masks of its own.
        The default, None, is for one device, or for your own `shard_map` with `axis_name`.
      batch_argnums: with `mesh`, or a method that halves the batch, which arguments carry examples: 0 is the
        model, and 1, the default, what follows it.
      num_microbatches: with `mesh`, m parts of each device's examples. All start from the model's present
        state, which moves once, to their mean. Without a mesh there is `microbatch`.
      weight: with `mesh`, how much the loss of a device's part counts, a function of the arguments of `fun`.
      **options: the other arguments of the method but `argnums`, for `nso_jax.value_and_grad` `sigma`,
        `num_samples`, `antithetic`, `sampler`, `mask`, `clean_weight`, `chunk_size`, `axis_name` (with `mesh`
        "data" by default), `independent_draws`, `param_specs`. A prefix pytree, or a function to one, refers
        to `nnx.state(model, wrt)`: noise for each layer is `sigma=nnx.State({"conv": 0.1, "head": 0.0})`.

    Returns:
      `fn(key, model, *args, **kwargs)`, returning `(value, grads)`, or `((value, aux), grads)` if `has_aux`.
      `grads` is an `nnx.State`, ready for `nnx.Optimizer.update(model, grads)`; `model` is updated in place.

    Raises:
      TypeError: as the method, `argnums` is given, `method` is for a mesh by itself, or arguments for a mesh
        are given without one.
      ValueError: as the method, `wrt` selects nothing, or `fun` adds or removes variables.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> import nso_jax.nnx
      >>> model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
      >>> loss = lambda model, x, y: jnp.mean((model(x) - y) ** 2)
      >>> x, y = jnp.ones((8, 3)), jnp.ones((8, 1))
      >>> value, grads = nso_jax.nnx.value_and_grad(loss, sigma=0.01)(jax.random.key(0), model, x, y)
      >>> _ = optimizer.update(model, grads)

    References:
      Zhang, Li and Ju, Noise Stability Optimization for Finding Flat Minima, arXiv 2306.08553, 2023.
    """
    _check_arguments(method, mesh, num_microbatches, weight, options)
    in_wrt = nnx.filterlib.to_predicate(wrt)
    argnums = batch_numbers(batch_argnums) if mesh is not None or takes_batch(method) else ()

    def is_differentiated(path: tuple[Any, ...], value: Any) -> bool:
        return path[0] == 0 and in_wrt(path[1:], value)

    def split(arguments: PyTree) -> Any:
        return nnx.split(arguments, is_differentiated, ...)

    def merged(params: nnx.State, graphdef: Any, rest: nnx.State) -> Any:
        # tree.map copies the variables, so that no evaluation sees what another did to them
        return nnx.merge(graphdef, nnx.State({0: params}), jax.tree.map(lambda x: x, rest))

    def loss(params: nnx.State, graphdef: Any, rest: nnx.State, batch: Batch) -> tuple[Any, PyTree]:
        copies = merged(params, graphdef, rest)
        model, args, kwargs = copies
        value, aux_out = as_loss(fun(*join([model, *args], batch), **kwargs), has_aux=has_aux)
        return value, (aux_out, _moved(rest, split(copies)[2]))

    def weight_of(params: nnx.State, graphdef: Any, rest: nnx.State, batch: Batch) -> Any:
        model, args, kwargs = merged(params, graphdef, rest)
        return weight(*join([model, *args], batch), **kwargs)  # type: ignore[misc]  # only called if given

    options |= {} if aux == "mean" else {"aux": (aux, "clean" if aux == "clean" else "mean")}
    options |= {"batch_argnums": 3} if argnums else {}
    if mesh is not None:
        options |= {"mesh": mesh, "method": method, "num_microbatches": num_microbatches}
        options["weight"] = weight and weight_of
        method = parallel.value_and_grad
    averaged = method(loss, has_aux=True, **options)

    def value_and_grad_fn(key: jax.Array, /, model: Any, *args: Any, **kwargs: Any) -> tuple[Any, nnx.State]:
        key = as_key(key)
        (_, *fixed), batch = select_batch((model, *args), argnums, 1)
        check_whole((0,), batch, 1 + len(args))
        arguments = (model, fixed, kwargs)
        graphdef, selected, rest = split(arguments)
        if not selected:
            raise ValueError(f"wrt: {wrt!r} selects no variable of the {type(model).__name__}.")
        (value, (aux_out, moved)), grads = averaged(key, selected[0], graphdef, rest, batch)
        nnx.update(arguments, _only(rest, moved))
        return ((value, aux_out) if has_aux else value), grads

    return named_after(fun, value_and_grad_fn, "Value and gradient by a module's variables")


def microbatch(
    fn: Callable[..., PyTree],
    num_microbatches: int,
    *,
    batch_argnums: int | Sequence[int] = (1,),
    weight: Weight | None = None,
    aux: PyTree = "mean",
    axis_name: AxisName | None = None,
    independent_draws: bool = True,
) -> Callable[..., PyTree]:
    """`nso_jax.parallel.microbatch` for functions of NNX modules, whose state moves with each part.

        g = sum_i w_i g(key_i, model after i parts, part i) / sum_i w_i

    with `key_i = jax.random.split(key, m)[i]`.

    It is as if `fn` were called with one part of the batch after another: dropout masks are new in each,
    and batch statistics, each of B/m examples, move m times.

    Args:
      fn: `fn(key, model, *args, **kwargs)`, as `value_and_grad` of this module gives.
      num_microbatches, aux, axis_name, independent_draws: as in `nso_jax.parallel.microbatch`.
      batch_argnums: as there: 0 is the model, and 1, the default, what follows it.
      weight: w, as there. A part of weight 0 does not move the statistics either.

    Returns:
      A function with the arguments of `fn` that returns what `fn` does, averaged over the parts, and updates
      the model in place.

    Raises:
      TypeError: as `nso_jax.parallel.microbatch`.
      ValueError: as `nso_jax.parallel.microbatch`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> import nso_jax.nnx
      >>> model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
      >>> loss = lambda model, x, y: jnp.mean((model(x) - y) ** 2)
      >>> fn = nso_jax.nnx.value_and_grad(loss, sigma=0.01)
      >>> fn = nso_jax.nnx.microbatch(fn, 4, batch_argnums=(1, 2))
      >>> value, grads = fn(jax.random.key(0), model, jnp.ones((32, 3)), jnp.ones((32, 1)))
      >>> grads["kernel"].shape
      (3, 1)
    """
    check_function("fn", fn, "a function fn(key, *args)")
    parts = Parts(num_microbatches, weight, aux, Axes(axis_name, independent_draws))
    argnums = batch_numbers(batch_argnums)

    def microbatched(key: jax.Array, /, *args: Any, **kwargs: Any) -> PyTree:
        fixed, batch = select_batch(args, argnums, num_microbatches)
        arguments = (fixed, kwargs)
        graphdef, variables, values = nnx.split(arguments, nnx.Variable, ...)  # type: ignore[misc]  # flax types it so

        def merged(others: Any, moved: list[Any]) -> tuple[list[Any], dict[str, Any]]:
            variables, values = others
            copies = jax.tree.map(lambda x: x, nnx.merge_state(variables, _only(variables, moved)))
            fixed, kwargs = nnx.merge(graphdef, copies, values)
            return fixed, kwargs

        def evaluate(
            _: Any, key: jax.Array, examples: Any, others: Any, moved: list[Any]
        ) -> tuple[PyTree, list[Any]]:
            fixed, kwargs = merged(others, moved)
            out = fn(key, *join(fixed, examples), **kwargs)
            return out, _moved(others[0], nnx.split((fixed, kwargs), nnx.Variable, ...)[1])

        def weight_of(examples: Any, others: Any) -> Any:
            fixed, kwargs = merged(others, still)
            return weight(*join(fixed, examples), **kwargs)  # type: ignore[misc]  # only called if given

        key, others = as_key(key), (variables, values)
        present = [variable for _, variable in nnx.to_flat_state(variables)]
        still = [None] * len(present)
        moving = jax.eval_shape(lambda: evaluate(0, key, batch, others, still)[1])
        start = [None if new is None else old for old, new in zip(present, moving, strict=True)]
        mean, moved = parts.mean(evaluate, key, batch, others=others, state=start, weight_of=weight_of)
        nnx.update(arguments, _only(variables, moved))
        return mean

    return microbatched


def _check_arguments(
    method: Any, mesh: Any, num_microbatches: Any, weight: Any, options: dict[str, Any]
) -> None:
    if "argnums" in options:
        raise TypeError("argnums: the model is the first argument; choose its variables with wrt.")
    if unwrapped(method) is parallel.value_and_grad:
        raise TypeError(
            "method: nso_jax.parallel.value_and_grad would not see which arguments carry examples; give mesh "
            "to nso_jax.nnx.value_and_grad instead."
        )
    if mesh is None and (weight is not None or num_microbatches != 1):
        raise TypeError(
            "num_microbatches and weight: they need mesh; without one split the batch with "
            "nso_jax.nnx.microbatch."
        )


def _moved(before: nnx.State, after: nnx.State) -> list[Any]:
    """The variables that an evaluation replaced, None for those it left alone: averaging would round them."""
    old, new = dict(nnx.to_flat_state(before)), dict(nnx.to_flat_state(after))
    if old.keys() != new.keys():
        names = sorted(".".join(map(str, path[1:])) for path in old.keys() ^ new.keys())
        raise ValueError(
            f"fun: it may change the model's variables but not add or remove any: {', '.join(names)}."
        )
    return [None if _same_leaves(old[path], new[path]) else new[path] for path in old]


def _only(state: nnx.State, moved: list[Any]) -> nnx.State:
    """A state of those variables that are not None, under the paths that they have in `state`."""
    paths = [path for path, _ in nnx.to_flat_state(state)]
    flat = [(path, variable) for path, variable in zip(paths, moved, strict=True) if variable is not None]
    return nnx.from_flat_state(flat)


def _same_leaves(old: Any, new: Any) -> bool:
    return all(a is b for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True))
