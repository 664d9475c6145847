"""`python -m benchmarks`: every mistake a user can make, help, and the choices of all commands."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from benchmarks import __main__ as cli
from benchmarks import registry
from benchmarks.cost import jax_steps, memory, rivals, step_cost
from benchmarks.curvature import trained_networks
from benchmarks.quality import demo, demo_options, matrix_sensing, robust_training
from benchmarks.registry import ROOMS, STUDIES

ROOT = Path(__file__).parents[2]
LOADING = "Loading JAX and Flax ...\n"


def test_no_command_writes_to_the_published_results_by_default():
    for name in STUDIES:
        options = registry.load(name).Options
        assert name == "demo" or options.out.parts[0] == "runs"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train"], "train: expected a command, one of demo, images,"),
        ([], "python -m benchmarks: expected a command"),
        (["demo", "--methods"], "argument --methods: expected at least one value"),
        (["demo", "--out", "a-file"], "a-file"),
        (["demo", "--out", "a-file/folder"], "a-file/folder"),
        (["demo", "--out", "/proc/x"], "/proc/x"),
        (["demo", "--out", "/dev/null/x"], "/dev/null/x"),
        (["demo", "--out", "new/" + 300 * "x"], "name too long"),
        (["publish", "--out", "nowhere"], "nowhere/results.json"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").write_text("mine")
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out in ("", LOADING)
    assert expected.lower() in shown.err.lower()
    assert shown.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a-file"]
    assert (tmp_path / "a-file").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["demo", "--methods", "sgd", "adam"], "'adam'"),
        (["demo", "--seeds", "0"], "--seeds: expected a whole number of at least 1, got '0'"),
        (["demo", "--steps", "many"], "--steps: expected a whole number of at least 1, got 'many'"),
        (["demo", "--epochs", "3"], "Unrecognized options: --epochs"),
        (["demo", "--wrong-labels", "nan"], "--wrong-labels: expected a number from 0 to 1, got 'nan'"),
        (["step-cost", "--repetitions", "0"], "at least 1, got '0'"),
        (["step-cost", "--cases", "resnet"], "resnet"),
        (["memory", "--samples", "3"], "--samples"),
        (["variance", "--draws", "1"], "at least 2, got '1'"),
        (["robustness", "--radius", "2"], "'2'"),
        (["robustness", "--methods", "sam"], "sam"),
        (["robustness", "--penalty-every", "0"], "'0'"),
        (["curvature", "--products", "3"], "at least 4, got '3'"),
        (["curvature", "--eigenvalues", "1"], "at least 2, got '1'"),
        (["curvature", "--probes", "1"], "at least 2, got '1'"),
        (["curvature", "--steps", "1"], "at least 2, got '1'"),
        (["curvature-peers", "--networks", "resnet"], "resnet"),
        (["publish", "--seeds", "3"], "Unrecognized options: --seeds"),
        (["tables", "now"], ": now"),
    ],
)
def test_wrong_options_are_told(arguments, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    shown = capsys.readouterr()
    assert shown.out in ("", LOADING)
    assert expected in " ".join(re.sub("[\u2500-\u257f]", " ", shown.err).split())
    assert not list(tmp_path.iterdir())


def test_help_names_the_commands_and_imports_none(capsys, monkeypatch):
    monkeypatch.setattr(registry, "load", None)
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    *rooms, maintenance = shown.split("\n\n")[2:]
    for (name, room), lines in zip(ROOMS.items(), rooms, strict=True):
        assert lines.startswith(f"{name}: {room.claim}\n")
        for command, study in room.studies.items():
            told = f"^  {command} +{study.minutes} min  {re.escape(study.help)}$"
            assert re.search(told, lines, re.MULTILINE)
    assert re.findall("^  ([a-z]+)  ", maintenance, re.MULTILINE) == list(cli.MAINTENANCE)


@pytest.mark.parametrize("name", [*STUDIES, *cli.MAINTENANCE])
def test_help_of_a_command_explains_its_options(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([name, "--help"])
    shown = capsys.readouterr().out
    assert f"python -m benchmarks {name} " in shown
    assert (name in STUDIES) == bool(re.search(r"Takes\s+about\s+(a|\d+)\s+minute", shown))
    assert not re.search(r"--[a-z-]+ \S+ +[(]default", shown)


@pytest.mark.parametrize("package", ["tyro", "flax", "sklearn", "matplotlib", "rich", "safetensors"])
def test_a_missing_package_is_told_in_one_line(package, tmp_path):
    code = (
        f"import sys; sys.modules[{package!r}] = None; from benchmarks.__main__ import main; sys.exit(main())"
    )
    _fails_in_one_line(["-c", code, "demo"], f"needs {package}, of the 'benchmarks' extra", tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_exit_code_is_that_of_main(tmp_path):
    _fails_in_one_line(["-m", "benchmarks", "train"], "expected a command", tmp_path)


def _fails_in_one_line(arguments, expected, folder):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(  # noqa: S603
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout in ("", LOADING)
    assert done.stderr.count("\n") == 1
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_a_fault_of_our_own_is_not_taken_for_a_missing_package():
    fault = ImportError("cannot import name 'x' from 'nso_jax.noise'", name="nso_jax.noise")
    assert cli._missing_package(fault) is fault


def test_ctrl_c_leaves_one_line_and_no_folder(monkeypatch, tmp_path, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "measure", interrupted)
    assert cli.main(["demo", "--out", str(tmp_path / "new" / "folder")]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("choices", "known"),
    [
        (demo_options.MethodName, demo_options.METHODS),
        (step_cost.CaseName, (*jax_steps.CASES, step_cost.NOISE)),
        (memory.CaseName, memory.CASES),
        (memory.NumSamples, memory.SAMPLES),
        (rivals.CaseName, rivals.CASES),
        (trained_networks.NetworkName, trained_networks.NETWORKS),
        (matrix_sensing.MethodName, matrix_sensing.METHODS),
        (robust_training.MethodName, tuple(robust_training.METHODS)[1:]),
    ],
)
def test_the_command_line_knows_all_choices(choices, known):
    assert get_args(choices) == tuple(known)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", "--xla_force_host_platform_device_count=8"),
        (
            "--xla_cpu_enable_fast_math=false",
            "--xla_cpu_enable_fast_math=false --xla_force_host_platform_device_count=8",
        ),
        ("--xla_force_host_platform_device_count=2", "--xla_force_host_platform_device_count=2"),
    ],
)
def test_devices_are_simulated_before_jax_is_imported(flags, expected, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", flags)
    imported = []
    monkeypatch.setattr(registry.importlib, "import_module", imported.append)
    registry.load("memory")
    assert cli.os.environ["XLA_FLAGS"] == flags
    registry.load("communication")
    assert cli.os.environ["XLA_FLAGS"] == expected
    assert imported == ["benchmarks.cost.memory", "benchmarks.cost.communication"]
