"""The notebooks run from top to bottom, and are committed with small outputs."""

import nbformat
import pytest
from conftest import ROOT
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture
def shell(monkeypatch, tmp_path):
    """Return IPython in this process, in the project's folder: a kernel would import everything again."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend("")  # as in a kernel, modules of the current folder are found
    yield InteractiveShell.instance(config=Config({"HistoryManager": {"enabled": False}}))
    InteractiveShell.clear_instance()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, shell):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < 500_000
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert any(cell.outputs for cell in code), "the notebook must be committed with its outputs"
    for cell in code:
        fewer_images = cell.source.replace("Digits(limit=200)", "Digits(limit=20)")
        shell.run_cell(fewer_images).raise_error()
