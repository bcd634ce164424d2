"""The arithmetic of docs/scaling.md: memory, communication, time, cost and data by model size.

    python -m bench.scaling [--price=2] [--mfu=0.4] ...      prints the tables as markdown
    python -m bench.scaling --write                          puts them into docs/scaling.md

Nothing is trained: parameters are counted on models without numbers (device "meta"), the rest are
the formulas below. GB is 10^9 bytes. N parameters, n GPUs, A micro-batches of a step on each GPU.
"""
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable

import torch

from bench.machine import RESULTS
from bench.step import SHAPES as STEP_SHAPES
from run.config import build, parse, run_command
from fast.cross_entropy import head_memory
from data.loader import divide_step
from run.device import PEAK_FLOPS
from model import GPT, GPTConfig
from run.presets import PRESETS

PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"
GPUS_OF_A_NODE = 8
NODES = (1, 2, 4, 8, 16)
PRESET_SHAPES = ("gpt2-124m", "gpt2-350m", "gpt2-774m", "gpt2-1558m")
# Width, depth, context and tokens of a step of GPT-3 6.7B: 2005.14165, table 2.1.
LARGE = dict(batch_tokens=2**21, micro_batch=2, model=dict(
    n_layer=32, n_head=32, n_embd=4096, block_size=2048, vocab_multiple=128))

# Bytes a parameter: float32 weights 4, gradients 4, AdamW's two means 8; a bfloat16 copy of the
# weights, which autocast makes or FSDP gathers, 2.
WEIGHTS, GRADIENTS, MOMENTS, COPY = 4, 4, 8, 2
# Bytes that forward keeps for backward, a token and layer and channel. bfloat16: residual stream
# into two LayerNorms, in float32, 4 + 4; the inputs of c_attn 2, attention 6 (q, k, v),
# attention's c_proj 2, c_fc 2, GELU 8, the MLP's c_proj 8. float32: 4 + 4 + 4 + 12 + 4 + 4 + 16
# + 16. Where blocks are recomputed, each keeps its float32 input: 4.
KEPT = {"bfloat16": 36, "float32": 64}
KEPT_OF_A_BLOCK = 4
# Where DDP ends: what is left for CUDA, NCCL and fragments (an assumption), and for activations.
RESERVE, ACTIVATIONS = 0.1, 14e9


@dataclass(frozen=True)
class ScalingConfig:
    peak: float = PEAK_FLOPS["H100"]  # dense bf16 FLOP/s of a GPU; H100 and H200 alike
    mfu: float = 0.4  # share of the peak that training reaches: an assumption
    nvlink: float = 450e9  # bytes/s each way between GPUs of a node (900 GB/s both ways)
    infiniband: float = 50e9  # bytes/s each way of a GPU's own 400 Gb/s adapter
    price: float = 2.0  # of a GPU-hour, in any currency: a placeholder, no quotation
    bytes_per_token: float = 4.59  # of text; measured on 300 pages of C4, GPT-2's tokenizer
    encode_rate: float = 30e6  # bytes/s of text that 2 idle cores tokenise
    write: bool = False  # put the tables into docs/scaling.md

    def __post_init__(self):
        for name in ("peak", "mfu", "nvlink", "infiniband", "bytes_per_token", "encode_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        if self.write and replace(self, write=False) != ScalingConfig():
            raise ValueError("--write keeps the page's own assumptions; give it alone")


@dataclass(frozen=True)
class Shape:
    """A network and how it is trained; what FSDP gathers at once: a block, or the rest (root)."""
    name: str
    config: GPTConfig
    batch_tokens: int
    micro_batch: int
    parameters: int         # that are stored: padded rows of the vocabulary included
    counted: int            # that are published: without them
    block: int
    flops: int              # a token, forward and backward

    @property
    def root(self) -> int:
        return self.parameters - self.config.n_layer * self.block


def shape_of(name: str, settings: dict[str, Any]) -> Shape:
    config = build(GPTConfig, settings["model"])
    with torch.device("meta"):
        model = GPT(config)
    return Shape(name, config, settings["batch_tokens"], settings["micro_batch"],
                 sum(p.numel() for p in model.parameters()), model.num_params(),
                 sum(p.numel() for p in model.transformer.h[0].parameters()),
                 model.flops_per_token())


def all_shapes() -> list[Shape]:
    found = [shape_of(name, PRESETS[name].settings) for name in PRESET_SHAPES]
    return [*found, shape_of("GPT-3 6.7B's", LARGE)]


# ------------------------------------------------------------------------------------------------
# Memory

def state_bytes(shape: Shape, shard: str, n: int, accumulate: bool) -> float:
    """Weights, gradients, optimizer state and copies on one GPU in the middle of a step."""
    N, largest = shape.parameters, max(shape.root, shape.block)
    if shard == "none":
        return (WEIGHTS + GRADIENTS + MOMENTS + COPY) * N
    held = (WEIGHTS + GRADIENTS + MOMENTS) * N / n
    # Gradients that are not reduced yet are whole.
    held += GRADIENTS * N if accumulate else (COPY + GRADIENTS) * largest
    return held + COPY * (N if shard == "zero2" else shape.root + 2 * shape.block)


def evaluation_bytes(shape: Shape, n: int) -> float:
    """On one GPU when a sharded run evaluates: every rank gathers the weights."""
    return ((WEIGHTS + MOMENTS) / n + WEIGHTS) * shape.parameters


def activation_bytes(shape: Shape, tokens: int, recompute: bool = False,
                     dtype: str = "bfloat16", device: str = "cuda") -> float:
    """What a micro-batch of so many tokens needs when its loss is computed."""
    C, L = shape.config.n_embd, shape.config.n_layer
    blocks = KEPT_OF_A_BLOCK * L + KEPT[dtype] if recompute else KEPT[dtype] * L
    last = 6 if dtype == "bfloat16" else 8                          # inputs of ln_f and lm_head
    return tokens * (blocks + last) * C + head_memory(tokens, C, shape.config.padded_vocab_size,
                                                      device)


# ------------------------------------------------------------------------------------------------
# Time

def seconds_of_step(shape: Shape, n: int, config: ScalingConfig) -> float:
    return shape.flops * shape.batch_tokens / (n * config.peak * config.mfu)


def sent_bytes(shape: Shape, shard: str, n: int, accumulation: int) -> float:
    """What each GPU sends in a step, and receives, in rings over all GPUs.

    DDP reduces float32 gradients once. FSDP gathers bfloat16 weights for each micro-batch, twice
    where they are given up between forward and backward, and reduces once, in float32.
    """
    if shard == "none":
        return 2 * (n - 1) / n * GRADIENTS * shape.parameters
    gathers = accumulation * (2 if shard == "fsdp" else 1)
    return (n - 1) / n * (gathers * COPY + GRADIENTS) * shape.parameters


def bandwidth(n: int, config: ScalingConfig) -> float:
    """Bytes/s of a ring: as many rings as GPUs of a node share its adapters, so all 8 work."""
    between = GPUS_OF_A_NODE * config.infiniband
    return config.nvlink if n <= GPUS_OF_A_NODE else min(config.nvlink, between)


# ------------------------------------------------------------------------------------------------
# Tables

def table(head: str, rows: list[list[str]]) -> str:
    columns = head.count("|") + 1
    return "\n".join([f"| {head} |", "|---" * columns + "|",
                      *("| " + " | ".join(row) + " |" for row in rows)])


def gb(count: float) -> str:
    return f"{count / 1e9:,.1f}"


def shape_table(config: ScalingConfig) -> str:
    return table("shape | layers | width | context | parameters | GFLOP a token | tokens of a step",
                 [[s.name, str(s.config.n_layer), str(s.config.n_embd), str(s.config.block_size),
                   f"{s.counted:,}", f"{s.flops / 1e9:.3g}", f"{s.batch_tokens:,}"]
                  for s in all_shapes()])


def memory_table(config: ScalingConfig) -> str:
    n = GPUS_OF_A_NODE
    return table("shape | DDP | zero2, A = 1 | zero2, A > 1 | fsdp, A = 1 | fsdp, A > 1 | "
                 "zero2 or fsdp while evaluating",
                 [[s.name, gb(state_bytes(s, "none", n, True)),
                   *(gb(state_bytes(s, shard, n, more)) for shard in ("zero2", "fsdp")
                     for more in (False, True)), gb(evaluation_bytes(s, n))] for s in all_shapes()])


def activation_table(config: ScalingConfig) -> str:
    rows = []
    for s in all_shapes():
        tokens = s.micro_batch * s.config.block_size
        head = head_memory(tokens, s.config.n_embd, s.config.padded_vocab_size, "cuda")
        kept, less = (activation_bytes(s, tokens, recompute) for recompute in (False, True))
        rows.append([s.name, f"{s.micro_batch} x {s.config.block_size}", gb(kept - head),
                     gb(less - head), gb(head), gb(kept), gb(less),
                     gb(kept + state_bytes(s, "none", GPUS_OF_A_NODE, True))])
    return table("shape | micro-batch | blocks | blocks, recomputed | head | together | "
                 "together, recomputed | with DDP's state", rows)


def check_table(config: ScalingConfig) -> str:
    """The formulas beside what bench/results/step-cpu.json measured, without torch.compile."""
    rows = []
    for row in json.loads((RESULTS / "step-cpu.json").read_text())["rows"]:
        if row["mode"] != "eager":
            continue
        c = STEP_SHAPES[row["shape"]][0]
        s = shape_of(row["shape"], dict(model=vars(c), batch_tokens=0, micro_batch=0))
        copy = COPY * s.parameters if row["dtype"] == "bfloat16" else 0
        state = (WEIGHTS + GRADIENTS + MOMENTS) * s.parameters + copy
        live = activation_bytes(s, row["micro_batch"] * c.block_size, dtype=row["dtype"],
                                device="cpu")
        rows.append([f"{row['shape']}, {row['micro_batch']} x {c.block_size}", row["dtype"],
                     f"{(state + live) / 2**20:,.0f}", f"{row['memory_mib']:,}"])
    return table("shape, micro-batch | precision | derived, MiB | measured, MiB", rows)


def communication_table(config: ScalingConfig) -> str:
    rows = []
    for s in all_shapes():
        for nodes in NODES:
            n = nodes * GPUS_OF_A_NODE
            A, micro = divide_step(s.batch_tokens, s.micro_batch, s.config.block_size, n)
            compute = seconds_of_step(s, n, config)
            times = [sent_bytes(s, shard, n, A) / bandwidth(n, config)
                     for shard in ("none", "zero2", "fsdp")]
            rows.append([s.name if nodes == 1 else "", str(n), f"{A} x {micro}",
                         f"{1000 * compute:,.0f}", *(f"{1000 * time:,.1f}" for time in times),
                         *(f"{time / compute:.0%}" for time in (times[0], times[2]))])
    return table("shape | GPUs | A x sequences | compute, ms | DDP, ms | zero2, ms | fsdp, ms | "
                 "DDP / compute | fsdp / compute", rows)


def speed_table(config: ScalingConfig) -> str:
    rows = []
    for s in all_shapes():
        for mfu in (0.3, 0.4, 0.5):
            speed = GPUS_OF_A_NODE * config.peak * mfu / s.flops
            hours = [tokens / speed / 3600 for tokens in (10e9, 100e9)]
            rows.append([s.name if mfu == 0.3 else "", f"{mfu:.0%}", f"{speed:,.0f}",
                         *(cell for time in hours for cell in
                           (f"{time:,.1f}", f"{time * GPUS_OF_A_NODE * config.price:,.0f}"))])
    return table("shape | MFU | tokens/s | hours for 10B | cost | hours for 100B | cost", rows)


def chinchilla_table(config: ScalingConfig) -> str:
    rows = []
    for s in all_shapes():
        tokens = 20 * s.counted
        hours = tokens * s.flops / (GPUS_OF_A_NODE * config.peak * config.mfu) / 3600
        rows.append([s.name, f"{tokens / 1e9:.1f}", f"{tokens / s.batch_tokens:,.0f}",
                     f"{tokens * s.flops:.2g}", f"{hours:,.1f}",
                     f"{hours * GPUS_OF_A_NODE * config.price:,.0f}",
                     f"{10e9 / s.counted:,.1f}"])
    return table("shape | 20 tokens a parameter, B | steps | FLOP | hours on 8 GPUs | cost | "
                 "tokens a parameter of a run of 10B", rows)


def limits_table(config: ScalingConfig) -> str:
    """The most parameters, in billions, with the bytes a parameter of the largest shape."""
    s = all_shapes()[-1]

    def most(memory: float, held: float, live: float) -> str:
        return f"{(memory * (1 - RESERVE) - live) / (held / s.parameters) / 1e9:.1f}"
    ways = [("none", 8, True), ("fsdp", 8, True), ("fsdp", 8, False), ("fsdp", 64, False)]
    return table("GPU memory, GB | DDP | fsdp, 8 GPUs, A > 1 | fsdp, 8, A = 1 | fsdp, 64, A = 1 | "
                 "fsdp while evaluating, 8 | while evaluating, 64",
                 [[f"{memory / 1e9:.0f}",
                   *(most(memory, state_bytes(s, *way), ACTIVATIONS) for way in ways),
                   *(most(memory, evaluation_bytes(s, n), 0) for n in (8, 64))]
                  for memory in (80e9, 141e9)])


def data_table(config: ScalingConfig) -> str:
    rows = []
    for name, tokens in (("10B", 10e9), ("100B", 100e9), ("1T", 1e12)):
        text = tokens * config.bytes_per_token
        hours = text / config.encode_rate / 3600                    # on 2 cores
        order = 8 * tokens / GPTConfig.block_size                   # int64 a window: data/loader.py
        rows.append([name, f"{text / 1e9:,.0f}", f"{2 * tokens / 1e9:,.0f}",
                     f"{tokens / 100e6:,.0f}", f"{hours:,.1f}", f"{order / 1e9:.2f}"])
    return table("tokens | text, GB | shards, GB | files of 100M tokens | hours on 2 cores | "
                 "order of the windows, GB a rank", rows)


TABLES: dict[str, Callable[[ScalingConfig], str]] = {
    "shapes": shape_table, "memory": memory_table, "limits": limits_table,
    "activations": activation_table,
    "check": check_table, "communication": communication_table, "speed": speed_table,
    "chinchilla": chinchilla_table, "data": data_table}


def filled(page: str, config: ScalingConfig) -> str:
    """The page with what stands between <!-- name --> and <!-- /name --> made anew."""
    for name, make in TABLES.items():
        page, count = re.subn(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
                              lambda match: f"{match[1]}{make(config)}\n{match[2]}", page,
                              flags=re.S)
        if count != 1:
            raise ValueError(f"{PAGE} has {count} places for the table {name!r}; it needs one")
    return page


def main(words: list[str]) -> None:
    config = parse(ScalingConfig, words, "python -m bench.scaling", about=__doc__)
    if config.write:
        PAGE.write_text(filled(PAGE.read_text(), config))
        return
    for name, make in TABLES.items():
        print(f"{name}\n\n{make(config)}\n")


if __name__ == "__main__":
    run_command(main)
