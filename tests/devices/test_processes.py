"""A training in two processes, of four devices each, and the same in one process."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from tests.devices.two_processes import train


def test_two_processes_train_as_one_does(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    program = Path(__file__).with_name("two_processes.py")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    processes = [
        subprocess.Popen(  # noqa: S603
            [sys.executable, program, str(i), str(port), tmp_path / f"{i}.safetensors"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    expected = train()
    assert expected["values"][-1] < 0.5 * expected["values"][0]
    for i in range(2):
        results = load_file(tmp_path / f"{i}.safetensors")
        for name, value in expected.items():
            np.testing.assert_allclose(results[name], value, rtol=1e-5, atol=1e-6)
