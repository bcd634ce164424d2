"""Time and memory of a fine-tuning step, against PEFT on transformers' GPT-2.

    python -m bench.lora [--shape=124M] [--variants=full,lora,dora,qlora] [--save]

Same shape, random weights, batch, precision (bfloat16 by autocast), AdamW and loss on both sides;
each measurement in a process of its own, so that its peak memory is its own, ours and theirs by
turns; medians. "full" is our model against transformers' without an adapter. Needs transformers,
peft and, for qlora, bitsandbytes.
"""
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from bench.machine import seconds, write_results
from run.config import parse, run_command
from run.device import autocast, peak_memory, pick_device
from lora import LoRAConfig, add_lora
from fast.linear import use_fast_products
from model import GPT, GPTConfig
from optim import OptimConfig, make_optimizer

SHAPES = {
    "124M": GPTConfig(block_size=256, n_layer=12, n_head=12, n_embd=768),
    "tiny": GPTConfig(block_size=64, vocab_size=1000, n_layer=4, n_head=4, n_embd=128),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {}, "lora": {}, "dora": {"use_dora": True}, "qlora": {"quantize": "nf4"}}


@dataclass(frozen=True)
class LoRABenchConfig:
    shape: str = "124M"  # which of 124M, tiny
    variants: tuple[str, ...] = tuple(VARIANTS)  # which of full, lora, dora, qlora
    sides: tuple[str, ...] = ("ours", "peft")  # ours, peft
    targets: tuple[str, ...] = ("c_attn",)  # layers with adapters: names, or all-linear
    r: int = 8  # rank
    batch: int = 4  # sequences of a step
    rounds: int = 3  # processes for each measurement; the median counts
    repeats: int = 5  # steps timed in each after two that warm up
    device: str = "auto"  # auto, cpu, cuda
    compile: bool = False  # torch.compile on both sides
    save: bool = False  # write bench/results/lora-DEVICE.json
    row: bool = False  # print one measurement as JSON (used inside)

    def __post_init__(self):
        for name, allowed in (("shape", SHAPES), ("variants", VARIANTS),
                              ("sides", ("ours", "peft"))):
            values = getattr(self, name)
            for value in (values,) if isinstance(values, str) else values:
                if value not in allowed:
                    raise ValueError(f"{name}={value} is unknown; choose {', '.join(allowed)}")


def ours(shape: GPTConfig, variant: str, config: LoRABenchConfig) -> nn.Module:
    model = use_fast_products(GPT(shape))
    if variant != "full":
        add_lora(model, LoRAConfig(r=config.r, alpha=16, target_modules=config.targets,
                                   **VARIANTS[variant]))
    return model


def theirs(shape: GPTConfig, variant: str, config: LoRABenchConfig) -> nn.Module:
    from transformers import BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=shape.vocab_size, n_positions=shape.block_size, n_embd=shape.n_embd,
        n_layer=shape.n_layer, n_head=shape.n_head, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0))
    if variant == "full":
        return model
    import peft
    if variant == "qlora":
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            model = GPT2LMHeadModel.from_pretrained(
                folder, device_map={"": config.device}, quantization_config=BitsAndBytesConfig(
                    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                    bnb_4bit_compute_dtype=torch.bfloat16))
    targets = list(config.targets) if config.targets != ("all-linear",) else "all-linear"
    return peft.get_peft_model(model, peft.LoraConfig(
        r=config.r, lora_alpha=16, target_modules=targets, use_dora=variant == "dora",
        fan_in_fan_out=variant != "qlora", task_type="CAUSAL_LM"))


def measure(side: str, variant: str, config: LoRABenchConfig) -> dict[str, Any]:
    """One process's row."""
    torch.manual_seed(0)
    # PEFT runs as it is: pick_device has ours reuse memory.
    device = torch.device(config.device) if side == "peft" else pick_device(config.device)
    shape = SHAPES[config.shape]
    model = {"ours": ours, "peft": theirs}[side](shape, variant, config).to(device).train()
    network = torch.compile(model, dynamic=False) if config.compile else model
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(model, OptimConfig(), 1e-4, 0.0)
    ids = torch.randint(shape.vocab_size, (config.batch, shape.block_size + 1), device=device)
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step() -> None:
        with autocast(device, torch.bfloat16):
            if side == "ours":
                _, loss = network(x, y)
            else:
                loss = F.cross_entropy(network(x).logits.flatten(0, 1).float(), y.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()                              # compiles, and makes the optimizer's state
    before = peak_memory(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = 0
    time = seconds(step, device, config.repeats)
    return {"side": side, "variant": variant, "ms": 1000 * time,
            "mib": max(before, peak_memory(device)) / 2**20,
            "trainable": sum(p.numel() for p in trainable)}


def main(words: list[str]) -> None:
    config = parse(LoRABenchConfig, words, "python -m bench.lora", about=__doc__)
    if config.row:
        print(json.dumps(measure(config.sides[0], config.variants[0], config)))
        return
    device = pick_device(config.device)
    pairs = [(variant, side) for variant in config.variants for side in config.sides]
    found: dict[tuple[str, str], list[dict[str, Any]]] = {pair: [] for pair in pairs}
    for _ in range(config.rounds):
        for variant, side in pairs:
            out = subprocess.run(
                [sys.executable, "-m", "bench.lora", *words, "--row=true", "--save=false",
                 f"--variants={variant}", f"--sides={side}", f"--device={device.type}"],
                check=True, stdout=subprocess.PIPE, text=True).stdout
            found[variant, side].append(json.loads(out.splitlines()[-1]))
    rows = []
    print(f"{'variant':9}{'side':7}{'trainable':>13}{'ms':>10}{'MiB':>9}")
    for variant, side in pairs:
        row = {**found[variant, side][0],
               **{key: round(statistics.median(row[key] for row in found[variant, side]), 1)
                  for key in ("ms", "mib")}}
        rows.append(row)
        print(f"{variant:9}{side:7}{row['trainable']:13,}{row['ms']:10.1f}{row['mib']:9,.0f}")
    for variant in config.variants if len(config.sides) == 2 else ():
        mine, other = (next(row for row in rows if (row["variant"], row["side"]) == (variant, side))
                       for side in ("ours", "peft"))
        print(f"{variant}: {mine['ms'] / other['ms']:.2f} of the time, "
              f"{mine['mib'] / other['mib']:.2f} of the memory")
    if config.save:
        facts = {key: getattr(config, key) for key in ("shape", "targets", "r", "batch", "compile")}
        print("written:", write_results(f"lora-{device.type}", device, rows, **facts).name)


if __name__ == "__main__":
    run_command(main)
