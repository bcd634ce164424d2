"""How long a command takes to begin: train.py --help beyond `import torch`, bpe.py without torch.

    python -m bench.startup [--rounds=7] [--save]

Whole processes, in turn; medians of the rounds, after one that warms up the disk. train.py has to
answer within a second more than `import torch` takes, and bpe.py without importing it at all.
"""
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.machine import write_results
from run.config import parse, run_command

REPOSITORY = Path(__file__).parent.parent
COMMANDS = {"python": ["-c", "pass"], "import torch": ["-c", "import torch"],
            "train.py --help": ["train.py", "--help"], "bpe.py --help": ["bpe.py", "--help"],
            "sample.py --help": ["sample.py", "--help"]}
MOST_SECONDS = 1.0          # of train.py --help, beyond `import torch`


@dataclass(frozen=True)
class StartupConfig:
    rounds: int = 7  # times each command runs; the median counts
    save: bool = False  # write bench/results/startup.json

    def __post_init__(self):
        if self.rounds < 1:
            raise ValueError(f"rounds={self.rounds} must be at least 1")


def run(arguments: list[str]) -> tuple[float, str]:
    """Seconds of a command of this Python in the repository's folder, and what it says on stderr.
    RuntimeError if it fails."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, text=True,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    taken = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: {done.stderr.strip()[-300:]}")
    return taken, done.stderr


def imported(arguments: list[str]) -> set[str]:
    """The packages that a command imports, as Python itself reports them."""
    _, report = run(["-X", "importtime", *arguments])
    return {name.split(".")[0] for name in re.findall(r"^import time:.*\|\s*(\S+)$", report, re.M)}


def measure(rounds: int) -> dict[str, Any]:
    """Median seconds of each command; train.py's beyond torch, each round's own difference."""
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds + 1):
        for name, arguments in COMMANDS.items():
            taken[name].append(run(arguments)[0])
    beyond = [train - torch_alone for train, torch_alone in
              zip(taken["train.py --help"][1:], taken["import torch"][1:])]
    return {"seconds": {name: statistics.median(times[1:]) for name, times in taken.items()},
            "train_beyond_torch": statistics.median(beyond),
            "bpe_imports_torch": "torch" in imported(COMMANDS["bpe.py --help"])}


def main(words: list[str]) -> None:
    config = parse(StartupConfig, words, "python -m bench.startup", about=__doc__)
    row = measure(config.rounds)
    for name, seconds in row["seconds"].items():
        print(f"{name:18}{seconds:8.2f} s")
    held = row["train_beyond_torch"] < MOST_SECONDS
    print(f"train.py --help takes {row['train_beyond_torch']:.2f} s beyond import torch (at most "
          f"{MOST_SECONDS:g} s: {'held' if held else 'NOT held'})")
    print("bpe.py --help " + ("imports torch: NOT held" if row["bpe_imports_torch"]
                              else "does not import torch"))
    if config.save:
        print("written:", write_results("startup", torch.device("cpu"), [row],
                                        rounds=config.rounds).name)


if __name__ == "__main__":
    run_command(main)
