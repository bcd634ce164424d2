"""The LoRA layer: a frozen linear layer and the low-rank changes that adapters make to it.

    base = nn.Linear(768, 2304);  layer = LoRALinear(base)
    A, B = INITS["kaiming"](base.weight, r=8, scale=2.0, init="kaiming")
    part = LowRank(base, A, B, scale=2.0, config=LoRAConfig(r=8, alpha=16), start=0)
    layer.lora_adapters["default"] = nn.ModuleDict({"whole": part})
    layer.active = (("default", 1.0),)
    y = layer(x)                                # x (..., in) -> (..., out)

A variant is one function or one branch here, and one value of LoRAConfig. lora.py has the papers.
"""
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import torch.nn as nn
from torch.nn import functional as F

from lora_targets import matching_pattern
from fast.nf4 import NF4Linear, nf4_rounded

LOFTQ_STEPS = 5                         # the paper's
Init = Literal["kaiming", "gaussian", "pissa", "olora", "loftq"]


def _dict(help: str) -> Any:
    return field(default_factory=dict, metadata={"help": help})


@dataclass(frozen=True)
class LoRAConfig:
    """What an adapter is, and which layers it goes to. ValueError for what cannot be."""
    r: int = 8  # rank of the change
    alpha: float = 16.0  # the change is multiplied by alpha / r
    dropout: float = 0.0  # share of the adapter's inputs that are dropped
    target_modules: tuple[str, ...] = ("c_attn",)  # layers to adapt: names, ends of names or
        # regular expressions, or all-linear, which leaves out the head; c_attn.q, .k, .v are parts
        # of c_attn
    bias: Literal["none", "all", "lora_only"] = "none"  # biases that train: none, all, or those of
        # adapted layers
    use_rslora: bool = False  # multiply by alpha / sqrt(r) (rsLoRA)
    use_dora: bool = False  # train the length of each row of the weight apart (DoRA)
    init: Init = "kaiming"  # where A and B start: kaiming, gaussian: a random A; pissa: the largest
        # singular directions; olora: a QR decomposition; loftq: what quantising loses
    layers: tuple[int, ...] | None = None  # numbers of the blocks to adapt; none: all
    modules_to_save: tuple[str, ...] = ()  # modules to train in full and save along
    rank_pattern: dict[str, int] = _dict("other ranks, by the end of a layer's name")
    alpha_pattern: dict[str, float] = _dict("other alphas, in the same way")
    quantize: Literal["none", "nf4"] = "none"  # frozen linear layers in 4 bits (QLoRA)

    def __post_init__(self):
        for name in ("r", *(f"rank_pattern.{key}" for key in self.rank_pattern)):
            rank = self.rank_pattern[name[13:]] if "." in name else self.r
            if rank <= 0:
                raise ValueError(f"lora.{name}={rank} must be at least 1; for full training, "
                                 f"leave LoRA out")
        if not self.alpha > 0:
            raise ValueError(f"lora.alpha={self.alpha} must be positive")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout={self.dropout} is not in [0, 1)")
        for name, allowed in (("init", Init), ("bias", Literal["none", "all", "lora_only"]),
                              ("quantize", Literal["none", "nf4"])):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"lora.{name}={getattr(self, name)!r} is unknown; choose "
                                 f"{', '.join(get_args(allowed))}")
        if self.init == "loftq" and self.quantize == "none":
            raise ValueError("lora.init=loftq makes up for quantising; add lora.quantize=nf4, or "
                             "take init=pissa")

    def rank(self, name: str) -> int:
        """R of a layer: that of the rank_pattern that matches its name, or r."""
        return self.rank_pattern.get(matching_pattern(self.rank_pattern, name), self.r)

    def scale(self, name: str) -> float:
        """s of a layer: alpha / R, or alpha / sqrt(R) with rsLoRA (2312.03732)."""
        rank = self.rank(name)
        alpha = self.alpha_pattern.get(matching_pattern(self.alpha_pattern, name), self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


# ------------------------------------------------------------------------------------------------
# Where A (R, in) and B (out, R) start, from the weight (out, in) and the scale.

def random_a(weight: torch.Tensor, r: int, scale: float, init: str):
    """kaiming: uniform as nn.Linear's (loralib, PEFT). gaussian: deviation 1 / r. B is zero."""
    A = weight.new_empty(r, weight.size(1), dtype=torch.float32)
    A = A.normal_(std=1 / r) if init == "gaussian" else A.uniform_(-1, 1) / weight.size(1) ** 0.5
    return A, weight.new_zeros(weight.size(0), r, dtype=torch.float32)


def pissa(weight: torch.Tensor, r: int, scale: float, init: str):
    """s B A is the best approximation of rank r: the largest singular values and vectors."""
    U, S, V = torch.linalg.svd(weight, full_matrices=False)
    root = (S[:r] / scale).sqrt()
    return root[:, None] * V[:r], U[:, :r] * root


def olora(weight: torch.Tensor, r: int, scale: float, init: str):
    """B is the first r columns of Q and A the first r rows of R, where W = Q R."""
    Q, R = torch.linalg.qr(weight)
    return R[:r].contiguous(), Q[:, :r].contiguous()


def loftq(weight: torch.Tensor, r: int, scale: float, init: str):
    """Quantise what s B A leaves, let s B A approximate what that loses, and again."""
    A, B = random_a(weight, r, scale, init)
    for _ in range(LOFTQ_STEPS):
        A, B = pissa(weight - nf4_rounded(weight - scale * B @ A), r, scale, init)
    return A, B


RANDOM = ("kaiming", "gaussian")        # these read the weight's size only
INITS = {"kaiming": random_a, "gaussian": random_a, "pissa": pissa, "olora": olora, "loftq": loftq}


# ------------------------------------------------------------------------------------------------
# The layer

class LowRank(nn.Module):
    """The change of one layer, or of the rows that are one part of it, by one adapter."""

    def __init__(self, base: nn.Module, A: torch.Tensor, B: torch.Tensor, scale: float,
                 config: LoRAConfig, start: int):
        super().__init__()
        self.scale, self.dropout, self.start = scale, config.dropout, start
        self.after = base.out_features - start - len(B)     # rows of the layer below this part
        A, B = A.contiguous(), B.contiguous()               # strides would change the rounding
        self.lora_A, self.lora_B = nn.Parameter(A.clone()), nn.Parameter(B.clone())
        moved = config.init not in RANDOM
        self.register_buffer("initial_A", A.clone() if moved else None)
        self.register_buffer("initial_B", B.clone() if moved else None)
        self.lora_magnitude = None
        self.register_buffer("weight_square", None, persistent=False)
        if config.use_dora:
            self.weigh(base)
            self.lora_magnitude = nn.Parameter(self.norm(base))

    def weigh(self, base: nn.Module) -> None:
        """Note |w|^2 of each row, which DoRA needs in every step."""
        self.weight_square = weight_of(base)[self.rows()].square().sum(dim=1)

    def rows(self) -> slice:
        """The rows of the layer's weight that this part changes."""
        return slice(self.start, self.start + len(self.lora_B))

    def whole(self, B: torch.Tensor, value: float = 0.0) -> torch.Tensor:
        """Rows of this part as rows of the whole layer."""
        below = (0, 0) * (B.dim() - 1)
        return F.pad(B, (*below, self.start, self.after), value=value) \
            if self.start or self.after else B

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A (R, in), B (rows, R): the change is scale * B A. With an initial pair, R is 2r."""
        if self.initial_A is None:
            return self.lora_A, self.lora_B
        return (torch.cat([self.lora_A, self.initial_A]),
                torch.cat([self.lora_B, -self.initial_B], dim=1))

    @torch.no_grad()
    def norm(self, base: nn.Module) -> torch.Tensor:
        """The length of each row of W + s B A, without forming B A (out, in):

        |w + s b A|^2 = |w|^2 + 2 s (w A^T) b + s^2 b (A A^T) b^T        for a row w, b of W, B
        """
        with torch.autocast(self.lora_A.device.type, enabled=False):
            A, B = (factor.float() for factor in self.factors())
            cross = ((weight_of(base)[self.rows()] @ A.t()) * B).sum(dim=1)         # (rows,)
            square = self.weight_square + 2 * self.scale * cross \
                + self.scale ** 2 * ((B @ (A @ A.t())) * B).sum(dim=1)
            return square.clamp_min(1e-30).sqrt()

    def forward(self, x: torch.Tensor, out: torch.Tensor, base: nn.Module, share: float):
        """x (..., in), and out (..., out) of the base and the adapters before: out, changed."""
        x = F.dropout(x, self.dropout, self.training)
        s, dtype = self.scale * share, x.dtype
        down = F.linear(x, self.lora_A.to(dtype)) * s                               # (..., R)
        up = self.whole(self.lora_B.to(dtype))                                      # (out, R)
        if self.initial_A is None:          # one kernel, which keeps nothing as wide as out
            out = torch.addmm(out.flatten(0, -2), down.flatten(0, -2), up.t()).view(out.shape)
        else:                               # subtracted first, so that it is exactly 0 at the start
            start = F.linear(x, self.initial_A.to(dtype)) * s
            out = out + (F.linear(down, up)
                         - F.linear(start, self.whole(self.initial_B.to(dtype))))
        if self.lora_magnitude is not None:     # the norm takes no gradient (DoRA, section 4.3)
            gain = self.whole(self.lora_magnitude / self.norm(base), 1.0)           # (out,)
            shift = 0.0 if base.bias is None else base.bias * (1 - gain)    # biases keep theirs
            out = (out * gain + shift).to(out.dtype)
        return out

    @torch.no_grad()
    def change(self, weight: torch.Tensor, base: nn.Module, share: float) -> torch.Tensor:
        """The same for a weight (out, in) in float32, to merge."""
        A, B = (factor.float() for factor in self.factors())
        weight = weight + share * self.scale * self.whole(B) @ A
        if self.lora_magnitude is not None:
            weight = weight * self.whole(self.lora_magnitude / self.norm(base), 1.0)[:, None]
        return weight


class LoRALinear(nn.Module):
    """A linear layer with its adapters: lora_adapters.NAME.PART, PART "whole" or of FUSED."""

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.lora_adapters = nn.ModuleDict()
        self.lora_unmerged: nn.Module | None = None         # the base layer, while merged
        self.active: tuple[tuple[str, float], ...] = ()     # adapters that compute, their shares

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) -> (..., out): the base, and the change of each active adapter."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind):                 # once, for base and adapters
            x = x.to(torch.get_autocast_dtype(kind))
        out = self.base_layer(x)
        if self.lora_unmerged is None:
            for name, share in self.active:
                for part in self.lora_adapters[name].values():
                    out = part(x, out, self.base_layer, share)
        return out


def weight_of(base: nn.Module) -> torch.Tensor:
    """The weight (out, in) of a layer in float32."""
    if isinstance(base, NF4Linear):
        return base.dequantize()
    if not base.weight.is_floating_point() or base.weight.shape != (base.out_features,
                                                                    base.in_features):
        raise ValueError(f"a {type(base).__name__} with {base.weight.dtype} weights cannot be read "
                         f"as DoRA, PiSSA, OLoRA and merging need; use lora.quantize=nf4")
    return base.weight.detach().float()
