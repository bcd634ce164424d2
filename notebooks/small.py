"""The small models that the notebooks train, each once.

    from small import base_run
    model, tokenizer = base_run()       # the first call trains it, 40 to 60 seconds on 2 CPU cores

base_run: the preset `demo`, 150 steps instead of 1,200. 4 blocks, 4 heads, 128 channels, 128 tokens
of context, 4,096 tokens of vocabulary: 1.3 M parameters, trained on the documentation that Python
carries. It is an ordinary run in out/notebooks/base, so any notebook finds it finished; delete that
folder to train it again. Two notebooks that ask for it at once get the same one: the second waits.

`needs` leaves a cell out where something that it needs is not there.
"""
import contextlib
import fcntl
import io
import os
from pathlib import Path
from typing import Iterator

from bpe import Tokenizer
from data import shards
from data.corpus import prepare
from model import GPT
from run.config import build, flatten
from run.load import load_writer
from run.presets import PRESETS
from train import TrainConfig, train

# From where the notebook runs, so that nothing printed has a path of this machine in it.
OUT = Path(os.path.relpath(Path(__file__).resolve().parents[1] / "out" / "notebooks"))
BASE = OUT / "base"
SETTINGS = {**PRESETS["demo"].settings, "max_steps": 150, "weight_decay": 0.1, "compile": "off",
            "eval_every": 0, "eval_tokens": 16384, "sample_tokens": 0, "save_every": 200}


@contextlib.contextmanager
def alone(name: str) -> Iterator[None]:
    """Wait while another notebook is within the same name's."""
    OUT.mkdir(parents=True, exist_ok=True)
    with open(OUT / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)                # until the file is closed
        yield


def small_run(name: str, **changes) -> tuple[GPT, Tokenizer]:
    """The model of out/notebooks/<name>, in eval mode, and its tokenizer.

    It is trained first, with `changes` of SETTINGS, unless the run is there already.
    """
    settings = {**flatten(SETTINGS), **flatten(changes), "out": str(OUT / name)}
    with contextlib.redirect_stdout(io.StringIO()):     # other words at the first call than later
        with alone("corpus"):
            if not (shards.DATA / "corpus" / "meta.json").exists():
                prepare()
        with alone(name):
            summary = train(build(TrainConfig, settings))
    print(f"out/notebooks/{name}: {summary['step']} steps, training loss "
          f"{summary['train_loss']:.2f}, validation loss {summary['val_loss']:.2f}")
    return load_writer(OUT / name)


def base_run() -> tuple[GPT, Tokenizer]:
    """The model that several notebooks go on from.

    Another number of threads, kind of CPU or Python (its documentation is the text) ends at a loss
    some hundredths away; so may yours from the outputs that are stored.
    """
    return small_run("base")


def needs(name: str, cell: str) -> None:
    """The cell magic `%%needs NAME`: run the cell if the notebook's variable is something."""
    shell = get_ipython()                               # noqa: F821: IPython's, in a notebook
    if shell.user_ns.get(name.strip()) is None:
        print(f"left out: this cell needs {name.strip()}, which is not here")
    else:
        shell.run_cell(cell).raise_error()
