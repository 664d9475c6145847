"""`python -m benchmarks curvature` on a network that the demo trains for a few steps; and saved networks."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from rich.console import Console

from benchmarks import __main__ as cli
from benchmarks.curvature import figures
from benchmarks.curvature import saved_network as command
from benchmarks.kit import report
from benchmarks.kit.files import RESULTS, UserError
from benchmarks.quality import demo, demo_options
from benchmarks.tasks import checkpoints, data, models
from benchmarks.training import measuring

STEPS = 3
METADATA = checkpoints.Metadata("ConvNet", "nso", seed=3, steps=5, num_train=400, wrong_labels=0.2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A demo's output folder."""
    folder = tmp_path_factory.mktemp("demo")
    size = demo_options.Size(seeds=2, steps=STEPS, num_points=1, point_products=4, final_products=4)
    sizes = {"NUM_TRAIN": 40, "BATCH_SIZE": 20, "QUICK": size}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "SLICE_DISTANCES", {"random": [0.0], "eigenvector": [0.0]})
        for name, value in sizes.items():
            patch.setattr(demo_options, name, value)
        arguments = ["demo", "--methods", "nso", "--out", str(folder)]
        assert cli.main(arguments) == 0
    return folder


@pytest.fixture(scope="module")
def results(trained, measured_once):
    sizes = ["--products", "4", "--eigenvalues", "2", "--probes", "2", "--steps", "4"]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"NUM_SAMPLES": 4, "BOUND_PROBES": 2, "GRID_POINTS": 3, "TOLERANCE": 0.1}.items():
            patch.setattr(figures, name, value)
        return measured_once("curvature", "--model", str(trained / "nso.safetensors"), *sizes)


@pytest.mark.slow
def test_the_demo_saves_the_first_seed_of_a_method(trained):
    network, metadata = checkpoints.load(trained / "nso.safetensors")
    assert metadata == checkpoints.Metadata("ConvNet", "nso", 0, STEPS, num_train=40, wrong_labels=0.2)
    run = json.loads((trained / "results.json").read_text())["runs"][0]
    split = data.digits(0, 40, 0.2)
    loss = models.cross_entropy(network, split.train)
    assert float(loss) == pytest.approx(run["train_loss"], rel=1e-5)
    accuracy = np.mean(np.argmax(network(split.test.inputs), axis=-1) == split.test.labels)
    assert accuracy == pytest.approx(run["test_accuracy"], rel=1e-5)


@pytest.mark.slow
def test_figures_are_those_of_the_training_loss(trained, results):
    run = json.loads((trained / "results.json").read_text())["runs"][0]
    assert results["loss"] == pytest.approx(run["train_loss"], rel=1e-5)
    assert results["weights"] == 38_378
    assert results["settings"]["trained"]["seed"] == 0
    trace, largest = results["trace"], results["largest"]
    assert trace["num_products"] == 4
    shares = trace["layers"]
    assert set(shares) == {"conv1", "conv2", "dense1", "dense2", "norm1", "norm2"}
    assert sum(share["value"] for share in shares.values()) == pytest.approx(trace["value"], rel=1e-4)
    assert largest["values"][0] == pytest.approx(run["largest_eigenvalue"], rel=0.1)
    assert largest["values"] == sorted(largest["values"], reverse=True)
    assert results["smallest"]["values"][0] < largest["values"][-1]
    density = results["density"]
    assert np.trapezoid(density["density"], density["grid"]) == pytest.approx(1, abs=1e-3)
    assert set(results["layers"]["blocks"]) == {"dense1.kernel", "dense2.kernel"}


@pytest.mark.slow
def test_noise_is_measured_around_the_suggested_sigma(results):
    noise = results["noise"]
    suggested = noise["suggested"]
    assert suggested["gap"]["value"] == pytest.approx(0.2 * results["loss"], rel=0.3)
    assert noise["sigma"][6] == pytest.approx(suggested["sigma"], rel=1e-4)
    assert noise["gap"][6] == pytest.approx(suggested["gap"]["value"], rel=1e-3)
    assert noise["quadratic"][6] == pytest.approx(suggested["quadratic"]["value"], rel=1e-3)
    assert noise["num_evaluations"] == 1 + 2 * 4 * 9


@pytest.mark.slow
def test_the_bound_is_made_of_its_parts(trained, results):
    bound = results["bound"]
    product = bound["max_loss"] * bound["max_trace"] / bound["sample_size"]
    assert bound["value"] == pytest.approx(product**0.5 * bound["distance"], rel=1e-4)
    assert bound["sample_size"] == 40
    assert bound["num_derivatives"] == 2 * 12
    before = checkpoints.named(nnx.state(models.ConvNet(rngs=nnx.Rngs(0)), nnx.Param))
    after = safetensors.numpy.load((trained / "nso.safetensors").read_bytes())
    for name, distance in bound["leaf_distances"].items():
        assert distance == pytest.approx(float(np.linalg.norm(after[name] - before[name])), rel=1e-4)


@pytest.mark.slow
def test_the_middle_of_the_surface_is_the_network(results):
    surface = results["surface"]
    assert np.shape(surface["losses"]) == (3, 3)
    assert surface["distances"][1] == 0
    assert surface["losses"][1][1] == pytest.approx(results["loss"], rel=1e-5)


@pytest.mark.slow
def test_table_fits_into_80_columns(results, capsys):
    report.print_table(Console(width=80), command, results)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    for row in command.rows(results):
        assert len(row) == len(command.HEADERS)
        for cell in row:
            assert cell in shown


@pytest.fixture
def network():
    """With batch statistics that are not the initial ones."""
    network = models.ConvNet(rngs=nnx.Rngs(3))
    network(data.digits(3, 400).train.inputs)
    network.eval()
    return network


def test_a_saved_network_comes_back_bit_for_bit(network, tmp_path):
    (tmp_path / "model").write_bytes(checkpoints.save(network, METADATA))
    loaded, metadata = checkpoints.load(tmp_path / "model")
    assert metadata == METADATA
    saved = nnx.Param, nnx.BatchStat
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded, saved), nnx.state(network, saved))
    images = data.digits(3, 400).test.inputs
    np.testing.assert_array_equal(loaded(images), network(images))


def test_initial_weights_are_those_the_demo_starts_from():
    start = nnx.state(demo.make_task(METADATA.wrong_labels).model(METADATA.seed), nnx.Param)
    found = nnx.state(checkpoints.initial(METADATA), nnx.Param)
    jax.tree.map(np.testing.assert_array_equal, found, start)


def _changed(arrays, words):
    """The content of a file like a saved network's, with other arrays and metadata."""

    def content(network):
        saved = safetensors.numpy.load(checkpoints.save(network, METADATA)) | arrays
        metadata = {name: str(value) for name, value in METADATA._asdict().items()} | words
        kept = {name: array for name, array in saved.items() if array is not None}
        return safetensors.numpy.save(
            kept, {name: word for name, word in metadata.items() if word is not None}
        )

    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda _: b"", "no safetensors file"),
        (lambda _: b"a picture or anything else", "no safetensors file"),
        (lambda network: checkpoints.save(network, METADATA)[:-100], "no safetensors file"),
        (lambda _: safetensors.numpy.save({"a": np.ones(3)}), "lacks the metadata network, method, seed"),
        (_changed({}, {"seed": None}), "lacks the metadata seed"),
        (_changed({}, {"seed": "one"}), "metadata that cannot be read: .*'one'"),
        (_changed({}, {"network": "ResNet"}), "is a ResNet, and only ConvNet is known"),
        (
            _changed({"norm1.mean": None}, {}),
            "expected float32 of shape \\(16,\\) for norm1.mean, got nothing",
        ),
        (_changed({"more": np.ones(2)}, {}), "expected nothing for more, got float64 of shape \\(2,\\)"),
        (
            _changed({"dense2.bias": np.ones(9, np.float32)}, {}),
            "expected float32 of shape \\(10,\\) for dense2.bias, got float32 of shape \\(9,\\)",
        ),
    ],
)
def test_files_that_hold_no_network_are_told_in_one_line(content, message, network, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content(network))
    with pytest.raises(UserError, match=f"^{path} .*{message}") as raised:
        checkpoints.load(path)
    assert "\n" not in str(raised.value)


def test_a_missing_file_is_told_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*nowhere: No such file"):
        checkpoints.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model", "{folder}/nowhere"],
            "no network in {folder}/nowhere: `python -m benchmarks demo` saves",
        ),
        (["--model", "{folder}/nan"], "the loss of this network is nan"),
        (["--model", "{folder}"], "cannot read {folder}: Is a directory"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, message, network, tmp_path, told_of_a_mistake):
    network.dense2.bias[...] = np.nan
    (tmp_path / "nan").write_bytes(checkpoints.save(network, METADATA))
    given = [word.format(folder=tmp_path) for word in arguments]
    assert message.format(folder=tmp_path) in told_of_a_mistake("curvature", *given)


def test_the_default_network_is_the_published_one():
    assert RESULTS / demo.PUBLISHED["nso.safetensors"] == command.Options().model
