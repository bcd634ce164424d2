"""Tiny shakespeare with nanoGPT's CPU recipe: our loss per byte and wall time, beside nanoGPT's.

    python -m bench.shakespeare [--nanogpt=CHECKOUT] [--input=input.txt] [--rounds=1]

Runs `train.py shakespeare` and, where a checkout of github.com/karpathy/nanoGPT is named, its
train.py with the recipe of its README, in turn, as whole commands with their evaluations. The text
is ASCII, so a loss per character and per byte are the same.
"""
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.machine import write_results
from run.config import parse, run_command
from data.shakespeare import ShakespeareConfig, prepare
from data.shards import DATA
from run.log import read_log

RECIPE = ("config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 "
          "--log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 "
          "--max_iters=2000 --lr_decay_iters=2000 --dropout=0.0").split()


@dataclass(frozen=True)
class BenchConfig:
    nanogpt: str = ""  # a checkout of nanoGPT; empty: only ours
    input: str = ""  # a local copy of the text; empty: data.shakespeare downloads it
    rounds: int = 1  # how often each runs; medians count
    save: bool = False  # write bench/results/shakespeare.json


def ours(folder: Path) -> tuple[float, float]:
    """Validation loss per byte and wall time of `train.py shakespeare`."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "train.py", "shakespeare", f"--out={folder}", "--device=cpu"],
                   check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    taken = time.perf_counter() - start
    losses = [line["val_loss"] for line in read_log(folder / "log.jsonl") if "val_loss" in line]
    return losses[-1], taken


def theirs(checkout: Path, text: Path, folder: Path) -> tuple[float, float]:
    """The same of nanoGPT."""
    data = checkout / "data" / "shakespeare_char"
    if not (data / "train.bin").exists():
        shutil.copy(text, data / "input.txt")
        subprocess.run([sys.executable, "prepare.py"], cwd=data, check=True,
                       stdout=subprocess.DEVNULL)
    start = time.perf_counter()
    out = subprocess.run([sys.executable, "train.py", *RECIPE, f"--out_dir={folder}"], check=True,
                         cwd=checkout, capture_output=True, text=True).stdout
    taken = time.perf_counter() - start
    return float(re.findall(r"val loss ([\d.]+)", out)[-1]), taken


def main(words: list[str]) -> None:
    config = parse(BenchConfig, words, "python -m bench.shakespeare", about=__doc__)
    if config.input:
        prepare(ShakespeareConfig(from_=config.input))
    text = Path(config.input or DATA / "shakespeare" / "input.txt").resolve()
    runs: dict[str, list[tuple[float, float]]] = {"oneloop": []}
    with tempfile.TemporaryDirectory() as scratch:
        for i in range(config.rounds):
            runs["oneloop"].append(ours(Path(scratch) / f"ours{i}"))
            if config.nanogpt:
                runs.setdefault("nanoGPT", []).append(
                    theirs(Path(config.nanogpt).resolve(), text, Path(scratch) / f"theirs{i}"))
    rows = [{"who": who,
             "val_loss_per_byte": round(statistics.median(loss for loss, _ in found), 4),
             "seconds": round(statistics.median(taken for _, taken in found), 1)}
            for who, found in runs.items()]
    for row in rows:
        print(f"{row['who']:10} validation loss per byte {row['val_loss_per_byte']:.4f}   "
              f"{row['seconds']:.1f} s")
    if config.nanogpt:
        print(f"ours takes {rows[0]['seconds'] / rows[1]['seconds']:.2f} of nanoGPT's time")
    if config.save:
        write_results("shakespeare", torch.device("cpu"), rows, rounds=config.rounds)


if __name__ == "__main__":
    run_command(main)
