"""The adapters of one model: which compute, which train, what a checkpoint keeps of them.

    set_adapter(model, "a")                             # a computes and trains
    set_adapter(model, {"a": 0.5, "b": 0.5}, ())        # a mixture computes, nothing trains
    with disable_lora(model): ...                       # the base
    state = trainable_state(model);  load_trainable_state(model, state)

Biases and modules_to_save train in place, in the base's own parameters; the values that the base
has, and those of adapters that do not compute, are kept in `model.lora` and change places.
"""
import contextlib
import hashlib
import os
from dataclasses import dataclass, field
from typing import Iterable, Iterator, Mapping

import torch
import torch.nn as nn

from lora_layer import LoRAConfig, LoRALinear
from lora_targets import as_tuple, full_names, summary
from fast.nf4 import NF4Linear


@dataclass
class Adapters:
    """What a model with adapters knows of them, as `model.lora`."""
    base_hash: str
    configs: dict[str, LoRAConfig] = field(default_factory=dict)
    active: dict[str, float] = field(default_factory=dict)
    # Biases and modules_to_save train in place: {adapter: {name: its value}}, and the base's values
    trained: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    original: dict[str, torch.Tensor] = field(default_factory=dict)


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are no adapter's, under the names they have without adapters."""
    return {name.replace(".base_layer.", "."): p for name, p in model.named_parameters()
            if ".lora_" not in name}


def base_hash(model: nn.Module) -> str:
    """Identifies a base by names, shapes and values; empty for a model without values."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        if p.is_meta:
            return ""
        digest.update(f"{name} {tuple(p.shape)} {p.dtype}".encode())
        digest.update(p.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def adapted_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """{name: layer} of all layers with an adapter."""
    return {name: module for name, module in model.named_modules()
            if isinstance(module, LoRALinear)}


def adapters_of(model: nn.Module, names: Iterable[str] = ()) -> Adapters:
    """`model.lora`, which must know these adapters."""
    if getattr(model, "lora", None) is None:
        raise ValueError("the model has no adapter; add_lora or load_lora gives it one")
    for name in names:
        if name not in model.lora.configs:
            raise ValueError(f"there is no adapter {name!r}; there are "
                             f"{', '.join(model.lora.configs)}")
    return model.lora


def refuse_if_merged(model: nn.Module, what: str) -> None:
    """ValueError where adapters are merged; `what` says what was to be done."""
    if any(layer.lora_unmerged is not None for layer in adapted_layers(model).values()):
        raise ValueError(f"adapters are merged into the base; unmerge_lora before you {what}")


def as_shares(names: str | Iterable[str] | Mapping[str, float]) -> dict[str, float]:
    """One name, several, or {name: share} as {name: share}."""
    if isinstance(names, Mapping):
        return dict(names)
    return dict.fromkeys(as_tuple(names), 1.0)


def set_adapter(model: nn.Module, names: str | Iterable[str] | Mapping[str, float],
                trainable: str | Iterable[str] | None = None) -> None:
    """Choose which adapters compute, {name: share} for a linear mixture, and which train.

    The active ones train unless `trainable` says otherwise; () freezes all. Every call sets every
    parameter's requires_grad, so none is left over from before.
    """
    shares = as_shares(names)
    train = tuple(shares) if trainable is None else as_tuple(trainable)
    adapters = adapters_of(model, (*shares, *train))
    refuse_if_merged(model, "switch")
    for name in shares:
        if adapters.configs[name].use_dora and shares != {name: 1.0}:
            raise ValueError(f"the DoRA adapter {name!r} is not linear in its factors: it computes "
                             f"alone and in full, not as {shares}")
    activate(model, shares)
    for p in model.parameters():
        p.requires_grad_(False)
    for layer in adapted_layers(model).values():
        for name in set(train) & set(layer.lora_adapters):
            layer.lora_adapters[name].requires_grad_(True)
    base = base_parameters(model)
    for name in train:
        for key in adapters.trained[name] if shares == {name: 1.0} else ():
            base[key].requires_grad_(True)


def activate(model: nn.Module, shares: dict[str, float]) -> None:
    """Let these adapters compute. Biases and modules in training change places with the base's."""
    adapters, base = model.lora, base_parameters(model)
    for key, value in trained_values(model, adapters.active).items():
        if list(adapters.active.values()) == [1.0]:
            adapters.trained[next(iter(adapters.active))][key] = value.clone()
    for key, value in trained_values(model, shares, live=False).items():
        base[key].data.copy_(value)
    adapters.active = shares
    for layer in adapted_layers(model).values():
        layer.active = tuple((name, share) for name, share in shares.items()
                             if name in layer.lora_adapters)


def trained_values(model: nn.Module, shares: dict[str, float], live: bool = True):
    """Biases and modules in training as these adapters have them."""
    adapters, base = model.lora, base_parameters(model)
    if live and shares == adapters.active:
        keys = [key for name in shares for key in adapters.trained[name]]
        return {key: base[key].detach() for key in keys}
    values = dict(adapters.original)
    for name, share in shares.items():
        for key, value in adapters.trained[name].items():
            start = adapters.original[key].to(value.device)
            values[key] = value if share == 1 and len(shares) == 1 else \
                values[key].to(value.device) + share * (value - start)
    return values


@contextlib.contextmanager
def disable_lora(model: nn.Module) -> Iterator[nn.Module]:
    """The base, inside a `with`."""
    shares = adapters_of(model).active
    refuse_if_merged(model, "disable them")
    activate(model, {})
    try:
        yield model
    finally:
        activate(model, shares)


def describe(model: nn.Module) -> str:
    """What is adapted and how much of the model trains, in two lines."""
    adapters, layers = adapters_of(model), adapted_layers(model)
    lines = []
    for name in adapters.active:
        parts = [(full, part) for layer, module in layers.items() if name in module.lora_adapters
                 for full, part in zip(full_names(layer, tuple(module.lora_adapters[name])),
                                       module.lora_adapters[name].values())]
        ranks = sorted({len(part.lora_A) for _, part in parts})
        scales = sorted({part.scale for _, part in parts})
        config = adapters.configs[name]
        lines.append(f"adapter {name}: {summary([full for full, _ in parts])}; rank "
                     f"{', '.join(map(str, ranks))}, scale {', '.join(f'{s:.4g}' for s in scales)} "
                     f"(alpha / {'sqrt(r)' if config.use_rslora else 'r'}), init {config.init}"
                     + (", DoRA" if config.use_dora else "") + (
                         f", base in {config.quantize}" if config.quantize != "none" else ""))
    packed = sum(module.in_features * module.out_features for module in model.modules()
                 if isinstance(module, NF4Linear))
    total = sum(p.numel() for p in model.parameters()) + packed
    train = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return "\n".join([*lines, f"trainable {train:,} of {total:,} parameters ({train / total:.2%})"])


def say(text: str) -> None:
    """Print, on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(text)


# ------------------------------------------------------------------------------------------------
# What training changes, for a checkpoint

def trainable_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """All that makes this run's model out of its base, by the names of state_dict.

    That is the adapter, trained biases and modules and, where the base was quantised without what
    the adapter started with, the codes: a decomposition may differ on another machine.
    """
    adapters = adapters_of(model)
    if len(adapters.configs) > 1:
        raise ValueError(f"a run trains one adapter; this model has {', '.join(adapters.configs)}")
    trained = {key for keys in adapters.trained.values() for key in keys}
    split = {f"{name}.base_layer." for name, layer in adapted_layers(model).items()
             if getattr(layer.base_layer, "low_A", None) is not None}
    return {key: tensor.detach() for key, tensor in model.state_dict().items()
            if ".lora_adapters." in key or key.replace(".base_layer.", ".") in trained
            or any(key.startswith(start) for start in split)}


def load_trainable_state(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Put a `trainable_state` back into a model with the same adapter."""
    ours = trainable_state(model)
    for key in (*ours, *state):
        if key not in state or key not in ours:
            where = "the checkpoint" if key not in state else "this model's adapter"
            raise ValueError(f"{where} has no tensor {key!r}; the run has other lora settings")
        if ours[key].shape != state[key].shape:
            raise ValueError(f"{key} is {tuple(state[key].shape)} in the checkpoint and "
                             f"{tuple(ours[key].shape)} here; the run has other lora settings")
    for key, tensor in ours.items():
        tensor.copy_(state[key])
    for layer in adapted_layers(model).values():        # its codes may have changed
        for part in layer.modules():
            if getattr(part, "weight_square", None) is not None:
                part.weigh(layer.base_layer)
