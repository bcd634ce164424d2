"""Optimizer and learning-rate schedules.

    optimizer = make_optimizer(model, OptimConfig(), learning_rate=6e-4, weight_decay=0.1)
    lr = learning_rate(step, "cosine", max_steps=19073, warmup_steps=715, peak=6e-4, floor=6e-5)
"""
import math
from dataclasses import dataclass
from typing import Callable

import torch
import torch.nn as nn

from config import option


@dataclass(frozen=True)
class OptimConfig:
    beta1: float = option(0.9, "AdamW: decay of the mean of gradients")
    beta2: float = option(0.95, "AdamW: decay of their mean square (GPT-3's; PyTorch has 0.999)")
    eps: float = option(1e-8, "AdamW: added to the root of the mean square")
    power: float = option(1.0, "exponent of the polynomial schedule")
    decay_share: float = option(0.2, "share of the steps in which the wsd schedule decays")

    def __post_init__(self):
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optim.{name}={getattr(self, name)} is not in [0, 1)")
        if not 0 < self.decay_share <= 1:
            raise ValueError(f"optim.decay_share={self.decay_share} is not in (0, 1]")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters in two groups: matrices and embeddings decay, biases and gains not."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [{"params": [p for p in trainable if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0}]


def make_optimizer(model: nn.Module, config: OptimConfig, learning_rate: float,
                   weight_decay: float) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019), fused: one kernel updates all parameters of a group."""
    return torch.optim.AdamW(parameter_groups(model, weight_decay), lr=learning_rate,
                             betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


# A schedule maps the share of training that is done after warmup, 0..1, to a share of the way from
# the floor (0) to the peak (1).
SCHEDULES: dict[str, Callable[[float, OptimConfig], float]] = {
    "cosine": lambda done, config: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done, config: 1 - done,
    "constant": lambda done, config: 1.0,
    "polynomial": lambda done, config: (1 - done) ** config.power,
    # warmup-stable-decay (Hu et al. 2024, MiniCPM): constant, then linear in the last decay_share
    "wsd": lambda done, config: min(1.0, (1 - done) / config.decay_share),
}


def learning_rate(step: int, schedule: str, max_steps: int, warmup_steps: int, peak: float,
                  floor: float, config: OptimConfig = OptimConfig()) -> float:
    """The learning rate of step 0 .. max_steps - 1: linear warmup to `peak`, then the schedule.

    Warmup never starts at zero, which would waste a step: step s of w warmup steps has
    peak * (s + 1) / w, and the step after the last would reach the schedule's end.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return floor + (peak - floor) * SCHEDULES[schedule](min(1.0, done), config)
