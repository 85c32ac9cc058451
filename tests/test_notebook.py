import dataclasses
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import simclr
from support import datasets
from support.errors import UserError

DOCS = Path(simclr.__file__).resolve().parent / "docs"


def test_the_first_steps_can_be_taken(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(DOCS / "first_steps.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)  # committed without them
    (setup,) = [cell for cell in cells if "EPOCHS = 100" in cell.source]
    setup.source = setup.source.replace("EPOCHS = 100", "EPOCHS = 2")
    (first,) = [cell for cell in cells if "epochs=EPOCHS," in cell.source]
    first.source = first.source.replace("epochs=EPOCHS,", "epochs=EPOCHS, probe_epochs=5,")
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


@pytest.mark.usefixtures("unrendered_pictures")
def test_main_can_be_called_again_after_an_error(tmp_path, monkeypatch, capfd):
    config = simclr.Config(
        dataset="digits",
        encoder="small",
        epochs=2,
        batch_size=256,
        few_labels=0,
        probe_epochs=3,
        stages="pretrain,probe",
        output_dir=str(tmp_path),
        name="first",
        device="cpu",
    )
    first = simclr.main(config)
    with pytest.raises(UserError):
        simclr.main(config)  # the folder is there
    with monkeypatch.context() as patch:
        normalize, calls = datasets.Split.normalize, []

        def interrupted(split, images):
            calls.append(1)
            if len(calls) == 8:  # in the second epoch
                raise KeyboardInterrupt
            return normalize(split, images)

        patch.setattr(datasets.Split, "normalize", interrupted)
        with pytest.raises(KeyboardInterrupt):
            simclr.main(dataclasses.replace(config, name="interrupted"))
    again = simclr.main(dataclasses.replace(config, name="again"))
    folder = tmp_path / "simclr" / "interrupted"
    resumed = simclr.main(dataclasses.replace(config, name="interrupted", resume=str(folder)))
    for name in ("final_loss", "linear_probe_accuracy", "per_class_accuracy"):
        assert first[name] == again[name] == resumed[name]
    output = capfd.readouterr()
    assert output.err == ""
    assert "\r" not in output.out
