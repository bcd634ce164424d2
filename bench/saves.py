"""How long training stands still for a checkpoint, and what writing it costs the steps after it.

    python -m bench.saves [--shape=124M] [--folder=out] [--save]

Ours: checkpoint.Saver.save, which copies the state and leaves the file to a thread. Beside it, in
the same process: checkpoint.save, which returns when the file is on the disk, and a plain copy of
as many bytes to host memory. The steps are train.py's; those that run while a file is written are
compared with those before. Medians.
"""
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any, Literal

import torch
from torch.utils._pytree import tree_leaves

from bench.machine import Row, lasting, machine_state, publish, seconds, table, where
from bench.peers import SHAPES, our_step, random_batch
from run import checkpoint
from run.config import parse, run_command
from run.device import has_compiler, pick_device, pick_dtype
from run.processes import deterministic


@dataclass(frozen=True)
class SavesConfig:
    shape: Literal[tuple(SHAPES)] = "124M"  # the network
    folder: str = "out"  # where the files go, on the disk that is to be measured
    repeats: int = 5  # saves of each kind; steps timed before them
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile for the steps
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # precision of the steps
    device: str = "auto"  # auto, cpu, cuda
    save: bool = False  # write bench/results/saves-DEVICE.json


def measure(config: SavesConfig, device: torch.device, folder: Path) -> Row:
    """One row: seconds of each, and the ratios."""
    shape, *micro_batches = SHAPES[config.shape]
    batch = random_batch(shape, micro_batches[device.type == "cuda"], device)
    compile = config.compile == "on" or config.compile == "auto" and has_compiler(device)
    dtype = pick_dtype(config.dtype, device)
    run = our_step(shape, *batch, device, dtype, "compiled" if compile else "eager")
    run.step()
    step = seconds(run.step, device, config.repeats)
    state = {"step": 2, "model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
    size = sum({(leaf.data_ptr(), leaf.shape): leaf.nbytes      # one that has two names: once
                for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor)}.values())
    saver = checkpoint.Saver(folder, max_failed=0)
    copies, during, lost = [], [], []
    for _ in range(config.repeats + 1):                 # the first has to find memory for the copy
        copies.append(lasting(lambda: saver.save(state), device))
        steps = [lasting(run.step, device)]
        while saver.thread.is_alive():
            steps.append(lasting(run.step, device))
        during += steps
        lost.append(sum(steps) - step * len(steps))
        saver.wait()
    saver.close()
    foreground = seconds(lambda: checkpoint.save(folder / "foreground.pt", state), device,
                         config.repeats)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    plain = seconds(lambda: target.copy_(source), device, config.repeats)
    copy, slowed, writing = median(copies[1:]), median(lost[1:]), mean(during)
    return {"shape": config.shape, "dtype": str(dtype).removeprefix("torch."),
            "compiled": run.compiled, "bytes": size,
            "seconds": {"copy": copy, "first copy": copies[0], "foreground": foreground,
                        "plain copy": plain, "step": step, "step while writing": writing,
                        "steps lose": slowed},
            "ratios": {"copy / foreground": copy / foreground, "copy / plain copy": copy / plain,
                       "(copy + steps lose) / foreground": (copy + slowed) / foreground,
                       "step while writing / step": writing / step}}


def report(found: dict[str, Any]) -> str:
    row = found["rows"][0]
    return (f"`python -m bench.saves`, {where(found)}: a checkpoint of {row['shape']}, "
            f"{row['bytes'] / 1e9:.2f} GB, beside a training step:\n\n" + table(
                "what | ms:,.1f | ratio:.3f", [
                    *({"what": name, "ms": 1000 * taken} for name, taken in row["seconds"].items()),
                    *({"what": name, "ratio": ratio} for name, ratio in row["ratios"].items())]))


def main(words: list[str]) -> None:
    config = parse(SavesConfig, words, "python -m bench.saves", about=__doc__)
    device = pick_device(config.device)
    Path(config.folder).mkdir(parents=True, exist_ok=True)
    states = [machine_state(device)]
    with tempfile.TemporaryDirectory(dir=config.folder) as folder, deterministic(True, device):
        row = measure(config, device, Path(folder))
    states.append(machine_state(device))
    publish(report, f"saves-{device.type}", config.save, device, [row], states,
            repeats=config.repeats)


if __name__ == "__main__":
    run_command(main)
