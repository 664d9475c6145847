"""How every estimator begins: the check of its call, and the count of its products."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import numpy as np

from nso_jax._checks import as_key, describe
from nso_jax.curvature._checks import check_concrete, check_outside_jit
from nso_jax.curvature.operators import CurvatureMatrix

_Function = TypeVar("_Function", bound=Callable[..., Any])
_OF_THE_MATRIX = ("fun", "params", "batches", "mask", "weight", "chunk_size")


def estimator(function: _Function) -> _Function:
    """Checks the key and the matrix of a call, and says better than Python does what to write."""

    @functools.wraps(function)
    def checked(*args: Any, **options: Any) -> Any:
        given = dict(zip(("key", "h"), args, strict=False)) | options
        _check_matrix(function.__name__, args, given)
        key = _checked_key(function.__name__, given.pop("key", None))
        return function(key, given.pop("h"), **given)

    return cast("_Function", checked)


def _check_matrix(name: str, args: tuple[Any, ...], given: dict[str, Any]) -> None:
    """Raises TypeError unless there is a matrix, and only one place that says what is measured."""
    moved = [option for option in _OF_THE_MATRIX if option in given]
    if isinstance(given.get("h"), CurvatureMatrix) and not moved and len(args) <= 2:  # noqa: PLR2004
        return
    options = "".join(f", {option}=..." for option in moved if option not in _OF_THE_MATRIX[:3])
    if len(args) == 1 and isinstance(args[0], CurvatureMatrix):
        problem = "key: is missing"
    elif "h" not in given:
        problem = "h: is missing"
    elif not isinstance(given["h"], CurvatureMatrix):
        problem = f"h: expected a CurvatureMatrix, got {describe(given['h'])}"
    else:
        problem = f"{', '.join(moved) or 'fun, params, batches'}: the matrix has what is measured"
    raise TypeError(
        f"{problem}; write h = curvature.hessian(fun, params, batches{options}), then "
        f"curvature.{name}(key, h, ...)."
    )


def _checked_key(name: str, key: Any) -> jax.Array:
    try:
        typed = as_key(key)
    except TypeError as error:
        raise TypeError(f"{error} Write curvature.{name}(key, h, ...).") from None
    check_concrete("key", typed)
    check_outside_jit("h")
    return typed


class Products:
    """A call's products with a matrix, which are counted.

    Attributes:
      h: the matrix.
      count: how many have been made.
    """

    def __init__(self, h: CurvatureMatrix, callback: Callable[[int], object] | None = None) -> None:
        self.h, self.count, self._callback = h, 0, callback

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """The products with vectors, a row for each, in float64 and host memory."""
        return self.h.products(vectors, self._report)

    def _report(self, more: int) -> None:
        self.count += more
        if self._callback is not None:
            self._callback(self.count)
