import os
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parent.parent
SHARED = Path(os.environ.get("ONELOOP_SHARED", REPOSITORY.parent / "shared" / "data"))


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models gain nothing from threads, and wait for each other on a busy machine."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def shared():
    """The folder of real data beside the repository; tests that use it are skipped without it."""
    if not SHARED.is_dir():
        pytest.skip(f"real data is not here ({SHARED})")
    return SHARED


@pytest.fixture
def dataset(tmp_path):
    """A small byte-level data set: 5,000 tokens to train on, 1,000 to validate."""
    from data.corpus import CorpusConfig, prepare
    text = "".join(f"line {i * i % 97} of the text, {'odd' if i % 2 else 'even'}\n"
                   for i in range(240))[:6000]
    (tmp_path / "text.txt").write_text(text)
    return prepare(CorpusConfig(from_=str(tmp_path / "text.txt"), tokenizer="bytes",
                                validation=1 / 6, out=str(tmp_path / "data")))
