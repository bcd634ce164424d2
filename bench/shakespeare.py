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
from typing import Any

from bench.machine import CPU, REPOSITORY, Row, median_row, publish, table, take_turns, where
from run.config import parse, run_command
from data.shakespeare import ShakespeareConfig, prepare
from data.prepared import DATA
from run.log import read_log

RECIPE = ("config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 "
          "--log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 "
          "--max_iters=2000 --lr_decay_iters=2000 --dropout=0.0").split()


@dataclass(frozen=True)
class ShakespeareBenchConfig:
    nanogpt: str = ""  # a checkout of nanoGPT; empty: only ours
    input: str = ""  # a local copy of the text; empty: data.shakespeare downloads it
    rounds: int = 1  # how often each runs; medians count
    save: bool = False  # write bench/results/shakespeare.json


def measure(who: str, nanogpt: str, text: Path) -> Row:
    """Validation loss per byte and wall time of `train.py shakespeare`, or of nanoGPT's recipe."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, where_run = f"{scratch}/run", REPOSITORY
        words = ["train.py", "shakespeare", f"--out={folder}", "--device=cpu"]
        if who == "nanoGPT":
            where_run, words = Path(nanogpt).resolve(), ["train.py", *RECIPE, f"--out_dir={folder}"]
            data = where_run / "data" / "shakespeare_char"
            if not (data / "train.bin").exists():
                shutil.copy(text, data / "input.txt")
                subprocess.run([sys.executable, "prepare.py"], cwd=data, check=True,
                               stdout=subprocess.DEVNULL)
        start = time.perf_counter()
        said = subprocess.run([sys.executable, *words], cwd=where_run, check=True,
                              capture_output=True, text=True).stdout
        taken = time.perf_counter() - start
        loss = (re.findall(r"val loss ([\d.]+)", said)[-1] if who == "nanoGPT" else
                [line["val_loss"] for line in read_log(Path(folder) / "log.jsonl")
                 if "val_loss" in line][-1])
    return {"val_loss_per_byte": float(loss), "seconds": taken}


def report(found: dict[str, Any]) -> str:
    """A result as markdown."""
    return (f"`python -m bench.shakespeare`, {where(found)}, medians of {found['rounds']}: whole "
            f"commands in turn, with nanoGPT's CPU recipe (4 layers, width 128, context 64, 2,000 "
            f"steps of 12 sequences):\n\n" + table(
                "who | validation loss per byte=val_loss_per_byte:.4f | seconds:.1f | of nanoGPT's "
                "time=share:.2f", ({**row, "share": row["seconds"] / found["rows"][-1]["seconds"]}
                                   for row in found["rows"])))


def main(words: list[str]) -> None:
    config = parse(ShakespeareBenchConfig, words, "python -m bench.shakespeare", about=__doc__)
    if config.input:
        prepare(ShakespeareConfig(from_=config.input))
    text = Path(config.input or DATA / "shakespeare" / "input.txt").resolve()
    turns = take_turns(["oneloop", *(["nanoGPT"] if config.nanogpt else [])],
                       lambda who, _: measure(who, config.nanogpt, text), config.rounds)
    rows = [{"who": who, "val_loss_per_byte": round(statistics.median(
                run["val_loss_per_byte"] for run in runs), 4),
             "seconds": median_row(runs, "seconds")["seconds"]} for who, runs in turns.rows.items()]
    publish(report, "shakespeare", config.save, CPU, rows, turns.states, rounds=config.rounds)


if __name__ == "__main__":
    run_command(main)
