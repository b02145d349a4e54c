"""Execute the notebooks of this folder and write them with their outputs: `make notebooks`."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent


def execute(file: Path) -> nbformat.NotebookNode:
    """Return the notebook with the outputs of a fresh run; an error in a cell is raised."""
    notebook = nbformat.read(file, as_version=4)
    NotebookClient(notebook, timeout=600, record_timing=False, resources={"metadata": {"path": str(HERE)}}).execute()
    return notebook


if __name__ == "__main__":
    for file in sorted(HERE.glob("*.ipynb")):
        nbformat.write(execute(file), file)
