"""Our training step and generation against nanoGPT, build-nanogpt and transformers, in one run.

    python -m bench.versus_peers --nanogpt=CHECKOUT --build_nanogpt=CHECKOUT [--save]
    python -m bench.versus_peers ... --device=cuda --only=124M --rounds=1 --minutes=7    on a GPU

CHECKOUT: of github.com/karpathy/nanoGPT and karpathy/build-nanogpt; a peer that is not here is left
out. Every (who, shape, precision, mode) is measured in a process of its own, so that memory is its
own, and all of a shape take turns, so that a change of the machine's speed meets all. Medians of
the rounds; the ratios are of our fastest mode to the peers' fastest. A step is forward, backward,
clipping and AdamW, ours with all that train.py does for it, deterministic algorithms included. It
is held against the matrix products, greedy generation against the memory bandwidth that the same
processes measure.
"""
import contextlib
import importlib.util
import json
import math
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.machine import write_results
from bench.peers import GENERATE, LOOSE, OURS, SHAPES, WHO, measure_generation, measure_step
from run.config import parse, run_command
from run.device import DTYPES, has_compiler, pick_device
from run.processes import repeatable


@dataclass(frozen=True)
class PeersConfig:
    only: tuple[str, ...] = ()  # which of tiny, recipe, small, 124M, 350M, 1558M, generate,
        # generate-32, generate-tiny; empty: recipe, small, 124M and both generations, on a GPU 124M
    nanogpt: str = ""  # a checkout of nanoGPT; empty: without it
    build_nanogpt: str = ""  # a checkout of build-nanogpt; empty: without it
    who: tuple[str, ...] = ()  # which of oneloop, oneloop --deterministic=off, nanoGPT,
        # build-nanogpt, transformers; empty: all that are here
    dtypes: tuple[str, ...] = ()  # float32, bfloat16; empty: both, on a GPU bfloat16
    modes: tuple[str, ...] = ()  # eager, compiled; empty: both, on a GPU compiled
    micro_batches: tuple[int, ...] = ()  # sequences of a step, the fastest counts; tried from the
        # largest until one is slower; empty: the shape's own, on a GPU 4,8,16,32,64
    rounds: int = 3  # processes for each measurement; the median counts
    repeats: int = 3  # steps timed in each after two that warm up, more of short ones
    minutes: float = 0.0  # start no measurement after this time; 0: no limit
    device: str = "auto"  # auto, cpu, cuda
    save: bool = False  # write bench/results/versus-peers-DEVICE.json, with --only's names in the
        # name where it is given
    row: bool = False  # print one measurement as JSON (used inside)

    def __post_init__(self):
        for name, allowed in (("only", (*SHAPES, *GENERATE)), ("who", WHO), ("dtypes", DTYPES),
                              ("modes", ("eager", "compiled", "autocast"))):
            for value in getattr(self, name):
                if value not in allowed:
                    raise ValueError(f"{name}={value} is unknown; choose {', '.join(allowed)}")
        for name in ("rounds", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name, file in (("nanogpt", "model.py"), ("build_nanogpt", "train_gpt2.py")):
            folder = getattr(self, name)
            if folder and not (Path(folder) / file).is_file():
                raise FileNotFoundError(f"{name}={folder} has no {file}; name a checkout of it")


def measure(config: PeersConfig, device: torch.device) -> dict[str, Any]:
    """What --row prints: the first of each list, in this process."""
    what, who, dtype, mode = config.only[0], config.who[0], config.dtypes[0], config.modes[0]
    checkout = {"nanoGPT": config.nanogpt, "build-nanogpt": config.build_nanogpt}.get(who, "")
    if what in GENERATE:
        row = measure_generation(who, *GENERATE[what], dtype, mode, device, config.repeats,
                                 checkout)
    else:
        with repeatable(who == OURS) if who in (OURS, LOOSE) else contextlib.nullcontext():
            row = measure_step(who, SHAPES[what][0], config.micro_batches, dtype, mode, device,
                               config.repeats, checkout)
    return {"what": what, "who": who, "dtype": dtype, "mode": mode, **row}


def plan(config: PeersConfig, what: str, device: torch.device) -> list[tuple[str, str, str]]:
    """Who is measured in which precision and mode, in the order of a round."""
    on_gpu = device.type == "cuda"
    here = [who for who in config.who or WHO
            if not (who == "nanoGPT" and not config.nanogpt)
            and not (who == "build-nanogpt" and not config.build_nanogpt)
            and not (who == "transformers" and not importlib.util.find_spec("transformers"))]
    dtypes = config.dtypes or (("bfloat16",) if on_gpu else ("float32", "bfloat16"))
    if what in GENERATE:                # build-nanogpt has no function for it
        return [(who, dtype, mode) for dtype in dtypes
                for mode in config.modes or ("eager", "compiled", "autocast")
                for who in here if who in (OURS, "nanoGPT", "transformers")
                and (mode == "eager" or who == OURS)
                and (mode != "compiled" or has_compiler(device))
                and (mode != "autocast" or dtype != "float32")]
    modes = config.modes or (("compiled",) if on_gpu else ("eager", "compiled"))
    return [(who, dtype, mode) for dtype in dtypes for mode in modes for who in here
            if (mode == "eager" and who != LOOSE) or (mode == "compiled" and has_compiler(device))]


def in_process(words: list[str]) -> dict[str, Any] | str:
    """A row measured by another process, or the last line of what it died of."""
    done = subprocess.run([sys.executable, "-m", "bench.versus_peers", *words, "--row=true"],
                          capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300]
    return json.loads(done.stdout.splitlines()[-1])


def median_row(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of those that several rounds measured."""
    speeds = [row["tokens_per_s"] for row in rounds]
    medians = {key: round(statistics.median(row[key] for row in rounds), 1)
               for key in ("ms", "tokens_per_s", "memory_mib")}
    return {**rounds[0], **medians, "limit": max(row["limit"] for row in rounds),
            "tokens_per_s_rounds": [round(speed, 1) for speed in speeds]}


def spread(row: dict[str, Any]) -> float:
    """The range of the rounds' speeds over their median."""
    speeds = row["tokens_per_s_rounds"]
    return (max(speeds) - min(speeds)) / row["tokens_per_s"]


def with_shares(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with their share of the machine's limit, the best that any of them measured: their
    processes ran at different moments."""
    limits: dict[str, float] = {}
    for row in rows:
        limits[row["limit_of"]] = max(limits.get(row["limit_of"], 0.0), row["limit"])
    return [{**row, "limit": limits[row["limit_of"]],
             "share": round(row["tokens_per_s"] * row["work"] / limits[row["limit_of"]], 3)}
            for row in rows]


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per shape and precision, our fastest row over the peers' fastest: tokens/s (more than 1 is
    faster), and its memory over the least of any peer's row (less than 1 is less)."""
    found = []
    for what, dtype in dict.fromkeys((row["what"], row["dtype"]) for row in rows):
        group = [row for row in rows if (row["what"], row["dtype"]) == (what, dtype)]
        ours = [row for row in group if row["who"] == OURS]
        peers = [row for row in group if row["who"] not in (OURS, LOOSE)]
        if ours and peers:
            mine, best = (max(side, key=lambda row: row["tokens_per_s"]) for side in (ours, peers))
            least = min(row["memory_mib"] for row in peers)
            found.append({"what": what, "dtype": dtype, "mode": mine["mode"],
                          "best_peer": f"{best['who']}, {best['mode']}",
                          "speed": round(mine["tokens_per_s"] / best["tokens_per_s"], 3),
                          "memory": round(mine["memory_mib"] / least, 3)})
    return found


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows and ratios as lines; `spread` is the rounds' range over their median."""
    lines = [f"{'what':14}{'dtype':10}{'who':29}{'mode':9}{'batch':>5}{'ms':>10}{'tokens/s':>12}"
             f"{'spread':>8}{'of limit':>9}{'MiB':>9}"]
    for row in rows:
        lines.append(f"{row['what']:14}{row['dtype']:10}{row['who']:29}{row['mode']:9}"
                     f"{row['micro_batch']:5}{row['ms']:10,.1f}{row['tokens_per_s']:12,.1f}"
                     f"{spread(row):8.1%}{row['share']:9.1%}{row['memory_mib']:9,.0f}")
    for name, limit in {row["limit_of"]: row["limit"] for row in rows}.items():
        unit = "GB/s" if name == "reading memory" else "GFLOP/s"
        lines.append(f"limit of {name}: {limit / 1e9:,.1f} {unit}")
    for ratio in ratios(rows):
        lines.append(f"{ratio['what']}, {ratio['dtype']}: ours ({ratio['mode']}) has "
                     f"{ratio['speed']:.2f} of the tokens/s of the best peer "
                     f"({ratio['best_peer']}), and {ratio['memory']:.2f} of the least memory")
    return lines


def rounds_of(config: PeersConfig, what: str, device: torch.device, until: float
              ) -> tuple[list[dict[str, Any]], list[str]]:
    """All rows of a shape, and what is missing with its reason."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    missing: dict[tuple[str, str, str], str] = {}
    default = (4, 8, 16, 32, 64) if device.type == "cuda" else SHAPES.get(what, (None, 1))[1:]
    for turn in range(config.rounds):
        for who, dtype, mode in plan(config, what, device):
            key = who, dtype, mode
            if key in missing:
                continue
            if time.monotonic() > until:
                missing[key] = f"round {turn + 1} was not begun after {config.minutes:g} minutes"
                continue
            micro = ([found[key][0]["micro_batch"]] if key in found     # the sweep's best
                     else config.micro_batches or default)
            row = in_process([
                f"--only={what}", f"--who={who}", f"--dtypes={dtype}", f"--modes={mode}",
                f"--micro_batches={','.join(map(str, micro))}", f"--repeats={config.repeats}",
                f"--device={device.type}", f"--nanogpt={config.nanogpt}",
                f"--build_nanogpt={config.build_nanogpt}"])
            if isinstance(row, str):
                missing[key] = row
                print(f"warning: {what} {who} {dtype} {mode}: {row}", file=sys.stderr, flush=True)
                continue
            found.setdefault(key, []).append(row)
            print(f"round {turn + 1}: {what} {who} {dtype} {mode}: {row['ms']:,.1f} ms",
                  file=sys.stderr, flush=True)
    return ([median_row(rows) for rows in found.values()],
            [f"{what} {' '.join(key)}: {reason}" for key, reason in missing.items()])


def main(words: list[str]) -> None:
    config = parse(PeersConfig, words, "python -m bench.versus_peers", about=__doc__)
    config = replace(config, **{name: str(Path(getattr(config, name)).resolve())
                                for name in ("nanogpt", "build_nanogpt") if getattr(config, name)})
    # Peers run as they are: pick_device has ours reuse memory.
    peer = config.row and config.who[0] not in (OURS, LOOSE)
    device = torch.device(config.device) if peer else pick_device(config.device)
    if config.row:
        print(json.dumps(measure(config, device)))
        return
    until = time.monotonic() + 60 * (config.minutes or math.inf)
    rows, missing = [], []
    usual = ("124M",) if device.type == "cuda" else ("recipe", "small", "124M", "generate",
                                                      "generate-32")
    for what in config.only or usual:
        more, gone = rounds_of(config, what, device, until)
        rows, missing = rows + more, missing + gone
        shared = with_shares(rows)
        if config.save and rows:        # after each shape: what is measured stays
            write_results("-".join(["versus-peers", device.type, *config.only]), device, shared,
                          rounds=config.rounds, ratios=ratios(shared), missing=missing)
    print(*table(with_shares(rows)), sep="\n")
    for line in missing:
        print("missing:", line)


if __name__ == "__main__":
    run_command(main)
