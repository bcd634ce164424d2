"""Loss, perplexity and bits per byte of a model on a split of token shards.

    python -m eval.loss --model=out/demo --data=corpus [--split=val] [--limit=TOKENS]

Bits per byte = sum of token losses / (ln 2 x bytes that those tokens spell). It does not depend on
the tokenizer, so runs with different vocabularies can be compared; special tokens spell no bytes.
"""
import math
from dataclasses import dataclass
from typing import Any, Iterable, Literal

import torch
import torch.distributed as dist
import torch.nn as nn

from config import option, parse, run_command
from data import loader, shards
from device import autocast, pick_device, pick_dtype


@dataclass(frozen=True)
class LossConfig:
    model: str = option("gpt2", "a run (out/demo), a Hugging Face folder, gpt2, gpt2-medium, ...")
    data: str = option("corpus", "data set: a name under data/ or a folder of shards")
    split: Literal["train", "val"] = option("val", "which part of it")
    limit: int = option(0, "tokens to evaluate, spread over the split; 0 is all")
    batch_size: int = option(8, "windows at a time")
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = option("auto", "precision")


def token_lengths(tokenizer: Any) -> torch.Tensor:
    """Bytes that each token spells: (V,) int64, 0 for special tokens."""
    return torch.tensor([len(token) for token in tokenizer.token_bytes])


@torch.no_grad()
def evaluate_loss(model: nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
                  device: torch.device, lengths: torch.Tensor | None = None,
                  dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """Evaluate a GPT on (x, y) batches of this rank; with a process group, on all ranks' together.

    lengths: from `token_lengths`; without it there are no bits per byte.
    Returns loss (nats per labelled token), perplexity, tokens and, with lengths, bits_per_byte.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros(3, dtype=torch.float64)                     # nats, tokens, bytes
    for x, y in batches:
        with autocast(device, dtype):
            _, nats = model(x.to(device), y.to(device), reduction="sum")
        labels = y[y >= 0]
        spelled = lengths[labels].sum() if lengths is not None else 0
        total += torch.tensor([nats.item(), len(labels), spelled], dtype=torch.float64)
    model.train(was_training)
    if dist.is_initialized():
        total = total.to(device) if device.type == "cuda" else total    # NCCL reduces on the GPU
        dist.all_reduce(total)
    nats, tokens, spelled = total.tolist()
    loss = nats / max(tokens, 1)
    result = {"loss": loss, "perplexity": math.exp(min(loss, 700)), "tokens": int(tokens)}
    if spelled:
        result["bits_per_byte"] = nats / math.log(2) / spelled
    return result


def main(words: list[str]) -> None:
    from sample import load_model
    config = parse(LossConfig, words, "python -m eval.loss", about=__doc__)
    device = pick_device(config.device)
    model, tokenizer = load_model(config.model, device)
    folder = shards.find(config.data)
    made_with = shards.read_meta(folder)["tokenizer_hash"]
    if made_with not in (None, tokenizer.hash):
        raise ValueError(f"{folder} was made with another tokenizer than {config.model}'s")
    batches = loader.evaluation_batches(shards.open_split(folder, config.split),
                                        model.config.block_size, config.batch_size, config.limit)
    result = evaluate_loss(model, batches, device, token_lengths(tokenizer),
                           pick_dtype(config.dtype, device))
    print(f"{config.model} on {config.data}/{config.split}: "
          + "  ".join(f"{key} {value:,.4f}" if isinstance(value, float) else f"{key} {value:,}"
                      for key, value in result.items()))


if __name__ == "__main__":
    run_command(main)
