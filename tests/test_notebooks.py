"""Every notebook runs from its first cell to its last, where a reader would run it.

The solutions of its exercises, folded into `<details>` of text cells, run in their places too.
"""
import re
import threading
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbformat is a development extra")
nbclient = pytest.importorskip("nbclient", reason="nbclient is a development extra")
pytest.importorskip("ipykernel", reason="ipykernel is a development extra")

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def with_solutions(notebook):
    """The notebook with each folded block of Python as a code cell behind its text."""
    cells = []
    for cell in notebook.cells:
        cells.append(cell)
        if cell.cell_type == "markdown":
            for folded in re.findall("<details>.*?</details>", cell.source, re.DOTALL):
                cells += [nbformat.v4.new_code_cell(code)
                          for code in re.findall("```python\n(.*?)```", folded, re.DOTALL)]
    notebook.cells = cells
    return notebook


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_the_notebook_runs_with_its_solutions(path, request):
    notebook = with_solutions(nbformat.read(path, as_version=4))
    if "Tokenizer.gpt2()" in str(notebook):
        request.getfixturevalue("gpt2_in_cache")
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3",
                                     resources={"metadata": {"path": str(path.parent)}})
    client.execute()   # raises CellExecutionError with the cell and its traceback


def test_two_notebooks_at_once_train_their_base_once(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(NOTEBOOKS[0].parent)
    import small
    inside, going_on = [], threading.Event()

    def train(config):
        inside.append(threading.current_thread())
        going_on.wait(60)
        return {"step": 1, "train_loss": 1.0, "val_loss": 1.0}
    monkeypatch.setattr(small, "OUT", tmp_path)
    monkeypatch.setattr(small, "train", train)
    monkeypatch.setattr(small, "load_writer", lambda folder: None)
    both = [threading.Thread(target=small.base_run) for _ in range(2)]
    for thread in both:
        thread.start()
    both[0].join(1)
    assert len(inside) == 1                             # the other waits for the first one's end
    going_on.set()
    for thread in both:
        thread.join(60)
    assert len(inside) == 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_the_stored_outputs_have_no_error_and_no_path_of_a_machine(path):
    text = path.read_text(encoding="utf-8")
    assert '"output_type": "error"' not in text
    assert str(Path(__file__).parents[2]) + "/" not in text and str(Path.home()) + "/" not in text
