"""Has a chat model learned its training set, and does that help with other conversations?

    python -m eval.loss --model=out/chat --data=chat --fit

Three figures say it: the loss on training data, the loss on validation data, and the share of
training samples that the model answers word for word. Greedy decoding says an answer exactly when
each of its tokens, and the one that ends it, is the likeliest after what is before; so nothing is
generated. Of several turns all answers count, each after the true ones before it.
"""
from typing import Any, Iterable

import torch
import torch.nn as nn
from torch.nn import functional as F

from eval.scoring import evaluating
from model import IGNORE

LEARNED = 0.5           # the share of training samples that are answered word for word, at least
GAP = 0.5               # nats that validation may be above training: 1.65 times the perplexity


def answer_figures(model: nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
                   dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """loss (nats per labelled token), exact (share of samples), samples; of (x, y) batches."""
    nats = tokens = exact = samples = 0
    with evaluating(model, dtype) as device:
        for x, y in batches:
            x, y = x.to(device), y.to(device)                       # (B, T) each
            row, t = (y != IGNORE).nonzero(as_tuple=True)           # (N,) labelled tokens
            logits = model.lm_head(model.features(x)[row, t])[:, :model.config.vocab_size].float()
            nats += F.cross_entropy(logits, y[row, t], reduction="sum").item()
            wrong = row[logits.argmax(-1) != y[row, t]].unique()    # not said word for word
            exact, samples = exact + len(y) - len(wrong), samples + len(y)
            tokens += len(row)
    return {"loss": nats / tokens, "exact": exact / samples, "samples": samples}


def fit_report(model: nn.Module, train: Any, val: Any, batch_size: int = 8, limit: int = 0,
               dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """train_loss, val_loss, exact_match on training data, and the verdict.

    train, val: data.samples.Samples; limit: tokens of each, spread over it, 0 is all.
    """
    seen = answer_figures(model, train.evaluation_batches(batch_size, limit), dtype)
    unseen = answer_figures(model, val.evaluation_batches(batch_size, limit), dtype)
    return {"train_loss": seen["loss"], "val_loss": unseen["loss"], "exact_match": seen["exact"],
            "samples": seen["samples"],
            "verdict": verdict(seen["loss"], unseen["loss"], seen["exact"])}


def verdict(train_loss: float, val_loss: float, exact_match: float) -> str:
    """What losses (nats per token) and the share of answers given word for word say."""
    gap = val_loss - train_loss
    if exact_match < LEARNED:
        return (f"has not learned the training set: it answers {exact_match:.0%} of it word for "
                f"word, below {LEARNED:.0%}; train longer, or change the learning rate")
    if gap > GAP:
        return (f"has learned it but does not generalise: validation is {gap:.2f} nats above "
                f"training, more than {GAP}; give it more varied data, or fewer epochs")
    return (f"fine: it answers {exact_match:.0%} of the training set word for word ({LEARNED:.0%} "
            f"or more), and validation is {gap:.2f} nats above training ({GAP} or less)")
