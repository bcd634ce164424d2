"""Loss, perplexity and bits per byte of a model: on a data set, text files or conversations.

    python -m eval.loss --model=out/demo --data=corpus [--split=val] [--limit=TOKENS]
    python -m eval.loss --model=gpt2 --data=book.txt --stride=512
    python -m eval.loss --model=out/chat --data=chat [--fit]

Bits per byte = sum of token losses / (ln 2 x bytes that those tokens spell): runs with different
vocabularies can be compared. Special tokens spell no bytes.

A text longer than the context is read in windows, side by side. With --stride=N a window begins
every N tokens and scores its last N only, so that each token is scored once, after at least
block_size - N others; both figures are shown.

Of conversations the answers are scored (data/chat.py); --fit says what the model has learned of
them (eval/fit.py). Of texts with classes (data/labels.py) a classifier's accuracy is shown too.

Reference: "Perplexity of fixed-length models", Hugging Face's documentation of transformers.
"""
if __name__ == "__main__":
    from run.config import interruptible
    interruptible()
import math
import sys
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Iterable, Iterator, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn

from data import chat, labels, loader, prepared, sets, shards, texts
from data.templates import TEMPLATES
from eval.fit import fit_report
from eval.scoring import evaluating
from model import IGNORE
from run.config import parse, run_command
from run.device import pick_device, pick_dtype
from run.load import load_model, needs_tokenizer, run_settings, run_template

KINDS = {"text": "text files", "tokens": "token shards", "chat": "chat data",
         "classes": "texts with classes", "mixture": "a mixture"}
MEANT = {"stride": ("text", "tokens"), "fit": ("chat",), "labels": ("chat",),
         "split": ("tokens", "chat", "classes", "mixture")}         # settings that others ignore


@dataclass(frozen=True)
class LossConfig:
    model: str = "gpt2"  # a run (out/demo), a Hugging Face folder, gpt2, gpt2-medium, ...
    data: str = "corpus"  # data set: a name under data/ or a folder, several by
        # weight (a:0.7,b:0.3), or a .txt, .jsonl or .parquet file, several by comma
    split: Literal["train", "val"] = "val"  # which part of a data set
    limit: int = 0  # tokens to evaluate, spread over the split; 0 is all
    stride: int = 0  # tokens between windows that overlap; 0: no such figure
    batch_size: int = 8  # windows or conversations at a time
    template: str = ""  # of chat data; empty: the one that the run was trained with
    labels: Literal["all", "last", ""] = ""  # of chat data: which answers are scored; empty: those
        # that the run has learned
    fit: bool = False  # of chat data: has the model learned it, and does it generalise?
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # precision

    def __post_init__(self):
        for name, least in (("limit", 0), ("stride", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")


def token_lengths(tokenizer: Any) -> torch.Tensor | None:
    """Bytes that each token spells: (V,) int64, 0 for special tokens. None without a tokenizer."""
    return torch.tensor(list(map(len, tokenizer.token_bytes))) if tokenizer else None


def evaluate_loss(model: nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
                  device: torch.device, lengths: torch.Tensor | None = None,
                  dtype: torch.dtype = torch.float32, compile: bool = False) -> dict[str, float]:
    """Evaluate a model on (x, y) batches of this rank; with a process group, of all ranks.

    lengths: from `token_lengths`; without it there are no bits per byte. compile: do so for
    the shape of the first batch; those of another, the last one perhaps, go without.
    Returns loss (nats per label) and tokens, the number of labels; of a GPT also perplexity and,
    with lengths, bits_per_byte; of a Classifier accuracy. ValueError where there is no label.
    """
    classes = getattr(model, "classes", 0)
    compiled = torch.compile(model, dynamic=False) if compile else model
    shape = None
    tokens = spelled = 0
    found: list[torch.Tensor] = []                                  # a batch's nats and right ones
    with evaluating(model, dtype, one_shape=compile):
        for x, y in batches:
            if device.type == "cuda":
                x, y = x.pin_memory(), y.pin_memory()               # the host need not wait
            shape = shape or x.shape
            network, targets = compiled if x.shape == shape else model, y[y >= 0]
            logits, nats = network(x.to(device, non_blocking=True), y.to(device, non_blocking=True),
                                   reduction="sum")
            right = (logits.argmax(1) == targets.to(device)).sum() if classes else nats.new_zeros(())
            found.append(torch.stack([nats, right.to(nats)]))
            tokens += len(targets)
            if lengths is not None and not classes:
                spelled += int(lengths[targets].sum())
    total = torch.tensor([0, tokens, spelled, 0], dtype=torch.float64)  # nats, labels, bytes, right
    for nats, right in torch.stack(found).tolist() if found else ():   # the host waits once, here
        total += torch.tensor([nats, 0, 0, right], dtype=torch.float64)
    if dist.is_initialized():
        total = total.to(device) if device.type == "cuda" else total    # NCCL reduces on the GPU
        dist.all_reduce(total)
    nats, tokens, spelled, right = total.tolist()
    if not tokens:                      # a loss of 0 would be the best that there is
        raise ValueError("there is no label in what is to be evaluated; give it more data")
    loss = nats / tokens
    if classes:
        return {"loss": loss, "accuracy": right / tokens, "tokens": int(tokens)}
    result = {"loss": loss, "perplexity": math.exp(min(loss, 700)), "tokens": int(tokens)}
    if spelled:
        result["bits_per_byte"] = nats / math.log(2) / spelled
    return result


def evaluate_data(model: nn.Module, data: Any, config: Any, world: Any, *rest: Any
                  ) -> dict[str, float]:
    """`evaluate_loss` on the validation split of a run's data; of a mixture `mixed`."""
    if not isinstance(data, sets.MixtureSet):
        return evaluate_loss(model, data.validation(config, world), world.device,
                             token_lengths(data.tokenizer), *rest)
    return mixed({name: evaluate_data(model, source, config, world, *rest)
                  for name, source in data.sources.items()}, data.weights)


def mixed(each: dict[str, dict[str, float]], weights: Iterable[Fraction]) -> dict[str, float]:
    """What `evaluate_loss` found of each source as the mean by weight, with each source's loss as
    loss/NAME."""
    weights = [float(weight) for weight in weights]
    shares = [weight / sum(weights) for weight in weights]
    loss = sum(share * found["loss"] for share, found in zip(shares, each.values()))
    result = {"loss": loss, "perplexity": math.exp(min(loss, 700)),
              "tokens": sum(found["tokens"] for found in each.values())}
    if all("bits_per_byte" in found for found in each.values()):
        spelled = sum(share * found["loss"] / found["bits_per_byte"]            # bytes a token, ln 2
                      for share, found in zip(shares, each.values()))
        result["bits_per_byte"] = loss / spelled
    return {**result, **{f"loss/{name}": found["loss"] for name, found in each.items()}}


def strided_batches(tokens: shards.Tokens, block_size: int, stride: int, batch_size: int,
                    limit: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Windows that begin every `stride` tokens, as (x, y); labels where no window before had them.

    With a limit, as many windows as score that many tokens, spread evenly.
    """
    if not 1 <= stride <= block_size:
        raise ValueError(f"stride={stride} is not in 1 to {block_size}, the context of the model")
    count = 1 + max(0, math.ceil((len(tokens) - 1 - block_size) / stride))
    starts = np.arange(count) * stride
    if limit and limit < count * stride:
        starts = starts[np.linspace(0, count - 1, math.ceil(limit / stride)).astype(np.int64)]
    for i in range(0, len(starts), batch_size):
        here = starts[i:i + batch_size]
        x = torch.zeros(len(here), block_size, dtype=torch.long)    # (B, T)
        y = torch.full((len(here), block_size), IGNORE)             # (B, T)
        for row, start in enumerate(here):
            ids = torch.from_numpy(tokens.read(int(start), int(start) + block_size + 1))
            seen = block_size - stride if start else 0
            x[row, :len(ids) - 1], y[row, seen:len(ids) - 1] = ids[:-1], ids[seen + 1:]
        yield x, y


def text_tokens(source: str, tokenizer: Any) -> shards.Tokens:
    """Text files as tokens, each document behind an end-of-text token, as in data sets."""
    start = [] if tokenizer.eot is None else [tokenizer.eot]
    documents = [np.array(start + tokenizer.encode(text), dtype=np.int64)
                 for text in texts.read_documents(texts.find_files(source))]
    if sum(map(len, documents)) < 2:
        raise ValueError(f"{source} has fewer than two tokens; there is nothing to predict")
    return shards.Tokens([np.concatenate(documents)])


def kind_of(data: str) -> str:
    """What --data names: "text" (files), "mixture", "tokens", "chat" or "classes"."""
    if any(Path(name).is_file() for name in data.split(",")):
        return "text"
    return "mixture" if ":" in data and sets.mixture_of(data) else sets.kind(shards.find(data))


def open_tokens(config: LossConfig, tokenizer: Any) -> shards.Tokens:
    """The shards that --data and --split name; ValueError if they are not for this tokenizer."""
    folder = shards.find(config.data)
    shards.verify(folder, cached=True)
    made_with = shards.read_meta(folder)["tokenizer_hash"]
    if made_with is None:                               # llm.c's shards are of GPT-2's tokens
        fits = tokenizer is None or tokenizer.eot == shards.GPT2_VOCAB - 1
    else:
        fits = tokenizer is not None and tokenizer.hash == made_with
    if not fits:
        raise ValueError(f"{folder} was made with another tokenizer than {config.model}'s")
    return shards.open_split(folder, config.split)


def open_chat(config: LossConfig, split: str, tokenizer: Any, block_size: int) -> Any:
    """The samples of a split of chat data, as data.samples.Samples."""
    template = config.template or run_template(config.model)
    if not template:
        raise ValueError(f"{config.model} was not trained on conversations; say how to write them "
                         f"with --template={', '.join(TEMPLATES)}")
    return chat.load_samples(shards.find(config.data), split, tokenizer, template,
                             block_size, config.labels
                             or run_settings(config.model).get("labels") or "all")


def open_classes(config: LossConfig, model: nn.Module, tokenizer: Any) -> Any:
    """The samples of texts with classes, as data.samples.Samples."""
    folder = shards.find(config.data)
    names = prepared.read_meta(folder, "classes")["labels"]
    if len(names) != model.classes:
        raise ValueError(f"{config.model} chooses among {model.classes} classes, {config.data} has "
                         f"{len(names)} ({', '.join(names)}); name the data that it was trained on")
    return labels.load_samples(folder, config.split, tokenizer, model.config.block_size)


def measure(model: nn.Module, tokenizer: Any, config: LossConfig) -> dict[str, Any]:
    """What `evaluate_loss` returns, with a stride the same under "strided", with --fit `fit`."""
    device, block_size = next(model.parameters()).device, model.config.block_size
    dtype, size, limit = pick_dtype(config.dtype, device), config.batch_size, config.limit
    kind = kind_of(config.data)
    if (kind == "classes") != bool(getattr(model, "classes", 0)):
        raise ValueError(f"{config.model} is {'no' if kind == 'classes' else 'a'} classifier, and "
                         f"{config.data} holds {KINDS[kind]}; name another --model or --data")
    if kind != "tokens":
        needs_tokenizer(tokenizer, config.model)
    for name, meant in MEANT.items():
        if getattr(config, name) != getattr(LossConfig, name) and kind not in meant:
            raise ValueError(f"--{name} is for {', '.join(KINDS[one] for one in meant)}; "
                             f"{config.data} holds {KINDS[kind]}: leave it out")
    if kind == "mixture":
        weights = sets.mixture_of(config.data)
        return mixed({name: measure(model, tokenizer, replace(config, data=name))
                      for name in weights}, weights.values())
    if kind in ("chat", "classes"):
        samples = (open_classes(config, model, tokenizer) if kind == "classes" else
                   open_chat(config, config.split, tokenizer, block_size))
        if samples.counts.get("truncated") or samples.counts.get("dropped"):
            print(f"{config.data}/{config.split}: {samples.summary()}", file=sys.stderr)
        batches = samples.evaluation_batches(size, limit)
    else:
        tokens = (text_tokens(config.data, tokenizer) if kind == "text" else
                  open_tokens(config, tokenizer))
        batches = loader.evaluation_batches(tokens, block_size, size, limit)
    lengths = token_lengths(tokenizer)
    result: dict[str, Any] = evaluate_loss(model, batches, device, lengths, dtype)
    if config.stride:
        batches = strided_batches(tokens, block_size, config.stride, size, limit)
        result["strided"] = evaluate_loss(model, batches, device, lengths, dtype)
    if config.fit:
        splits = [open_chat(config, split, tokenizer, block_size) for split in ("train", "val")]
        result["fit"] = fit_report(model, *splits, size, limit, dtype)
    return result


def main(words: list[str]) -> None:
    config = parse(LossConfig, words, "python -m eval.loss", about=__doc__)
    model, tokenizer = load_model(config.model, pick_device(config.device))
    result = measure(model, tokenizer, config)
    strided, fit = result.pop("strided", None), result.pop("fit", None)
    part = "" if kind_of(config.data) == "text" else f"/{config.split}"
    print(f"{config.model} on {config.data}{part}: {line(result)}")
    if strided:
        print(f"with {model.config.block_size - config.stride} tokens of context or more "
              f"(stride {config.stride}): {line(strided)}")
    if fit:
        found = fit.pop("verdict")
        print(f"{line(fit)}\n{config.model} {found}")


def line(figures: dict[str, float]) -> str:
    """Figures as a line of text."""
    return "  ".join(f"{key} {value:,.4f}" if isinstance(value, float) else f"{key} {value:,}"
                     for key, value in figures.items())


if __name__ == "__main__":
    run_command(main)
