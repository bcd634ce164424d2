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


@pytest.mark.parametrize("path", [
    pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem == "09_better"))
    for path in NOTEBOOKS])                             # 09 takes minutes: make test-all
def test_the_notebook_runs_with_its_solutions(path, request):
    notebook = with_solutions(nbformat.read(path, as_version=4))
    if "Tokenizer.gpt2()" in str(notebook):
        request.getfixturevalue("gpt2_in_cache")
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3",
                                     resources={"metadata": {"path": str(path.parent)}})
    client.execute()   # raises CellExecutionError with the cell and its traceback


@pytest.mark.slow
def test_the_tokenizer_notebook_runs_without_gpt2s_vocabulary_and_says_what_it_leaves_out(
        tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")         # nobody answers there
    path = next(path for path in NOTEBOOKS if path.stem.startswith("02"))
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3",
                            resources={"metadata": {"path": str(path.parent)}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    left_out = [cell for cell in cells if cell.source.startswith("%%needs gpt2")]
    said = [cell for cell in cells if "left out: " in str(cell.outputs)]
    assert said == left_out and 0 < len(said) < len(cells) / 1.5
    assert "cannot download" in str(cells[0].outputs)


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
