"""The example notebooks run from top to bottom, as they are."""

import os
import sys

import pytest
from teachers import RECIPES

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOKS = sorted((RECIPES / "examples").glob("*.ipynb"))
SECONDS_PER_CELL = 600


def test_there_are_notebooks():
    assert [file.stem for file in NOTEBOOKS] == ["01_convert", "02_read_and_edit", "03_distil"]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebooks_are_stored_without_outputs(file):
    for cell in nbformat.read(file, as_version=4).cells:
        assert cell.cell_type != "code" or (not cell.outputs and cell.execution_count is None)


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebooks_run_from_top_to_bottom(file, monkeypatch):
    root = str(RECIPES.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    book = nbformat.read(file, as_version=4)
    resources = {"metadata": {"path": root}}
    client = nbclient.NotebookClient(
        book, timeout=SECONDS_PER_CELL, kernel_name=sys_kernel(), resources=resources
    )
    client.execute()


def sys_kernel():
    """A kernel of this very interpreter, whatever is installed for the user."""
    from jupyter_client.kernelspec import KernelSpecManager

    specs = KernelSpecManager().find_kernel_specs()
    assert "python3" in specs, f"no python3 kernel for {sys.executable}"
    return "python3"
