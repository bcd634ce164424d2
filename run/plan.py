"""What a run would do, said before it does it: `python train.py PRESET --dry_run`.

Steps, passes over the data, parameters, floating-point operations, memory, the learning rate as a
curve, the trained tensors, and the first example with what is learned of it; of a long run also
time, cost and disk. The formulas of memory are those of docs/scaling.md, whose tables
tests/test_scaling.py compares with them, and them with what the code does.
"""
import math
import shutil
from pathlib import Path
from typing import Any

import torch

import lora
from fast.cross_entropy import head_memory
from optim import OptimConfig, learning_rate, matrices
from run.device import PEAK_FLOPS
from run.processes import Processes

# Bytes a parameter: float32 weights 4, gradients 4, AdamW's two means 8.
WEIGHTS, GRADIENTS, MOMENTS = 4, 4, 8
# Bytes that forward keeps for backward, a token and layer and channel, by the bytes of a number in
# products. bfloat16: the inputs of c_attn 2, attention 6 (q, k, v), attention's c_proj 2, c_fc 2,
# GELU 8, the MLP's c_proj 8; float32: 4 + 12 + 4 + 4 + 16 + 16. And twice the residual stream, into
# the LayerNorms: a number of it is in float32 but where run/parallel.py:Parallel has lowered it.
KEPT = {2: 28, 4: 56}

SHARDS = ("none", "zero2", "fsdp")
LONG = 1e16                             # operations from which on a run is one for rented GPUs
RANKS = 8                               # of a node, where a plan for GPUs is made on one process
MFU = 0.4                               # assumed; llm.c's on H100 was 41%, on A100 60%
# Memory in GB, and dollars an hour for one on demand: RunPod's Secure Cloud (runpod.io/pricing), SXM
# cards, A100 and H100 as of 2026-11-09, H200 and B200 of 2026-10-07, in public copies of that page.
CARDS = {"A100": (80, 1.79), "H100": (80, 3.99), "H200": (141, 4.59), "B200": (180, 6.79)}


def optimizer_memory(model: torch.nn.Module, config: OptimConfig = OptimConfig()) -> int:
    """Bytes that the optimizer remembers: of matrices Muon one mean, GaLore two in the rank that it
    projects to and the basis; of all else AdamW its two."""
    linear, remembered = matrices(model), 0
    for p in (p for p in model.parameters() if p.requires_grad):
        size = MOMENTS * p.numel()
        if p in linear and config.optimizer == "muon":
            size //= 2
        elif p in linear and config.optimizer == "galore":
            shorter, longer = sorted(p.shape)
            rank = min(config.galore_rank, shorter)
            size = rank * (MOMENTS * longer + WEIGHTS * shorter)
        remembered += size
    return remembered


def held_memory(model: torch.nn.Module, shard: str, ranks: int,
                config: OptimConfig = OptimConfig()) -> float:
    """Bytes of weights, gradients and optimizer on a rank between two steps. Parameters are divided
    where they are sharded; what NF4 packs is in buffers, which never are."""
    held = optimizer_memory(model, config)
    for p in model.parameters():
        held += (WEIGHTS + GRADIENTS * p.requires_grad) * p.numel()
    return held / (1 if shard == "none" else ranks) + sum(b.nbytes for b in model.buffers())


def state_memory(model: torch.nn.Module, shard: str, ranks: int, accumulates: bool, size: int,
                 config: OptimConfig = OptimConfig()) -> float:
    """Bytes of all that is no activation on a rank in the middle of a step: what is held, and
    copies of weights and gradients. size: bytes of a number in products."""
    held = held_memory(model, shard, ranks, config)
    unpacked = size * max((m.in_features * m.out_features for m in model.modules()
                           if hasattr(m, "dequantize")), default=0)
    every, trained = ([p.numel() for p in model.parameters() if p.requires_grad or not only]
                      for only in (False, True))
    if shard == "none":                                 # the copies that autocast makes
        return held + unpacked + (size * sum(every) if size < WEIGHTS else 0)
    blocks, grads = ([sum(p.numel() for p in block.parameters() if p.requires_grad or not only)
                      for block in model.transformer.h] for only in (False, True))
    root = sum(every) - sum(blocks)
    # Gradients that are not reduced yet are whole.
    held += GRADIENTS * sum(trained) if accumulates else \
        (size + GRADIENTS) * max(sum(trained) - sum(grads), max(grads))
    return held + unpacked + size * (sum(every) if shard == "zero2" else root + 2 * max(blocks))


def block_memory(model: torch.nn.Module, tokens: int, size: int, stream: int,
                 recompute: bool = False) -> int:
    """Bytes of activations up to the head's input, for so many tokens at once, by the bytes of a
    number in products and in the residual stream. Blocks that are recomputed keep their input each,
    and one of them all."""
    layers, kept = model.config.n_layer, KEPT[size] + 2 * stream
    return tokens * model.config.n_embd * (
        (stream * layers + kept if recompute else kept * layers) + stream + size)


def activation_memory(model: torch.nn.Module, tokens: int, size: int, stream: int, recompute: bool,
                      device: str) -> int:
    """Bytes of activations for so many tokens at once, the head's included."""
    c, live = model.config, block_memory(model, tokens, size, stream, recompute)
    if getattr(model, "classes", 0):
        return live
    rows = c.padded_vocab_size
    frozen = not model.transformer.wte.weight.requires_grad             # it has no gradient
    return live + head_memory(tokens, c.n_embd, rows, device) - 4 * rows * c.n_embd * frozen


def dry_run(config: Any, model: torch.nn.Module, batches: Any, data: Any, world: Processes,
            dtype: torch.dtype) -> dict[str, Any]:
    """Print what a run would do: its steps, memory, schedule, trained tensors and an example."""
    c, n = config.model, model.num_params()
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    trained = sum(p.numel() for _, p in trainable)
    if model.transformer.wte.weight.requires_grad:
        trained -= (c.padded_vocab_size - c.vocab_size) * c.n_embd
    passes = config.max_steps * batches.rows_per_step / batches.rows_per_epoch
    flops = model.flops_per_token() * config.max_steps * batches.tokens_per_step
    rates = [learning_rate(round(i * (config.max_steps - 1) / 59), config.schedule,
                           config.max_steps, config.warmup_steps, config.learning_rate,
                           config.min_learning_rate, config.optim) for i in range(60)]
    lines = [
        f"{config.max_steps:,} steps of {config.batch_tokens:,} tokens = {world.size} rank(s) x "
        f"{batches.accumulation} micro-batch(es) x {batches.micro_batch} sequences x "
        f"{c.block_size} tokens ({batches.tokens_per_step:,.0f} without padding); {passes:.2f} "
        f"passes over {batches.rows_per_epoch:,} rows of the data",
        f"parameters {n:,}, trained {trained:,}; {model.flops_per_token() / 1e9:.3g} GFLOP a "
        f"token, {flops:.3g} FLOP in all",
        *about_resources(config, model, world, dtype, flops),
        *(about_disk(config, data, model, trained) if flops > LONG else ()),
        f"learning rate, {config.schedule}, {config.warmup_steps} steps of warmup, "
        f"peak {config.learning_rate:g}, floor {config.min_learning_rate:g}:",
        f"  [{sketch(rates)}]",
        "trained tensors (of blocks, the first stands for all):",
        *(f"  {name:40} {tuple(p.shape)}" for name, p in trainable
          if ".h." not in name or ".h.0." in name)]
    if data.published:
        lines.append(f"{config.data} is not prepared here, so no example; python -m "
                     f"data.{config.data} makes it")
    else:
        x, y = next(batches.batches(0))[:2]
        lines += [f"the first example of step 0, {int((y[0] >= 0).sum())} of {len(y[0])} positions "
                  f"labelled; what has no label stands in [brackets]:",
                  marked_example(x[0], y[0], data)]
    if world.rank == 0:
        print("\n".join(lines))
    return {"parameters": n, "trained": trained, "max_steps": config.max_steps,
            "flops_per_token": model.flops_per_token(), "tokens_per_step": batches.tokens_per_step}


def about_resources(config: Any, model: torch.nn.Module, world: Processes, dtype: torch.dtype,
                    flops: float) -> list[str]:
    """Memory of a rank; of a long run, which is planned for GPUs wherever that is done, also of the
    other ways to share it among the ranks, and time and cost."""
    long, T = flops > LONG, config.model.block_size
    if long and config.dtype == "auto":
        dtype = torch.bfloat16
    size = torch.finfo(dtype).bits // 8
    node = world.size if world.size > 1 else RANKS

    def memory(shard: str, ranks: int) -> tuple[float, float]:
        """Bytes of state and of activations."""
        accumulates = config.batch_tokens > config.micro_batch * T * ranks
        tokens = min(config.micro_batch * T, config.batch_tokens // ranks)
        device = "cuda" if long else world.device.type
        lowered = shard != "none" or device == "cuda" and dtype == torch.bfloat16
        return (state_memory(model, shard, ranks, accumulates, size, config.optim),
                activation_memory(model, tokens, size, size if lowered else 4,
                                  config.recompute_activations, device))
    here = node if config.shard != "none" else world.size
    state, live = memory(config.shard, here)
    lines = [f"memory a rank, estimated: {gb(state)} GB weights, gradients, optimizer and copies, "
             f"{gb(live)} GB activations ({str(dtype).removeprefix('torch.')}, {here} rank(s), "
             f"--shard={config.shard})"]
    if not long:
        return lines
    lines.append(f"  the first of these on {node} ranks: " + ", ".join(
        f"{gb(memory(shard, node)[0])} with --shard={shard}" for shard in SHARDS))
    lines.append(f"on rented GPUs, predicted at {MFU:.0%} of their peak, without evaluations; "
                 f"prices of 2026-11, run/plan.py:CARDS:")
    for name, (memory_gb, price) in CARDS.items():
        hours = flops / (PEAK_FLOPS[name] * MFU) / 3600
        small = state + live > 0.9e9 * memory_gb
        lines.append(f"  {name}, {memory_gb:3} GB: {hours:,.1f} hours on 1, {hours / node:,.1f} "
                     f"on {node}; ${hours * price:,.0f} at ${price} an hour"
                     + ("; too small for this micro_batch and --shard" if small else ""))
    return lines


def about_disk(config: Any, data: Any, model: torch.nn.Module, trained: int) -> list[str]:
    """What is downloaded and written."""
    kept = config.keep_last + 1                         # and one that is being written
    if config.milestone_every:
        kept += config.save_total_limit or config.max_steps // config.milestone_every
    moments = optimizer_memory(model, config.optim)
    needs = {f"{kept} checkpoints": kept * (WEIGHTS * trained + moments),
             "best.pt": WEIGHTS * trained}
    needs = {**{what: size for what, size in data.published.items() if what != "tokens"}, **needs}
    folder = next(path for path in Path(config.out).absolute().parents if path.exists())
    together, free = sum(needs.values()), shutil.disk_usage(folder).free
    return ["disk: " + ", ".join(f"{gb(size)} GB {what}" for what, size in needs.items())
            + f"; together {gb(together)}, free here {gb(free)}"
            + (", which is too little" if together > free else "")]


def gb(count: float) -> str:
    """Bytes in units of 10^9: "28.0", "0.026"."""
    return f"{count / 1e9:,.1f}" if count >= 1e8 else f"{count / 1e9:.2g}"


@torch.no_grad()
def first_step(model: torch.nn.Module, config: lora.LoRAConfig, rate: float) -> str:
    """How far AdamW's first step at this rate moves the weights that the active adapters, of this
    config, are on, and which rates move them as far with another r or alpha.

    The step's entries are +-rate, so s B A moves by s rate sqrt(|A|^2 / in + |B|^2 / out), root
    mean square; with B = 0 A stands still. A's start has |A|^2 / in = r / (3 in) by "kaiming".
    """
    moved = []
    for layer in lora.adapted_layers(model).values():
        for change, _ in layer.changes(model.adapters.active):
            A, B, W = change.lora_A, change.lora_B, lora.weight_of(layer.base_layer)[change.rows]
            step = (A.square().sum() / A.size(1) + B.square().sum() / B.size(0)).sqrt()
            moved.append(change.scale * rate * step / W.square().mean().sqrt())
    text = (f"a first step at the learning rate {rate:g} moves the adapted weights by "
            f"{torch.stack(moved).median():.2%} of their size")
    if config.init != "kaiming":
        return text
    wider = rate if config.use_rslora else rate * math.sqrt(2)
    return (f"{text}; as far at r={2 * config.r} with {wider:.2g}, "
            f"at alpha={2 * config.alpha:g} with {rate / 2:.2g}")


def marked_example(x: torch.Tensor, y: torch.Tensor, data: Any, width: int = 64) -> str:
    """The first `width` targets of an example as text, unlabelled stretches in brackets. Of a text
    with a class the end, and the class."""
    tokenizer = data.tokenizer
    if tokenizer is None:
        return f"  ids {x[:width].tolist()}"
    if data.classes:
        end = int((y >= 0).nonzero()[0]) + 1            # the first, where several are packed
        text = f"[{tokenizer.decode(x[max(0, end - width):end].tolist())}] {data.names[y[end - 1]]}"
        return "  " + text.replace("\n", "\n  ")
    ids = torch.cat([x[:1], torch.where(y >= 0, y, x.roll(-1))])
    labelled = [False, *(y >= 0).tolist()]              # nothing predicts the first token
    text, start = "", 0
    for end in range(1, min(width, len(ids)) + 1):
        if end == min(width, len(ids)) or labelled[end] != labelled[start]:
            piece = tokenizer.decode(ids[start:end].tolist())
            text += piece if labelled[start] else f"[{piece}]"
            start = end
    return "  " + text.replace("\n", "\n  ")


def sketch(values: list[float]) -> str:
    """A line of bars, one a value, as high as the value is large."""
    top = max(values) or 1.0
    return "".join(" ▁▂▃▄▅▆▇█"[round(8 * max(value, 0) / top)] for value in values)
