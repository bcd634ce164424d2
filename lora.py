"""LoRA: fine-tuning by a low-rank change of frozen linear layers.

    model = add_lora(model, LoRAConfig(r=8, alpha=16))      # in place; only the adapter trains
    save_lora(model, "adapter")                             # PEFT's format, and back:
    load_lora(model, "adapter", name="other")
    set_adapter(model, {"default": 0.5, "other": 0.5})      # which ones compute
    with disable_lora(model): ...                           # the base
    merge_lora(model, idx);  unmerge_lora(model);  plain = unload_lora(model)

A layer W x + b gets s B A dropout(x) added, with A (R, in), B (out, R) and scale s = alpha / R. B
starts at zero, so the model starts as its base; W is frozen and never edited. That is the first
section. Each one after it is one idea, up to merging; then which layers, checks and files.

Hu et al. 2022, "LoRA"; Kalajdzievski 2023, "rsLoRA"; Meng et al. 2024, "PiSSA"; Büyükakyüz 2024,
"OLoRA"; Li et al. 2024, "LoftQ"; Liu et al. 2024, "DoRA"; Dettmers et al. 2023, "QLoRA". LoRA+ is a
setting of optim.py.
"""
import contextlib
import math
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterable, Iterator, Literal, get_args, get_type_hints

import torch
import torch.nn as nn
from torch.nn import functional as F

from fast.nf4 import NF4Linear, nf4_rounded
from formats import peft

__all__ = ["LoRAConfig", "add_lora", "merge_lora", "unmerge_lora", "unload_lora", "save_lora",
           "load_lora", "set_adapter", "disable_lora", "describe"]


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
    init: Literal["kaiming", "gaussian", "pissa", "olora", "loftq"] = "kaiming"  # where A and B
        # start: kaiming, gaussian: a random A; pissa: the largest singular directions; olora: a QR
        # decomposition; loftq: what quantising loses
    layers: tuple[int, ...] | None = None  # numbers of the blocks to adapt; none: all
    modules_to_save: tuple[str, ...] = ()  # modules to train in full and save along; wte, the
        # embedding, with its head
    rank_pattern: dict[str, int] = field(default_factory=dict)  # other ranks, by the end of a
        # layer's name
    alpha_pattern: dict[str, float] = field(default_factory=dict)  # other alphas, in the same way
    quantize: Literal["none", "nf4"] = "none"  # frozen linear layers in 4 bits (QLoRA)

    def __post_init__(self):
        check(self)


class LowRank(nn.Module):
    """The change that one adapter makes to a layer, or to some rows of it: scale * B A."""

    def __init__(self, A: torch.Tensor, B: torch.Tensor, scale: float, dropout: float, rows: slice):
        super().__init__()
        self.lora_A, self.lora_B = nn.Parameter(A.clone()), nn.Parameter(B.clone())
        self.scale, self.dropout, self.rows = scale, dropout, rows
        self.lora_magnitude = None                          # DoRA's

    def forward(self, x: torch.Tensor, out: torch.Tensor, share: float = 1.0) -> torch.Tensor:
        """out + dropout(x) @ A.T @ B.T * scale: x (..., in), out (..., out) of the layer."""
        x = F.dropout(x, self.dropout, self.training)
        down = F.linear(x, self.lora_A.to(x.dtype)) * (self.scale * share)          # (..., R)
        up = spread(self.lora_B.to(x.dtype), self.rows, out.size(-1))               # (out, R)
        # The sum is in the product's kernel: nothing else as wide as out is made or kept.
        return torch.addmm(out.flatten(0, -2), down.flatten(0, -2), up.t()).view(out.shape)


class LoRALinear(nn.Module):
    """A frozen linear layer and its adapters, lora_adapters.NAME.PART: PART "whole" or of FUSED."""

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer, self.lora_adapters = base_layer, nn.ModuleDict()
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.active: dict[str, float] = {}                  # adapters that compute, and their share
        self.lora_merged: nn.Linear | None = None           # computes alone, once merged

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) -> (..., out): the base, and the change of each active adapter."""
        if torch.is_autocast_enabled(x.device.type):        # once, for base and adapters
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.lora_merged is not None:
            return self.lora_merged(x)
        out = self.base_layer(x)
        for change, share in self.changes(self.active):
            out = change(x, out, share)
            if change.lora_magnitude is not None:
                out = rescaled(out, change, self.base_layer, self.base_layer.bias)
        return out

    def changes(self, shares: dict[str, float]) -> list[tuple[LowRank, float]]:
        """The changes that these adapters make here, with their shares."""
        return [(change, share) for name, share in shares.items() if name in self.lora_adapters
                for change in self.lora_adapters[name].values()]


def add_lora(model: nn.Module, config: LoRAConfig, name: str = "default",
             quiet: bool = False) -> nn.Module:
    """Give the model an adapter, in place: it computes and trains, everything else is frozen.

    Returns the model. ValueError where no layer matches, the name is taken, or a layer cannot have
    one; then nothing has changed.
    """
    adapters, found = check_addition(model, config, name), targets(model, config)
    extras = trained_parameters(model, config, [layer for layer, _, _ in found.values()])
    changes: dict[str, nn.ModuleDict] = {}
    for full, (layer, part, rows) in found.items():
        change = new_change(model.get_submodule(layer), rows, full, config)
        changes.setdefault(layer, nn.ModuleDict())[part] = change
    for layer, parts in changes.items():
        module = model.get_submodule(layer)
        if not isinstance(module, LoRALinear):
            module = LoRALinear(module).train(module.training)
            model.set_submodule(layer, module)
        module.lora_adapters[name] = parts.train(module.training)
    if config.quantize == "nf4" and not adapters.configs:
        quantize_base(model, extras)
    model.adapters, adapters.configs[name] = adapters, config
    adapters.original = {**extras, **adapters.original}
    adapters.trained[name] = {key: nn.Parameter(adapters.original[key].detach().clone())
                              for key in extras}
    model.requires_grad_(False)             # also what `trained` takes the places of
    set_adapter(model, name)
    if not quiet:
        say(describe(model))
    return model


# -------------------------------------------------------------------------------------------- Scale

def rank_and_scale(config: LoRAConfig, name: str) -> tuple[int, float]:
    """R and s of a layer, by the patterns that match its name. alpha / R lets a large R learn
    slower than a small one; alpha / sqrt(R) does not (rsLoRA)."""
    rank = peft.by_pattern(config.rank_pattern, name, config.r)
    alpha = peft.by_pattern(config.alpha_pattern, name, config.alpha)
    return rank, alpha / (math.sqrt(rank) if config.use_rslora else rank)


# ------------------------------------------------------------------------------------------------
# Inits: where A and B start. From the weight's own directions, B A starts at some B0 A0 instead of
# zero; that is taken off again, so that the model still starts as its base.

def initial_factors(base: nn.Module, rows: slice, r: int, scale: float, init: str
                    ) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A (R, in) and B (rows, R), None for zeros, of these rows of a linear layer.

    kaiming: uniform as nn.Linear's (loralib, PEFT). gaussian: deviation 1 / R. pissa: s B A is the
    best approximation of rank R. olora: W = Q R; B is the first columns of Q, A the first rows of
    R. loftq: quantise what s B A leaves, let s B A approximate what that loses, and again.
    """
    device = next(tensor.device for tensor in (*base.parameters(), *base.buffers()))
    A = torch.empty(r, base.in_features, dtype=torch.float32, device=device)
    if init == "gaussian":
        return A.normal_(std=1 / r), None
    if init in ("kaiming", "loftq"):
        A = A.uniform_(-1, 1) / base.in_features ** 0.5
    if init == "kaiming":
        return A, None
    W = weight_of(base)[rows]
    if init == "pissa":
        return largest_directions(W, r, scale)
    if init == "olora":
        Q, R = torch.linalg.qr(W)
        return R[:r], Q[:, :r]
    B = A.new_zeros(len(W), r)
    for _ in range(5):                                      # the paper's
        A, B = largest_directions(W - nf4_rounded(W - scale * B @ A), r, scale)
    return A, B


def largest_directions(W: torch.Tensor, r: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of the best approximation of W as scale * B A: its largest singular directions."""
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    root = (S[:r] / scale).sqrt()
    return root[:, None] * V[:r], U[:, :r] * root


class LowRankFromWeight(LowRank):
    """The change scale * (B A - B0 A0), where B0 A0 is what B A started at."""

    def __init__(self, A: torch.Tensor, B: torch.Tensor, *args: Any):
        super().__init__(A, B, *args)
        self.register_buffer("initial_A", A.clone())
        self.register_buffer("initial_B", B.clone())

    def forward(self, x: torch.Tensor, out: torch.Tensor, share: float = 1.0) -> torch.Tensor:
        """As LowRank's. B0 A0 is subtracted first, so that the change starts as exactly 0."""
        x = F.dropout(x, self.dropout, self.training)
        now, start = (F.linear(F.linear(x, A.to(x.dtype)) * (self.scale * share),
                               spread(B.to(x.dtype), self.rows, out.size(-1)))
                      for A, B in ((self.lora_A, self.lora_B), (self.initial_A, self.initial_B)))
        return out + (now - start)


def factors(change: LowRank) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B such that scale * B A is the change: of B A - B0 A0 (2R, in) and (rows, 2R)."""
    if not isinstance(change, LowRankFromWeight):
        return change.lora_A, change.lora_B
    return (torch.cat([change.lora_A, change.initial_A]),
            torch.cat([change.lora_B, -change.initial_B], dim=1))


# ------ DoRA: the changed weight gives each row its direction; its length is a parameter of its own

@torch.no_grad()
def row_lengths(change: LowRank, base: nn.Module) -> torch.Tensor:
    """The length of each row of W + s B A, without forming B A (out, in):

    |w + s b A|^2 = |w|^2 + 2 s (w A^T) b + s^2 b (A A^T) b^T            for a row w, b of W, B
    """
    with torch.autocast(change.lora_A.device.type, enabled=False):
        A, B = (factor.float() for factor in factors(change))
        W, s = weight_of(base)[change.rows], change.scale                           # (rows, in)
        square = W.square().sum(dim=1) + 2 * s * ((W @ A.t()) * B).sum(dim=1) \
            + s ** 2 * ((B @ (A @ A.t())) * B).sum(dim=1)
        return square.clamp_min(1e-30).sqrt()


def rescaled(out: torch.Tensor, change: LowRank, base: nn.Module, bias: torch.Tensor | None = None
             ) -> torch.Tensor:
    """out (..., out), its rows of the trained lengths; a bias in it keeps its own. The length as
    computed takes no gradient (DoRA, section 4.3)."""
    gain = change.lora_magnitude / row_lengths(change, base)                        # (rows,)
    gain = spread(gain, change.rows, out.size(-1), 1.0)                             # (out,)
    return (out * gain + (0.0 if bias is None else bias * (1 - gain))).to(out.dtype)


# ------------------------------ Parts of fused layers: c_attn.q is the first third of c_attn's rows

FUSED = {"c_attn": ("q", "k", "v")}


def places(model: nn.Module) -> dict[str, tuple[str, str, slice]]:
    """Where a change can be: {"h.0.attn.c_attn.q": (layer, "q", its rows), ...}; of a layer in
    full, under its own name, the part is "whole"."""
    found = {}
    for layer, module in linear_layers(model).items():
        found[layer] = layer, "whole", slice(0, module.out_features)
        parts = FUSED.get(layer.rpartition(".")[2], ())
        for i, part in enumerate(parts):
            size = module.out_features // len(parts)
            found[f"{layer}.{part}"] = layer, part, slice(i * size, (i + 1) * size)
    return found


def spread(values: torch.Tensor, rows: slice, out_features: int, fill: float = 0.0) -> torch.Tensor:
    """Values of some rows, (rows, R) or (rows,), among all rows of a layer."""
    around = (rows.start, out_features - rows.stop)
    if around == (0, 0):
        return values
    return F.pad(values, (0, 0) * (values.dim() - 1) + around, value=fill)


def new_change(module: nn.Module, rows: slice, name: str, config: LoRAConfig) -> LowRank:
    """The change of some rows of a layer, as it starts."""
    base = getattr(module, "base_layer", module)
    r, scale = rank_and_scale(config, name)
    A, B = initial_factors(base, rows, r, scale, config.init)
    if len(A) < r:
        raise ValueError(f"lora.r={r} is above the {len(A)} directions of {name}, which "
                         f"init={config.init} takes them from")
    kind = LowRank if B is None else LowRankFromWeight
    B = A.new_zeros(rows.stop - rows.start, r) if B is None else B
    # contiguous: strides would change the rounding
    change = kind(A.contiguous(), B.contiguous(), scale, config.dropout, rows)
    if config.use_dora:
        change.lora_magnitude = nn.Parameter(row_lengths(change, base))
    return change


# ------------------------------------------------ QLoRA: the frozen weights in 4 bits (fast/nf4.py)

def quantize_base(model: nn.Module, extras: Iterable[str]) -> None:
    """Replace the frozen linear layers but the head by NF4 ones. What a change starts at is taken
    off the weight before and not quantised (PiSSA, LoftQ)."""
    for layer, module in linear_layers(model, heads=False).items():
        base = getattr(module, "base_layer", module)
        if not isinstance(base, nn.Linear) or f"{layer}.weight" in extras:
            continue
        parts = [change for change in module.modules() if isinstance(change, LowRank)]
        moved = [part for part in parts if isinstance(part, LowRankFromWeight)]
        packed = NF4Linear(base, moved and (
            torch.cat([spread(part.scale * part.initial_B, part.rows, base.out_features)
                       for part in moved], dim=1),
            torch.cat([part.initial_A for part in moved])))
        model.set_submodule(layer if base is module else f"{layer}.base_layer", packed)
        for part in parts:
            if part.lora_magnitude is not None:             # the lengths that the rows have now
                part.lora_magnitude = nn.Parameter(row_lengths(part, packed))


def weight_of(base: nn.Module) -> torch.Tensor:
    """The weight (out, in) of a layer in float32."""
    if isinstance(base, NF4Linear):
        return base.dequantize()
    if not base.weight.is_floating_point() or base.weight.shape != (base.out_features,
                                                                    base.in_features):
        raise ValueError(f"a {type(base).__name__} with {base.weight.dtype} weights cannot be read "
                         f"as DoRA, PiSSA, OLoRA and merging need; use lora.quantize=nf4")
    return base.weight.detach().float()


# ------------------------------------------------------------------------------------------------
# Several adapters. Where one trains biases or whole modules it has parameters of its own for them,
# which take the places of the base's while it computes.

@dataclass
class Adapters:
    """What a model with adapters knows of them, as `model.adapters`."""
    base_hash: str
    configs: dict[str, LoRAConfig] = field(default_factory=dict)
    active: dict[str, float] = field(default_factory=dict)                  # {adapter: its share}
    original: dict[str, nn.Parameter] = field(default_factory=dict)         # the base's, by name
    trained: dict[str, dict[str, nn.Parameter]] = field(default_factory=dict)   # each adapter's


def set_adapter(model: nn.Module, names: str | Iterable[str] | dict[str, float],
                trainable: str | Iterable[str] | None = None) -> None:
    """Choose which adapters compute, {name: share} for a linear mixture, and which train.

    The active ones train unless `trainable` says otherwise; () freezes all. Every call sets every
    parameter's requires_grad, so none is left over from before.
    """
    shares = as_shares(names)
    train = as_shares(shares if trainable is None else trainable)
    adapters = adapters_of(model, (*shares, *train), to="switch")
    for name, share in shares.items():
        if not math.isfinite(share):
            raise ValueError(f"the share of the adapter {name!r} is {share}; give a finite number")
        if adapters.configs[name].use_dora and shares != {name: 1.0}:
            raise ValueError(f"the DoRA adapter {name!r} is not linear in its factors: it computes "
                             f"alone and in full, not as {shares}")
    activate(model, shares)
    trained = {p for name in train for p in adapters.trained[name].values()}
    for key, p in model.named_parameters():
        p.requires_grad_(p in trained or any(f".lora_adapters.{name}." in key for name in train))


def activate(model: nn.Module, shares: dict[str, float]) -> None:
    """Let these adapters compute."""
    tied = tied_weights(model)
    for key, p in trained_values(model, shares).items():
        for name in (key, *(second for second, first in tied.items() if first == key)):
            owner, _, last = name.rpartition(".")
            module = model.get_submodule(owner)
            setattr(getattr(module, "base_layer", module), last, p)
    for module in (model.adapters, *adapted_layers(model).values()):
        module.active = shares


@torch.no_grad()
def trained_values(model: nn.Module, shares: dict[str, float]) -> dict[str, nn.Parameter]:
    """Biases and whole modules as these adapters have them; where they have none, the base's."""
    original, trained, now = model.adapters.original, model.adapters.trained, base_parameters(model)
    for values in (original, *trained.values()):
        for key, p in values.items():
            p.data = p.data.to(now[key])                            # the model may have moved
    found = dict(original)
    for name, share in shares.items():
        for key, p in trained[name].items():
            found[key] = p if shares == {name: 1.0} else nn.Parameter(
                found[key] + share * (p - original[key]), requires_grad=False)
    return found


@contextlib.contextmanager
def disable_lora(model: nn.Module) -> Iterator[nn.Module]:
    """The base, inside a `with`."""
    shares = adapters_of(model, to="disable them").active
    activate(model, {})
    try:
        yield model
    finally:
        activate(model, shares)


def as_shares(names: str | Iterable[str] | dict[str, float]) -> dict[str, float]:
    """One name, several, or {name: share} as {name: share}."""
    names = [names] if isinstance(names, str) else names
    return dict(names) if isinstance(names, dict) else dict.fromkeys(names, 1.0)


def adapters_of(model: nn.Module, names: Iterable[str] = (), to: str = "") -> Adapters:
    """`model.adapters`, which must know these names; none may be merged where something is `to`
    be done that cannot be done then."""
    adapters = getattr(model, "adapters", None)
    if adapters is None:
        raise ValueError("the model has no adapter; add_lora or load_lora gives it one")
    for name in names:
        if name not in adapters.configs:
            raise ValueError(f"there is no adapter {name!r}; there are "
                             f"{', '.join(adapters.configs)}")
    if to and any(layer.lora_merged is not None for layer in adapted_layers(model).values()):
        raise ValueError(f"adapters are merged into the base; unmerge_lora before you {to}")
    return adapters


# ------- Merging: one product instead of two. The base stays as it was, and comes back bit for bit.

@torch.no_grad()
def merge_lora(model: nn.Module, *inputs: Any) -> float:
    """Add the active adapters to the base's weights: in float32, rounded once.

    Prints and returns how far that moves the logits of model(*inputs), or, without inputs, the
    weights. The base is kept for `unmerge_lora`; a quantised layer becomes a plain one.
    """
    def logits() -> torch.Tensor:
        out = model(*inputs)
        out = getattr(out, "logits", out)
        return (out[0] if isinstance(out, tuple) else out).float()

    shares, training = adapters_of(model, to="merge again").active, model.training
    model.eval()
    before, moved, packed = logits() if inputs else None, 0.0, 0
    for layer in adapted_layers(model).values():
        if changes := layer.changes(shares):
            base, exact = layer.base_layer, merged_weight(layer.base_layer, changes)
            dtype = torch.float32 if isinstance(base, NF4Linear) else base.weight.dtype
            layer.lora_merged = plain_linear(base, exact.to(dtype))
            moved = max(moved, (layer.lora_merged.weight.float() - exact).abs().max().item())
            packed += isinstance(base, NF4Linear)
    if inputs:
        moved = (logits() - before).abs().max().item()
    model.train(training)
    if packed:
        say(f"merged onto the dequantised weights of {packed} layers, which are float32 now")
    say(f"merged: {'logits differ' if inputs else 'weights are rounded'} by at most {moved:.3g}")
    return moved


def merged_weight(base: nn.Module, changes: list[tuple[LowRank, float]]) -> torch.Tensor:
    """The weight W + share * s B A + ... of a layer with these changes: (out, in) float32."""
    weight = weight_of(base)
    for change, share in changes:
        A, B = (factor.float() for factor in factors(change))
        weight = weight + share * change.scale * spread(B, change.rows, len(weight)) @ A
        if change.lora_magnitude is not None:
            weight = rescaled(weight.t(), change, base).t()
    return weight


def plain_linear(base: nn.Module, weight: torch.Tensor) -> nn.Linear:
    """A linear layer with this weight (out, in) and the bias of another."""
    plain = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
    plain.weight, plain.bias = nn.Parameter(weight.contiguous(), requires_grad=False), base.bias
    return plain


def unmerge_lora(model: nn.Module) -> None:
    """Take merged adapters off again; the base is as it was, bit for bit."""
    adapters_of(model)
    layers = [layer for layer in adapted_layers(model).values() if layer.lora_merged is not None]
    if not layers:
        raise ValueError("no adapter is merged")
    for layer in layers:
        layer.lora_merged = None


def unload_lora(model: nn.Module) -> nn.Module:
    """The plain model, in place: with what is merged, else without any adapter's change. Where
    something is merged no layer stays quantised, so that all of it can be trained and saved."""
    adapters_of(model)
    layers = adapted_layers(model)
    merged = any(layer.lora_merged is not None for layer in layers.values())
    if not merged:
        activate(model, {})
    for name, layer in layers.items():
        model.set_submodule(name, layer.lora_merged or layer.base_layer)
    for name, layer in linear_layers(model).items() if merged else ():
        if isinstance(layer, NF4Linear):
            model.set_submodule(name, plain_linear(layer, layer.dequantize()))
    del model.adapters
    return model


# ------------------------------------------ Which layers: names, ends of names, regular expressions

HEADS = ("lm_head", "head", "embed_out", "output_layer", "score", "classifier")  # not all-linear


def linear_layers(model: nn.Module, heads: bool = True) -> dict[str, nn.Module]:
    """Linear layers by name, plain, quantised or adapted; at will without output heads."""
    tied = {name for pair in tied_weights(model).items() for name in pair}
    return {name: module for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, NF4Linear, LoRALinear))
            and not {"base_layer", "lora_merged"} & set(name.split("."))
            and (heads or f"{name}.weight" not in tied
                 and name.rpartition(".")[2] not in HEADS)}


def adapted_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """{name: layer} of all layers with an adapter."""
    return {name: module for name, module in model.named_modules()
            if isinstance(module, LoRALinear)}


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are no adapter's, under the names they have without adapters."""
    return {name.replace(".base_layer.", "."): p for name, p in model.named_parameters()
            if ".lora_" not in name}


def targets(model: nn.Module, config: LoRAConfig) -> dict[str, tuple[str, str, slice]]:
    """The `places` to adapt. ValueError for a choice that matches nothing or cannot be adapted."""
    spots, wanted, hits = places(model), config.target_modules, []
    for target in [wanted] if isinstance(wanted, str) else wanted:
        hits += (linear_layers(model, heads=False) if target == "all-linear" else
                 peft.choose("target_modules", [target], spots, "linear layer"))
    block = {layer: next((int(word) for word in layer.split(".") if word.isdigit()), None)
             for layer in (spots[name][0] for name in hits)}
    refuse_tied(model, [f"{layer}.weight" for layer in block])
    for number in config.layers or ():
        if number not in block.values():
            raise ValueError(f"lora.layers={config.layers}: no target is in block {number}")
    found = {name: spots[name] for layer in block for name in sorted(hits)
             if spots[name][0] == layer and (name == layer or layer not in hits)
             and (config.layers is None or block[layer] in config.layers)}
    if not found:
        raise ValueError(f"lora.target_modules={config.target_modules} and layers={config.layers} "
                         f"choose no layer; leave out what is empty")
    for setting in ("rank_pattern", "alpha_pattern"):
        peft.choose(setting, getattr(config, setting), found, "adapted layer")
    return found


def trained_parameters(model: nn.Module, config: LoRAConfig, adapted: Iterable[str]
                       ) -> dict[str, nn.Parameter]:
    """The base's own parameters that the adapter trains: biases and whole modules."""
    saved = peft.choose("modules_to_save", config.modules_to_save,
                        [name for name, _ in model.named_modules() if name], "module")
    for name, layer in ((name, layer) for name in saved for layer in adapted):
        if (layer + ".").startswith(name + "."):
            raise ValueError(f"lora.modules_to_save: {name} holds the adapted layer {layer}; leave "
                             f"one of them out")
    within, tied, found = tuple(f"{name}." for name in saved), tied_weights(model), {}
    for key, p in base_parameters(model).items():
        owner, _, last = key.rpartition(".")
        bias = config.bias == "all" or config.bias == "lora_only" and owner in adapted
        if bias and last == "bias" or key.startswith(within):
            found[key] = p
    refuse_tied(model, [key for key, first in tied.items()
                        if key.startswith(within) and first not in found])
    return found


def tied_weights(model: nn.Module) -> dict[str, str]:
    """Parameters that have an earlier name too: {"lm_head.weight": "transformer.wte.weight"}."""
    first = {p: name for name, p in model.named_parameters()}
    return {name: first[p] for name, p in model.named_parameters(remove_duplicate=False)
            if name != first[p]}


def refuse_tied(model: nn.Module, weights: Iterable[str]) -> None:
    """ValueError where one of these is another module's weight too."""
    tied = tied_weights(model)
    for names in (tied | {first: second for second, first in tied.items()}).items():
        if names[0] in weights:
            name, other = (name.removesuffix(".weight") for name in names)
            raise ValueError(f"{name} shares its weight with {other}: training or merging one "
                             f"would change the other; leave {name} out, or untie the two first")


# ---------------------------------------------------------------------- Checks, and what is printed

def check(config: LoRAConfig) -> None:
    """ValueError for a setting that cannot be."""
    for name, _, allowed, what in peft.FIELDS.values():
        value = getattr(config, name)
        if not allowed(value):
            fix = "; for full training, leave LoRA out" if name in ("r", "alpha") else ""
            raise ValueError(f"lora.{name}={value!r:.80} must be {what}{fix}")
    for name in ("init", "quantize"):
        value, allowed = getattr(config, name), get_args(get_type_hints(LoRAConfig)[name])
        if value not in allowed:
            raise ValueError(f"lora.{name}={value!r:.80} is unknown; choose {', '.join(allowed)}")
    if config.init == "loftq" and config.quantize == "none":
        raise ValueError("lora.init=loftq makes up for quantising; add lora.quantize=nf4, or take "
                         "init=pissa")


def check_addition(model: nn.Module, config: LoRAConfig, name: str) -> Adapters:
    """`model.adapters`, new ones of a plain model; ValueError where this one cannot join them."""
    adapters = (adapters_of(model, to="add an adapter") if hasattr(model, "adapters") else
                Adapters(peft.base_hash(model.named_parameters())))
    if name in adapters.configs:
        raise ValueError(f"there is an adapter {name!r} already; choose another name")
    if not name or "." in name or hasattr(nn.ModuleDict, name):
        raise ValueError(f"an adapter cannot be called {name!r}; choose another name")
    if config.quantize != "none" and any(isinstance(layer.base_layer, nn.Linear)
                                         for layer in adapted_layers(model).values()):
        raise ValueError(f"lora.quantize={config.quantize}: the base has adapters already; the "
                         f"first one says whether it is quantised")
    return adapters


def describe(model: nn.Module) -> str:
    """What is adapted, by which settings, and how much of the model trains: a line each."""
    lines, usual = [], {**vars(LoRAConfig()), "r": None, "alpha": None}
    for name in adapters_of(model).active:
        config = model.adapters.configs[name]
        found = Counter(re.sub(r"\b\d+\b", "*", full) for full in targets(model, config))
        where = ", ".join(f"{count} x {full}" for full, count in found.items())
        settings = [f"{key}={value}" for key, value in vars(config).items()
                    if key != "target_modules" and value != usual[key]]
        lines.append(f"adapter {name}: {where}; {', '.join(settings)}")
    packed = sum(module.in_features * module.out_features for module in model.modules()
                 if isinstance(module, NF4Linear))
    total = sum(p.numel() for p in model.parameters()) + packed
    train = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return "\n".join([*lines, f"trainable {train:,} of {total:,} parameters ({train / total:.2%})"])


def say(text: str) -> None:
    """Print, on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(text)


# -------------------------------------------------------- Files, in PEFT's format (formats/peft.py)

@torch.no_grad()
def save_lora(model: nn.Module, folder: str | Path,
              name: str | dict[str, float] = "default", base: str = "") -> None:
    """Write an adapter, or a mixture {name: share}, as PEFT reads it; `base` names the base.

    Every adapter becomes an ordinary LoRA: one that did not start at zero (PiSSA) has twice its
    rank, parts of a layer and mixtures the sum of their ranks.
    """
    shares = as_shares(name)
    adapters = adapters_of(model, shares)
    config, *rest = [adapters.configs[name] for name in shares]
    for other in rest:
        for key in ("bias", "modules_to_save", "use_dora", "use_rslora"):
            if getattr(other, key) != getattr(config, key) or other.use_dora:
                raise ValueError(f"adapters that differ in {key}, or are DoRA, make no single one")
    layers, magnitudes = {}, {}
    for layer, module in adapted_layers(model).items():
        if changes := module.changes(shares):
            layers[layer] = [(share * change.scale, A, spread(B, change.rows, module.out_features))
                             for change, share in changes for A, B in [factors(change)]]
        if changes and config.use_dora:                 # rows of no part keep their length
            magnitudes[layer] = weight_of(module.base_layer).square().sum(1).sqrt()
            for change, _ in changes:
                magnitudes[layer][change.rows] = change.lora_magnitude
    values = trained_values(model, shares)
    others = {key: values[key] for name in shares for key in adapters.trained[name]}
    saved = peft.choose("modules_to_save", config.modules_to_save,
                        [name for name, _ in model.named_modules() if name], "module")
    peft.write(folder, layers, magnitudes, others, {**vars(config), "modules_to_save": saved},
               linear_layers(model), tied_weights(model),
               base or getattr(model, "name_or_path", "") or None,
               {"base_hash": adapters.base_hash, "init": config.init, "quantize": config.quantize})


@torch.no_grad()
def load_lora(model: nn.Module, folder: str | Path, name: str = "default",
              trainable: bool = False) -> nn.Module:
    """Add an adapter from a folder, ours or PEFT's, and let it compute; frozen unless `trainable`.

    A plain base is quantised as it was in training. Returns the model. FileNotFoundError without
    the two files; ValueError for an adapter of another base, of other shapes, or of a kind that is
    not here.
    """
    sizes = {layer: (module.in_features, module.out_features)
             for layer, module in linear_layers(model).items()}
    fields, layers, others, notes = peft.read(
        folder, sizes, [key for key, _ in model.named_modules()], tied_weights(model))
    quantize, init = notes.get("quantize", "none"), notes.get("init")
    if quantize != "none" and init not in ("kaiming", "gaussian"):
        print(f"warning: {folder} was trained with init={init} on a base in {quantize} that its "
              f"files do not hold: logits differ; add_adapter_of(model, RUN) of run/load.py gives "
              f"those of its run", file=sys.stderr)
        quantize = "none"
    try:
        config = LoRAConfig(**fields, target_modules=tuple(layers), quantize=quantize)
        here = check_addition(model, config, name).base_hash
        if here and notes.get("base_hash", here) != here:
            base = str(notes["base"] or "unnamed")
            raise ValueError(f"it was trained on another base ({base:.80}, hash "
                             f"{notes['base_hash']!s:.8}); this model's hash is {here[:8]}")
        trained = trained_parameters(model, config, layers)
        for key in sorted(trained.keys() | others.keys()):
            if key not in trained:
                raise ValueError(f"it has a tensor {key:.200}, which is not read: only A and B of "
                                 f"linear layers, and what its bias and modules_to_save name; make "
                                 f"the adapter without it")
            if key not in others or others[key].shape != trained[key].shape:
                raise ValueError(f"it has no tensor {key} of shape {tuple(trained[key].shape)}")
        with torch.random.fork_rng(devices=[]):         # its random start is overwritten
            add_lora(model, config, name, quiet=True)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    for layer, found in layers.items():
        change = model.get_submodule(f"{layer}.lora_adapters.{name}.whole")
        for kind in ("A", "B", "magnitude")[:2 + config.use_dora]:
            getattr(change, f"lora_{kind}").copy_(found[kind])
    for key, p in model.adapters.trained[name].items():
        p.copy_(others[key])
    set_adapter(model, name, None if trainable else ())
    say(describe(model))
    return model
