"""Time and memory of a fine-tuning step, against PEFT on transformers' GPT-2.

    python -m bench.lora [--shape=124M] [--variants=full,lora,dora,qlora] [--save]

Same shape, random weights, batch, precision (bfloat16 by autocast), AdamW and loss on both sides;
each measurement in a process of its own, so that its peak memory is its own, ours and theirs by
turns; medians. "full" is our model against transformers' without an adapter. Needs transformers,
peft and, for qlora, bitsandbytes.
"""
import tempfile
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from bench.machine import (Row, in_process, matmul_peak, median_row, publish, table, take_turns,
                           where)
from bench.peers import (KEPT, Contestant, measure_contestant, peer_step, random_batch,
                         transformers_model)
from lora import LoRAConfig, add_lora
from fast.linear import use_fast_products
from model import GPT, GPTConfig
from optim import OptimConfig, make_optimizer
from run.config import parse, run_command
from run.device import pick_device

SHAPES = {
    "124M": GPTConfig(block_size=256, n_layer=12, n_head=12, n_embd=768),
    "tiny": GPTConfig(block_size=64, vocab_size=1000, n_layer=4, n_head=4, n_embd=128),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {}, "lora": {}, "dora": {"use_dora": True}, "qlora": {"quantize": "nf4"}}
SIDES = ("ours", "peft", "peft" + KEPT)


@dataclass(frozen=True)
class LoRABenchConfig:
    shape: Literal[tuple(SHAPES)] = "124M"  # the network
    variants: tuple[Literal[tuple(VARIANTS)], ...] = tuple(VARIANTS)  # what is trained
    targets: tuple[str, ...] = ("c_attn",)  # layers with adapters: names, or all-linear
    r: int = 8  # rank
    batch: int = 4  # sequences of a step
    rounds: int = 3  # processes for each measurement; the median counts
    repeats: int = 5  # steps timed in each after two that warm up
    device: str = "auto"  # auto, cpu, cuda
    compile: bool = False  # torch.compile on both sides
    save: bool = False  # write bench/results/lora-DEVICE.json


def ours(shape: GPTConfig, variant: str, config: LoRABenchConfig) -> nn.Module:
    model = use_fast_products(GPT(shape))
    if variant != "full":
        add_lora(model, LoRAConfig(r=config.r, alpha=16, target_modules=config.targets,
                                   **VARIANTS[variant]))
    return model


def theirs(shape: GPTConfig, variant: str, config: LoRABenchConfig) -> nn.Module:
    model = transformers_model(shape)
    model.config.use_cache = False
    if variant == "full":
        return model
    import peft
    if variant == "qlora":
        from transformers import BitsAndBytesConfig
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            model = type(model).from_pretrained(
                folder, device_map={"": config.device}, quantization_config=BitsAndBytesConfig(
                    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                    bnb_4bit_compute_dtype=torch.bfloat16))
    targets = list(config.targets) if config.targets != ("all-linear",) else "all-linear"
    return peft.get_peft_model(model, peft.LoraConfig(
        r=config.r, lora_alpha=16, target_modules=targets, use_dora=variant == "dora",
        fan_in_fan_out=variant != "qlora", task_type="CAUSAL_LM"))


def measure(variant: str, side: str, config: LoRABenchConfig, limit: bool = False) -> Row:
    """One process's row; with its share of the machine's limit, if that shall be measured too."""
    # pick_device keeps freed memory on a CPU.
    device = torch.device(config.device) if side == "peft" else pick_device(config.device)
    shape = SHAPES[config.shape]
    x, y = random_batch(shape, config.batch, device)

    def loss_of(network: nn.Module) -> torch.Tensor:
        if side == "ours":
            return network(x, y)[1]
        return F.cross_entropy(network(x).logits.flatten(0, 1).float(), y.flatten())

    def make() -> Contestant:
        make_model = ours if side == "ours" else theirs
        model = make_model(shape, variant, config).to(device).train()
        optimizer = make_optimizer(model, OptimConfig(), 1e-4, 0.0)
        return peer_step(model, optimizer, loss_of, device, torch.bfloat16,
                         "compiled" if config.compile else "eager")
    row = measure_contestant(make, y.numel(), device, config.repeats)
    found = {"side": side, "variant": variant, "ms": row["ms"], "mib": row["memory_mib"],
             "trainable": row["trainable"]}
    if limit:
        with torch.device("meta"):
            plain = GPT(shape)
        flops = plain.flops_per_token()
        if variant != "full":                           # 4 a weight of a product instead of 6
            flops -= 2 * (plain.num_params() - plain.transformer.wpe.weight.numel())
        found["percent"] = 100 * flops * row["tokens_per_s"] / matmul_peak(device, torch.bfloat16)
    return found


def report(found: dict[str, Any]) -> str:
    rows = [dict(row) for row in found["rows"]]
    by_side = {(row["variant"], row["side"]): row for row in rows}
    for row in rows:
        peft, kept = (by_side.get((row["variant"], side)) for side in SIDES[1:])
        if row["side"] == "ours" and peft:
            row.update(time=row["ms"] / peft["ms"], memory=row["mib"] / peft["mib"])
        if row["side"] == "ours" and kept:
            row["kept"] = row["ms"] / kept["ms"]
    return (f"`python -m bench.lora`, {where(found)}, GPT-2 {found['shape']}, {found['batch']} "
            f"sequences, bf16, {'compiled' if found['compile'] else 'eager'}, adapters of rank "
            f"{found['r']} on {', '.join(found['targets'])}:\n\n" + table(
                "variant | side | trained=trainable:,d | ms:,.0f | % of limit=percent:.1f | "
                "MiB=mib:,.0f | of PEFT's time=time:.2f | with memory kept=kept:.2f | "
                "of its memory=memory:.2f", rows))


def main(words: list[str]) -> None:
    config = parse(LoRABenchConfig, words, "python -m bench.lora", about=__doc__)
    device = pick_device(config.device)
    config = replace(config, device=device.type)
    turns = take_turns([(variant, side) for variant in config.variants
                        for side in (SIDES if device.type == "cpu" else SIDES[:2])],
                       lambda key: in_process(measure, *key, config, True), config.rounds, device)
    rows = [median_row(rounds, "ms", "mib", "percent") for rounds in turns.rows.values()]
    publish(report, f"lora-{device.type}", config.save, device, rows, turns.states,
            shape=config.shape, targets=config.targets, r=config.r, batch=config.batch,
            compile=config.compile)


if __name__ == "__main__":
    run_command(main)
