"""Every notebook runs from top to bottom."""

import os
from pathlib import Path

import jupytext
import nbclient
import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.py"))


@pytest.mark.parametrize(
    "file",
    [pytest.param(file, marks=[pytest.mark.slow] * (file.stem != "first_round"), id=file.stem) for file in NOTEBOOKS],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the notebook tools, not of ours
def test_notebook_runs(file, tmp_path):
    notebook = jupytext.read(file)
    environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}  # as many devices as a user has
    client = nbclient.NotebookClient(notebook, timeout=400, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=environment)
    images = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert images
