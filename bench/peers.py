"""Training steps and generation of ours and of the peers, alike in shape, tokens and settings.

    contestant = STEPS["nanoGPT"](GPTConfig(...), x, y, device, dtype, "eager", checkout)
    contestant.step()                       # forward, backward, clipping, AdamW; returns the loss
    row = measure_step("oneloop", GPTConfig(...), 2, "bfloat16", "compiled", device, repeats=3)

Peers: github.com/karpathy/nanoGPT and karpathy/build-nanogpt, from a checkout, and transformers.
Each has the optimizer that it makes itself; bench/versus_peers.py compares them.
"""
import ast
import contextlib
import functools
import math
import statistics
import sys
import types
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable

import torch
import torch.nn as nn

from bench.machine import Row, lasting, matmul_peak, memory_bandwidth, seconds
from fast.decoding import compile_blocks, record_steps
from fast.linear import pack_weights, use_fast_products
from model import GPT, GPTConfig
from run.device import DTYPES, autocast, peak_memory

SHAPES = {          # name: shape, its micro-batch on a CPU, on a GPU; all have biases
    "tiny": (GPTConfig(64, 256, n_layer=2, n_head=2, n_embd=32), 2, 2),     # to try the benchmark
    "recipe": (GPTConfig(64, 65, n_layer=4, n_head=4, n_embd=128), 12, 12),   # nanoGPT's, on a CPU
    "small": (GPTConfig(256, 50304, n_layer=6, n_head=6, n_embd=384), 8, 256),
    "124M": (GPTConfig(1024, 50304), 2, 32),
    "350M": (GPTConfig(1024, 50304, n_layer=24, n_head=16, n_embd=1024), 1, 16),
    "1558M": (GPTConfig(1024, 50304, n_layer=48, n_head=25, n_embd=1600), 1, 4),
}
GENERATE = {        # name: shape, sequences at once
    "generate": (SHAPES["124M"][0], 1), "generate-32": (SHAPES["124M"][0], 32),
    "generate-tiny": (GPTConfig(256, 256, n_layer=2, n_head=2, n_embd=32), 1),
}
OURS, LOOSE = "oneloop", "oneloop --deterministic=off"
PEERS = ("nanoGPT", "build-nanogpt", "transformers")
KEPT = " (memory kept)"                 # a peer whose freed memory is kept as ours is
WHO = (OURS, LOOSE, *PEERS, *(peer + KEPT for peer in PEERS))
PROMPT, NEW_TOKENS = 16, 128            # of a generation, greedy
LEARNING_RATE, WEIGHT_DECAY, BETAS, EPS = 6e-4, 0.1, (0.9, 0.95), 1e-8      # the AdamW of all


@dataclass
class Contestant:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: Callable[[], torch.Tensor]        # takes a training step, returns its loss
    compiled: bool = False


def our_step(config: GPTConfig, x: torch.Tensor, y: torch.Tensor, device: torch.device,
             dtype: torch.dtype, mode: str, checkout: str = "") -> Contestant:
    """What train.py does with a batch of one micro-batch."""
    # Imported here: the memory of peers is without what these bring.
    from optim import OptimConfig, make_optimizer, take_step
    from run.parallel import Parallel, compiled, full
    from run.processes import Processes
    with device:
        model = use_fast_products(GPT(config))
    world = Processes(0, 1, device)
    parallel = Parallel(model, world, "none", dtype)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(model, OptimConfig(beta1=BETAS[0], beta2=BETAS[1], eps=EPS),
                               LEARNING_RATE, WEIGHT_DECAY, dtype)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    loader = types.SimpleNamespace(one_shape=True, batches=lambda step: iter([(x, y)]))
    network = compiled(parallel, "on" if mode == "compiled" else "off", loader, 0, world, dtype)
    labels = y.numel()

    def step() -> torch.Tensor:
        loss = torch.zeros((), device=device)
        with autocast(device, dtype):
            _, nats = network(x, y, reduction="sum")
        nats.backward(scaler.scale(torch.where(nats.isfinite(), 1 / labels, math.nan)))
        loss += nats.detach() / labels
        norm = full(torch.nn.utils.clip_grad_norm_(trainable, 1.0))
        take_step(optimizer, scaler, ~norm.isfinite())
        optimizer.zero_grad(set_to_none=True)
        return loss
    return Contestant(model, optimizer, step, network is not model)


def peer_step(model: nn.Module, optimizer: torch.optim.Optimizer, loss_of: Callable,
              device: torch.device, dtype: torch.dtype, mode: str) -> Contestant:
    """The step of the peers' training loops; their torch.compile is without options."""
    network = torch.compile(model) if mode == "compiled" else model

    def step() -> torch.Tensor:
        with autocast(device, dtype):
            loss = loss_of(network)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()
    return Contestant(model, optimizer, step, network is not model)


def their_model(script: Path, config: GPTConfig, **more: Any) -> nn.Module:
    """The GPT of a peer's script. build-nanogpt's trains when it is imported, so only imports and
    classes are executed; of these, not its HellaSwag, which wants packages of its own."""
    tree = ast.parse(script.read_text())
    tree.body = [node for node in tree.body
                 if isinstance(node, (ast.Import, ast.ClassDef))
                 or isinstance(node, ast.ImportFrom) and node.module != "hellaswag"]
    sys.modules["peer"] = peer = types.ModuleType("peer")
    peer.master_process = False                         # a global of its script: who prints
    exec(compile(tree, str(script), "exec"), peer.__dict__)
    return peer.GPT(peer.GPTConfig(
        block_size=config.block_size, vocab_size=config.vocab_size, n_layer=config.n_layer,
        n_head=config.n_head, n_embd=config.n_embd, **more))


def transformers_model(config: GPTConfig, checkout: str = "") -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=config.vocab_size, n_positions=config.block_size, n_embd=config.n_embd,
        n_layer=config.n_layer, n_head=config.n_head, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=None, eos_token_id=None)).train()


MODELS = {
    OURS: lambda config, checkout: use_fast_products(GPT(config)),
    "nanoGPT": lambda config, checkout: their_model(Path(checkout) / "model.py", config,
                                                    dropout=0.0, bias=True),
    "build-nanogpt": lambda config, checkout: their_model(Path(checkout) / "train_gpt2.py", config),
    "transformers": transformers_model,
}


def their_step(who: str, config: GPTConfig, x: torch.Tensor, y: torch.Tensor,
               device: torch.device, dtype: torch.dtype, mode: str, checkout: str) -> Contestant:
    """A peer with the optimizer of its own training script. transformers has none: it gets what
    its Trainer takes by default, AdamW, fused since PyTorch 2.8, and no cache."""
    with device:
        model = MODELS[who](config, checkout)
    if who != "transformers":
        betas = (BETAS,) if who == "nanoGPT" else ()        # build-nanogpt has them written in
        optimizer = model.configure_optimizers(WEIGHT_DECAY, LEARNING_RATE, *betas, device.type)
        return peer_step(model, optimizer, lambda network: network(x, y)[1], device, dtype, mode)
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
         {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}],
        lr=LEARNING_RATE, betas=BETAS, eps=EPS, fused=True)
    return peer_step(model, optimizer, lambda network: network(
        input_ids=x, labels=y, shift_labels=y).loss, device, dtype, mode)


STEPS = {OURS: our_step, LOOSE: our_step,
         **{who: functools.partial(their_step, who) for who in PEERS}}


def step_time(step: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median seconds of a step: of `repeats`, or of as many as fill 2 seconds, at most 100.

    A GPU is timed by its own events, without waiting between steps, as in training.
    """
    count = min(100, max(repeats, math.ceil(2 / lasting(step, device))))
    if device.type != "cuda":
        return statistics.median(lasting(step, device) for _ in range(count))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    for event in events[:-1]:
        event.record()
        step()
    events[-1].record()
    torch.cuda.synchronize(device)
    return statistics.median(a.elapsed_time(b) / 1000 for a, b in zip(events, events[1:]))


def measure_contestant(make: Callable[[], Contestant], tokens: int, device: torch.device,
                       repeats: int) -> Row:
    """What a contestant's steps of so many tokens take, after a first one that compiles and makes
    the optimizer's state."""
    contestant = make()
    loss = contestant.step().item()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    taken = step_time(contestant.step, device, repeats)
    return {"ms": 1000 * taken, "tokens_per_s": tokens / taken, "first_loss": loss,
            "memory_mib": peak_memory(device) / 2**20, "compiled": contestant.compiled,
            "parameters": sum(p.numel() for p in contestant.model.parameters()),
            "trainable": sum(p.numel() for p in contestant.model.parameters() if p.requires_grad)}


def measure_step(who: str, config: GPTConfig, micro_batch: int, dtype: str, mode: str,
                 device: torch.device, repeats: int, checkout: str = "") -> Row:
    """The row of a contestant's training step."""
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")
    with torch.device("meta"):                          # counted without memory for weights
        flops = GPT(config).flops_per_token()
    if device.type == "cuda" and who in (OURS, LOOSE) and config.vocab_size == 50304:
        config = replace(config, vocab_size=50257, vocab_multiple=128)      # as the presets have it
    x, y = random_batch(config, micro_batch, device)
    row = measure_contestant(
        lambda: STEPS[who](config, x, y, device, DTYPES[dtype], mode, checkout), y.numel(), device,
        repeats)
    if row["compiled"] != (mode == "compiled"):                 # ours goes on without it
        raise RuntimeError(f"{who} could not be compiled")
    return {"micro_batch": micro_batch, **row, "work": flops,
            "limit_of": f"matrix products in {dtype}", "limit": matmul_peak(device, DTYPES[dtype])}


def random_batch(config: GPTConfig, micro_batch: int, device: torch.device
                 ) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets (B, T), the same for all; seeds the weights that are made after it."""
    torch.manual_seed(0)
    ids = torch.randint(min(50257, config.vocab_size), (micro_batch, config.block_size + 1))
    return ids[:, :-1].contiguous().to(device), ids[:, 1:].contiguous().to(device)


def measure_generation(who: str, config: GPTConfig, batch: int, dtype: str, mode: str,
                       device: torch.device, repeats: int, checkout: str = "",
                       new_tokens: int = NEW_TOKENS) -> Row:
    """Greedy generation. Weights in dtype; packed: float32 under autocast, as sample.py on a CPU.
    recorded: by CUDA graphs, as sample.py on a GPU; recorded compiled: as its --compile there."""
    torch.manual_seed(0)
    ids = torch.randint(min(50257, config.vocab_size), (batch, PROMPT), device=device)
    with device:
        model = MODELS[who](config, checkout)
    model = model.to(DTYPES["float32" if mode == "packed" else dtype]).eval()
    if mode == "packed":
        pack_weights(model)
    if "compiled" in mode:
        compile_blocks(model)
    if "recorded" in mode:
        record_steps(model, DTYPES[dtype])

    def generate() -> torch.Tensor:
        with autocast(device, DTYPES[dtype]) if mode == "packed" else contextlib.nullcontext():
            if who == OURS:
                return model.generate(ids, new_tokens, temperature=0)
            if who == "nanoGPT":                        # top_k=1 is its way to be greedy
                return model.generate(ids, new_tokens, temperature=1.0, top_k=1)
            return model.generate(ids, max_new_tokens=new_tokens, do_sample=False,
                                  attention_mask=torch.ones_like(ids), pad_token_id=0)

    found = generate().size(1)
    if found != PROMPT + new_tokens:
        raise ValueError(f"{who} made {found - PROMPT} tokens of {new_tokens}")
    taken, memory = seconds(generate, device, repeats), peak_memory(device) / 2**20
    read = sum(p.numel() * DTYPES[dtype].itemsize for p in model.parameters()
               if p.shape != (config.block_size, config.n_embd))    # of positions, one row is read
    return {"micro_batch": batch, "ms": 1000 * taken, "tokens_per_s": batch * new_tokens / taken,
            "memory_mib": memory, "work": read / batch, "limit_of": "reading memory",
            "limit": memory_bandwidth(device)}
