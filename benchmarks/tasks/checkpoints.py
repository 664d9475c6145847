"""Trained networks in safetensors files, with what it takes to make their initial weights and data again."""

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

import nso_jax
from benchmarks.kit.files import UserError, read_file
from benchmarks.tasks.models import ConvNet

NETWORKS = {"ConvNet": ConvNet}
_SAVED = (nnx.Param, nnx.BatchStat)


class Metadata(NamedTuple):
    """How a network was trained.

    Attributes:
        network: Its name in `NETWORKS`.
        method: The method that trained it.
        seed: Of the initial weights, and of the training images as `data.digits` draws them.
        steps: How many it took.
        num_train: Images to train on.
        wrong_labels: The share of them with a wrong label.
        nso_jax: The version of the library.
    """

    network: str
    method: str
    seed: int
    steps: int
    num_train: int
    wrong_labels: float
    nso_jax: str = nso_jax.__version__

    @classmethod
    def parse(cls, words: dict[str, str]) -> Self:
        """The metadata from a file's words.

        Args:
            words: Every attribute as text.

        Raises:
            UserError: One of them is missing, or is no number where it should be.
        """
        if missing := [name for name in cls._fields if name not in words]:
            raise UserError(f"lacks the metadata {', '.join(missing)}")
        try:
            return cls(**{name: of(words[name]) for name, of in cls.__annotations__.items()})
        except ValueError as error:
            raise UserError(f"has metadata that cannot be read: {error}") from error


def save(network: nnx.Module, metadata: Metadata) -> bytes:
    """A file's content with the weights and batch statistics of a network, under their dotted paths.

    Args:
        network: One of `NETWORKS`.
        metadata: How it was trained.
    """
    return dump(network, {name: str(value) for name, value in metadata._asdict().items()})


def dump(network: nnx.Module, words: dict[str, str] | None = None) -> bytes:
    """A file's content with the weights and batch statistics of any network.

    Args:
        network: The network.
        words: Metadata of the file.
    """
    arrays = {name: np.asarray(array) for name, array in named(nnx.state(network, _SAVED)).items()}
    return safetensors.numpy.save(arrays, metadata=words)


def load(path: Path) -> tuple[nnx.Module, Metadata]:
    """The network that a file holds, in evaluation mode.

    Args:
        path: A file with what `save` gives.

    Returns:
        The network, and how it was trained.

    Raises:
        UserError: There is no such file, or it is no safetensors file of one of `NETWORKS`.
    """
    content = read_file(path)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = Metadata.parse(file.metadata() or {})
        network = initial(metadata)
        fill(network, safetensors.numpy.load(content))
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is no safetensors file: {error}") from error
    except UserError as error:
        raise UserError(f"{path} {error}") from error
    network.eval()
    return network, metadata


def initial(metadata: Metadata) -> nnx.Module:
    """A network as it was before its training.

    Args:
        metadata: How it was trained.

    Raises:
        UserError: It is none of `NETWORKS`.
    """
    if metadata.network not in NETWORKS:
        raise UserError(f"is a {metadata.network}, and only {', '.join(NETWORKS)} is known")
    return NETWORKS[metadata.network](rngs=nnx.Rngs(metadata.seed))


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree like a network's state, under their dotted paths.

    Args:
        tree: The state, or a tree of its structure.
    """
    return {_dotted(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey))


def fill(network: nnx.Module, arrays: dict[str, np.ndarray], but: str | None = None) -> None:
    """Gives a network the arrays that `dump` took from one.

    Args:
        network: The network.
        arrays: By their dotted paths.
        but: The attribute that keeps its own, such as the head for other classes.

    Raises:
        UserError: They are not those that it takes.
    """
    check(network, arrays, but)
    state = nnx.state(network, _SAVED)
    own = {name: array for name, array in named(state).items() if name.partition(".")[0] == but}
    filled = jax.tree.map_with_path(lambda path, _: jnp.asarray((arrays | own)[_dotted(path)]), state)
    nnx.update(network, filled)


def check(network: nnx.Module, arrays: dict[str, np.ndarray], but: str | None = None) -> None:
    """Whether a network, or the shapes of one, can take arrays as `fill` gives them.

    Args:
        network: The network.
        arrays: By their dotted paths.
        but: The attribute that they may lack.

    Raises:
        UserError: They are not those that it takes.
    """
    own = named(nnx.state(network, _SAVED))
    expected = {name: _described(array) for name, array in own.items() if name.partition(".")[0] != but}
    given = {name: _described(array) for name, array in arrays.items() if name.partition(".")[0] != but}
    for name in sorted(expected.keys() | given.keys()):
        if expected.get(name) != given.get(name):
            raise UserError(
                f"does not fit the network: expected {expected.get(name, 'nothing')} for {name}, "
                f"got {given.get(name, 'nothing')}"
            )


def installed(package: str, folder: str) -> Path:
    """A folder of a package that has the weights of a network.

    The package is not imported: it would import others, which nothing here needs.

    Args:
        package: Its name for pip.
        folder: In it.

    Raises:
        UserError: It is not installed.
    """
    found = importlib.util.find_spec(package.replace("-", "_"))
    if found is None or not found.submodule_search_locations:
        raise UserError(f"no package {package}: pip install --no-deps {package}")
    return Path(found.submodule_search_locations[0], folder)


def _described(array: Any) -> str:
    return f"{array.dtype} of shape {array.shape}"
