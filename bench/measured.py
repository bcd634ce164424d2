"""docs/measured.md: every table that bench/results/*.json holds, and a summary before them.

    python -m bench.measured
"""
from dataclasses import dataclass
from typing import Any, Callable

from bench import (bpe, gpu, hellaswag, kills, ladder, lm_eval, loading, lora, machine, ranks, saves,
                   race, step, versus_peers)
from bench.machine import REPOSITORY, table
from formats.files import read_json
from run.config import parse, run_command

PAGE = REPOSITORY / "docs" / "measured.md"
HEAD = """# Measured

Made by `python -m bench.measured` from `bench/results/*.json`; do not edit. Each table names the
command that measured it, the day, the machine and the versions. Peers are measured in the same run,
in turn; `bench/__main__.py` names the parts of `make bench`. Nothing here was measured on a GPU
unless a table says so.
"""
TITLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {     # files: heading, report
    "gpu-*": ("On a GPU", gpu.report),
    "versus-peers-*": ("Steps and generation beside peers", versus_peers.report),
    "ladder-*": ("What makes a step fast", ladder.report),
    "step-*": ("A step", step.report),
    "lora-*": ("Fine-tuning beside PEFT", lora.report),
    "ranks-*": ("Ranks and accumulation", ranks.report),
    "loading": ("Reading data", loading.report),
    "bpe": ("Tokenizers", bpe.report),
    "hellaswag_*": ("HellaSwag", hellaswag.report),
    "lm_eval": ("HellaSwag beside the harness", lm_eval.report),
    "race": ("A whole run beside nanoGPT", race.report),
    "saves-*": ("Checkpoints", saves.report),
    "kills": ("Kills", kills.report),
    "survival": ("What surviving kills costs", kills.report_costs),
}


@dataclass(frozen=True)
class MeasuredConfig:
    """There is nothing to set."""


def found(pattern: str) -> list[dict[str, Any]]:
    """The results whose files match, the oldest first."""
    files = sorted(machine.RESULTS.glob(f"{pattern}.json"))
    return sorted(map(read_json, files), key=lambda result: result["date"])


def summary() -> str:
    """Our fastest way over the best peer's; of two results for one machine the newer."""
    newest = {(result["processor"], result["device"], one["what"], one["dtype"]):
              {**one, "device": result["device"]}
              for result in found("versus-peers-*") for one in result["ratios"]}
    return table("what | precision=dtype | ours=mode | best peer=best_peer | speed:.2f | "
                 "memory:.2f | on=device", newest.values())


def page() -> str:
    """docs/measured.md."""
    parts = [HEAD.strip(), "## Summary\n\nTokens/s of ours over the best peer's (more than 1 is "
             "faster), and memory over the least of any peer (less than 1 is less):\n\n"
             + summary()]
    for pattern, (title, report) in TITLES.items():
        results = found(pattern)
        if pattern == "hellaswag_*" and results:                        # a row each: one table
            results = [{**results[-1], "rows": [row for one in results for row in one["rows"]]}]
        if results:
            parts.append("\n\n".join([f"## {title}", *map(report, results)]))
    return "\n\n".join(parts) + "\n"


def main(words: list[str]) -> None:
    parse(MeasuredConfig, words, "python -m bench.measured", about=__doc__)
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written: {PAGE.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    run_command(main)
