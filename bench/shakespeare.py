"""Tiny shakespeare with nanoGPT's CPU recipe: our loss per byte and wall time, beside nanoGPT's.

    python -m data.shakespeare
    python -m bench.shakespeare --nanogpt=CHECKOUT [--save]

Runs `train.py shakespeare` and train.py of a checkout of github.com/karpathy/nanoGPT, its data
prepared, with the recipe of its README, as whole commands with their evaluations. The text is
ASCII, so a loss per character and per byte are the same.
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
from run.config import parse, run_command
from run.log import read_log

RECIPE = ("config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 "
          "--log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 "
          "--max_iters=2000 --lr_decay_iters=2000 --dropout=0.0").split()


@dataclass(frozen=True)
class ShakespeareBenchConfig:
    nanogpt: str = ""  # a checkout of nanoGPT; empty: only ours
    save: bool = False  # write bench/results/shakespeare.json


def run(folder: Path, *words: str) -> tuple[float, str]:
    """Seconds of the folder's train.py with these words, and what it prints."""
    start = time.perf_counter()
    said = subprocess.run([sys.executable, "train.py", *words], cwd=folder, check=True,
                          capture_output=True, text=True).stdout
    return time.perf_counter() - start, said


def report(found: dict[str, Any]) -> str:
    """A result as markdown."""
    return (f"`python -m bench.shakespeare`, {where(found)}: whole commands with nanoGPT's CPU "
            f"recipe (4 layers, width 128, context 64, 2,000 steps of 12 sequences):\n\n" + table(
                "who | validation loss per byte=val_loss_per_byte:.4f | seconds:.1f | of nanoGPT's "
                "time=share:.2f", ({**row, "share": row["seconds"] / found["rows"][-1]["seconds"]}
                                   for row in found["rows"])))


def main(words: list[str]) -> None:
    config = parse(ShakespeareBenchConfig, words, "python -m bench.shakespeare", about=__doc__)
    states, found = [machine_state(CPU)], {}
    with tempfile.TemporaryDirectory() as scratch:
        seconds, _ = run(REPOSITORY, "shakespeare", f"--out={scratch}/run", "--device=cpu")
        losses = [line["val_loss"] for line in read_log(Path(scratch) / "run" / "log.jsonl")
                  if "val_loss" in line]
        found["oneloop"] = losses[-1], seconds
        if config.nanogpt:
            seconds, said = run(Path(config.nanogpt), *RECIPE, f"--out_dir={scratch}/nanogpt")
            found["nanoGPT"] = float(re.findall(r"val loss ([\d.]+)", said)[-1]), seconds
    rows = [{"who": who, "val_loss_per_byte": round(loss, 4), "seconds": round(seconds, 1)}
            for who, (loss, seconds) in found.items()]
    publish(report, "shakespeare", config.save, CPU, rows, [*states, machine_state(CPU)])


if __name__ == "__main__":
    run_command(main)
