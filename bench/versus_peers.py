"""Our training step and generation against nanoGPT, build-nanogpt and transformers, in one run.

    python -m bench.versus_peers --nanogpt=CHECKOUT --build_nanogpt=CHECKOUT [--save]
    python -m bench.versus_peers ... --device=cuda --only=124M --rounds=1    on a GPU

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from bench.machine import (Row, Turns, in_process, median_step, publish, table, take_turns, where,
                           with_shares, with_spread)
from bench.peers import GENERATE, LOOSE, OURS, SHAPES, WHO, measure_generation, measure_step
from run.config import parse, run_command
from run.device import DTYPES, has_compiler, pick_device
from run.processes import deterministic

MODES = ("eager", "compiled", "autocast")


@dataclass(frozen=True)
class PeersConfig:
    only: tuple[Literal[(*SHAPES, *GENERATE)], ...] = ()  # what is measured; empty: recipe, small,
        # 124M and both generations, on a GPU 124M
    nanogpt: str = ""  # a checkout of nanoGPT; empty: without it
    build_nanogpt: str = ""  # a checkout of build-nanogpt; empty: without it
    who: tuple[Literal[WHO], ...] = ()  # empty: all that are here
    dtypes: tuple[Literal[tuple(DTYPES)], ...] = ()  # empty: float32, bfloat16, on a GPU bfloat16
    modes: tuple[Literal[MODES], ...] = ()  # empty: eager and compiled, on a GPU compiled
    micro_batch: int = 0  # sequences of a step; 0: the shape's own
    rounds: int = 3  # processes for each measurement; the median counts
    repeats: int = 3  # steps timed in each after two that warm up, more of short ones
    device: str = "auto"  # auto, cpu, cuda
    save: bool = False  # write bench/results/versus-peers-DEVICE.json, with --only's names in the
        # name where it is given

    def __post_init__(self):
        for name, file in (("nanogpt", "model.py"), ("build_nanogpt", "train_gpt2.py")):
            folder = getattr(self, name)
            if folder and not (Path(folder) / file).is_file():
                raise FileNotFoundError(f"{name}={folder} has no {file}; name a checkout of it")


def measure(what: str, who: str, dtype: str, mode: str, kind: str, repeats: int,
            micro_batch: int = 0, checkout: str = "") -> Row:
    """The row of a contestant on a kind of device, cpu or cuda, in this process."""
    ours = who in (OURS, LOOSE)
    # Peers run as they are: pick_device has ours reuse memory.
    device = pick_device(kind) if ours else torch.device(kind)
    if what in GENERATE:
        row = measure_generation(who, *GENERATE[what], dtype, mode, device, repeats, checkout)
    else:
        shape, *usual = SHAPES[what]
        with deterministic(who == OURS, device) if ours else contextlib.nullcontext():
            row = measure_step(who, shape, micro_batch or usual[kind == "cuda"], dtype, mode,
                               device, repeats, checkout)
    return {"what": what, "who": who, "dtype": dtype, "mode": mode, **row}


def plan(config: PeersConfig, what: str, device: torch.device) -> list[tuple[str, str, str]]:
    """Who is measured in which precision and mode, in the order of a round."""
    def fits(who: str, dtype: str, mode: str) -> bool:
        if mode == "compiled" and not has_compiler(device):
            return False
        if what in GENERATE:                # build-nanogpt has no function for it
            return who == OURS and (mode, dtype) != ("autocast", "float32") or \
                   who in ("nanoGPT", "transformers") and mode == "eager"
        return mode != "autocast" and (who, mode) != (LOOSE, "eager")

    here = {OURS: True, LOOSE: True, "nanoGPT": config.nanogpt,
            "build-nanogpt": config.build_nanogpt,
            "transformers": importlib.util.find_spec("transformers")}
    on_gpu = device.type == "cuda"
    dtypes = config.dtypes or (("bfloat16",) if on_gpu else ("float32", "bfloat16"))
    modes = config.modes or (("compiled",) if on_gpu and what in SHAPES else MODES)
    return [(who, dtype, mode) for dtype in dtypes for mode in modes for who in config.who or WHO
            if here[who] and fits(who, dtype, mode)]


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
    lines = [f"limit of {name}: {limit / 1e9:,.1f} "
             f"{'GB/s' if name == 'reading memory' else 'GFLOP/s'}"
             for name, limit in {row["limit_of"]: row["limit"] for row in found["rows"]}.items()]
    lines += [f"{one['what']}, {one['dtype']}: ours ({one['mode']}) has {one['speed']:.2f} of the "
              f"tokens/s of the best peer ({one['best_peer']}), and {one['memory']:.2f} of the "
              f"least memory" for one in found["ratios"]]
    lines += [f"missing: {line}" for line in found["missing"]]
    return (f"`python -m bench.versus_peers`, {where(found)}, medians of {found['rounds']}:\n\n"
            + table("what | precision=dtype | who | mode | batch=micro_batch | ms:,.1f | "
                    "tokens/s=tokens_per_s:,.1f | spread:.1% | of limit=share:.1% | "
                    "MiB=memory_mib:,.0f", with_spread(found["rows"]))
            + "\n\n" + "\n".join(f"- {line}" for line in lines))


def measure_shape(config: PeersConfig, what: str, device: torch.device) -> Turns:
    """All turns of a shape."""
    checkouts = {"nanoGPT": config.nanogpt, "build-nanogpt": config.build_nanogpt}
    return take_turns(
        plan(config, what, device),
        lambda key, _: in_process(measure, what, *key, device.type, config.repeats,
                                  config.micro_batch, checkouts.get(key[0], "")),
        config.rounds, device, strict=False)


def main(words: list[str]) -> None:
    config = parse(PeersConfig, words, "python -m bench.versus_peers", about=__doc__)
    device = pick_device(config.device)
    rows, missing, states = [], [], []
    usual = ("124M",) if device.type == "cuda" else ("recipe", "small", "124M", "generate",
                                                     "generate-32")
    for what in config.only or usual:
        turns = measure_shape(config, what, device)
        rows += [median_step(rounds) for rounds in turns.rows.values()]
        missing += [f"{what} {' '.join(key)}: {why}" for key, why in turns.missing.items()]
        states += turns.states
        shared = with_shares(rows)      # after each shape, so that what is measured stays
        publish(report, "-".join(["versus-peers", device.type, *config.only]),
                config.save and bool(rows), device, shared, states, rounds=config.rounds,
                ratios=ratios(shared), missing=missing)


if __name__ == "__main__":
    run_command(main)
