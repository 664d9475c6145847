"""Eight devices: a process has them from its start, so these tests run apart, `pytest tests/devices`."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
