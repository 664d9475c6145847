"""Prints the oldest versions that the package allows, as constraints for pip: `python tests/floors.py`."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
requirements = [*project["dependencies"], *extras["flax"], *extras["curvature"]]
sys.stdout.write("\n".join(requirements).replace(">=", "==") + "\n")
