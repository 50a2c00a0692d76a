"""The notebook for newcomers runs from the first cell to the last, and is kept without outputs."""

import nbformat
import pytest
from nbclient import NotebookClient

from tests.house.source import ROOT

NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


def read() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, nbformat.NO_CONVERT)


def test_the_notebook_is_kept_without_outputs():
    cells = [cell for cell in read().cells if cell.cell_type == "code"]
    assert [cell.source for cell in cells if cell.outputs or cell.execution_count] == []


@pytest.mark.slow
def test_every_cell_runs(tmp_path, monkeypatch):
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "TMPDIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = read()
    where = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=600, resources=where).execute()
    outputs = [each for cell in notebook.cells for each in cell.get("outputs", [])]
    results = [each.data["text/plain"] for each in outputs if each.output_type == "execute_result"]
    assert results == ["True", "True"]  # the cut model is exact, and so is its generation
    printed = "".join(each.text for each in outputs if each.output_type == "stream")
    assert "no defence  text             100%" in printed
