"""Linear layers, by the product that is fastest where they run.

    use_fast_products(model)            # in place: its nn.Linear layers compute by `linear`
    y = linear(x, weight, bias)         # F.linear in all but speed

On a GPU that is PyTorch's own product. On a CPU PyTorch asks oneDNN for bfloat16 and MKL for
float32, and two of their products are slow:
- MKL takes AVX-512 on Intel's processors only; on others oneDNN is twice as fast. What PyTorch
  gives oneDNN in float32 is convolutions, and a linear layer is one of width 1: OpenAI's code for
  GPT-2 calls it conv1d.
- The product of a single row, which writing text is made of, reads the weights once and computes
  next to nothing. Both libraries read at a third of the memory's bandwidth then; a loop that
  torch.compile writes itself reads at most of it.
- For few rows MKL takes one core on processors that are not Intel's (PyTorch's issue 96643), and
  oneDNN all. Its linear layer, which torch.compile uses, has no gradient: only inference takes it.

Shapes: N rows, C channels in, O channels out.
"""
import torch
import torch.nn as nn
from torch.nn import functional as F

FEW_ROWS = 32                           # below, both libraries wait for the weights
LARGE = 2**21                           # weights: of fewer, another core reads no faster


def processor() -> str:
    """What Linux says of the first core; "" elsewhere."""
    try:
        with open("/proc/cpuinfo") as file:
            return file.read(4096)
    except OSError:
        return ""


def mkl_is_foreign(about: str) -> bool:
    """Whether PyTorch has MKL and oneDNN for a processor that is not Intel's."""
    return (bool(about) and "GenuineIntel" not in about and torch.backends.mkl.is_available()
            and torch.backends.mkldnn.is_available())


MKL_IS_FOREIGN = mkl_is_foreign(processor())    # constants: torch.compile cannot read files
MKL_IS_SLOW = MKL_IS_FOREIGN and "avx512f" in processor()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b as F.linear has it, up to rounding: x (..., C), weight (O, C), bias (O,) ->
    (..., O), in autocast's dtype where it is on."""
    if x.device.type == "cpu":
        rows, lower = x.numel() // x.size(-1), torch.is_autocast_enabled("cpu")
        if rows == 1 and torch.compiler.is_compiling():
            y = torch.mv(weight, x.flatten().to(weight.dtype))
            y = (y if bias is None else y + bias).view(*x.shape[:-1], -1)
            return y.to(torch.get_autocast_dtype("cpu") if lower else x.dtype)
        float32 = x.dtype == weight.dtype == torch.float32 and not lower
        if 0 < rows <= FEW_ROWS and weight.numel() >= LARGE and float32 and MKL_IS_FOREIGN \
                and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
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
    return model
