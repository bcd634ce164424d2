"""The small model that the notebooks share: the preset `demo`, stopped early.

    from small import base_run
    model, tokenizer = base_run()       # the first call trains it, about 20 seconds on 2 CPU cores

4 blocks, 4 heads, 128 channels, 128 tokens of context, 4,096 tokens of vocabulary: 1.3 M
parameters, trained on the documentation that Python carries. It is an ordinary run in
out/notebooks/base, so any notebook finds it finished; delete that folder to train it again.
"""
import contextlib
import io
import os
from pathlib import Path

from bpe import Tokenizer
from config import build
from model import GPT
from presets import PRESETS
from sample import load_writer
from train import TrainConfig, train

# From where the notebook runs, so that nothing printed has a path of this machine in it.
OUT = Path(os.path.relpath(Path(__file__).resolve().parents[1] / "out" / "notebooks"))
BASE = OUT / "base"
SETTINGS = {**PRESETS["demo"].settings, "max_steps": 150, "compile": "off", "eval_every": 150,
            "eval_tokens": 16384, "sample_tokens": 0}


def base_run() -> tuple[GPT, Tokenizer]:
    """The model, in eval mode, and its tokenizer, trained unless the run is there already."""
    with contextlib.redirect_stdout(io.StringIO()):     # other words at the first call than later
        summary = train(build(TrainConfig, {**SETTINGS, "out": str(BASE)}))
    final = summary["final"]
    print(f"out/notebooks/base: {final['step']} steps, training loss {final['train_loss']:.2f}, "
          f"validation loss {final['val_loss']:.2f}")
    return load_writer(BASE)
