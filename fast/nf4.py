"""NF4: a frozen linear layer whose weights take half a byte each (QLoRA).

    layer = NF4Linear(linear)                   # an nn.Linear, or any (out, in) weight with bias
    y = layer(x)                                # x (..., in) -> (..., out), in the dtype of x
    weight = layer.dequantize()                 # (out, in) float32

64 weights in a row share a scale, their largest absolute value; each is one of 16 levels between
-1 and 1, the quantiles of a normal distribution. The scales are quantised again: a byte each, in
blocks of 256 with one float32. That makes 4 + 8 / 64 + 32 / (64 * 256) = 4.13 bits a weight. The
codes are those of bitsandbytes.

Reference: Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs"; the 8-bit type of
the scales is that of Dettmers 2016, "8-Bit Approximations for Parallelism in Deep Learning".
"""
from types import SimpleNamespace

import torch
import torch.nn as nn
from torch.nn import functional as F

BLOCK = 64              # weights with a common scale
SCALE_BLOCK = 256       # scales with a common scale
LEVELS = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
          -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
          0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
          0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)    # QLoRA, appendix E


def dynamic_levels() -> torch.Tensor:
    """The 256 levels of the scales: 2^i midpoints in each decade 10^(i-7) .. 10^(i-6), 0 and 1."""
    levels = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, device="cpu")
        middles = 10 ** (i - 6) * (edges[:-1] + edges[1:]) / 2
        levels += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(levels), device="cpu")


def nearest(values: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """The index of the level that is nearest to each value."""
    return torch.bucketize(values, (levels[:-1] + levels[1:]) / 2)


def blocks(values: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values in rows of `size`, the last one filled with zeros, divided by their largest ones."""
    rows = F.pad(values.flatten(), (0, -values.numel() % size)).view(-1, size)
    largest = rows.abs().amax(dim=1)
    return rows * (1 / largest.clamp(min=1e-38))[:, None], largest


class NF4Linear(nn.Module):
    """A linear layer with NF4 weights, which never change.

    `low_rank` is a pair B (out, R), A (R, in) that is taken off the weight before it is quantised
    and added to the layer's output: what PiSSA and LoftQ need (see lora.py).
    """

    def __init__(self, linear: nn.Module,
                 low_rank: tuple[torch.Tensor, torch.Tensor] | None = None):
        super().__init__()
        weight = linear.weight.detach().float()
        self.out_features, self.in_features = weight.shape
        self.bias, device = linear.bias, weight.device
        for i, name in enumerate(("low_B", "low_A")):
            factor = low_rank[i].detach().clone(memory_format=torch.contiguous_format) \
                if low_rank else None
            self.register_buffer(name, factor)
        if low_rank:
            weight = weight - self.low_B @ self.low_A
        levels, scale_levels = torch.tensor(LEVELS, device=device), dynamic_levels().to(device)
        values, scales = blocks(weight, BLOCK)
        index = nearest(values.flatten(), levels).to(torch.uint8)
        self.register_buffer("codes", index[::2] << 4 | index[1::2])        # two in a byte
        self.register_buffer("scale_mean", scales.mean())
        values, coarse = blocks(scales - self.scale_mean, SCALE_BLOCK)
        codes = nearest(values.flatten()[:len(scales)], scale_levels).to(torch.uint8)
        self.register_buffer("scale_codes", codes)
        self.register_buffer("scale_scales", coarse)
        # a byte is looked up at once: (256, 2) levels
        pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)
        self.register_buffer("pairs", pairs, persistent=False)
        self.register_buffer("scale_levels", scale_levels, persistent=False)

    def packed(self) -> tuple[torch.Tensor, ...]:
        """All that `unpack` makes the weight from."""
        return (self.codes, self.scale_codes, self.scale_scales, self.scale_mean, self.pairs,
                self.scale_levels)

    def dequantize(self) -> torch.Tensor:
        """The weight that the layer stands for, (out, in) float32."""
        weight = unpack(*self.packed(), self.out_features, self.in_features, torch.float32)
        return weight if self.low_A is None else weight + self.low_B @ self.low_A

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) -> (..., out), in x's dtype, or autocast's."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        out = _Product.apply(x, self.bias, *self.packed(), self.out_features, self.in_features)
        if self.low_A is not None:
            out = out + F.linear(F.linear(x, self.low_A.to(x.dtype)), self.low_B.to(x.dtype))
        return out

    def extra_repr(self) -> str:
        """What print(model) says of the layer."""
        return f"in_features={self.in_features}, out_features={self.out_features}, nf4"


def unpack(codes: torch.Tensor, scale_codes: torch.Tensor, scale_scales: torch.Tensor,
           scale_mean: torch.Tensor, pairs: torch.Tensor, scale_levels: torch.Tensor,
           out_features: int, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    """The weight (out, in) from its codes; multiplied in float32, rounded to `dtype` once."""
    coarse = scale_scales.repeat_interleave(SCALE_BLOCK)[:len(scale_codes)]
    scales = scale_levels.index_select(0, scale_codes.int()) * coarse + scale_mean      # (blocks,)
    # A pair of levels moves as one number of 64 bits: three times as fast as an embedding of two.
    # An integer, as Apple's GPUs have no float64.
    levels = pairs.view(torch.int64).flatten().index_select(0, codes.int()).view(torch.float32)
    values = levels.view(-1, BLOCK).mul_(scales[:, None])
    return values.to(dtype).flatten()[:out_features * in_features].view(out_features, in_features)


def nf4_rounded(weight: torch.Tensor) -> torch.Tensor:
    """A weight (out, in) as NF4 would give it back."""
    return NF4Linear(SimpleNamespace(weight=weight, bias=None)).dequantize()


class _Product(torch.autograd.Function):
    """x W^T + bias. The dequantised W lives during the product; backward makes it again."""

    @staticmethod
    def forward(ctx, x, bias, codes, scale_codes, scale_scales, scale_mean, pairs, scale_levels,
                out_features, in_features):
        packed = codes, scale_codes, scale_scales, scale_mean, pairs, scale_levels
        ctx.save_for_backward(*packed)                              # what the layer holds anyway
        ctx.shape = out_features, in_features
        weight = unpack(*packed, *ctx.shape, x.dtype)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx, gradient):
        to_x = to_bias = None
        if ctx.needs_input_grad[0]:
            to_x = gradient @ unpack(*ctx.saved_tensors, *ctx.shape, gradient.dtype)
        if ctx.needs_input_grad[1]:
            to_bias = gradient.flatten(0, -2).sum(0)
        return (to_x, to_bias, *[None] * 8)
