"""What nso_jax claims, reproducible: run `python -m benchmarks --help`."""
