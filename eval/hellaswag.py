"""HellaSwag: does the model find the right ending of a text more likely than three wrong ones?

    python -m eval.hellaswag --model=gpt2|FOLDER|RUN [--hellaswag_file=PATH] [--style=harness]
    ... --file=PATH                                # the same, shorter

    items = load_items()                           # the 10,042 official validation items
    result = evaluate(model, tokenizer, items)     # acc, acc_norm, acc_bytes, n, 95% intervals

acc takes the ending whose tokens have the largest sum of log-probabilities after the context,
acc_bytes that per UTF-8 byte. A style is a preparation of the text (eval/hellaswag_items.py) and
what acc_norm divides the sum by; figures of two styles do not compare:

    completion   ctx, then " " + ending, as in the file; acc_norm: per token
    harness      "activity_label: ctx_a Ctx_b" without WikiHow's [marks]; acc_norm: per character

GPT-2 (124M) has acc 0.2859, acc_norm 0.2955 by completion and 0.2892, 0.3114 in the harness. Items
that are longer than the model's context lose tokens on the left; `cut` counts them.

References: Zellers et al. 2019, "HellaSwag" (1905.07830); completion as in llm.c and build-nanogpt;
harness as in EleutherAI's lm-evaluation-harness (lm_eval/tasks/hellaswag).
"""
if __name__ == "__main__":
    from run.config import interruptible
    interruptible()
import math
import re
from dataclasses import dataclass
from typing import Any, Iterator, Literal, Sequence, get_args

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn import functional as F
from tqdm import tqdm

from eval.hellaswag_items import ENDINGS, Item, Style, items_of_run, load_items, prepare
from eval.scoring import accuracy, evaluating, spread
from fast.linear import packed_weights
from model import IGNORE
from run.config import parse, run_command
from run.device import pick_device, pick_dtype
from run.load import load_writer

CPU_BATCH, GPU_BATCH = 4096, 32768          # tokens of a batch where none are given
PARTS = 8           # a batch's endings run in so many parts, by length: 96 inputs an item, not 164
LOGIT_ROWS, SOFTMAX_ROWS = 256, 16          # at once: a large product, a softmax in the cache
METRICS = ("acc", "acc_norm", "acc_bytes")


@dataclass(frozen=True)
class HellaSwagConfig:
    model: str = "gpt2"  # a run (out/demo), a Hugging Face folder, or gpt2, gpt2-medium
    hellaswag_file: str = ""  # local HellaSwag file; empty: the official one, downloaded once
    limit: int = 0  # so many items, spread over the file; 0 is all
    style: Style = "completion"  # preparation of the text; acc_norm per token or character
    batch_tokens: int = 0  # tokens of a batch, at most; 0: 4096 on a CPU, 32768 on a GPU
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # precision

    def __post_init__(self):
        for name in ("limit", "batch_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")


@dataclass(frozen=True)
class Scores:
    """What is known about each ending of N items; all but `cut` are (N, 4)."""
    sums: torch.Tensor          # float64, log-probability of the ending in nats
    tokens: torch.Tensor        # int64, that were scored
    characters: torch.Tensor    # int64, of the ending without the space before it
    bytes: torch.Tensor         # int64, the same in UTF-8
    cut: torch.Tensor           # (N,) bool, whether the item was too long for the model

    def decisions(self, style: Style) -> dict[str, torch.Tensor]:
        """The ending that each metric chooses: (N,) int64, the first of equals."""
        length = self.tokens if style == "completion" else self.characters
        return {"acc": self.sums.argmax(1), "acc_norm": (self.sums / length).argmax(1),
                "acc_bytes": (self.sums / self.bytes).argmax(1)}


# ------------------------------------------------------------------------------------------------
# Scores. Shapes: B contexts of a batch, R endings of a part of it, L tokens of context that are
# computed once, T tokens after them, C channels, V vocabulary.

@dataclass(frozen=True)
class Question:
    """Endings that follow the same tokens. An item is one; if its endings are cut, several."""
    context: tuple[int, ...]
    endings: list[list[int]]
    slots: list[int]                    # where their sums go: 4 * item + ending

    @property
    def length(self) -> int:
        """Tokens of the context and the longest ending."""
        return len(self.context) + max(map(len, self.endings))


class SharedContext:
    """Stands in for a model.KVCache: many endings read the keys and values of few contexts.

    Row r continues context `rows[r]` of the cache, by T tokens. Nothing is kept, and a layer's copy
    of the contexts is gone when the layer is done; a cache for all endings would be 4 x larger.
    """

    def __init__(self, cache: Any, rows: torch.Tensor, T: int):
        self.cache, self.rows, self.T, self.length = cache, rows, T, cache.length

    def __getitem__(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        keys, values = (F.pad(part[layer][self.rows], (0, 0, 0, self.T))        # (R, H, L + T, D)
                        for part in (self.cache.keys, self.cache.values))
        return keys, values, self.length


def questions_of(n: int, context: list[int], endings: list[list[int]],
                 block_size: int) -> list[Question]:
    """Item n, cut from the left to block_size inputs; an ending's last token is no input."""
    questions: dict[tuple[int, ...], Question] = {}
    for i, ending in enumerate(endings):
        over = max(0, len(context) + len(ending) - (block_size + 1))
        ids, start = (context + ending)[over:], max(1, len(context) - over)
        head = tuple(ids[:start])
        question = questions.setdefault(head, Question(head, [], []))
        question.endings.append(ids[start:])
        question.slots.append(ENDINGS * n + i)
    return list(questions.values())


def batches_of(questions: list[Question], batch_tokens: int) -> Iterator[list[Question]]:
    """Questions with contexts of similar lengths, at most batch_tokens in all their padded rows."""
    batch: list[Question] = []
    longest = 0
    for question in sorted(questions, key=lambda q: (len(q.context), q.length)):
        longest = max(longest, question.length)
        if batch and ENDINGS * (len(batch) + 1) * longest > batch_tokens:
            yield batch
            batch, longest = [], question.length
        batch.append(question)
    if batch:
        yield batch


def score_batch(model: nn.Module, batch: list[Question], sums: torch.Tensor) -> None:
    """Write the log-probability of every ending of the batch into its slot of sums (4 N,)."""
    device = sums.device
    # Positions are absolute, so rows cannot be padded on the left. What contexts have in common is
    # a length: that of the shortest. The few tokens beyond it go with each ending.
    L = min(len(question.context) for question in batch)
    cache = model.new_cache(len(batch), L)
    heads = torch.tensor([question.context[:L] for question in batch], device=device)   # (B, L)
    last = model.features(heads, cache=cache)[:, -1:]               # (B, 1, C)
    rows = [(list(question.context[L:]), ending, b, slot) for b, question in enumerate(batch)
            for ending, slot in zip(question.endings, question.slots)]
    rows.sort(key=lambda row: len(row[0]) + len(row[1]))
    size = math.ceil(len(rows) / PARTS)
    for part in (rows[i:i + size] for i in range(0, len(rows), size)):
        T = max(len(rest) + len(ending) for rest, ending, *_ in part)
        ids = torch.tensor([(rest + ending + T * [0])[:T] for rest, ending, *_ in part])
        targets = torch.tensor([(len(rest) * [IGNORE] + ending + T * [IGNORE])[:T]
                                for rest, ending, *_ in part])      # (R, T)
        which, slots = (torch.tensor(column, device=device)
                        for column in list(zip(*part))[2:])         # (R,) each
        x = last[which]                                             # (R, 1, C), predicts ids[:, 0]
        if T > 1:
            tail = model.features(ids[:, :-1].to(device), cache=SharedContext(cache, which, T - 1))
            x = torch.cat([x, tail], dim=1)                         # (R, T, C)
        r, t = (targets != IGNORE).nonzero(as_tuple=True)           # of the ending's tokens only
        found = log_probs(model, x[r.to(device), t.to(device)], targets[r, t].to(device))
        sums[slots] = found.new_zeros(len(part)).index_add(0, r.to(device), found)


def log_probs(model: nn.Module, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Of each target after its hidden state: x (N, C), targets (N,) -> (N,) float32."""
    found = []
    for rows, ids in zip(x.split(LOGIT_ROWS), targets.split(LOGIT_ROWS)):
        logits = model.lm_head(rows)[:, :model.config.vocab_size]   # padded ids are no tokens
        found += [F.cross_entropy(few.float(), few_ids, reduction="none") for few, few_ids
                  in zip(logits.split(SOFTMAX_ROWS), ids.split(SOFTMAX_ROWS))]
    return -torch.cat(found)


def score_questions(model: nn.Module, questions: list[Question], batch_tokens: int = 0,
                    dtype: torch.dtype = torch.float32, progress: bool = False) -> torch.Tensor:
    """The log-probability of every ending, at its slot: (endings,) float32, on the CPU."""
    with evaluating(model, dtype) as device, packed_weights(model):
        batch_tokens = batch_tokens or (CPU_BATCH if device.type == "cpu" else GPU_BATCH)
        sums = torch.zeros(sum(len(question.slots) for question in questions), device=device)
        with tqdm(total=len(sums), unit="ending", disable=not progress) as bar:
            for batch in batches_of(questions, batch_tokens):
                score_batch(model, batch, sums)
                bar.update(sum(len(question.slots) for question in batch))
    return sums.cpu()


def score(model: nn.Module, tokenizer: Any, items: Sequence[Item], style: Style = "completion",
          batch_tokens: int = 0, dtype: torch.dtype = torch.float32,
          progress: bool = False) -> Scores:
    """Score every ending of the items, on this rank alone.

    The methods of a module that torch.compile wraps are those of the plain one: nothing is compiled
    here, whatever the lengths.
    """
    if style not in get_args(Style):
        raise ValueError(f"style={style!r} is unknown; choose {' or '.join(get_args(Style))}")
    if tokenizer is None or tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError("HellaSwag needs the model's tokenizer; "
                         + (f"this one has {tokenizer.vocab_size} tokens, the model "
                            f"{model.config.vocab_size}" if tokenizer else "there is none"))
    block_size = model.config.block_size
    prepared = [prepare(tokenizer, item, style) for item in items]
    questions = [question for n, (context, endings, _) in enumerate(prepared)
                 for question in questions_of(n, context, endings, block_size)]
    sums = score_questions(model, questions, batch_tokens, dtype, progress)
    tokens = torch.zeros(len(sums), dtype=torch.long)
    for question in questions:
        tokens[question.slots] = torch.tensor([len(ending) for ending in question.endings])
    lengths = torch.tensor([[len(ending), len(ending.encode())] for *_, endings in prepared
                            for ending in endings], dtype=torch.long).view(len(items), ENDINGS, 2)
    cut = [len(context) + max(map(len, endings)) > block_size + 1
           for context, endings, _ in prepared]
    return Scores(sums.double().view(len(items), ENDINGS), tokens.view(len(items), ENDINGS),
                  lengths[..., 0], lengths[..., 1], torch.tensor(cut, dtype=torch.bool))


def evaluate(model: nn.Module, tokenizer: Any, items: Sequence[Item], style: Style = "completion",
             batch_tokens: int = 0, dtype: torch.dtype = torch.float32,
             progress: bool = False) -> dict[str, Any]:
    """Accuracies of a GPT; in a process group each rank takes its share of the items.

    Returns style, n, cut (items longer than the model's context), acc, acc_norm, acc_bytes, the
    number of correct items behind each, and a 95% interval for each.
    """
    if not items:
        raise ValueError("there are no items to evaluate")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = items[rank::world]
    scores = score(model, tokenizer, mine, style, batch_tokens, dtype, progress and rank == 0)
    labels = torch.tensor([item.label for item in mine], dtype=torch.long)
    right = [(choice == labels).sum() for choice in scores.decisions(style).values()]
    counts = torch.stack([torch.tensor(len(mine)), scores.cut.sum(), *right])
    if world > 1:
        device = next(model.parameters()).device
        counts = counts.to(device) if device.type == "cuda" else counts     # NCCL needs it there
        dist.all_reduce(counts)
    n, cut, *correct = counts.tolist()
    result: dict[str, Any] = {"style": style, "n": n, "cut": cut}
    for name, right in zip(METRICS, correct):
        result.update(accuracy(right, n, name))
    return result


def main(words: list[str]) -> None:
    words = [re.sub("^--file(?==|$)", "--hellaswag_file", word) for word in words]
    config = parse(HellaSwagConfig, words, "python -m eval.hellaswag", about=__doc__)
    device = pick_device(config.device)
    items = spread(load_items(config.hellaswag_file or None), config.limit)
    model, tokenizer = load_writer(config.model, device)
    result = evaluate(model, tokenizer, items, config.style, config.batch_tokens,
                      pick_dtype(config.dtype, device), progress=True)
    print(f"{config.model} on {result['n']:,} HellaSwag items, style {config.style}")
    unit = "token" if config.style == "completion" else "character"
    for name, rule in zip(METRICS, ("", f" per {unit}", " per byte")):
        right, (low, high) = result[name.replace("acc", "correct")], result[f"{name}_interval"]
        print(f"  {name:9} {result[name]:.4f}  ({right:,} right)  95% interval "
              f"{low:.4f} to {high:.4f}  largest log-probability{rule}")
    if result["cut"]:
        print(f"  {result['cut']:,} items are longer than the context of {model.config.block_size} "
              f"tokens; they lost tokens on the left")


if __name__ == "__main__":
    run_command(main)
