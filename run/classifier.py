"""A GPT that chooses among classes: token ids in, one score for each class out.

    model = Classifier(GPT.from_pretrained("gpt2"), classes=2, pooling="last")
    logits, _ = model(idx)                              # rows without padding -> (B, K)
    logits, loss = model(idx, targets, reduction="sum")

It is called and trained as a GPT is: targets (B, T) hold the class of a sample at its last token
and IGNORE elsewhere, so padding behind it, several samples in a row (positions) and counting labels
work as they do for words. One linear layer reads the hidden states of the sample: those of its last
token, which has seen all of it, or their mean. The layer starts at zero: every class is equally
likely at first, and the start of a run does not depend on a seed.

    python train.py imdb-demo                           trains one: data of data/labels.py
    model, _ = run.load.load_model("out/imdb-demo")       and gives it back

Shapes: B batch, T time, C channels, K classes, N samples: one in each row, or as many as labels.
Reference: Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training",
section 3.2; with pooling "last" the same function as transformers' GPT2ForSequenceClassification.
"""
from typing import Literal, get_args

import torch
import torch.nn as nn
from torch.nn import functional as F

from model import GPT, IGNORE

Pooling = Literal["last", "mean"]


class Classifier(nn.Module):
    """A GPT and K scores for each sample. It has what a GPT has for train.py and eval/."""

    def __init__(self, gpt: GPT, classes: int = 2, pooling: Pooling = "last"):
        if classes < 2:
            raise ValueError(f"classes={classes} must be at least 2")
        if pooling not in get_args(Pooling):
            raise ValueError(f"pooling={pooling!r} is unknown; choose last or mean")
        super().__init__()
        self.gpt, self.pooling, self.config, self.classes = gpt, pooling, gpt.config, classes
        self.head = nn.Linear(gpt.config.n_embd, classes, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None,
                positions: torch.Tensor | None = None, reduction: str = "mean"):
        """(logits (N, K), loss) of the samples whose class `targets` hold, in reading order.

        Without targets, of the whole rows, and the loss is None. positions: as in GPT.features.
        """
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction={reduction!r} is unknown; choose mean or sum")
        x = self.gpt.features(idx, positions)                       # (B, T, C)
        if targets is None:
            last = torch.full((len(idx),), idx.size(1) - 1, device=idx.device)
            return self.head(self.pool(x, torch.arange(len(idx), device=idx.device), last,
                                       torch.zeros_like(last))), None
        row, last = (targets != IGNORE).nonzero(as_tuple=True)      # (N,) each
        first = torch.zeros_like(last) if positions is None else last - positions[row, last]
        logits = self.head(self.pool(x, row, last, first))          # (N, K)
        loss = F.cross_entropy(logits.float(), targets[row, last], reduction="sum")
        return logits, loss / max(len(row), 1) if reduction == "mean" else loss

    def pool(self, x: torch.Tensor, row: torch.Tensor, last: torch.Tensor,
             first: torch.Tensor) -> torch.Tensor:
        """One vector for each sample, x[row, first..last]: x (B, T, C) -> (N, C)."""
        if self.pooling == "last":
            return x[row, last]
        t = torch.arange(x.size(1), device=x.device)                # (T,)
        inside = (first[:, None] <= t) & (t <= last[:, None])       # (N, T)
        return ((x[row] * inside[..., None]).sum(1) / inside.sum(1, keepdim=True)).to(x.dtype)

    @property
    def transformer(self) -> nn.ModuleDict:
        """The GPT's."""
        return self.gpt.transformer

    @property
    def recompute_activations(self) -> bool:
        """The GPT's."""
        return self.gpt.recompute_activations

    @recompute_activations.setter
    def recompute_activations(self, value: bool) -> None:
        self.gpt.recompute_activations = value

    def num_params(self) -> int:
        """Parameters: the GPT's and the head's."""
        return self.gpt.num_params() + self.head.weight.numel()

    def flops_per_token(self) -> int:
        """As a GPT's, less the product with the vocabulary, which is not computed."""
        each = 6 if self.transformer.wte.weight.requires_grad else 4
        return self.gpt.flops_per_token() - each * self.config.vocab_size * self.config.n_embd
