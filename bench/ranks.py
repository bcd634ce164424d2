"""What several ranks cost train.py: speed, reductions and memory on one machine's cores.

    python -m bench.ranks [--shapes=demo,small] [--ranks=2] [--rounds=3] [--save]

Speed: R gloo ranks with a thread each against one process with R threads, in turn, with the same
global batch; medians of the rounds. The ranks have to reach 0.9 of the threads' tokens/s.

Accumulation: a step in 1, 2 and 4 micro-batches of one size on R ranks. The gradients are reduced
over the ranks once a step, with the last micro-batch; and the memory of a rank, the most that its
process held in training, is that of one micro-batch. A fourfold micro-batch stands beside them.

All of it is train.py itself on a data set of random ids: its loader, its step, its log.
"""
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from run import parallel
import train
from bench.kills import start
from bench.loading import generated
from bench.machine import (CPU, Row, check_known, check_least, held, median_row, publish, table,
                           take_turns, where)
from bench.peers import SHAPES as PEERS_SHAPES
from run.config import build, parse, run_command
from formats.files import read_json, write_json
from run.device import has_compiler, peak_memory
from run.watch import Watch
from model import GPTConfig
from run.log import read_log

SHAPES = {          # name: shape, sequences of a step, steps between two looks at the clock
    "tiny": (GPTConfig(32, 256, n_layer=1, n_head=2, n_embd=16), 8, 2),     # to try the benchmark
    "demo": (GPTConfig(128, 4096, n_layer=4, n_head=4, n_embd=128), 16, 20),    # train.py's preset
    "small": (*PEERS_SHAPES["small"], 3),
}
LEAST_OF_THREADS = 0.9
ACCUMULATIONS = (1, 2, 4)


@dataclass(frozen=True)
class RanksConfig:
    shapes: tuple[str, ...] = ("demo", "small")  # speed of which of tiny, demo, small
    memory_shape: str = "small"  # whose memory is measured; empty: none
    ranks: int = 2  # processes, and threads of the one process beside them
    rounds: int = 3  # runs of each; the median counts
    looks: int = 4  # looks at the clock in a run; the first, which warms up, does not count
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # precision
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto: where it works
    save: bool = False  # write bench/results/ranks-cpu.json

    def __post_init__(self):
        check_known(self, shapes=SHAPES, memory_shape=(*SHAPES, ""))
        check_least(self, ranks=2, rounds=1, looks=2)
        for name in self.shapes:
            if SHAPES[name][1] % self.ranks:
                raise ValueError(f"ranks={self.ranks} do not divide the {SHAPES[name][1]} "
                                 f"sequences of a step of {name}")


def rank_main(settings: dict[str, Any], threads: int, notes: str) -> None:
    """One rank of a run; with `notes`, a folder, it counts reductions and memory into it."""
    sys.stdout = sys.stderr = open(f"{settings['out']}.txt", "a")
    torch.set_num_threads(threads)
    found: dict[str, Any] = {"reductions": 0, "reduced_bytes": 0}

    def counting(group, bucket):                        # DDP refuses annotations but its own
        found["reductions"] += 1
        found["reduced_bytes"] += bucket.buffer().nbytes
        return allreduce_hook(group, bucket)

    class Counting(parallel.DistributedDataParallel):
        def __init__(self, *arguments: Any, **named: Any):
            super().__init__(*arguments, **named)
            self.register_comm_hook(None, counting)

    at = Watch.at

    def noting(self: Watch, step: int, phase: str) -> None:
        if phase == "evaluating":                       # after each step, before the last save
            found["memory_mib"] = peak_memory(CPU) / 2**20
        at(self, step, phase)
    if notes:                                           # not where the speed is measured
        parallel.DistributedDataParallel, Watch.at = Counting, noting
    train.train(build(train.TrainConfig, settings))
    if notes:
        write_json(Path(notes) / f"{os.environ['RANK']}.json", found)


def run(folder: Path, settings: dict[str, Any], ranks: int, threads: int,
        notes: str = "") -> list[Row]:
    """Train in a new folder as so many ranks; the lines of its log, a line a step."""
    out = Path(tempfile.mkdtemp(dir=folder)) / "run"
    processes = start(rank_main, ranks, {**settings, "out": str(out)}, threads, notes)
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"a run of {ranks} rank(s) failed: "
                           f"{Path(f'{out}.txt').read_text().strip()[-500:]}")
    return [line for line in read_log(out / "log.jsonl") if "tokens_per_s" in line]


def settings_of(shape: str, folder: Path, config: RanksConfig) -> dict[str, Any]:
    """Settings of a run, but for its micro-batch and folder."""
    model, sequences, every = SHAPES[shape]
    data = folder / shape
    if not data.exists():
        generated(data, 64 * sequences * model.block_size, vocab_size=model.vocab_size,
                  val=model.block_size)
    compile = config.compile
    if compile == "auto":                               # train.py's auto is off for short runs
        compile = "on" if has_compiler(CPU) else "off"
    return dict(data=str(data), device="cpu", dtype=config.dtype, compile=compile, eval_every=0,
                save_every=0, sample_tokens=0, max_steps=config.looks * every, log_every=every,
                batch_tokens=sequences * model.block_size,
                model={name: getattr(model, name) for name in ("block_size", "n_layer", "n_head",
                                                               "n_embd")})


def compare_speed(shape: str, config: RanksConfig, folder: Path, states: list[float]) -> Row:
    """The row of a shape: tokens/s of ranks and of threads, medians, and their ratio. The machine's
    states are added to `states`."""
    settings, sequences, every = settings_of(shape, folder, config), *SHAPES[shape][1:]
    processes = {"threads": (1, config.ranks), "ranks": (config.ranks, 1)}

    def measure(who: str, _: list[Row]) -> Row:
        ranks, threads = processes[who]
        lines = run(folder, {**settings, "micro_batch": sequences // ranks}, ranks, threads)
        return {"tokens_per_s": statistics.median(line["tokens_per_s"] for line in lines[every:])}
    turns = take_turns(processes, measure, config.rounds)
    states += turns.states
    speeds = {who: median_row(rows, "tokens_per_s")["tokens_per_s"]
              for who, rows in turns.rows.items()}
    return {"shape": shape, "ranks": config.ranks, "sequences": sequences,
            "compile": settings["compile"], "dtype": config.dtype, "tokens_per_s": speeds,
            "of_threads": speeds["ranks"] / speeds["threads"],
            "tokens_per_s_rounds": {who: [row["tokens_per_s"] for row in rows]
                                    for who, rows in turns.rows.items()}}


def compare_accumulation(shape: str, config: RanksConfig, folder: Path) -> list[Row]:
    """Rows of 1, 2, 4 micro-batches a step, and of one that is four times as large."""
    settings, (model, sequences, _) = settings_of(shape, folder, config), SHAPES[shape]
    micro_batch, steps, rows = max(1, sequences // config.ranks // 2), 3, []
    for size, accumulation in [*((micro_batch, a) for a in ACCUMULATIONS), (4 * micro_batch, 1)]:
        with tempfile.TemporaryDirectory(dir=folder) as notes:
            run(folder, {**settings, "compile": "off", "micro_batch": size, "max_steps": steps,
                         "batch_tokens": size * accumulation * config.ranks * model.block_size},
                config.ranks, 1, notes)
            found = read_json(Path(notes) / "0.json")
        rows.append({"shape": shape, "ranks": config.ranks, "micro_batch": size,
                     "accumulation": accumulation, "memory_mib": found["memory_mib"],
                     "reductions_per_step": found["reductions"] / steps,
                     "reduced_bytes_per_step": found["reduced_bytes"] / steps})
    return rows


def report(found: dict[str, Any]) -> str:
    """A result as markdown."""
    rows = [{**row, "speed": row["tokens_per_s"]["ranks"],
             "held": held(row["of_threads"] >= LEAST_OF_THREADS)} for row in found["rows"]]
    return (f"`python -m bench.ranks`, {where(found)}, medians of {found['rounds']}: gloo ranks "
            f"with a thread each beside one process with as many threads, of which at least "
            f"{LEAST_OF_THREADS} is to be reached:\n\n"
            + table("shape | sequences a step=sequences | ranks | tokens/s=speed:,.0f | of "
                    "threads'=of_threads:.2f | held", rows)
            + "\n\nA step in several micro-batches:\n\n"
            + table("micro-batch=micro_batch | of them a step=accumulation | reductions="
                    "reductions_per_step:.1f | bytes reduced=reduced_bytes_per_step:,.0f | "
                    "MiB of a rank=memory_mib:,.0f", found["accumulation"]))


def main(words: list[str]) -> None:
    config = parse(RanksConfig, words, "python -m bench.ranks", about=__doc__)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        states: list[float] = []
        speed = [compare_speed(shape, config, folder, states) for shape in config.shapes]
        accumulation = (compare_accumulation(config.memory_shape, config, folder)
                        if config.memory_shape else [])
    publish(report, "ranks-cpu", config.save, CPU, speed, states, rounds=config.rounds,
            accumulation=accumulation)


if __name__ == "__main__":
    run_command(main)
