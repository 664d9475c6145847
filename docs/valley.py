"""Draws docs/_static/valley.png by the code of notebooks/quickstart.ipynb: `python docs/valley.py`."""

import json
from pathlib import Path

import matplotlib as mpl

DOCS = Path(__file__).parent


def main() -> None:
    """Runs the cells that train on two weights and draw it."""
    mpl.use("Agg")
    notebook = json.loads((DOCS.parent / "notebooks" / "quickstart.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names: dict[str, object] = {}
    for cell in cells[:3]:
        code = "\n".join(line for line in cell.splitlines() if not line.startswith("%"))
        exec(code.replace("plt.show()", ""), names)  # noqa: S102  # code of this repository
    fig = names["fig"]
    fig.savefig(DOCS / "_static" / "valley.png", dpi=150, bbox_inches="tight")  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
