"""The notebooks of the documentation run from top to bottom, and show what a run of them gave."""

import runpy
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_was_run_as_a_whole(file: Path) -> None:
    cells = [cell for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_runs(file: Path) -> None:
    """An error in a cell is raised; kinds of outputs are as committed, their values are the machine's."""
    execute = runpy.run_path(str(FOLDER / "execute.py"))["execute"]

    def kinds(notebook: nbformat.NotebookNode) -> list[list[str]]:
        return [[output.output_type for output in cell.get("outputs", [])] for cell in notebook.cells]

    assert kinds(execute(file)) == kinds(nbformat.read(file, as_version=4))
