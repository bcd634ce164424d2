"""Time of a training step: forward, backward, clipping, AdamW, as train.py takes it.

    python -m bench.step [--shapes=small,124M] [--dtypes=float32,bfloat16] [--device=auto] [--save]

What bench.versus_peers measures of ours, without peers: milliseconds, tokens/s, the share of the
matrix products' speed measured in the same process, and memory, eager and compiled.
"""
from dataclasses import dataclass
from typing import Any, Literal

from bench import versus_peers
from bench.machine import Row, in_process, publish, table, take_turns, where
from bench.peers import OURS, SHAPES
from run.config import parse, run_command
from run.device import DTYPES, has_compiler, pick_device


@dataclass(frozen=True)
class StepConfig:
    shapes: tuple[Literal[tuple(SHAPES)], ...] = ("small", "124M")  # networks
    dtypes: tuple[Literal[tuple(DTYPES)], ...] = ("float32", "bfloat16")  # precisions
    modes: tuple[Literal["eager", "compiled"], ...] = ("eager", "compiled")  # torch.compile
    device: str = "auto"  # auto, cpu, cuda
    repeats: int = 3  # steps timed after two that warm up, more of short ones; the median counts
    save: bool = False  # write bench/results/step-DEVICE.json


def report(found: dict[str, Any]) -> str:
    return f"`python -m bench.step`, {where(found)}:\n\n" + table(
        "shape | sequences=micro_batch | precision=dtype | mode | ms:,.0f | "
        "tokens/s=tokens_per_s:,d | of the matmul peak=share_of_peak:.0% | MiB=memory_mib:,d",
        found["rows"])


def main(words: list[str]) -> None:
    config = parse(StepConfig, words, "python -m bench.step", about=__doc__)
    device = pick_device(config.device)

    def measure(key: tuple[str, str, str]) -> Row:
        shape, dtype, mode = key
        row = in_process(versus_peers.measure, shape, OURS, dtype, mode, device.type,
                         config.repeats)
        return {"shape": shape, "dtype": dtype, "mode": mode, "micro_batch": row["micro_batch"],
                "ms": round(row["ms"], 1), "tokens_per_s": round(row["tokens_per_s"]),
                "share_of_peak": round(row["tokens_per_s"] * row["work"] / row["limit"], 3),
                "peak_gflops": round(row["limit"] / 1e9), "memory_mib": round(row["memory_mib"])}
    keys = [(shape, dtype, mode) for shape in config.shapes for dtype in config.dtypes
            for mode in config.modes if mode == "eager" or has_compiler(device)]
    turns = take_turns(keys, measure, 1, device)
    publish(report, f"step-{device.type}", config.save, device,
            [rows[0] for rows in turns.rows.values()], turns.states)


if __name__ == "__main__":
    run_command(main)
