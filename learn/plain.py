"""Plain definitions of four things that the project has from PyTorch, or in a form made for speed.

    layer_norm      what nn.LayerNorm computes
    cross_entropy   the loss of fast/cross_entropy.py and its gradient
    accumulate      a step of train.py up to the gradient, on one device
    ending_score    what eval/hellaswag.py adds up, for one ending

They are exercises of `python -m learn`; tests/test_learn.py holds the project to each of them.
Shapes: B batch, T time, C channels, V vocabulary, N rows.
"""
import torch
from torch import Tensor, nn

from fast.cross_entropy import IGNORE


def layer_norm(x: Tensor, shape: tuple[int, ...], weight: Tensor | None = None,
               bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Each row of x (..., C) with mean 0 and variance 1, times weight (C,), plus bias (C,), where
    they are given. shape: (C,); eps: added to the variance."""
    mean = x.mean(-1, keepdim=True)                                 # (..., 1)
    variance = (x - mean).square().mean(-1, keepdim=True)
    x = (x - mean) / (variance + eps).sqrt()
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Of logits (N, V) and targets (N,): -log softmax(logits)[target] of each row (N,), in nats,
    and the gradient of their sum with respect to the logits (N, V). 0 where a target is IGNORE."""
    rows, labelled = torch.arange(len(targets)), targets != IGNORE
    targets = targets.clamp(min=0)
    nats = logits.logsumexp(-1) - logits[rows, targets]
    gradient = logits.softmax(-1)
    gradient[rows, targets] -= 1
    return nats * labelled, gradient * labelled[:, None]


def accumulate(model: nn.Module, micro_batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The mean loss over all labelled tokens of a step's micro-batches, (x, y) of (B, T) each;
    its gradient is added to the `grad` of the parameters, one micro-batch after the other."""
    labels = sum(int((y != IGNORE).sum()) for _, y in micro_batches)
    loss = torch.zeros(())
    for x, y in micro_batches:
        _, nats = model(x, y, reduction="sum")
        part = nats / labels
        part.backward()
        loss += part.detach()
    return loss


def ending_score(model: nn.Module, context: list[int], ending: list[int]) -> Tensor:
    """The log-probability of an ending after a context, both as ids: a sum over its tokens."""
    ids = torch.tensor(context + ending)                            # (T,)
    logits, _ = model(ids[None, :-1])                               # (1, T - 1, V)
    log_probs = logits[0].log_softmax(-1)                           # (T - 1, V)
    first = len(context) - 1                                        # it predicts that of the ending
    return log_probs[first:].gather(1, ids[first + 1:, None]).sum()
