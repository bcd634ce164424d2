"""How long a command takes to begin: train.py --help beyond `import torch`, bpe.py without torch.

    python -m bench.startup [--rounds=7] [--save]

Whole processes, in turn; medians of the rounds, after one that warms up the disk. train.py has to
answer within a second more than `import torch` takes, and bpe.py without importing it at all.
"""
import re
import statistics
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from bench.machine import (CPU, REPOSITORY, check_least, held, lasting, publish, table, take_turns,
                           where)
from run.config import parse, run_command

COMMANDS = {"python": ["-c", "pass"], "import torch": ["-c", "import torch"],
            "train.py --help": ["train.py", "--help"], "bpe.py --help": ["bpe.py", "--help"],
            "sample.py --help": ["sample.py", "--help"]}
MOST_SECONDS = 1.0          # of train.py --help, beyond `import torch`


@dataclass(frozen=True)
class StartupConfig:
    rounds: int = 7  # times each command runs; the median counts
    save: bool = False  # write bench/results/startup.json

    def __post_init__(self):
        check_least(self, rounds=1)


def run(arguments: list[str]) -> str:
    """Run a command of this Python in the repository's folder; what it says on stderr.
    RuntimeError if it fails."""
    done = subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, text=True,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: {done.stderr.strip()[-300:]}")
    return done.stderr


def imported(arguments: list[str]) -> set[str]:
    """The packages that a command imports, as Python itself reports them."""
    report = run(["-X", "importtime", *arguments])
    return {name.split(".")[0] for name in re.findall(r"^import time:.*\|\s*(\S+)$", report, re.M)}


def row_of(taken: dict[str, list[float]]) -> dict[str, Any]:
    """Median seconds of each command; train.py's beyond torch, each round's own difference."""
    beyond = [train - torch_alone for train, torch_alone in
              zip(taken["train.py --help"], taken["import torch"])]
    return {"seconds": {name: statistics.median(times) for name, times in taken.items()},
            "train_beyond_torch": statistics.median(beyond),
            "bpe_imports_torch": "torch" in imported(COMMANDS["bpe.py --help"])}


def report(found: dict[str, Any]) -> str:
    """A result as markdown."""
    row = found["rows"][0]
    beyond, torch = row["train_beyond_torch"], row["bpe_imports_torch"]
    return (f"`python -m bench.startup`, {where(found)}. `train.py --help` takes {beyond:.2f} s "
            f"beyond `import torch` (at most {MOST_SECONDS:g}: {held(beyond < MOST_SECONDS)}); "
            f"`bpe.py --help` without importing torch: {held(not torch)}.\n\n" + table(
                "command | seconds:.2f", ({"command": name, "seconds": seconds}
                                          for name, seconds in row["seconds"].items())))


def main(words: list[str]) -> None:
    config = parse(StartupConfig, words, "python -m bench.startup", about=__doc__)
    turns = take_turns(COMMANDS, lambda name, _: {"s": lasting(lambda: run(COMMANDS[name]))},
                       config.rounds + 1)
    row = row_of({name: [one["s"] for one in rows[1:]] for name, rows in turns.rows.items()})
    publish(report, "startup", config.save, CPU, [row], turns.states, rounds=config.rounds)


if __name__ == "__main__":
    run_command(main)
