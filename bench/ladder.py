"""The steps that make training fast, one after the other, on this machine.

    python -m bench.ladder [--shape=small] [--rounds=3] [--device=auto] [--save]

Each rung keeps what the ones below it added, in the order of Karpathy's lecture (build-nanogpt,
2024), with two rungs more. What a rung replaces is written here, what it puts there is the model's:

    float32              attention and head written out, 50257 tokens, AdamW in PyTorch's default
    TF32                 float32 products in fewer bits; only GPUs have it
    oneDNN               float32 products by oneDNN instead of MKL; for CPUs which MKL half uses
    bfloat16             products in bfloat16, weights and sums in float32
    torch.compile        kernels of several operations
    flash attention      one kernel instead of softmax(Q K^T) V with its (B, H, T, T) scores
    vocabulary 50304     rows of the embedding to a multiple of 128
    fused AdamW          one kernel for all parameters
    the model's head     GPT.forward as it is, instead of logits (B, T, V) and F.cross_entropy

A step is forward, backward, clipping and AdamW. Every (rung, round) has a process of its own, so
that memory is its own; rounds take turns, medians count. The share is that of the matrix products
in the same precision, measured in the same processes. --save writes bench/results/ladder-DEVICE
.json, with the shape in the name where it is not "small".
"""
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch.nn import functional as F

from bench.machine import (Row, in_process, matmul_peak, median_step, publish, table, take_turns,
                           where, with_spread)
from bench.peers import (BETAS, EPS, LEARNING_RATE, WEIGHT_DECAY, Contestant, measure_contestant,
                         peer_step, random_batch)
from fast.linear import use_fast_products
from fast.processor import MKL_IS_SLOW
from model import GPT, IGNORE, CausalSelfAttention, GPTConfig
from optim import parameter_groups
from run.config import parse, run_command
from run.device import DTYPES, has_compiler, pick_device

SHAPES = {          # name: shape, its micro-batch on a CPU, on a GPU
    "tiny": (GPTConfig(64, 250, n_layer=2, n_head=2, n_embd=32), 2, 2),     # to try the benchmark
    "small": (GPTConfig(256, n_layer=6, n_head=6, n_embd=384), 8, 64),
    "124M": (GPTConfig(), 2, 16),
}
TF32, ONEDNN, COMPILE, FLASH, PADDED, FUSED, HEAD = (
    "TF32", "oneDNN", "torch.compile", "flash attention", "vocabulary 50304", "fused AdamW",
    "the model's head")
RUNGS = ("float32", TF32, ONEDNN, "bfloat16", COMPILE, FLASH, PADDED, FUSED, HEAD)


@dataclass(frozen=True)
class LadderConfig:
    shape: Literal[tuple(SHAPES)] = "small"  # the network
    rungs: tuple[Literal[RUNGS], ...] = ()  # empty: all
    rounds: int = 3  # processes for each rung; the median counts
    repeats: int = 3  # steps timed in each after two that warm up, more of short ones
    device: str = "auto"  # auto, cpu, cuda
    save: bool = False  # write the result to bench/results


class WrittenOutAttention(CausalSelfAttention):
    """softmax(Q K^T / sqrt(D)) V with the scores of all pairs in memory."""

    def forward(self, x: torch.Tensor, mask: Any = None, cache: Any = None) -> torch.Tensor:
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
                   for part in self.c_attn(x).split(C, dim=2))      # (B, H, T, D) each
        scores = q @ k.transpose(-2, -1) * (C // self.n_head) ** -0.5           # (B, H, T, T)
        future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        y = scores.masked_fill(future, float("-inf")).softmax(dim=-1) @ v       # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class PlainHead(GPT):
    """All logits at once, and the cross-entropy of them."""

    def forward(self, idx: torch.Tensor, targets: torch.Tensor):
        logits = self.lm_head(self.features(idx))[..., :self.config.vocab_size]     # (B, T, V)
        return None, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(),
                                     ignore_index=IGNORE)


def contestant(rung: str, config: GPTConfig, x: torch.Tensor, y: torch.Tensor,
               device: torch.device) -> Contestant:
    """A model that has all of the ladder up to a rung, and its step."""
    has = set(RUNGS[:RUNGS.index(rung) + 1])
    if PADDED in has:
        config = replace(config, vocab_multiple=128)
    with device:
        model = (GPT if HEAD in has else PlainHead)(config)
    if ONEDNN in has:
        use_fast_products(model)
    if FLASH not in has:
        for block in model.transformer.h:
            block.attn.__class__ = WrittenOutAttention
    optimizer = torch.optim.AdamW(parameter_groups(model, WEIGHT_DECAY), LEARNING_RATE, BETAS, EPS,
                                  fused=FUSED in has)
    torch.set_float32_matmul_precision("high" if TF32 in has and device.type == "cuda"
                                       else "highest")
    dtype = DTYPES["bfloat16" if "bfloat16" in has else "float32"]
    return peer_step(model, optimizer, lambda network: network(x, y)[1], device, dtype,
                     "compiled" if COMPILE in has and has_compiler(device) else "eager")


def measure(rung: str, config: GPTConfig, micro_batch: int, kind: str, repeats: int) -> Row:
    """The row of a rung on a kind of device, cpu or cuda, in this process."""
    device = pick_device(kind)
    x, y = random_batch(config, micro_batch, device)
    reached = RUNGS[:RUNGS.index(rung) + 1]
    dtype = "bfloat16" if "bfloat16" in reached else "float32"
    precision = TF32 if dtype == "float32" and TF32 in reached and kind == "cuda" else dtype
    row = measure_contestant(lambda: contestant(rung, config, x, y, device), y.numel(), device,
                             repeats)
    with torch.device("meta"):
        flops = GPT(config).flops_per_token()
    return {"rung": rung, "micro_batch": micro_batch, **row, "work": flops,
            "limit_of": f"matrix products in {precision}",
            "limit": matmul_peak(device, DTYPES[dtype])}


def left_out(rung: str, device: torch.device) -> str:
    """Why a rung is not measured here; "" where it is."""
    if rung == TF32 and (device.type != "cuda"
                         or torch.cuda.get_device_capability(device) < (8, 0)):
        return f"{device.type} has no TF32" if device.type != "cuda" else "a GPU before Ampere"
    if rung == ONEDNN and (device.type != "cpu" or not MKL_IS_SLOW):
        return "MKL uses all of this CPU" if device.type == "cpu" else "only CPUs have it"
    if rung == COMPILE and not has_compiler(device):
        return "no compiler here; the rungs above it are eager"
    return ""


def report(found: dict[str, Any]) -> str:
    """A result as markdown; `faster` is over the rung before."""
    rows = with_spread(found["rows"])
    slower = []
    for before, row in zip([rows[0], *rows], rows):
        row.update(faster=before["ms"] / row["ms"], all=rows[0]["ms"] / row["ms"])
        if row["faster"] < 1:
            slower.append(f"{row['rung']} is slower here than the rung before, and takes "
                          f"{row['memory_mib'] / before['memory_mib']:.0%} of its memory")
    peaks = {row["limit_of"]: f"{row['limit'] / 1e9:,.0f} GFLOP/s" for row in rows}
    notes = [f"peak of {name}: {peak}" for name, peak in peaks.items()]
    notes += slower
    notes += ["one round: how far another would be off is not known"] * (found["rounds"] == 1)
    notes += [f"without {rung}: {why}" for rung, why in found["skipped"].items()]
    return (f"`python -m bench.ladder`, {found['shape']}, {rows[0]['micro_batch']} sequences, "
            f"{where(found)}, medians of {found['rounds']}; each rung on top of those before:\n\n"
            + table("rung | ms:,.1f | tokens/s=tokens_per_s:,.0f | spread:.1% | of peak=share:.1% "
                    "| MiB=memory_mib:,.0f | faster:.2f | in all=all:.2f", rows)
            + "\n\n" + "\n".join(f"- {note}" for note in notes))


def main(words: list[str]) -> None:
    config = parse(LadderConfig, words, "python -m bench.ladder", about=__doc__)
    device = pick_device(config.device)
    wanted = [rung for rung in RUNGS if rung in (config.rungs or RUNGS)]
    skipped = {rung: why for rung in wanted if (why := left_out(rung, device))}
    shape, *micro_batches = SHAPES[config.shape]
    turns = take_turns(             # not strict: where memory does not suffice, others are of use
        [rung for rung in wanted if rung not in skipped],
        lambda rung: in_process(measure, rung, shape, micro_batches[device.type == "cuda"],
                                device.type, config.repeats),
        config.rounds, device, strict=False)
    skipped.update(turns.missing)
    if not turns.rows:
        raise ValueError(f"rungs={','.join(wanted)}: {'; '.join(skipped.values())}")
    rows = [median_step(rounds) for rounds in turns.rows.values()]
    name = f"ladder-{device.type}" + ("" if config.shape == "small" else f"-{config.shape}")
    publish(report, name, config.save, device, rows, turns.states, shape=config.shape,
            rounds=config.rounds, skipped=skipped)


if __name__ == "__main__":
    run_command(main)
