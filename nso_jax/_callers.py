"""Optax wrappers, seen from inside: what they would do silently wrong is refused by who calls.

A transformation gets no other word of what is around it. Frames of the call stack are compared by their
code, so that other functions of the same name do not count.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Collection, Iterator
from types import FrameType
from typing import Any

import optax

# Numbers of our transformations that may be traced, and so injected.
_DYNAMIC = {
    "noise_stability": ("sigma", "clean_weight"),
    "nso": ("sigma", "clean_weight"),
    "ivon": ("learning_rate", "weight_decay", "b1", "b2", "initial_hessian"),
    "bsam": ("learning_rate", "rho", "weight_decay", "damping", "b1", "b2", "initial_precision"),
}
_INJECTING = "inject_hyperparams.<locals>.wrapped_transform.<locals>."


def check_not_in_multi_steps(name: str) -> None:
    """Raises ValueError inside `optax.MultiSteps`: it calls for each microbatch and keeps the last result.

    That is right for what depends on the accumulated gradient, and not for what evaluates the loss: from
    microbatches with the gradients 1, 2, 3 and 10 it would make 10.
    """
    codes = {optax.MultiSteps.init.__code__, optax.MultiSteps.update.__code__}
    if any(frame.f_code in codes for frame in _callers()):
        inside = (
            "put it inside, optax.chain(noise_stability(...), "
            "optax.MultiSteps(optimizer, n).gradient_transformation()), or "
        )
        raise ValueError(
            f"{name}: optax.MultiSteps around it would keep the last microbatch's gradient alone; "
            f"{inside if name == 'noise_stability' else ''}split the batch with nso_jax.parallel.microbatch."
        )


def check_injected(*also_static: str) -> None:
    """Raises TypeError where `optax.inject_hyperparams` makes arrays or schedules of what is neither.

    It takes every function for a schedule and every number for one to be traced, but those in `static_args`:
    a function to a mask, called with the step's count, may even return a bool that is then the mask.
    """
    found = _injected()
    if found is None:
        return
    factory, names = found
    parameters = inspect.signature(factory).parameters
    dynamic = [name for name in _dynamic(factory) if name not in also_static]
    wrong = [name for name in parameters if name in names and name not in (*dynamic, "key")]
    if dynamic and wrong:
        static = tuple(name for name in parameters if name not in dynamic)
        function, first = unwrapped(factory), _dynamic(factory)[0]
        name = function.__name__
        module = "nso_jax.sharpness" if function.__module__.startswith("nso_jax.sharpness.") else "nso_jax"
        raise TypeError(
            f"{', '.join(wrong)}: optax.inject_hyperparams makes schedules of functions and arrays of "
            "numbers, which these cannot be. Write "
            f"optax.inject_hyperparams({module}.{name}, static_args={static}), or put it around a function "
            "of what is to change: "
            f"optax.inject_hyperparams(lambda {first}: {module}.{name}(...))({first}=...)."
        )


def injection_hint(name: str) -> str:
    """What to do about an array in the place of a static argument, where `inject_hyperparams` made it."""
    if _injected() is None:
        return ""
    return f" optax.inject_hyperparams makes arrays of numbers: name {name} in its static_args."


def _injected() -> tuple[Callable[..., Any], Collection[str]] | None:
    """The function that `optax.inject_hyperparams` is about to call, and the arguments that it injects."""
    for frame in _callers():
        if frame.f_code.co_qualname.startswith(_INJECTING):
            factory, static = (frame.f_locals.get(name) for name in ("inner_factory", "other_hps"))
            if callable(factory) and static is not None:
                return factory, inspect.signature(factory).parameters.keys() - static
    return None


def _dynamic(factory: Callable[..., Any]) -> tuple[str, ...]:
    """The arguments that may be injected; none for a function that is not ours, whose names are its own."""
    function = unwrapped(factory)
    ours = (getattr(function, "__module__", None) or "").startswith("nso_jax.")
    return _DYNAMIC.get(function.__name__, ()) if ours else ()


def unwrapped(function: Any) -> Any:
    """The function that `functools.partial`, perhaps many times, has bound arguments of."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def takes_batch(method: Any) -> bool:
    """Whether a method has to know which arguments carry examples, as `sharpness.mrwp`, which halves them."""
    try:
        return "batch_argnums" in inspect.signature(method).parameters
    except (TypeError, ValueError):  # some callables have no signature
        return False


def _callers() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001
    while frame is not None:
        yield frame
        frame = frame.f_back
