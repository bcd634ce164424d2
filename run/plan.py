"""What a run would do, said before it does it: `python train.py PRESET --dry_run`.

Steps, passes over the data, parameters, floating-point operations, memory, the learning rate as a
curve, the trained tensors, and the first example with what is learned of it.
"""
from typing import Any

import torch

from fast.cross_entropy import head_memory
from optim import learning_rate
from run.processes import Processes


def dry_run(config: Any, model: torch.nn.Module, batches: Any, data: Any, world: Processes,
            dtype: torch.dtype) -> dict[str, Any]:
    """Print what a run would do: its steps, memory, schedule, trained tensors and an example."""
    c, n = config.model, model.num_params()
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    trained = sum(p.numel() for _, p in trainable)
    passes = config.max_steps * batches.rows_per_step / batches.rows_per_epoch
    # Activations a token and layer: 34 C bytes with 2-byte numbers (Korthikanti et al. 2022,
    # 2205.05198, table 2, without the attention matrix, which flash attention does not keep) and 2
    # more that autograd keeps; recomputed, its float32 input.
    size = torch.finfo(dtype).bits // 8
    layers = 18 * size * c.n_embd * (1 if config.recompute_activations else c.n_layer)
    layers += 4 * c.n_embd * c.n_layer if config.recompute_activations else 0
    tokens = batches.micro_batch * c.block_size
    live = tokens * layers
    if not data.classes:
        live += head_memory(tokens, c.n_embd, c.padded_vocab_size, world.device.type)
    state = 4 * n + 12 * trained + (size * n if size < 4 else 0)    # and autocast's copy
    rates = [learning_rate(round(i * (config.max_steps - 1) / 59), config.schedule,
                           config.max_steps, config.warmup_steps, config.learning_rate,
                           config.min_learning_rate, config.optim) for i in range(60)]
    x, y = next(batches.batches(0))[:2]
    lines = [
        f"{config.max_steps} steps of {config.batch_tokens:,} tokens = {world.size} rank(s) x "
        f"{batches.accumulation} micro-batch(es) x {batches.micro_batch} sequences x "
        f"{c.block_size} tokens; {passes:.2f} passes over "
        f"{batches.rows_per_epoch:,} rows of the data",
        f"parameters {n:,}, trained {trained:,}; "
        f"{model.flops_per_token() / 1e9:.3g} GFLOP a token, "
        f"{model.flops_per_token() * config.max_steps * config.batch_tokens:.3g} FLOP in all",
        f"memory a rank, estimated: {state / 2**30:.2f} GiB weights, gradients and AdamW, "
        f"{live / 2**30:.2f} GiB activations ({str(dtype).removeprefix('torch.')})",
        f"learning rate, {config.schedule}, {config.warmup_steps} steps of warmup, "
        f"peak {config.learning_rate:g}, floor {config.min_learning_rate:g}:",
        f"  [{sketch(rates)}]",
        "trained tensors (of blocks, the first stands for all):",
        *(f"  {name:40} {tuple(p.shape)}" for name, p in trainable
          if ".h." not in name or ".h.0." in name),
        f"the first example of step 0, {int((y[0] >= 0).sum())} of {len(y[0])} positions labelled; "
        f"what has no label stands in [brackets]:", marked_example(x[0], y[0], data)]
    if world.rank == 0:
        print("\n".join(lines))
    return {"parameters": n, "trained": trained, "max_steps": config.max_steps,
            "flops_per_token": model.flops_per_token()}


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
