"""A race on tiny shakespeare: nanoGPT's CPU recipe, and ours of its size and with as many tokens.

    python -m data.shakespeare
    python -m bench.race --nanogpt=CHECKOUT [--save]

Whole commands, their start and evaluations included: `train.py shakespeare`, the same with fewer
steps, and train.py of a checkout of github.com/karpathy/nanoGPT, its data prepared, with the recipe
of its README. The text is ASCII, so a loss per character and per byte are the same.
"""
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.machine import CPU, REPOSITORY, machine_state, publish, table, where
from formats.files import read_json
from run.config import parse, run_command

RECIPE = ("config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 "
          "--log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 "
          "--max_iters=2000 --lr_decay_iters=2000 --dropout=0.0").split()


@dataclass(frozen=True)
class RaceConfig:
    nanogpt: str = ""  # a checkout of nanoGPT; empty: only ours
    short: int = 500  # steps of our second run
    save: bool = False  # write bench/results/race.json


def run(folder: Path, *words: str) -> tuple[float, str]:
    """Seconds of the folder's train.py with these words, and what it prints."""
    start = time.perf_counter()
    said = subprocess.run([sys.executable, "train.py", *words], cwd=folder, check=True,
                          capture_output=True, text=True).stdout
    return time.perf_counter() - start, said


def report(found: dict[str, Any]) -> str:
    """A result as markdown."""
    return (f"`python -m bench.race`, {where(found)}: whole commands of nanoGPT's CPU recipe (4 "
            f"layers, width 128, context 64, 1.5M tokens), and of ours:\n\n" + table(
                "who | tokens:, | validation loss per byte=val_loss_per_byte:.4f | seconds:.1f | of "
                "nanoGPT's time=share:.2f",
                ({**row, "share": row["seconds"] / found["rows"][-1]["seconds"]}
                 for row in found["rows"])))


def main(words: list[str]) -> None:
    config = parse(RaceConfig, words, "python -m bench.race", about=__doc__)
    states, rows = [machine_state(CPU)], []
    with tempfile.TemporaryDirectory() as scratch:
        for name, more in (("oneloop", []), ("oneloop, shorter", [f"--max_steps={config.short}"])):
            taken, _ = run(REPOSITORY, "shakespeare", f"--out={scratch}/{name}", "--device=cpu",
                           *more)
            final = read_json(Path(scratch) / name / "run.json")["final"]
            rows.append({"who": name, "tokens": final["tokens"], "seconds": round(taken, 1),
                         "val_loss_per_byte": round(final["val_loss"], 4)})
        if config.nanogpt:
            taken, said = run(Path(config.nanogpt), *RECIPE, f"--out_dir={scratch}/nanogpt")
            rows.append({"who": "nanoGPT", "tokens": 2000 * 12 * 64, "seconds": round(taken, 1),
                         "val_loss_per_byte": float(re.findall(r"val loss ([\d.]+)", said)[-1])})
    publish(report, "race", config.save, CPU, rows, [*states, machine_state(CPU)])


if __name__ == "__main__":
    run_command(main)
