"""The loss of a language model's head: hidden states and targets in, their cross-entropy out.

    loss = linear_cross_entropy(x, model.lm_head, targets, vocab_size=50257)    # a sum, in nats

Written plainly it is what `plain` does. But the logits are by far the largest tensor of a GPT-2:
50,257 numbers a token, of which autograd keeps several copies. Their gradient, softmax - onehot, is
known as soon as they are; so the products that need it are made at once, for some rows at a time,
and no logits outlive their rows. The idea is Liger Kernel's (Hsu et al. 2024, 2410.10989).

Shapes: N tokens, C channels, V rows of the head, of which the first vocab_size are tokens.
"""
import math

import torch
import torch.nn as nn
from torch.nn import functional as F

IGNORE = -100                       # the target of a position that has no label
# A CPU wants logits that stay near its caches, a GPU enough rows to fill it.
LOGITS_AT_ONCE = {"cpu": 2**25, "cuda": 2**28}
COLUMNS = {"cuda": 64}              # logits of a row are a multiple: tensor cores read 128 bytes
SCATTERS = {"cpu"}                  # where an index is faster than a comparison, see with_target


def head_memory(tokens: int, channels: int, rows: int, device: str) -> int:
    """Bytes that `linear_cross_entropy` holds at its height, uncompiled, beside its inputs: 12 for
    each logit that is there at once, and the gradient of the head's weight (rows, channels)."""
    at_once = min(tokens * rows, LOGITS_AT_ONCE.get(device, 2**25))
    return 12 * at_once + 4 * rows * channels


def plain(x: torch.Tensor, head: nn.Module, targets: torch.Tensor,
          vocab_size: int) -> torch.Tensor:
    """The same sum, by all logits at once; see `linear_cross_entropy`."""
    logits = head(x)[:, :vocab_size].float()                        # (N, vocab_size)
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")


def linear_cross_entropy(x: torch.Tensor, head: nn.Module, targets: torch.Tensor,
                         vocab_size: int) -> torch.Tensor:
    """The sum of -log softmax(head(x))[target] over the labelled tokens: a float32 scalar.

    x (N, C), targets (N,) int64, IGNORE where there is no label. Products are in autocast's dtype
    where it is on, softmax and sum in float32. A head that is more than an nn.Linear without bias,
    an adapted one for example, is computed plainly. A head with another `product` than F.linear's
    (fast/linear.py) is multiplied by that.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    product = F.linear if type(head) is nn.Linear else getattr(head, "product", None)
    if product is None or head.bias is not None:
        return plain(x, head, targets, vocab_size)
    wants = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (x, head.weight)]
    return _LinearCrossEntropy.apply(x, head.weight, targets, vocab_size, dtype, product, *wants)


def with_target(softmax: torch.Tensor, targets: torch.Tensor, value: torch.Tensor,
                dtype: torch.dtype, scale: torch.Tensor | None = None) -> torch.Tensor:
    """softmax (N, V) in dtype, with value (N,) in the column of each row's target; scaled, where
    there is a scale, before it is rounded.

    A scatter is an operation of its own, for which the softmax is written in float32; a comparison
    is fused with the softmax by torch.compile. On a CPU, near its caches, the scatter is faster.
    """
    if scale is not None:
        softmax, value = softmax * scale, value * scale
    if softmax.device.type in SCATTERS:
        return softmax.scatter_(1, targets.clamp(min=0)[:, None], value[:, None]).to(dtype)
    columns = torch.arange(softmax.size(1), device=softmax.device)
    return torch.where(columns == targets[:, None], value[:, None].to(dtype), softmax.to(dtype))


def half_scales(x: torch.Tensor, weight: torch.Tensor, rows: int
                ) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of the gradient and of x in float16, which holds 6e-8 to 65504: powers of two, which
    round nothing. The gradient is scaled up before it is rounded, but no sum may overflow: over V
    its entries add up to 2 at most, over the rows of a piece to as many as these."""
    up = power_of_two((2**14 / weight.abs().max().float()).clamp(max=2**10))
    return up, power_of_two((2**15 / (up * rows * x.abs().max())).clamp(max=1))


def power_of_two(x: torch.Tensor) -> torch.Tensor:
    """The largest one not above x > 0, exactly. x = mantissa * 2^n, with half <= mantissa < 1."""
    return x / (2 * torch.frexp(x).mantissa)


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradients, but for their common factor, are made by the forward pass."""

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size, dtype, product, want_dx, want_dweight):
        device, V = x.device, weight.size(0)
        pieces = -(-x.size(0) * V // LOGITS_AT_ONCE.get(device.type, 2**25))
        total, dx, dweight = torch.zeros((), device=device), [], None
        with torch.autocast(device.type, enabled=False):
            w = weight.to(dtype)
            if missing := -V % COLUMNS.get(device.type, 1):
                w = F.pad(w, (0, 0, 0, missing))                     # more rows that are no tokens
            lower, up = x.to(dtype), None
            if dtype == torch.float16:
                up, down = half_scales(lower, w, -(-len(x) // pieces))
            for rows, target in zip(lower.chunk(pieces), targets.chunk(pieces)):
                logits = product(rows, w).float()                    # (n, V)
                if vocab_size < len(w):
                    logits[:, vocab_size:] = -math.inf
                nats = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="none")
                total = total + nats.sum()
                if want_dx or want_dweight:
                    # p - 1 at the target, by expm1: of a p near 1, bfloat16 would leave nothing.
                    grad = with_target(logits.softmax(dim=1), target, torch.expm1(-nats), dtype, up)
                    labelled = (target != IGNORE)[:, None]
                if want_dx:
                    dx.append(product(grad, w.T) * labelled)         # (n, C)
                if want_dweight:
                    rows = rows * labelled
                    part = product(grad.T, (rows if up is None else rows * down).T)  # (V, C)
                    dweight = part.float() if dweight is None else dweight + part
        dx = torch.cat(dx).to(x.dtype) if want_dx else None
        dweight = dweight[:V].to(weight.dtype) if want_dweight else None
        if up is not None:
            dx = dx / up if want_dx else None
            dweight = dweight / (up * down) if want_dweight else None
        ctx.save_for_backward(dx, dweight)
        return total

    @staticmethod
    def backward(ctx, upstream):
        dx, dweight = (None if grad is None else grad * upstream for grad in ctx.saved_tensors)
        return dx, dweight, None, None, None, None, None, None
