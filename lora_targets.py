"""Which layers of a model an adapter goes to.

    targets(model, config)      # {"transformer.h.0.attn.c_attn": ("whole",), ...}

Every choice that matches nothing, or something that cannot be adapted, is a ValueError.
"""
import difflib
import re
from typing import Any, Iterable

import torch.nn as nn

from fast.nf4 import NF4Linear

FUSED = {"c_attn": ("q", "k", "v")}     # layers that compute several things: c_attn.q is a third
HEADS = ("lm_head", "head", "embed_out", "output_layer", "score", "classifier")  # not all-linear
INSIDE = {"base_layer", "lora_unmerged"}                # what an adapted layer holds


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers by name, plain, quantised or adapted."""
    return {name: module for name, module in model.named_modules()
            if (isinstance(module, (nn.Linear, NF4Linear)) or hasattr(module, "lora_adapters"))
            and not INSIDE & set(name.split("."))}


def tied_weights(model: nn.Module) -> dict[str, str]:
    """Modules that share a weight with another one: {"lm_head": "transformer.wte", ...}."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module._parameters.get("weight"), nn.Parameter):
            users.setdefault(id(module.weight), []).append(name)
    return {a: b for names in users.values() for a in names for b in names if a != b}


def as_tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    """A name as a tuple of one."""
    return (names,) if isinstance(names, str) else tuple(names)


def matches(target: str, name: str) -> bool:
    """Whether a target is a module's name, the end of it after a dot, or a regex of all of it."""
    if name == target or name.endswith("." + target):
        return True
    try:
        return re.fullmatch(target, name) is not None
    except re.error as error:
        raise ValueError(f"{target!r} is neither a module nor a regular expression: {error}") \
            from None


def targets(model: nn.Module, config: Any) -> dict[str, tuple[str, ...]]:
    """The layers to adapt, by name, and which parts of each: ("whole",) or ("q", "v")."""
    linear, tied = linear_layers(model), tied_weights(model)
    found: dict[str, tuple[str, ...]] = {}
    for target in as_tuple(config.target_modules):
        hits = {}
        for name in linear:
            last = name.rpartition(".")[2]
            if target == "all-linear":
                parts = () if is_head(name, tied) else ("whole",)
            elif matches(target, name):
                parts = ("whole",)
            else:
                parts = tuple(part for part in FUSED.get(last, ())
                              if matches(target, f"{name}.{part}"))
            if parts:
                hits[name] = parts
        if not hits:
            raise ValueError(_no_target(target, model, linear, tied))
        for name, parts in hits.items():
            both = {*found.get(name, ()), *parts}
            found[name] = ("whole",) if "whole" in both else tuple(sorted(both))
    for name in found:
        if name in tied:
            raise ValueError(tied_error(name, tied[name]))
    if config.layers is not None:
        block = {name: next((int(part) for part in name.split(".") if part.isdigit()), None)
                 for name in found}
        for number in config.layers:
            if number not in block.values():
                raise ValueError(f"lora.layers={config.layers}: no target is in block {number}")
        found = {name: parts for name, parts in found.items() if block[name] in config.layers}
    adapted = [full for name, parts in found.items() for full in full_names(name, parts)]
    for kind in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, kind):
            if not any(matching_pattern({key: 0}, name) for name in adapted):
                raise ValueError(f"lora.{kind}: {key!r} matches no adapted layer; there are "
                                 f"{summary(adapted)}")
    return found


def saved_modules(model: nn.Module, config: Any, found: Iterable[str] = ()) -> list[str]:
    """The modules of config.modules_to_save; none may be tied or hold a layer of `found`."""
    names, tied = [], tied_weights(model)
    for wanted in config.modules_to_save:
        hits = [name for name, _ in model.named_modules() if name and matches(wanted, name)]
        if not hits:
            raise ValueError(f"lora.modules_to_save: there is no module {wanted!r}")
        names += hits
    for name in names:
        if name in tied:
            raise ValueError(tied_error(name, tied[name]))
        for layer in found:
            if (layer + ".").startswith(name + "."):
                raise ValueError(f"lora.modules_to_save: {name} holds the adapted layer {layer}; "
                                 f"leave one of them out")
    return names


def is_head(name: str, tied: dict[str, str]) -> bool:
    """Whether a layer is the output head, or shares its weight with another."""
    return name in tied or name.rpartition(".")[2] in HEADS


def full_names(name: str, parts: tuple[str, ...]) -> list[str]:
    """Names of a layer's parts, such as h.0.attn.c_attn.q; of a whole layer its own."""
    return [name if part == "whole" else f"{name}.{part}" for part in parts]


def tied_error(name: str, other: str) -> str:
    """Why a layer that shares its weight is refused."""
    return (f"{name} shares its weight with {other}: training or merging one would change the "
            f"other; leave {name} out, or untie the two first")


def _no_target(target: str, model: nn.Module, linear: dict[str, nn.Module],
               tied: dict[str, str]) -> str:
    for name, module in model.named_modules():
        if name in tied and matches(target, name):
            return tied_error(name, tied[name])
        if name and matches(target, name) and not list(module.children()):
            return f"lora.target_modules: {name} is {type(module).__name__}, no linear layer"
    ends = {name.rpartition(".")[2] for name in linear}
    near = difflib.get_close_matches(target.rpartition(".")[2], ends, n=3, cutoff=0.4)
    return (f"lora.target_modules: {target!r} matches no layer; "
            + (f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(ends)}"))


def summary(names: list[str]) -> str:
    """12 x transformer.h.*.attn.c_attn"""
    counts: dict[str, int] = {}
    for name in names:
        short = re.sub(r"\b\d+\b", "*", name)
        counts[short] = counts.get(short, 0) + 1
    return ", ".join(f"{count} x {name}" if count > 1 else name for name, count in counts.items())


def matching_pattern(patterns: dict[str, Any], name: str) -> str | None:
    """The first pattern that is the name, or the end of it from a dot on (as in PEFT)."""
    return next((key for key in patterns if re.fullmatch(rf"(.*\.)?({key})", name)), None)
