"""LAMBADA: does the model say the last word of a passage, which takes all of it to guess?

    python -m eval gpt2|FOLDER|RUN --lambada_file=PASSAGES.jsonl [--limit=N]

In: {"text": passage} a line. The last word, with the space before it, follows the rest of the text.
acc: the share of passages where every token of it is the likeliest; perplexity: exp of the mean of
the word's negative log-probability. Both as in lm-evaluation-harness (lambada_openai).

Reference: Paperno et al. 2016, "The LAMBADA dataset" (1606.06031).
"""
import math
from typing import Any, Sequence

import torch
import torch.nn as nn

from data.texts import read_objects, text_of
from eval.scoring import accuracy, evaluating, score_rows
from model import IGNORE


def load_passages(path: str) -> list[tuple[str, str]]:
    """(what comes before, the last word with its space) of every passage."""
    found = []
    for place, record in read_objects(path):
        context, _, word = text_of(record, "text", place).strip().rpartition(" ")
        if not context:
            raise ValueError(f"{place} has a single word")
        found.append((context, " " + word))
    return found


def evaluate(model: nn.Module, tokenizer: Any, passages: Sequence[tuple[str, str]],
             batch_size: int = 16, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """n, acc with its count and 95% interval, perplexity; cut: passages that lost their start."""
    T = model.config.block_size
    rows = [(tokenizer.encode(context), tokenizer.encode(word)) for context, word in passages]
    cut = sum(len(context) + len(word) > T + 1 for context, word in rows)
    rows = sorted([((context + word)[-T - 1:], min(len(word), T)) for context, word in rows],
                  key=lambda row: len(row[0]))
    nats, right = 0.0, 0
    with evaluating(model, dtype) as device:
        for batch in (rows[i:i + batch_size] for i in range(0, len(rows), batch_size)):
            longest = len(batch[-1][0])
            x = torch.zeros(len(batch), longest - 1, dtype=torch.long)      # (B, T)
            y = torch.full_like(x, IGNORE)                                  # (B, T)
            for i, (ids, length) in enumerate(batch):
                x[i, :len(ids) - 1] = torch.tensor(ids[:-1])
                y[i, len(ids) - 1 - length:len(ids) - 1] = torch.tensor(ids[-length:])
            row_nats, row_right = score_rows(model, x.to(device), y.to(device))
            nats, right = nats + row_nats.sum().item(), right + int(row_right.sum())
    n = len(rows)
    return {"n": n, "cut": cut, **accuracy(right, n), "perplexity": math.exp(min(nats / n, 700))}
