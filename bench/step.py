"""Time of a training step: forward, backward, clipping, AdamW.

    python -m bench.step [--shapes=small,124M] [--dtypes=float32,bfloat16] [--device=auto]

Prints milliseconds, tokens/s, the share of the matrix-product peak measured in the same run, and
memory, eager and compiled; each row in a process of its own, so that memory is its own.
"""
import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any, Literal

import torch

from bench.machine import matmul_peak, seconds, write_results
from run.config import parse, run_command
from run.device import DTYPES, autocast, has_compiler, peak_memory, pick_device
from fast.linear import use_fast_products
from model import GPT, GPTConfig
from optim import OptimConfig, make_optimizer

SHAPES = {      # name: shape, micro-batch on a CPU, on a GPU
    "small": (GPTConfig(block_size=256, vocab_size=50304, n_layer=6, n_head=6, n_embd=384), 8, 256),
    "124M": (GPTConfig(block_size=1024, vocab_size=50304), 2, 32),
}


@dataclass(frozen=True)
class StepConfig:
    shapes: tuple[str, ...] = tuple(SHAPES)  # which of small, 124M
    dtypes: tuple[str, ...] = ("float32", "bfloat16")  # precisions
    modes: tuple[str, ...] = ("eager", "compiled")  # with and without torch.compile
    device: str = "auto"  # auto, cpu, cuda
    repeats: int = 3  # steps timed after two that warm up; the median counts
    save: bool = False  # write bench/results/step-DEVICE.json
    row: Literal["yes", "no"] = "no"  # print one measurement as JSON (used inside)


def measure(shape: str, dtype: str, mode: str, device: torch.device,
            repeats: int) -> dict[str, Any]:
    """One row of the table."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")
    config, on_cpu, on_gpu = SHAPES[shape]
    batch = on_gpu if device.type == "cuda" else on_cpu
    model = use_fast_products(GPT(config)).to(device)
    network = torch.compile(model, dynamic=False) if mode == "compiled" else model
    optimizer = make_optimizer(model, OptimConfig(), 1e-4, 0.1)
    ids = torch.randint(config.vocab_size, (batch, config.block_size + 1), device=device)

    def step() -> None:
        with autocast(device, DTYPES[dtype]):
            _, loss = network(ids[:, :-1], ids[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()                              # compiles
    time = seconds(step, device, repeats)
    tokens = batch * config.block_size / time
    peak = matmul_peak(device, DTYPES[dtype])
    return {"shape": shape, "dtype": dtype, "mode": mode, "micro_batch": batch,
            "ms": round(1000 * time, 1), "tokens_per_s": round(tokens),
            "share_of_peak": round(tokens * model.flops_per_token() / peak, 3),
            "peak_gflops": round(peak / 1e9), "memory_mib": peak_memory(device) >> 20}


def main(words: list[str]) -> None:
    config = parse(StepConfig, words, "python -m bench.step", about=__doc__)
    device = pick_device(config.device)
    for shape in config.shapes:
        if shape not in SHAPES:
            raise ValueError(f"there is no shape {shape!r}; choose among {', '.join(SHAPES)}")
    if config.row == "yes":
        print(json.dumps(measure(config.shapes[0], config.dtypes[0], config.modes[0], device,
                                 config.repeats)))
        return
    print(f"{'shape':8}{'dtype':10}{'mode':10}{'ms':>9}{'tokens/s':>11}{'of peak':>9}"
          f"{'peak GFLOP/s':>14}{'MiB':>8}")
    rows = []
    for shape in config.shapes:
        for dtype in config.dtypes:
            for mode in config.modes:
                if mode == "compiled" and not has_compiler(device):
                    continue
                words = [f"--shapes={shape}", f"--dtypes={dtype}", f"--modes={mode}", "--row=yes",
                         f"--device={config.device}", f"--repeats={config.repeats}"]
                out = subprocess.run([sys.executable, "-m", "bench.step", *words], check=True,
                                     stdout=subprocess.PIPE, text=True).stdout
                rows.append(json.loads(out.splitlines()[-1]))
                row = rows[-1]
                print(f"{shape:8}{dtype:10}{mode:10}{row['ms']:9.1f}{row['tokens_per_s']:11,}"
                      f"{row['share_of_peak']:9.1%}{row['peak_gflops']:14,}{row['memory_mib']:8,}",
                      flush=True)
    if config.save:
        print("written:", write_results(f"step-{device.type}", device, rows).name)


if __name__ == "__main__":
    run_command(main)
