"""python -m bench: every benchmark that needs nothing but this repository, in under 15 minutes.

    python -m bench [--save=false] [--only=ladder,ranks]

Writes bench/results/*.json and a picture (`--save=false`: only prints); `python -m bench.measured`
puts them into docs/measured.md. Beside these there are benchmarks that need others' programs
(bench.versus_peers, bench.bpe, bench.lora, bench.lm_eval) or more time (bench.step for all
shapes, which has to save all its rows at once; bench.kills; bench.shakespeare).
"""
import subprocess
import sys
import time
from dataclasses import dataclass

from bench.machine import REPOSITORY, check_known
from run.config import parse, run_command

PARTS = {       # module: what it is run with, what it shows
    "ladder": (["--rounds=1", "--save=true"], "the steps that make training fast"),
    "step": (["--shapes=124M", "--dtypes=bfloat16"], "a training step of GPT-2 124M"),
    "loading": (["--save=true"], "does reading keep up?"),
    "ranks": (["--rounds=2", "--save=true"], "several ranks, and accumulation"),
}


@dataclass(frozen=True)
class AllConfig:
    only: tuple[str, ...] = ()  # which of ladder, step, loading, ranks; empty: all
    save: bool = True  # write to bench/results

    def __post_init__(self):
        check_known(self, only=PARTS)


def commands(config: AllConfig) -> dict[str, list[str]]:
    """The words of each part's command line."""
    return {name: [word for word in words if config.save or word != "--save=true"]
            for name, (words, _) in PARTS.items() if name in (config.only or PARTS)}


def main(words: list[str]) -> None:
    config = parse(AllConfig, words, "python -m bench", about=__doc__)
    began, failed = time.monotonic(), []
    for name, arguments in commands(config).items():
        print(f"\n--- {PARTS[name][1]}: python -m bench.{name} {' '.join(arguments)}", flush=True)
        if subprocess.run([sys.executable, "-m", f"bench.{name}", *arguments],
                          cwd=REPOSITORY).returncode:
            failed.append(name)
    print(f"\n{(time.monotonic() - began) / 60:.1f} minutes")
    if failed:
        raise ValueError(f"{', '.join(failed)} failed; what went wrong is above")


if __name__ == "__main__":
    run_command(main)
