"""LAMBADA: does the model say the last word of a passage, which takes all of it to guess?

    python -m eval gpt2|FOLDER|RUN --lambada_file=PASSAGES.jsonl [--limit=N]

In: {"text": passage} a line. The last word, with the space before it, follows the rest of the text.
acc: the share of passages where every token of it is the likeliest; perplexity: exp of the mean of
the word's negative log-probability. Both as in lm-evaluation-harness (lambada_openai).

Reference: Paperno et al. 2016, "The LAMBADA dataset" (1606.06031).
"""
import math
from typing import Any, Sequence

import numpy as np
import torch
import torch.nn as nn

from data.samples import Samples
from data.texts import read_objects, text_of
from eval.fit import answer_figures
from eval.scoring import accuracy


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
    T, n = model.config.block_size, len(passages)
    rows = [(tokenizer.encode(context), tokenizer.encode(word)) for context, word in passages]
    kept = [(context + word)[-T - 1:] for context, word in rows]
    offsets = np.cumsum([0, *map(len, kept)])
    labelled = np.zeros(offsets[-1], dtype=bool)
    for end, (_, word) in zip(offsets[1:], rows):
        labelled[end - min(len(word), T):end] = True
    samples = Samples(np.concatenate(kept), labelled, offsets, T)
    found = answer_figures(model, samples.evaluation_batches(batch_size), dtype)
    nats = found["loss"] * int(samples.label_counts.sum()) / n      # a word, of several tokens
    return {"n": n, "cut": sum(len(context) + len(word) > T + 1 for context, word in rows),
            **accuracy(round(n * found["exact"]), n), "perplexity": math.exp(min(nats, 700))}
