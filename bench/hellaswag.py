"""HellaSwag against scoring it one item at a time: items a second, and the same answers.

    python -m bench.hellaswag [--hellaswag_file=PATH] [--items=100] [--dtype=bfloat16]

The other way is the usual script's (build-nanogpt's train_gpt2.py, llm.c's): an item is four rows
of context and ending, padded; the logits of all positions; the loss of each; autocast entered for
each item, so that the weights are cast for each. `casts_once` is the same inside one autocast: what
is left then is what the shared context and the fewer logits save. A random GPT-2 (124M, or
--model.n_layer=...); all ways take turns in one process, which keeps freed memory for all, and the
best of --repeats counts. Decisions and sums are compared in float32 too, where rounding hides
nothing. Writes bench/results/hellaswag_DTYPE.json.
"""
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import functional as F

from bench.machine import lasting, publish, table, take_turns, where
from bpe import Tokenizer
from eval.hellaswag import Item, Scores, load_items, score
from fast.linear import use_fast_products
from model import GPT, GPTConfig
from run.config import parse, run_command
from run.device import autocast, pick_device, pick_dtype


@dataclass(frozen=True)
class HellaswagBenchConfig:
    hellaswag_file: str = ""  # local HellaSwag file; empty: the official one, downloaded once
    items: int = 100  # how many of its items, spread over it
    repeats: int = 4  # turns of each way; the best counts, as others may use the machine
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "bfloat16"  # precision
    model: GPTConfig = GPTConfig()  # the network, with random weights


@torch.no_grad()
def one_at_a_time(model: GPT, tokenizer: Tokenizer, items: list[Item],
                  dtype: torch.dtype) -> torch.Tensor:
    """Sums of log-probabilities (N, 4), style completion, as the usual script computes them."""
    device, sums = next(model.parameters()).device, []
    for item in items:
        context = tokenizer.encode(item.context)
        endings = [tokenizer.encode(" " + ending) for ending in item.endings]
        T = len(context) + max(map(len, endings))
        ids, scored = torch.zeros(4, T, dtype=torch.long), torch.zeros(4, T)
        for row, ending in enumerate(endings):
            end = len(context) + len(ending)
            ids[row, :end] = torch.tensor(context + ending)
            scored[row, len(context):end] = 1
        ids, scored = ids.to(device), scored.to(device)
        with autocast(device, dtype):
            logits, _ = model(ids)                                  # (4, T, V)
        nats = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(),
                               reduction="none").view(4, T - 1)
        sums.append(-(nats * scored[:, 1:]).sum(1).cpu().double())   # MPS has no float64
    return torch.stack(sums)


def measure(config: HellaswagBenchConfig) -> tuple[dict[str, Any], list[float]]:
    """The row, and the machine's states before and after."""
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    torch.manual_seed(0)
    model = use_fast_products(GPT(config.model)).to(device).eval()
    tokenizer = Tokenizer.gpt2()
    items = load_items(config.hellaswag_file or None)
    items = items[::max(1, len(items) // config.items)][:config.items]

    def theirs(dtype: torch.dtype, once: bool = False) -> torch.Tensor:
        with autocast(device, dtype if once else torch.float32):
            return one_at_a_time(model, tokenizer, items, dtype)

    def ours(dtype: torch.dtype) -> Scores:
        return score(model, tokenizer, items, dtype=dtype)

    one_at_a_time(model, tokenizer, items[:2], dtype)               # warm up
    ways = {"one_at_a_time": lambda: theirs(dtype), "casts_once": lambda: theirs(dtype, True),
            "ours": lambda: ours(dtype)}
    turns = take_turns(ways, lambda name: {"s": lasting(ways[name], device)}, config.repeats,
                       device)
    seconds = {name: [round(row["s"], 2) for row in rows] for name, rows in turns.rows.items()}
    speed = {name: len(items) / min(row["s"] for row in rows) for name, rows in turns.rows.items()}
    return {
        "parameters": model.num_params(), "items": len(items), "repeats": config.repeats,
        "dtype": str(dtype).removeprefix("torch."), "seconds": seconds,
        "items_per_s": {name: round(value, 2) for name, value in speed.items()},
        "speedup": round(speed["ours"] / speed["one_at_a_time"], 2),
        "in_float32": compare(theirs(torch.float32), ours(torch.float32)),
        "in_this_dtype": compare(theirs(dtype), ours(dtype)),
    }, turns.states


def compare(other: torch.Tensor, mine: Scores) -> dict[str, Any]:
    """How many decisions differ between the two ways, and the largest difference of sums."""
    lengths = {"acc": 1, "acc_norm": mine.tokens, "acc_bytes": mine.bytes}
    choices = mine.decisions("completion")
    return {"decisions_that_differ": {
                metric: int(((other / length).argmax(1) != choices[metric]).sum())
                for metric, length in lengths.items()},
            "largest_difference_of_sums": float((other - mine.sums).abs().max())}


def report(found: dict[str, Any]) -> str:
    return f"`python -m bench.hellaswag`, {where(found)}, best of the turns, items/s:\n\n" + table(
        "precision=dtype | items | one at a time=one_at_a_time:.1f | weights cast once="
        "casts_once:.1f | ours:.1f | times=speedup:.2f | decisions that differ, float32=exact | "
        "in this precision=here", ({
            **row, **row["items_per_s"],
            **{name: sum(row[key]["decisions_that_differ"].values())
               for name, key in (("exact", "in_float32"), ("here", "in_this_dtype"))}}
            for row in found["rows"]))


def main(words: list[str]) -> None:
    config = parse(HellaswagBenchConfig, words, "python -m bench.hellaswag", about=__doc__)
    row, states = measure(config)
    publish(report, f"hellaswag_{row['dtype']}", True, pick_device(config.device), [row], states)


if __name__ == "__main__":
    run_command(main)
