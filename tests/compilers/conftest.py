"""The default backend is the CPU: the compilers of others are asked by their names."""

import jax

jax.config.update("jax_platforms", "cpu")
