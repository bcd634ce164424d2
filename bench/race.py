"""A race on tiny shakespeare: nanoGPT's CPU recipe, and ours of its size and with as many tokens.

    python -m data.shakespeare
    python -m bench.race --nanogpt=CHECKOUT [--nanochat=CHECKOUT] [--save]

Whole commands, their start and evaluations included: `train.py shakespeare`, the same with fewer
steps, and train.py of a checkout of github.com/karpathy/nanoGPT, its data prepared, with the recipe
of its README. The text is ASCII, so a loss per character and per byte are the same.

Of a checkout of github.com/karpathy/nanochat its model and its optimizer, whose training script
takes no bytes, on our batches: no GPT-2, but one with rotary positions, squared ReLU, embeddings of
values, an untied head. Of as many layers, channels and tokens, and again with as many steps as fit
into our minutes; its rates, which are for 524,288 tokens a step, times the best of --rates.
"""
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.machine import CPU, REPOSITORY, Row, in_process, machine_state, publish, table, where
from data import shards
from data.loader import WindowLoader, evaluation_batches
from formats.files import read_json
from run.config import parse, run_command

RECIPE = ("config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 "
          "--log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 "
          "--max_iters=2000 --lr_decay_iters=2000 --dropout=0.0").split()


@dataclass(frozen=True)
class RaceConfig:
    nanogpt: str = ""  # a checkout of nanoGPT; empty: without it
    nanochat: str = ""  # a checkout of nanochat; empty: without it
    rates: tuple[float, ...] = (0.3, 1.0)  # nanochat's learning rates times this
    short: int = 500  # steps of our second run
    save: bool = False  # write bench/results/race.json


def run(folder: Path, *words: str) -> tuple[float, str]:
    """Seconds of the folder's train.py with these words, and what it prints."""
    start = time.perf_counter()
    said = subprocess.run([sys.executable, "train.py", *words], cwd=folder, check=True,
                          capture_output=True, text=True).stdout
    return time.perf_counter() - start, said


def run_nanochat(checkout: str, steps: int, rate: float) -> Row:
    """nanochat's loss and seconds after so many steps of 12 x 64 bytes, scheduled as its base_train
    does: 40 steps of warmup, the last 65% down to a twentieth, momentum 0.85 to 0.97 to 0.9."""
    sys.path.insert(0, checkout)
    from nanochat.gpt import GPT, GPTConfig
    torch.manual_seed(1337)
    start, folder = time.perf_counter(), shards.find("shakespeare")
    model = GPT(GPTConfig(64, 256, 4, 4, 4, 128, window_pattern="L"))
    model.init_weights()
    optimizer = model.setup_optimizer(0.008 * rate, 0.3 * rate, 0.02 * rate, scalar_lr=0.5 * rate)
    loader = WindowLoader(shards.open_split(folder, "train"), 64, 12 * 64, 12, seed=1337)
    for step in range(steps):
        left = min(1.0, (steps - step) / round(0.65 * steps))
        momentum = 0.9 + 0.07 * left if left < 1 else min(0.97, 0.85 + 0.12 * step / 400)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * min((step + 1) / 40, 0.05 + 0.95 * left)
            if group["kind"] == "muon":
                group["momentum"] = momentum
        for x, y in loader.batches(step):
            model(x, y.where(y >= 0, -1)).backward()        # -1 is what it ignores
        optimizer.step()
        model.zero_grad(set_to_none=True)
    nats = labels = 0
    with torch.no_grad():
        for x, y in evaluation_batches(shards.open_split(folder, "val"), 64, 64):
            nats += model(x, y.where(y >= 0, -1), loss_reduction="sum").item()
            labels += int((y >= 0).sum())
    return {"who": f"nanochat's model, {rate:g} x its rates", "tokens": steps * 12 * 64,
            "val_loss_per_byte": round(nats / labels, 4),
            "seconds": round(time.perf_counter() - start, 1)}


def report(found: dict[str, Any]) -> str:
    whole = {row["who"]: row["seconds"] for row in found["rows"]}.get("nanoGPT", float("nan"))
    return (f"`python -m bench.race`, {where(found)}: whole commands of nanoGPT's CPU recipe (4 "
            f"layers, width 128, context 64, 1.5M tokens), and of ours:\n\n" + table(
                "who | tokens:, | validation loss per byte=val_loss_per_byte:.4f | seconds:.1f | of "
                "nanoGPT's time=share:.2f",
                ({**row, "share": row["seconds"] / whole} for row in found["rows"])))


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
    if config.nanochat:
        tried = [in_process(run_nanochat, config.nanochat, 2000, rate) for rate in config.rates]
        best = min(tried, key=lambda row: row["val_loss_per_byte"])
        steps = int(2000 * rows[0]["seconds"] / best["seconds"])
        rate = config.rates[tried.index(best)]
        rows += [best, in_process(run_nanochat, config.nanochat, steps, rate)]
        rows[-1]["who"] += ", our minutes"
    publish(report, "race", config.save, CPU, rows, [*states, machine_state(CPU)])


if __name__ == "__main__":
    run_command(main)
