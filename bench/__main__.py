"""python -m bench: every benchmark that needs nothing but this repository, in under 15 minutes.

    python -m bench [--save=false]

Writes bench/results/*.json (`--save=false`: only prints); `python -m bench.measured` puts them into
docs/measured.md. Generation is measured beside transformers where that is installed. Beside these
there are benchmarks that need others' programs (all of bench.versus_peers; bench.bpe, bench.lora,
bench.lm_eval) or more time (bench.step for all shapes, which has to save all its rows at once;
bench.kills; bench.race).
"""
import subprocess
import sys
import time
from dataclasses import dataclass

from bench.machine import REPOSITORY
from run.config import parse, run_command

PARTS = {       # module: what it is run with
    "ladder": ["--rounds=1", "--save=true"],
    "step": ["--shapes=124M", "--dtypes=bfloat16"],
    "loading": ["--save=true"],
    "ranks": ["--rounds=2", "--save=true"],
    "versus_peers": ["--only=generate", "--dtypes=float32", "--rounds=1"],
}


@dataclass(frozen=True)
class AllConfig:
    save: bool = True  # write to bench/results


def main(words: list[str]) -> None:
    config = parse(AllConfig, words, "python -m bench", about=__doc__)
    began, failed = time.monotonic(), []
    for name, arguments in PARTS.items():
        command = ["-m", f"bench.{name}", *(word for word in arguments
                                            if config.save or word != "--save=true")]
        print("\n--- python", *command, flush=True)
        if subprocess.run([sys.executable, *command], cwd=REPOSITORY).returncode:
            failed.append(name)
    print(f"\n{(time.monotonic() - began) / 60:.1f} minutes")
    if failed:
        raise ValueError(f"{', '.join(failed)} failed; what went wrong is above")


if __name__ == "__main__":
    run_command(main)
