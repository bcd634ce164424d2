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
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.machine import (Row, Turns, check_known, check_least, in_process, median_step, publish,
                           table, take_turns, where, with_shares, with_spread)
from bench.peers import GENERATE, LOOSE, OURS, SHAPES, WHO, measure_generation, measure_step
from run.config import parse, run_command
from run.device import DTYPES, has_compiler, pick_device
from run.processes import deterministic


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
        check_known(self, only=(*SHAPES, *GENERATE), who=WHO, dtypes=DTYPES,
                    modes=("eager", "compiled", "autocast"))
        check_least(self, rounds=1, repeats=1)
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
        with deterministic(who == OURS) if who in (OURS, LOOSE) else contextlib.nullcontext():
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


def ratios(rows: list[Row]) -> list[Row]:
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


def report(found: dict[str, Any]) -> str:
    """A result as markdown."""
    limits = {row["limit_of"]: row["limit"] for row in found["rows"]}
    lines = [f"limit of {name}: {limit / 1e9:,.1f} "
             f"{'GB/s' if name == 'reading memory' else 'GFLOP/s'}"
             for name, limit in limits.items()]
    lines += [f"{one['what']}, {one['dtype']}: ours ({one['mode']}) has {one['speed']:.2f} of the "
              f"tokens/s of the best peer ({one['best_peer']}), and {one['memory']:.2f} of the "
              f"least memory" for one in found["ratios"]]
    lines += [f"missing: {line}" for line in found["missing"]]
    return (f"`python -m bench.versus_peers`, {where(found)}, medians of {found['rounds']}:\n\n"
            + table("what | precision=dtype | who | mode | batch=micro_batch | ms:,.1f | "
                    "tokens/s=tokens_per_s:,.1f | spread:.1% | of limit=share:.1% | "
                    "MiB=memory_mib:,.0f", with_spread(found["rows"]))
            + "\n\n" + "\n".join(f"- {line}" for line in lines))


def measure_shape(config: PeersConfig, what: str, device: torch.device, until: float) -> Turns:
    """All turns of a shape; after the first round with the micro-batch that was its fastest."""
    default = (4, 8, 16, 32, 64) if device.type == "cuda" else SHAPES.get(what, (None, 1))[1:]

    def measure(key: tuple[str, str, str], before: list[Row]) -> Row:
        who, dtype, mode = key
        micro = (before[0]["micro_batch"],) if before else config.micro_batches or default
        return in_process("versus_peers", config, only=(what,), who=(who,), dtypes=(dtype,),
                          modes=(mode,), micro_batches=micro, device=device.type)
    return take_turns(plan(config, what, device), measure, config.rounds, device, until,
                      strict=False)


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
    rows, missing, states = [], [], []
    usual = ("124M",) if device.type == "cuda" else ("recipe", "small", "124M", "generate",
                                                     "generate-32")
    for what in config.only or usual:
        turns = measure_shape(config, what, device, until)
        rows += [median_step(rounds) for rounds in turns.rows.values()]
        missing += [f"{what} {' '.join(key)}: {why}" for key, why in turns.missing.items()]
        states += turns.states
        shared = with_shares(rows)      # after each shape, so that what is measured stays
        publish(report, "-".join(["versus-peers", device.type, *config.only]),
                config.save and bool(rows), device, shared, states, rounds=config.rounds,
                ratios=ratios(shared), missing=missing)


if __name__ == "__main__":
    run_command(main)
