"""Fixtures that all tests share, and how they are spread over processes (pytest -n auto)."""
import os
from pathlib import Path

import pytest

# Of what tests start, too. Before PyTorch, which the controller of all processes does not import.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


# What takes longest begins first, so that no process is left alone with it at the end; and of the
# whole notebooks (make test-all) those first that do not wait for each other's base.
LONGEST = ("solutions[03_training]", "solutions[05_lora]", "solutions[01_model]",
           "test_notebooks.py", "compile", "test_faults.py", "test_train.py", "test_compare.py",
           "test_lora", "test_scaling.py", "test_bench_gpu.py", "test_inside.py", "test_killed.py",
           "test_survival.py", "test_plots.py", "test_sample.py", "test_bpe", "test_classifier.py",
           "test_fuzz.py", "test_finetune.py", "test_data.py", "test_docs.py", "test_eval.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: next((number for number, part in enumerate(LONGEST)
                                      if part in item.nodeid), len(LONGEST)))


@pytest.hookimpl(optionalhook=True)             # pytest-xdist may not be here
def pytest_xdist_auto_num_workers(config):
    """One more than cores: for a quarter of their time tests wait for processes they started."""
    return (os.cpu_count() or 1) + 1


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file is one process's, for what it trains once; but each whole notebook is on its own, and
    each test of faults, which start processes of theirs. What compiles is one process's, which
    imports the compiler."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file, _, name = nodeid.partition("::")
            if "test_notebooks.py" in file and "solutions[" in name:
                return nodeid
            if "compile" in name:
                return "compile"
            return nodeid.partition("[")[0] if "test_faults.py" in file else file
    config.option.loadscopereorder = False      # by the number of tests: notebooks would be last
    return ByFile(config, log)


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models gain nothing from threads, and wait for each other on a busy machine."""
    import torch
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def shared():
    """The folder of real data that ONELOOP_SHARED names; tests that use it are skipped without."""
    folder = os.environ.get("ONELOOP_SHARED", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("ONELOOP_SHARED names no folder of real data")
    return Path(folder)


@pytest.fixture
def gpt2_vocab(shared):
    """The folder with GPT-2's encoder.json and vocab.bpe."""
    return shared / "gpt2_vocab"


@pytest.fixture
def gpt2_in_cache(gpt2_vocab, tmp_path, monkeypatch):
    """A cache that has GPT-2's two files, so that Tokenizer.gpt2() downloads nothing."""
    (tmp_path / "cache" / "oneloop").mkdir(parents=True)
    (tmp_path / "cache" / "oneloop" / "gpt2").symlink_to(gpt2_vocab)
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MPLCONFIGDIR", str(home / "matplotlib"))    # which keeps its list of fonts


@pytest.fixture
def dataset(tmp_path):
    """A small byte-level data set: 5,000 tokens to train on, 1,000 to validate."""
    from data.corpus import CorpusConfig, prepare
    text = "".join(f"line {i * i % 97} of the text, {'odd' if i % 2 else 'even'}\n"
                   for i in range(240))[:6000]
    (tmp_path / "text.txt").write_text(text)
    return prepare(CorpusConfig(from_=str(tmp_path / "text.txt"), tokenizer="bytes",
                                validation=1 / 6, out=str(tmp_path / "data")))
