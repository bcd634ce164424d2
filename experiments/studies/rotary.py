"""Rotary positions in place of learned ones: a change to the model, for experiments.compare.

    python -m experiments.compare demo --max_steps=200 --patch=experiments/studies/rotary.py

Queries and keys are turned by an angle that grows with their position, so that their product
depends on how far apart they are (Su et al. 2021, RoFormer, 2104.09864). The learned positions are
zeros and do not train. What the run computes with is replaced from outside; model.py stays as it
is. Rows of several samples (`packing`) are not meant here: a position is one of the row.
"""
import torch
from torch import Tensor
from torch.nn import functional as F

from model import GPT

attention, init = F.scaled_dot_product_attention, GPT.__init__


def rotated(x: Tensor, start: int) -> Tensor:
    """Queries or keys (B, H, T, D) at the positions from `start` on: channel i of the first half
    and channel i of the second are turned together, by position / 10000^(2 i / D)."""
    T, D = x.shape[-2:]
    speed = 10_000 ** (-torch.arange(0, D, 2, device=x.device) / D)             # (D / 2,)
    angle = torch.arange(start, start + T, device=x.device)[:, None] * speed    # (T, D / 2)
    a, b = x.float().chunk(2, dim=-1)
    turned = torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)
    return turned.to(x.dtype)


def rotary_attention(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """PyTorch's attention; of a cache's keys the queries are the last."""
    return attention(rotated(q, k.size(2) - q.size(2)), rotated(k, 0), v, **options)


def without_positions(self, config):
    init(self, config)
    torch.nn.init.zeros_(self.transformer.wpe.weight).requires_grad_(False)


F.scaled_dot_product_attention, GPT.__init__ = rotary_attention, without_positions
