"""Every notebook runs from its first cell to its last, where a reader would run it (slow); in `make
test` with its training cut short.

The solutions of its exercises, folded into `<details>` of text cells, run in their places too.
"""
import functools
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import ranks
from data import corpus, pydocs, shards

nbformat = pytest.importorskip("nbformat", reason="nbformat is a development extra")
nbclient = pytest.importorskip("nbclient", reason="nbclient is a development extra")
pytest.importorskip("ipykernel", reason="ipykernel is a development extra")
pytest.importorskip("matplotlib", reason="matplotlib is a development extra")

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


@pytest.mark.slow                                       # minutes each
@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_the_notebook_runs_with_its_solutions(path, request):
    notebook = with_solutions(nbformat.read(path, as_version=4))
    if "Tokenizer.gpt2()" in str(notebook):
        request.getfixturevalue("gpt2_in_cache")
    client = nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3",
                                     resources={"metadata": {"path": str(path.parent)}})
    client.execute()   # raises CellExecutionError with the cell and its traceback


# ---- the same with training cut short

STEPS = 3                                               # of each training in a notebook
SMALL = dict(max_steps=20, warmup_steps=5, batch_tokens=4 * 128, micro_batch=4, eval_tokens=4096)
# What only a trained model does: computed in `make test`, asserted in `make test-all`.
UNTRAINED = {
    "01_model": ["trained_habits[:, 1].max()"],
    "02_tokenizer": ["with_space > without", "likeness(never) >"],
    "03_training": ["losses[-1] < 0.2", "min(ends,", "ends[30] < ends[1]", 'ends["100 more, the',
                    "clipped < unclipped", "lost[torch.bfloat16] > 0.8", 'abs(gains["autocast"]',
                    'gains["bfloat16 weights"] <', "gain > gains"],
    "04_sft": ['seams["Assistant: ", "sentences"] >', 'answers(tuned, right)["exact"]',
               "chat_reply(tuned,", "stops(tuned)[0] == 1 and", "abs(words_only[0]",
               "chatty_curve[middle][1] >", 'asked["as in training"]', 'asked["another template"]',
               "words in fit", "answers(only_last,", "stops(mended)[0] == 1",
               "answers(chat_model,"],
    "05_lora": ["max(by_rank.values()) -", "uncut <="],
    "06_eval": ['found["trained"]', 'shortest["acc"] >', "norm_only.sum() >", "paired < unpaired",
                'results["256 bytes"]["loss"] <', 'results["256 bytes"]["bits_per_byte"] >',
                "means[0] >", 'strided[1]["loss"] <', "with_other >", "by_size[1] >"],
    "07_generation": ["found < 1.2 * chance", 'table["greedy"][0] >', 'table["greedy"][2] <',
                      "len(loops) == 5", "repeated(with_penalty", "nats(torch.cat([prompt, found"]}
SHORTER = {                                             # what else: (in the notebook, here)
    "01_model": [(" and losses[-1] < losses[1] < losses[0] and again > 0.3", ""),
                 ("scaled, n_embd=256)", "scaled, n_embd=128)")],
    "02_tokenizer": [('.glob("*.py"))', '.glob("*.py"))[:60]')],
    "03_training": [
        ("T, 128, limit=128 * T", "T, 32, limit=32 * T"),
        ("below = next(step for step in range(250) if max(losses[step:step + 5]) < entropy)",
         "below = 0"), (" and losses[-1] < entropy", ""),
        ("> min(smooth[:i + 1]) + 0.2)", ">= min(smooth[:i + 1]))"),
        ("steps=100)", "steps=3)"), ("for step in range(100)]", "for step in range(3)]"),
        ("for i in range(100)]", "for i in range(3)]"),
        ("for step in range(60)", "for step in range(3)"),
        ("/ seconds(step, device)", "/ seconds(step, device, repeats=1)"),
        ("torch.compile(model)", 'torch.compile(model, backend="eager")')],
    "04_sft": [("middle = 2", "middle = 0"), ("most=40", "most=4"),
               ('messages[:1], "plain", temp', 'messages[:1], "plain", 4, temp'),
               ("rows_of(0, 80), rows_of(80, 110)", "rows_of(0, 16), rows_of(80, 88)")],
    "05_lora": [("evaluation_batches(32, limit=6000)", "evaluation_batches(8, limit=300)"),
                ("steps=20, ratio=1.0, **settings", "steps=1, ratio=1.0, **settings"),
                ("for lr in RATES[name]}", "for lr in RATES[name][:1]}")],
    "06_eval": [("for start, end in halves:", "for start, end in halves[:60]:"),
                ("text_bytes = byte_tokens(val_ids)", "text_bytes = byte_tokens(val_ids[:4096])"),
                ("byte_tokens(val_ids[:2048])", "byte_tokens(val_ids[:256])"),
                ("byte_tokens(val_ids[:1024])", "byte_tokens(val_ids[:128])")],
    "08_memory": [("(2, 16, 128))\n    x, y = idx", "(2, 4, 128))\n    x, y = idx"),
                  ('"recomputed", "kept", "recomputed")', '"recomputed")'),
                  ("(128, 64, 32, 16, 8)", "(128, 8)")],
    "07_generation": [("in range(15)", "in range(2)"), ("N = 5000", "N = 500"),
                      ("tok.encode(text), 6)", "tok.encode(text)[:10], 6)"),
                      ("def written(n=48", "def written(n=16"), ("(start, 100,", "(start, 20,"),
                      ("for prompt in PROMPTS])", "for prompt in PROMPTS[:2]])"),
                      (" and distance(found, q) < 1.3 * by_chance(q)", "")]}


def shortened(notebook, name):
    """Its cells of code. What is to be changed and is not there is an error: change it here too."""
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    changes = SHORTER.get(name, []) + [
        (f"assert {claim}", claim) for claim in UNTRAINED.get(name, [])]
    for old, new in changes:
        assert any(old in cell for cell in cells), f"{name} has no {old!r}"
        cells = [cell.replace(old, new) for cell in cells]
    return [re.sub(r"step in range\((steps.*?)\)", rf"step in range(min({STEPS}, \1))", cell)
            for cell in cells]


@pytest.fixture(scope="module")
def short_runs(tmp_path_factory):
    """small.py as it is imported by notebooks, with short runs and the documentation of a sixth of
    Python's library in a folder of their own."""
    some, home = corpus.library_files()[::6], tmp_path_factory.mktemp("data")
    docstrings = functools.cache(corpus.library_docstrings.__wrapped__)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "library_files", lambda: some)
        for module in (corpus, pydocs, shards):
            patch.setattr(module, "DATA", home)
        for module in (corpus, pydocs):
            patch.setattr(module, "library_docstrings", docstrings)
        patch.syspath_prepend(NOTEBOOKS[0].parent)
        import small
        whole = small.small_run
        patch.setattr(small, "OUT", tmp_path_factory.mktemp("notebooks"))
        patch.setattr(small, "small_run", lambda name, **changes: whole(name, **changes | SMALL))
        yield


def torchrun(command, **_):
    """torchrun SCRIPT ROOT with two ranks, in processes that have PyTorch loaded already."""
    script, root = command[-2:]
    said = Path(script).with_suffix(".txt")
    failed = any(ranks.exit_codes(ranks.as_script, 2, script, root, said))
    return subprocess.CompletedProcess(command, int(failed), said.read_text(), said.read_text())


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.stem != "09_better"],
                         ids=lambda path: path.stem)    # 09 has a base of its own: make test-all
def test_the_notebook_runs_with_its_solutions_and_little_training(path, request, short_runs,
                                                                  tmp_path, monkeypatch):
    """In this process, by IPython: no kernel has to import PyTorch."""
    from IPython.core.interactiveshell import InteractiveShell
    from matplotlib import pyplot
    from traitlets.config import Config
    notebook = with_solutions(nbformat.read(path, as_version=4))
    if "Tokenizer.gpt2()" in str(notebook):
        request.getfixturevalue("gpt2_in_cache")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr(sys, "path", [*sys.path])
    if path.stem == "08_memory":
        monkeypatch.setattr(subprocess, "run", torchrun)
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])   # IPython puts its own
    pyplot.switch_backend("agg")
    with pyplot.rc_context():
        shell = InteractiveShell(config=Config({"HistoryManager": {"enabled": False}}))
        for cell in shortened(notebook, path.stem):
            shell.run_cell(cell).raise_error()
            pyplot.close("all")


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
    monkeypatch.setattr(small, "prepare", lambda: None)
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
