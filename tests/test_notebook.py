from pathlib import Path

import nbformat
from nbclient import NotebookClient

import simclr

DOCS = Path(simclr.__file__).resolve().parent / "docs"


def test_the_first_steps_can_be_taken(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(DOCS / "first_steps.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)  # committed without them
    (setup,) = [cell for cell in cells if "EPOCHS = 100" in cell.source]
    setup.source = setup.source.replace("EPOCHS = 100", "EPOCHS = 2")
    before = set(DOCS.iterdir())
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": DOCS}}).execute()
    assert set(DOCS.iterdir()) == before
    for cell in cells:
        shown = [part for part in cell.outputs if "image/png" in part.get("data", {})]
        assert bool(shown) == ("\nImage(" in "\n" + cell.source)
        printed = [part for part in cell.outputs if part.output_type == "stream"]
        assert not any("\r" in part.text for part in printed)  # no bars that overwrite themselves
        assert {part.name for part in printed} <= {"stdout"}
    (numbers,) = [cell for cell in cells if "numbers.items()" in cell.source]
    assert "linear_probe_accuracy" in numbers.outputs[0]["data"]["text/plain"]
    assert "± " in cells[-1].outputs[0].text
