"""Linear layers, by the product that is fastest where they run.

    use_fast_products(model)            # in place; attention too, by fast/attention.py
    y = linear(x, weight, bias)         # F.linear in all but speed
    pack_weights(model)                 # before writing text in bfloat16 on a CPU, for good
    with packed_weights(model): ...     # or for a while

On a GPU that is PyTorch's own product. On a CPU PyTorch asks oneDNN for bfloat16 and MKL for
float32, and some of their products are slow:
- MKL takes AVX-512 on Intel's processors only; on others oneDNN is twice as fast. What PyTorch
  gives oneDNN in float32 is convolutions, and a linear layer is one of width 1: OpenAI's code for
  GPT-2 calls it conv1d.
- oneDNN's linear layer, which torch.compile uses, is as fast for many rows and faster for few, of
  which MKL does with one core on processors that are not Intel's (PyTorch's issue 96643). It has no
  gradient: only inference takes it.
- A single row, which writing text is made of, reads the weights once and computes next to nothing.
  A loop that torch.compile writes itself reads them fastest, and oneDNN where the weights lie as
  it packs them.

Shapes: N rows, C channels in, O channels out.
"""
import contextlib
from typing import Iterator

import torch
import torch.nn as nn
from torch.nn import functional as F

from fast.attention import attend
from fast.processor import MKL_IS_FOREIGN, MKL_IS_SLOW

FEW_ROWS = 32                           # below, both libraries wait for the weights
LARGE = 2**19 if MKL_IS_SLOW else 2**21         # weights: of fewer, oneDNN reads no faster


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b as F.linear has it, up to rounding: x (..., C), weight (O, C), bias (O,) ->
    (..., O), in autocast's dtype where it is on."""
    if x.device.type == "cpu":
        rows, lower = x.numel() // x.size(-1), torch.is_autocast_enabled("cpu")
        if rows == 1 and torch.compiler.is_compiling():
            y = torch.mv(weight, x.flatten().to(weight.dtype))
            y = (y if bias is None else y + bias).view(*x.shape[:-1], -1)
            return y.to(torch.get_autocast_dtype("cpu") if lower else x.dtype)
        if weight.is_mkldnn:
            return torch.ops.mkldnn._linear_pointwise(x.to(weight.dtype), weight, bias, "none", [],
                                                      "")
        float32 = x.dtype == weight.dtype == torch.float32 and not lower
        inferred = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if float32 and MKL_IS_FOREIGN and inferred and weight.numel() >= LARGE and rows \
                and (rows <= FEW_ROWS or MKL_IS_SLOW):
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        if rows >= FEW_ROWS and float32 and MKL_IS_SLOW:
            image = x.reshape(1, 1, rows, -1).permute(0, 3, 1, 2)   # (1, C, 1, N), channels last
            y = F.conv2d(image, weight[:, :, None, None], bias)     # (1, O, 1, N), likewise
            return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)
    return F.linear(x, weight, bias)


class FastLinear(nn.Linear):
    """An nn.Linear that computes by `linear`."""
    product = staticmethod(linear)      # what fast/cross_entropy.py multiplies with, too

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., C) -> x W^T + b (..., O)."""
        return linear(x, self.weight, self.bias)


def use_fast_products(model: nn.Module) -> nn.Module:
    """The model, each nn.Linear in it now a FastLinear; parameters and names stay what they are."""
    for module in model.modules():
        if type(module) is nn.Linear:   # not a subclass, which computes something of its own
            module.__class__ = FastLinear
        elif hasattr(module, "c_attn"):
            module.attend = attend
    return model


def pack_weights(model: nn.Module) -> nn.Module:
    """The model, made to read and write text in bfloat16 under autocast: the weights of its linear
    layers as this CPU's oneDNN packs them, where it can. It is no more to be trained or saved."""
    for layer in packable(model):
        weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().bfloat16())
        layer.weight = nn.Parameter(weight, requires_grad=False)                    # not tied
    return model


@contextlib.contextmanager
def packed_weights(model: nn.Module) -> Iterator[None]:
    """`pack_weights`, until the end of the block, where autocast is on for bfloat16 on a CPU."""
    lower = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    before = {layer: layer.weight for layer in packable(model)} if lower else {}
    try:
        if lower:
            pack_weights(model)
        yield
    finally:
        for layer, weight in before.items():
            layer.weight = weight


def packable(model: nn.Module) -> list[FastLinear]:
    """Its linear layers on a CPU whose weights no one else reads, as DoRA does its base's, and that
    are whole here (FSDP's are not); none where oneDNN has no bfloat16."""
    if not (torch.backends.mkl.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return []
    return [layer for name, layer in model.named_modules()
            if isinstance(layer, FastLinear) and not name.endswith("base_layer")
            and layer.weight.device.type == "cpu" and not hasattr(layer.weight, "to_local")]
