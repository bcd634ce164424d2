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
                           with_spread)
from bench.peers import (GENERATE, KEPT, LOOSE, OURS, PEERS, SHAPES, WHO, measure_generation,
                         measure_step)
from run.config import parse, run_command
from run.device import DTYPES, has_compiler, pick_device
from run.processes import deterministic

MODES = ("eager", "compiled", "packed")


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
    ours, as_it_is = who in (OURS, LOOSE), who in PEERS
    device = torch.device(kind) if as_it_is else pick_device(kind)  # which keeps freed memory
    name, who = who, who.removesuffix(KEPT)
    if what in GENERATE:
        row = measure_generation(who, *GENERATE[what], dtype, mode, device, repeats, checkout)
    else:
        shape, *usual = SHAPES[what]
        with deterministic(who == OURS, device) if ours else contextlib.nullcontext():
            row = measure_step(who, shape, micro_batch or usual[kind == "cuda"], dtype, mode,
                               device, repeats, checkout)
    return {"what": what, "who": name, "dtype": dtype, "mode": mode, **row}


def plan(config: PeersConfig, what: str, device: torch.device) -> list[tuple[str, str, str]]:
    """Who is measured in which precision and mode, in the order of a round."""
    def fits(who: str, dtype: str, mode: str) -> bool:
        if mode == "compiled" and not has_compiler(device) or on_gpu and who.endswith(KEPT):
            return False
        who = who.removesuffix(KEPT)
        if what in GENERATE:                # build-nanogpt has no function for it
            return who == OURS and (mode, dtype) != ("packed", "float32") or \
                   who in ("nanoGPT", "transformers") and mode == "eager"
        return mode != "packed" and (who, mode) != (LOOSE, "eager")

    here = {OURS: True, LOOSE: True, "nanoGPT": config.nanogpt,
            "build-nanogpt": config.build_nanogpt,
            "transformers": importlib.util.find_spec("transformers")}
    on_gpu = device.type == "cuda"
    dtypes = config.dtypes or (("bfloat16",) if on_gpu else ("float32", "bfloat16"))
    modes = config.modes or (("compiled",) if on_gpu and what in SHAPES else MODES)
    return [(who, dtype, mode) for dtype in dtypes for mode in modes for who in config.who or WHO
            if here[who.removesuffix(KEPT)] and fits(who, dtype, mode)]


def ratios(rows: list[Row]) -> list[Row]:
    """Per shape and precision, our fastest row over the peers' fastest: tokens/s (more than 1 is
    faster), and its memory over the least of any peer's row (less than 1 is less)."""
    found = []
    for what, dtype in dict.fromkeys((row["what"], row["dtype"]) for row in rows):
        group = [row for row in rows if (row["what"], row["dtype"]) == (what, dtype)]
        ours, peers, kept = ([row for row in group if row["who"] in side] for side in
                             ((OURS,), PEERS, tuple(peer + KEPT for peer in PEERS)))
        if ours and peers:
            mine, best = (max(side, key=lambda row: row["tokens_per_s"]) for side in (ours, peers))
            least = min(row["memory_mib"] for row in peers)
            found.append({"what": what, "dtype": dtype, "mode": mine["mode"],
                          "best_peer": f"{best['who']}, {best['mode']}",
                          "speed": round(mine["tokens_per_s"] / best["tokens_per_s"], 3),
                          "memory": round(mine["memory_mib"] / least, 3)})
            if kept:
                fastest = max(row["tokens_per_s"] for row in kept)
                found[-1]["speed_kept"] = round(mine["tokens_per_s"] / fastest, 3)
    return found


def over_peers(rows: list[Row]) -> list[Row]:
    """Rows with their tokens/s over those of each peer's fastest mode, as "/ PEER"."""
    best: dict[tuple[str, str], dict[str, float]] = {}
    for row in sorted(rows, key=lambda row: row["tokens_per_s"]):
        best.setdefault((row["what"], row["dtype"]), {})[row["who"]] = row["tokens_per_s"]
    return [{**row, **{f"/ {who}": row["tokens_per_s"] / speed
                       for who, speed in best[row["what"], row["dtype"]].items()}} for row in rows]


def report(found: dict[str, Any]) -> str:
    lines = []
    for name in dict.fromkeys(row["limit_of"] for row in found["rows"]):
        limits = [row["limit"] / 1e9 for row in found["rows"] if row["limit_of"] == name]
        unit = "GB/s" if name == "reading memory" else "GFLOP/s"
        lines.append(f"limit of {name}: {min(limits):,.1f} to {max(limits):,.1f} {unit}")
    for one in found["ratios"]:
        kept = (f", {one['speed_kept']:.2f} where that keeps freed memory" if "speed_kept" in one
                else "")
        lines.append(f"{one['what']}, {one['dtype']}: ours ({one['mode']}) has {one['speed']:.2f} "
                     f"of the tokens/s of the best peer ({one['best_peer']}){kept}, and "
                     f"{one['memory']:.2f} of the least memory")
    lines += [f"missing: {line}" for line in found["missing"]]
    peers = [f"/ {who}:.2f" for who in WHO[2:] if any(row["who"] == who for row in found["rows"])]
    return (f"`python -m bench.versus_peers`, {where(found)}, medians of {found['rounds']}:\n\n"
            + table(" | ".join(["what | precision=dtype | who | mode | batch=micro_batch | ms:,.1f "
                                "| tokens/s=tokens_per_s:,.1f | spread:.1% | of limit=share:.1%",
                                *peers, "MiB=memory_mib:,.0f"]),
                    with_spread(over_peers(found["rows"])))
            + "\n\n" + "\n".join(f"- {line}" for line in lines))


def measure_shape(config: PeersConfig, what: str, device: torch.device) -> Turns:
    """All turns of a shape."""
    checkouts = {"nanoGPT": config.nanogpt, "build-nanogpt": config.build_nanogpt}
    return take_turns(
        plan(config, what, device),
        lambda key: in_process(measure, what, *key, device.type, config.repeats,
                               config.micro_batch, checkouts.get(key[0].removesuffix(KEPT), "")),
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
        publish(report, "-".join(["versus-peers", device.type, *config.only]),    # after each
                config.save and bool(rows), device, rows, states, rounds=config.rounds,
                ratios=ratios(rows), missing=missing)


if __name__ == "__main__":
    run_command(main)
