"""What several ranks cost train.py on one machine's cores.

    python -m bench.ranks [--shapes=demo,small] [--ranks=2] [--rounds=3] [--save]

R gloo ranks with a thread each against one process with R threads, in turn, with the same global
batch; medians of the rounds. The ranks have to reach 0.9 of the threads' tokens/s. It is train.py
itself on a data set of random ids: its loader, its step, its log.
"""
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import train
from bench.kills import start
from bench.loading import generated
from bench.machine import CPU, Row, held, median_row, publish, table, take_turns, where
from bench.peers import SHAPES as PEERS_SHAPES
from model import GPTConfig
from run.config import build, parse, run_command
from run.device import has_compiler
from run.log import read_log

SHAPES = {          # name: shape, sequences of a step, steps between two looks at the clock
    "tiny": (GPTConfig(32, 256, n_layer=1, n_head=2, n_embd=16), 8, 2),     # to try the benchmark
    "demo": (GPTConfig(128, 4096, n_layer=4, n_head=4, n_embd=128), 16, 20),    # train.py's preset
    "small": (PEERS_SHAPES["small"][0], 8, 3),
}
LEAST_OF_THREADS = 0.9
LOOKS = 4           # at the clock in a run; the first, which warms up, does not count


@dataclass(frozen=True)
class RanksConfig:
    shapes: tuple[Literal[tuple(SHAPES)], ...] = ("demo", "small")  # networks
    ranks: int = 2  # processes, and threads of the one process beside them
    rounds: int = 3  # runs of each; the median counts
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # precision
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto: where it works
    save: bool = False  # write bench/results/ranks-cpu.json

    def __post_init__(self):
        for name in self.shapes:
            if self.ranks < 2 or SHAPES[name][1] % self.ranks:
                raise ValueError(f"ranks={self.ranks} must be at least 2 and divide the "
                                 f"{SHAPES[name][1]} sequences of a step of {name}")


def rank_main(settings: dict[str, Any], threads: int) -> None:
    """One rank of a run."""
    sys.stdout = sys.stderr = open(f"{settings['out']}.txt", "a")
    torch.set_num_threads(threads)
    train.train(build(train.TrainConfig, settings))


def run(folder: Path, settings: dict[str, Any], ranks: int, threads: int) -> list[Row]:
    """Train in a new folder as so many ranks; the lines of its log, a line a step."""
    out = Path(tempfile.mkdtemp(dir=folder)) / "run"
    processes = start(rank_main, ranks, {**settings, "out": str(out)}, threads)
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"a run of {ranks} rank(s) failed: "
                           f"{Path(f'{out}.txt').read_text().strip()[-500:]}")
    return [line for line in read_log(out / "log.jsonl") if "tokens_per_s" in line]


def compare(shape: str, config: RanksConfig, folder: Path) -> Row:
    """The row of a shape: tokens/s of ranks and of threads, medians, and their ratio."""
    model, sequences, every = SHAPES[shape]
    generated(folder / shape, 64 * sequences * model.block_size, vocab_size=model.vocab_size,
              val=model.block_size)
    compile = config.compile                            # train.py's auto is off for short runs
    if compile == "auto":
        compile = "on" if has_compiler(CPU) else "off"
    settings = dict(
        data=str(folder / shape), device="cpu", dtype=config.dtype, compile=compile, eval_every=0,
        save_every=0, sample_tokens=0, max_steps=LOOKS * every, log_every=every,
        batch_tokens=sequences * model.block_size, model={
            name: getattr(model, name) for name in ("block_size", "n_layer", "n_head", "n_embd")})
    processes = {"threads": (1, config.ranks), "ranks": (config.ranks, 1)}

    def measure(who: str) -> Row:
        ranks, threads = processes[who]
        lines = run(folder, {**settings, "micro_batch": sequences // ranks}, ranks, threads)
        return {"tokens_per_s": statistics.median(line["tokens_per_s"] for line in lines[every:])}
    turns = take_turns(processes, measure, config.rounds)
    speeds = {who: median_row(rows, "tokens_per_s")["tokens_per_s"]
              for who, rows in turns.rows.items()}
    return {"shape": shape, "ranks": config.ranks, "sequences": sequences, "compile": compile,
            "dtype": config.dtype, "tokens_per_s": speeds, "states": turns.states,
            "of_threads": speeds["ranks"] / speeds["threads"],
            "tokens_per_s_rounds": {who: [row["tokens_per_s"] for row in rows]
                                    for who, rows in turns.rows.items()}}


def report(found: dict[str, Any]) -> str:
    rows = [{**row, "speed": row["tokens_per_s"]["ranks"],
             "held": held(row["of_threads"] >= LEAST_OF_THREADS)} for row in found["rows"]]
    return (f"`python -m bench.ranks`, {where(found)}, medians of {found['rounds']}: gloo ranks "
            f"with a thread each beside one process with as many threads, of which at least "
            f"{LEAST_OF_THREADS} is to be reached:\n\n"
            + table("shape | sequences a step=sequences | ranks | tokens/s=speed:,.0f | of "
                    "threads'=of_threads:.2f | held", rows))


def main(words: list[str]) -> None:
    config = parse(RanksConfig, words, "python -m bench.ranks", about=__doc__)
    with tempfile.TemporaryDirectory() as folder:
        rows = [compare(shape, config, Path(folder)) for shape in config.shapes]
    states = [state for row in rows for state in row.pop("states")]
    publish(report, "ranks-cpu", config.save, CPU, rows, states, rounds=config.rounds)


if __name__ == "__main__":
    run_command(main)
