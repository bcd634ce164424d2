"""LoRA: fine-tuning by low-rank changes of frozen linear layers.

    model = add_lora(model, LoRAConfig(r=8, alpha=16))      # in place; only the adapter trains
    save_lora(model, "adapter")                             # PEFT's format, and back:
    load_lora(model, "adapter", name="other")
    set_adapter(model, {"default": 0.5, "other": 0.5})      # which ones compute
    with disable_lora(model): ...                           # the base
    merge_lora(model, idx);  unmerge_lora(model);  plain = unload_lora(model)

`python -m run.export` writes a base with an adapter merged in.

A layer W (out, in) becomes h = W x + s (B A - B0 A0) dropout(x) with A (R, in) and B (out, R),
rank R and scale s = alpha / R. B starts at zero and there is no B0 A0, except where an init starts
from the weight's own directions: then B0 A0 is where B A started. So the model always starts as the
base (as NF4 holds it, where that is asked for), and the base's weights are never edited.

The layer and its variants are in lora_layer.py, the choice of layers in lora_targets.py, switching
and checkpoints in lora_adapters.py, PEFT's format in lora_files.py, NF4 in quant.py.

Four choices: scale (use_rslora), init, forward (use_dora), weights of the base (quantize).
Hu et al. 2022, "LoRA"; Kalajdzievski 2023, "rsLoRA"; Liu et al. 2024, "DoRA"; Meng et al. 2024,
"PiSSA"; Büyükakyüz 2024, "OLoRA"; Li et al. 2024, "LoftQ"; Dettmers et al. 2023, "QLoRA".
LoRA+ is a setting of optim.py.
"""
import dataclasses
from pathlib import Path
from typing import Any, Iterable

import torch
import torch.nn as nn
from torch.nn import functional as F

from formats import peft as lora_files
from lora_adapters import (Adapters, activate, adapted_layers, adapters_of, base_hash,
                           base_parameters, describe, disable_lora, load_trainable_state,
                           refuse_if_merged, say, set_adapter, trainable_state)
from formats.peft import save_lora
from lora_layer import INITS, RANDOM, LoRAConfig, LoRALinear, LowRank, weight_of
from lora_targets import (FUSED, full_names, is_head, linear_layers, saved_modules, summary,
                          targets, tied_weights)
from fast.nf4 import NF4Linear

__all__ = ["LoRAConfig", "add_lora", "merge_lora", "unmerge_lora", "unload_lora", "save_lora",
           "load_lora", "set_adapter", "disable_lora", "describe", "trainable_state",
           "load_trainable_state"]


def add_lora(model: nn.Module, config: LoRAConfig, name: str = "default",
             quiet: bool = False) -> nn.Module:
    """Give the model an adapter, in place: it computes and trains, everything else is frozen.

    Returns the model. ValueError where no layer matches, the name is taken, or a layer cannot have
    one; then nothing has changed.
    """
    _attach(model, config, name)
    if not quiet:
        say(describe(model))
    return model


def _attach(model: nn.Module, config: LoRAConfig, name: str) -> None:
    found, linear, tied = targets(model, config), linear_layers(model), tied_weights(model)
    saved = saved_modules(model, config, found)
    adapters = getattr(model, "lora", None) or Adapters(base_hash(model))
    if name in adapters.configs:
        raise ValueError(f"there is an adapter {name!r} already; choose another name")
    if not name or "." in name or hasattr(nn.ModuleDict, name):
        raise ValueError(f"an adapter cannot be called {name!r}; choose another name")
    refuse_if_merged(model, "add an adapter")
    if config.quantize != "none" and any(isinstance(getattr(linear[layer], "base_layer", None),
                                                    nn.Linear) for layer in found):
        raise ValueError(f"lora.quantize={config.quantize}: the base has adapters already; the "
                         f"first one says whether it is quantised")
    extras = _trained_names(model, config, found, saved)
    made = {layer: _factors(linear[layer], layer, parts, config) for layer, parts in found.items()}
    if config.quantize == "nf4":
        for layer, module in linear.items():
            inside = any((layer + ".").startswith(other + ".") for other in saved)
            if isinstance(module, nn.Linear) and not is_head(layer, tied) and not inside:
                model.set_submodule(layer, NF4Linear(module, _taken_off(module, made.get(layer))))
    for layer, parts in made.items():
        module = model.get_submodule(layer)
        if not isinstance(module, LoRALinear):
            module = LoRALinear(module).train(module.training)
            model.set_submodule(layer, module)
        module.lora_adapters[name] = nn.ModuleDict({
            part: LowRank(module.base_layer, A, B, scale, config, start)
            for part, (A, B, scale, start) in parts.items()}).train(module.training)
    model.lora = adapters
    adapters.configs[name] = config
    base = base_parameters(model)
    for key in extras:
        adapters.original.setdefault(key, base[key].detach().clone())
    adapters.trained[name] = {key: adapters.original[key].clone() for key in extras}
    set_adapter(model, name)


def _trained_names(model: nn.Module, config: LoRAConfig, found: Iterable[str],
                   saved: Iterable[str]) -> list[str]:
    """The base's own parameters that the adapter trains: biases and whole modules."""
    names = []
    for key in base_parameters(model):
        owner, _, last = key.rpartition(".")
        bias = config.bias == "all" or config.bias == "lora_only" and owner in found
        if last == "bias" and bias or any(key.startswith(other + ".") for other in saved):
            names.append(key)
    return names


def _factors(layer: nn.Module, name: str, parts: tuple[str, ...], config: LoRAConfig):
    """Where the change of each part of a layer starts: {part: (A, B, scale, first row)}."""
    base, fused, made = getattr(layer, "base_layer", layer), FUSED.get(name.rpartition(".")[2]), {}
    device = next(tensor.device for tensor in (*base.parameters(), *base.buffers()))
    for part, full in zip(parts, full_names(name, parts)):
        rows = base.out_features // (1 if part == "whole" else len(fused))
        start = 0 if part == "whole" else fused.index(part) * rows
        r, scale = config.rank(full), config.scale(full)
        reads = config.use_dora or config.init not in RANDOM
        if not reads:                                           # the weight may be packed
            weight = torch.empty((), device=device).expand(rows, base.in_features)
        elif config.init not in RANDOM and r > min(rows, base.in_features):
            raise ValueError(f"lora.r={r} is above the {min(rows, base.in_features)} directions of "
                             f"{full}, which init={config.init} takes them from")
        else:
            weight = weight_of(base)[start:start + rows]
        made[part] = *INITS[config.init](weight, r, scale, config.init), scale, start
    return made


def _taken_off(linear: nn.Linear, parts: dict[str, tuple] | None):
    """What a layer's adapter starts with, to be taken off the weight before quantising."""
    if not parts or not any(B.any() for _, B, _, _ in parts.values()):
        return None
    ups = [F.pad(scale * B, (0, 0, start, linear.out_features - start - len(B)))
           for _, B, scale, start in parts.values()]
    return torch.cat(ups, dim=1), torch.cat([A for A, *_ in parts.values()])


# ------------------------------------------------------------------------------------------------
# Merging

@torch.no_grad()
def merge_lora(model: nn.Module, *inputs: Any) -> float:
    """Add the active adapters to the base's weights: in float32, rounded once.

    Prints and returns how far that moves the logits of model(*inputs), or, without inputs, the
    weights. The base is kept for `unmerge_lora`; a quantised layer becomes a plain one.
    """
    adapters_of(model)
    refuse_if_merged(model, "merge again")
    before, rounding, packed = _logits(model, inputs), 0.0, 0
    for layer in adapted_layers(model).values():
        if not layer.active:
            continue
        base = layer.base_layer
        weight = weight_of(base)
        for name, share in layer.active:
            for part in layer.lora_adapters[name].values():
                weight = part.change(weight, base, share)
        dtype = torch.float32 if isinstance(base, NF4Linear) else base.weight.dtype
        merged = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
        merged.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        merged.bias = base.bias
        packed += isinstance(base, NF4Linear)
        rounding = max(rounding, (merged.weight.float() - weight).abs().max().item())
        layer.base_layer, layer.lora_unmerged = merged.train(layer.training), base
    if packed:
        say(f"merged onto the dequantised weights of {packed} layers, which are float32 now")
    if not inputs:
        say(f"merged: weights are rounded by at most {rounding:.3g}")
        return rounding
    difference = (_logits(model, inputs) - before).abs().max().item()
    say(f"merged: logits differ by at most {difference:.3g}")
    return difference


@torch.no_grad()
def _logits(model: nn.Module, inputs: tuple) -> torch.Tensor | None:
    if not inputs:
        return None
    training = model.training
    out = model.eval()(*inputs)
    model.train(training)
    out = getattr(out, "logits", out)
    return (out[0] if isinstance(out, tuple) else out).float()


def unmerge_lora(model: nn.Module) -> None:
    """Take merged adapters off again; the base comes back bit for bit, for it was kept."""
    adapters_of(model)
    layers = [layer for layer in adapted_layers(model).values() if layer.lora_unmerged is not None]
    if not layers:
        raise ValueError("no adapter is merged")
    for layer in layers:
        layer.base_layer, layer.lora_unmerged = layer.lora_unmerged, None


def unload_lora(model: nn.Module) -> nn.Module:
    """The plain model, in place: with what is merged, else without any adapter's change."""
    adapters_of(model)
    layers = adapted_layers(model)
    if all(layer.lora_unmerged is None for layer in layers.values()):
        activate(model, {})
    for name, layer in layers.items():
        model.set_submodule(name, layer.base_layer)
    del model.lora
    return model


# ------------------------------------------------------------------------------------------------
# Files and command line

@torch.no_grad()
def load_lora(model: nn.Module, folder: str | Path, name: str = "default",
              trainable: bool = False) -> nn.Module:
    """Add an adapter from a folder, ours or PEFT's, and let it compute; frozen unless `trainable`.

    Returns the model. FileNotFoundError without the two files; ValueError for an adapter of another
    base, of other shapes, or of a kind that is not here.
    """
    settings, layers, others, notes = lora_files.read(folder)
    here = model.lora.base_hash if getattr(model, "lora", None) else base_hash(model)
    if here and notes.get("base_hash", here) != here:
        raise ValueError(f"{folder} was trained on another base "
                         f"({settings.get('base_model_name_or_path') or 'unnamed'}, hash "
                         f"{notes['base_hash'][:8]}); this model's hash is {here[:8]}")
    config = LoRAConfig(**lora_files.config_settings(settings, layers))
    linear = linear_layers(model)
    # PEFT takes every module whose name ends so, even within a word
    config = dataclasses.replace(config, modules_to_save=tuple(
        name for name, _ in model.named_modules() if name.endswith(config.modules_to_save or "\0")))
    for layer, found in layers.items():
        if layer not in linear:
            raise ValueError(f"{folder} adapts {layer}, which this model does not have as a linear "
                             f"layer")
        r, module = config.rank(layer), linear[layer]
        shapes = tuple(found["A"].shape), tuple(found["B"].shape)
        if shapes != ((r, module.in_features), (module.out_features, r)):
            raise ValueError(f"{folder}: A and B of {layer} are {shapes[0]} and {shapes[1]}; rank "
                             f"{r} and the model ask for {(r, module.in_features)} and "
                             f"{(module.out_features, r)}")
    base = base_parameters(model)
    extras = _trained_names(model, config, layers, config.modules_to_save)
    for key in extras:
        if key not in others or others[key].shape != base[key].shape:
            raise ValueError(f"{folder} has no tensor {key} of shape {tuple(base[key].shape)}")
    with torch.random.fork_rng(devices=[]):             # its random start is overwritten
        _attach(model, config, name)
    for layer, found in layers.items():
        part = model.get_submodule(layer).lora_adapters[name]["whole"]
        part.lora_A.copy_(found["A"])
        part.lora_B.copy_(found["B"])
        if part.lora_magnitude is not None:
            part.lora_magnitude.copy_(found["magnitude"])
    for key in extras:
        base[key].copy_(others[key])
    set_adapter(model, name, None if trainable else ())
    say(describe(model))
    return model
