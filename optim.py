"""Optimizers and learning-rate schedules.

    optimizer = make_optimizer(model, OptimConfig(), learning_rate=6e-4, weight_decay=0.1)
    lr = learning_rate(step, "cosine", max_steps=19073, warmup_steps=715, peak=6e-4, floor=6e-5)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]

AdamW: Loshchilov & Hutter 2019. LoRA+: Hayou et al. 2024, B of an adapter learns faster than A.
GaLore: Zhao et al. 2024, AdamW on gradients projected to a low rank, which needs less memory.
Muon: Jordan et al. 2024, momentum made orthogonal, with the scale of Liu et al. 2025 ("Muon is
scalable"), so that learning rates of AdamW fit. The last two are for the matrices of linear layers;
embeddings, biases and gains keep AdamW.
"""
import math
from dataclasses import dataclass
from typing import Any, Callable, Literal

import torch
import torch.distributed as dist
import torch.nn as nn


@dataclass(frozen=True)
class OptimConfig:
    """How gradients become updates. ValueError for a number out of its range."""
    optimizer: "Literal[tuple(RULES)]" = "adamw"  # how matrices are updated
    beta1: float = 0.9  # AdamW: decay of the mean of gradients
    beta2: float = 0.95  # AdamW: decay of their mean square (GPT-3's; PyTorch has 0.999)
    eps: float = 1e-8  # AdamW: added to the root of the mean square
    embedding_lr: float = 1.0  # learning rate of the embeddings, over that of the rest
    lora_plus_ratio: float = 1.0  # LoRA+: learning rate of B over that of A; the paper's choice is
        # 16
    galore_rank: int = 128  # GaLore: rank of the projected gradients
    galore_every: int = 200  # GaLore: steps between projections
    galore_scale: float = 0.25  # GaLore: factor of its updates
    muon_momentum: float = 0.95  # Muon: decay of the mean of gradients
    muon_warmup: int = 0  # Muon: steps in which that decay rises from 0.85
    muon_weight_decay: float | None = None  # Muon: of its matrices; none: weight_decay
    power: float = 1.0  # exponent of the polynomial schedule
    decay_share: float = 0.2  # share of the steps in which the wsd schedule decays
    decay_to: float = 0.01  # what the exponential schedule ends at, as a share of the way from the
        # floor to the peak

    def __post_init__(self):
        for name in ("beta1", "beta2", "muon_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optim.{name}={getattr(self, name)} is not in [0, 1)")
        for name in ("embedding_lr", "lora_plus_ratio", "galore_rank", "galore_every",
                     "galore_scale"):
            if getattr(self, name) <= 0:
                raise ValueError(f"optim.{name}={getattr(self, name)} must be positive")
        for name in ("eps", "muon_warmup", "muon_weight_decay", "power"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"optim.{name}={getattr(self, name)} must be at least 0")
        if self.optimizer not in RULES:
            *names, last = RULES
            raise ValueError(f"optim.optimizer={self.optimizer!r} is unknown; choose "
                             f"{', '.join(names)} or {last}")
        for name in ("decay_share", "decay_to"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"optim.{name}={getattr(self, name)} is not in (0, 1]")


def parameter_groups(model: nn.Module, weight_decay: float, lora_plus_ratio: float = 1.0,
                     embedding_lr: float = 1.0) -> list[dict[str, Any]]:
    """Trainable parameters: matrices and embeddings decay, biases and gains not.

    A group's `lr_scale` is what the learning rate is multiplied by: 1, the ratio of LoRA+ for the B
    of adapters, or that of embeddings, which a tied head shares.
    """
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    found: dict[tuple[bool, float], list[nn.Parameter]] = {(True, 1.0): [], (False, 1.0): []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            scale = lora_plus_ratio if name.endswith("lora_B") else 1.0
            scale = embedding_lr if p in embeddings else scale
            found.setdefault((p.dim() >= 2, scale), []).append(p)
    return [{"params": params, "weight_decay": weight_decay if decays else 0.0, "lr_scale": scale}
            for (decays, scale), params in found.items()]


def matrices(model: nn.Module) -> dict[nn.Parameter, str]:
    """The weights of linear layers, with the layer's name, but that of a head tied to embeddings."""
    linear = {module.weight: name.rpartition(".")[2] for name, module in model.named_modules()
              if isinstance(module, nn.Linear)}
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            linear.pop(module.weight, None)
    return linear


# Layers whose rows are several matrices: queries, keys and values. Muon takes each by itself.
FUSED = {"c_attn": 3}


def make_optimizer(model: nn.Module, config: OptimConfig, learning_rate: float,
                   weight_decay: float, dtype: torch.dtype = torch.float32
                   ) -> torch.optim.Optimizer:
    """The optimizer of a model's trainable parameters: PyTorch's AdamW, or `ByRule`.

    Its `lr` are to be set before every step, as at the head of this file. dtype: of the model's
    matrix products, and of Muon's where it is bfloat16.
    """
    groups = parameter_groups(model, weight_decay, config.lora_plus_ratio, config.embedding_lr)
    for group in groups:
        group["lr"] = learning_rate * group["lr_scale"]
    if config.optimizer == "adamw":     # fused: one kernel updates all parameters of a group
        return torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.eps,
                                 fused=True)
    linear, split = matrices(model), []     # the same parameters in the same order, matrices apart
    for group in groups:
        for rule, wanted in ((config.optimizer, True), ("adamw", False)):
            params = [p for p in group["params"] if (p in linear) == wanted]
            if params:
                split.append({**group, "params": params, "rule": rule})
                if rule == "muon" and config.muon_weight_decay is not None:
                    split[-1]["weight_decay"] = config.muon_weight_decay
    parts = {p: FUSED[name] for p, name in linear.items() if name in FUSED}
    return ByRule(split, config, parts, dtype)


class ByRule(torch.optim.AdamW):
    """PyTorch's AdamW, but groups with another `rule` take their updates from one of RULES.

    All that a rule remembers is in the state, so saving and loading it continues exactly.
    `found_inf` is as in PyTorch's: 1, on the device, for a step that changes nothing.
    """
    found_inf = torch.zeros(())

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig,
                 parts: dict[nn.Parameter, int], dtype: torch.dtype):
        super().__init__(groups, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
        self.config, self.parts, self.dtype = config, parts, dtype

    def __setstate__(self, state: dict[str, Any]) -> None:
        torch.optim.Optimizer.__setstate__(self, state)     # AdamW's looks for a step in each state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """p -= lr * (weight_decay * p + update), for each parameter that has a gradient."""
        skip, groups = self.found_inf > 0, self.param_groups
        for group in groups:
            if group["rule"] == "adamw":
                continue
            params = [p for p in group["params"] if p.grad is not None]
            updates = [RULES[group["rule"]](p.grad, self.state[p], self.config, skip)
                       for p in params]
            if group["rule"] == "muon":                 # all at once
                updates = orthogonal(updates, [self.parts.get(p, 1) for p in params], self.dtype)
            decay = torch.where(skip, 1.0, 1 - group["lr"] * group["weight_decay"])
            for p, update in zip(params, updates):
                p.mul_(decay)
                p.sub_(torch.where(skip, 0.0, update), alpha=group["lr"])
        self.param_groups = [group for group in groups if group["rule"] == "adamw"]
        super().step()
        self.param_groups = groups


def follow(mean: torch.Tensor, value: torch.Tensor, decay: float,
           skip: torch.Tensor) -> torch.Tensor:
    """Move a running mean, in place, towards a value; a value to `skip` may be NaN."""
    return mean.lerp_(torch.where(skip, mean, value), 1 - decay)


# A rule's arguments: a parameter's gradient, what is remembered of the parameter, the settings, and
# whether to `skip`, a bool on the device: the state then stays, and the update is not used. To ask
# for its value would be to wait for the device in each step.

def adamw(gradient: torch.Tensor, state: dict[str, Any], config: OptimConfig,
          skip: torch.Tensor) -> torch.Tensor:
    """The mean of gradients over the root of their mean square, both without bias: an update of
    the gradient's shape, of size 1 or so."""
    if "mean" not in state:
        state["mean"], state["square"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
        state["steps"] = torch.zeros((), device=gradient.device)
    mean = follow(state["mean"], gradient, config.beta1, skip)
    square = follow(state["square"], gradient.square(), config.beta2, skip)
    steps = state["steps"].add_(~skip)
    steps = steps.to(torch.float32 if steps.device.type == "mps" else torch.float64)
    root = (square / (1 - config.beta2 ** steps)).sqrt_().add_(config.eps)
    return mean / (1 - config.beta1 ** steps) / root


def galore(gradient: torch.Tensor, state: dict[str, Any], config: OptimConfig,
           skip: torch.Tensor) -> torch.Tensor:
    """AdamW on the gradient's part in its `galore_rank` largest singular directions.

    Those of the shorter side are taken, anew every `galore_every` steps; the means stay. Only then
    is the device waited for, as the decomposition does anyway.
    """
    wide = gradient.size(0) <= gradient.size(1)
    if state.get("age", 0) % config.galore_every == 0:
        if skip:
            return torch.zeros_like(gradient)
        U, _, V = torch.linalg.svd(gradient.float(), full_matrices=False)
        basis = U[:, :config.galore_rank] if wide else V[:config.galore_rank].t()
        state["basis"] = basis.to(gradient.dtype).contiguous()      # (shorter side, R)
    state["age"], basis = state.get("age", 0) + 1, state["basis"]
    if wide:
        return config.galore_scale * basis @ adamw(basis.t() @ gradient, state, config, skip)
    return config.galore_scale * adamw(gradient @ basis, state, config, skip) @ basis.t()


def muon(gradient: torch.Tensor, state: dict[str, Any], config: OptimConfig,
         skip: torch.Tensor) -> torch.Tensor:
    """The mean of gradients with Nesterov's step, of which `orthogonal` makes Muon's update."""
    if "mean" not in state:
        state["mean"] = torch.zeros_like(gradient)
    momentum: Any = config.muon_momentum
    if config.muon_warmup:
        state.setdefault("steps", torch.zeros((), device=gradient.device))
        share = (state["steps"].add_(~skip) / config.muon_warmup).clamp(max=1)
        momentum = 0.85 + (momentum - 0.85) * share
    mean = follow(state["mean"], gradient, momentum, skip)
    return gradient.lerp(mean, momentum)


def orthogonal(matrices: list[torch.Tensor], parts: list[int],
               dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Of each matrix (n, m), or each of its `parts` of rows, roughly the nearest orthogonal one.

    Its entries have a root mean square of 1 / sqrt(max(n, m)); it is brought to 0.2, that of
    AdamW's updates. Those of one shape are one stack, and each rank computes its share of it: the
    ranks have the same gradients. What FSDP has split is put together, all at once, and split
    again.
    """
    split, matrices = matrices, [getattr(x, "full_tensor", lambda x=x: x)() for x in matrices]
    pieces = [piece for matrix, count in zip(matrices, parts) for piece in matrix.chunk(count)]
    wide = [piece if piece.size(0) <= piece.size(1) else piece.t() for piece in pieces]
    for shape in dict.fromkeys(x.shape for x in wide):
        numbers = [i for i, x in enumerate(wide) if x.shape == shape]
        found = five_steps_on_all_ranks([wide[i] for i in numbers], dtype)
        for i, x in zip(numbers, found):
            x = x.to(pieces[i].dtype) * (0.2 * math.sqrt(max(shape)))
            pieces[i] = x if x.shape == pieces[i].shape else x.t()
    left = iter(pieces)
    return [split_like(torch.cat([next(left) for _ in range(count)]), matrix)
            for count, matrix in zip(parts, split)]


def split_like(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that all have whole, where `like` is split over them."""
    if not hasattr(like, "full_tensor"):
        return whole
    from torch.distributed.tensor import distribute_tensor          # slow to import
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def five_steps_on_all_ranks(matrices: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """`five_steps` of all these in one stack, (k, n, m), whose first axis the ranks divide."""
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if ranks == 1:
        return five_steps(torch.stack(matrices), dtype)
    share = -(-len(matrices) // ranks)
    first = share * dist.get_rank()
    padded = matrices + ranks * share * matrices[:1]
    found = five_steps(torch.stack(padded[first:first + share]), dtype)
    whole = found.new_empty(ranks * share, *found.shape[1:])
    dist.all_gather_into_tensor(whole, found.contiguous())
    return whole[:len(matrices)]


def five_steps(x: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Of a stack (k, n, m), n <= m, matrices whose singular values are all near 1.

    P5 ... P1 X, where each P is a polynomial of the X X^T that it finds. In bfloat16 on a GPU and
    where dtype says so, as Muon's authors do. The P commute, so that of wide matrices in float32
    all is done with (n, n): half the time at m = 4 n. In bfloat16 the squares of small singular
    values would be lost.
    """
    lower = x.is_cuda or dtype == torch.bfloat16
    x = x.to(torch.bfloat16) if lower else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    if lower or x.size(2) < 2 * x.size(1):
        for _ in range(5):
            x = newton_schulz(x @ x.mT) @ x
        return x
    square = x @ x.mT                                               # (k, n, n)
    product = factor = newton_schulz(square)
    for _ in range(4):
        square = factor @ square @ factor                           # of P X it is P X X^T P
        factor = newton_schulz(square)
        product = factor @ product
    return product @ x


def newton_schulz(square: torch.Tensor) -> torch.Tensor:
    """What a step towards an orthogonal matrix multiplies X by: of X X^T (k, n, n) the P, of the
    same shape, by which a singular value s of X becomes 3.4445 s - 4.7750 s^3 + 2.0315 s^5."""
    factor = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
    factor.diagonal(dim1=1, dim2=2).add_(3.4445)
    return factor


# What OptimConfig.optimizer may be: one more is a function like these and a name here.
RULES = {"adamw": adamw, "galore": galore, "muon": muon}


def take_step(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
              skip: torch.Tensor) -> None:
    """The optimizer's step, except where `skip` (a bool on the device) says not to. The gradients
    are unscaled."""
    optimizer.found_inf = skip.float()                  # read on the device: no wait for it
    if skip.device.type != "mps" or not skip:           # PyTorch's kernel there does not read it
        optimizer.step()
    scaler.update()                                     # float16: it learns from overflows


# A schedule maps the share of training that is done after warmup, 0..1, to a share of the way from
# the floor (0) to the peak (1).
SCHEDULES: dict[str, Callable[[float, OptimConfig], float]] = {
    "cosine": lambda done, config: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done, config: 1 - done,
    "constant": lambda done, config: 1.0,
    # warmup-stable-decay (Hu et al. 2024, MiniCPM): constant, then linear in the last decay_share
    "wsd": lambda done, config: min(1.0, (1 - done) / config.decay_share),
    "polynomial": lambda done, config: (1 - done) ** config.power,
    # the same factor every step, where the floor is 0
    "exponential": lambda done, config: config.decay_to ** done,
}
# Settings that are read by one optimizer or schedule, or for adapters, alone.
READ_BY = {"galore_rank": "galore", "galore_every": "galore", "galore_scale": "galore",
           "muon_momentum": "muon", "muon_warmup": "muon", "muon_weight_decay": "muon",
           "decay_share": "wsd", "power": "polynomial", "decay_to": "exponential",
           "lora_plus_ratio": "lora"}


def learning_rate(step: int, schedule: str, max_steps: int, warmup_steps: int, peak: float,
                  floor: float, config: OptimConfig = OptimConfig()) -> float:
    """The learning rate of step 0 .. max_steps - 1: linear warmup to `peak`, then the schedule.

    Warmup never starts at zero, which would waste a step: step s of w warmup steps has
    peak * (s + 1) / w, and the step after the last would reach the schedule's end.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r} is unknown; choose {', '.join(SCHEDULES)}")
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return floor + (peak - floor) * SCHEDULES[schedule](min(1.0, done), config)
