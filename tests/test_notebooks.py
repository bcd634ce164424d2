"""Every notebook runs from its first cell to its last, where a reader would run it."""
from pathlib import Path

import pytest

import bpe

nbformat = pytest.importorskip("nbformat", reason="nbformat is a development extra")
nbclient = pytest.importorskip("nbclient", reason="nbclient is a development extra")
pytest.importorskip("ipykernel", reason="ipykernel is a development extra")

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_the_notebook_runs(path):
    notebook = nbformat.read(path, as_version=4)
    if "Tokenizer.gpt2()" in str(notebook) and not bpe.has_gpt2():
        pytest.skip("GPT-2's vocabulary files are not here, and tests download nothing")
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3",
                                     resources={"metadata": {"path": str(path.parent)}})
    client.execute()   # raises CellExecutionError with the cell and its traceback


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_the_stored_outputs_have_no_error_and_no_path_of_a_machine(path):
    text = path.read_text(encoding="utf-8")
    assert '"output_type": "error"' not in text
    assert str(Path(__file__).parents[2]) + "/" not in text and str(Path.home()) + "/" not in text
