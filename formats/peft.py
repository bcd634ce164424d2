"""Adapters as files, in PEFT's format: adapter_config.json and adapter_model.safetensors.

    write("adapter", settings, tensors, notes)      # tensors by PEFT's names
    settings, layers, others, notes = read("adapter")

Names: base_model.model.NAME.lora_A.weight (R, in), NAME.lora_B.weight (out, R) and
NAME.lora_magnitude_vector (out,) for a layer; NAME.base_layer.bias for its bias; other trained
tensors under the name that they have in the model. `notes` are what PEFT has no place for; they
stand in the header of the safetensors file, which PEFT does not read.

transformers' GPT-2 holds its linear layers as "Conv1D", whose weight is (in, out): PEFT calls that
fan_in_fan_out. A and B are not affected, a whole layer that was trained is.

Needs the extra "hf" (safetensors).
"""
import json
import math
from pathlib import Path
from typing import Any, Mapping

import torch
import torch.nn as nn

from lora_adapters import adapted_layers, adapters_of, as_shares, trained_values
from lora_layer import weight_of
from lora_targets import linear_layers, saved_modules

PREFIX = "base_model.model."
CONV1D = ("c_attn", "c_fc", "c_proj")
KINDS = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_magnitude_vector": "magnitude"}
UNSUPPORTED = ("lora_bias", "trainable_token_indices", "target_parameters", "layer_replication",
               "megatron_config", "use_qalora", "use_bdlora", "alora_invocation_tokens",
               "arrow_config", "kasa_config", "monteclora_config", "velora_config")


def _safetensors():
    try:
        import safetensors.torch
    except ModuleNotFoundError:
        raise ModuleNotFoundError('adapter files need the extra "hf": '
                                  'pip install -c constraints.txt -e ".[hf]"') from None
    return safetensors


def is_conv1d(name: str) -> bool:
    """Whether a tensor of our GPT-2 is the transpose of transformers'."""
    return name.endswith(tuple(f"{layer}.weight" for layer in CONV1D))


def write(folder: str | Path, settings: dict[str, Any], tensors: dict[str, torch.Tensor],
          notes: dict[str, Any]) -> None:
    """Write adapter_config.json and adapter_model.safetensors; `notes` are ours, in its header."""
    safetensors, folder = _safetensors(), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {PREFIX + name: tensor.detach().cpu().contiguous().clone()
               for name, tensor in tensors.items()}
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors",
                                metadata={"format": "pt", "oneloop": json.dumps(notes)})


def read(folder: str | Path):
    """(settings, {layer: {"A", "B", maybe "magnitude"}}, {name: tensor} of the rest, notes)."""
    folder = Path(folder)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / file).exists():
            raise FileNotFoundError(f"{folder} has no {file}; it is no adapter in PEFT's format")
    settings = json.loads((folder / "adapter_config.json").read_text())
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{folder} holds a {settings.get('peft_type')} adapter; only LORA is read")
    for key in UNSUPPORTED:
        if settings.get(key):
            raise ValueError(f"{folder}: {key}={settings[key]} is not supported")
    layers: dict[str, dict[str, torch.Tensor]] = {}
    others: dict[str, torch.Tensor] = {}
    with _safetensors().safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        notes = json.loads((file.metadata() or {}).get("oneloop", "{}"))
        for key in file.keys():
            name = key.removeprefix(PREFIX)
            kind = next((kind for kind in KINDS if name.endswith("." + kind)), None)
            if kind:
                layers.setdefault(name[:-len(kind) - 1], {})[KINDS[kind]] = file.get_tensor(key)
            elif not {"original_module", "modules_to_save"} & set(name.split(".")):
                tensor, name = file.get_tensor(key), name.replace(".base_layer.", ".")
                turned = settings.get("fan_in_fan_out") and is_conv1d(name)
                others[name] = tensor.t() if turned else tensor
    for name, found in layers.items():
        for kind in ("A", "B", "magnitude")[:3 if settings.get("use_dora") else 2]:
            if kind not in found:
                raise ValueError(f"{folder} has no {kind} of layer {name}")
    return settings, layers, others, notes


def peft_settings(layers: dict[str, tuple[int, float]], linear: list[str], rslora: bool,
                  **others: Any) -> dict[str, Any]:
    """adapter_config.json for layers {name: (rank, alpha)} of a model with `linear` layers.

    The commonest rank and alpha are the adapter's, the others its patterns. Targets are written by
    their last names where these match nothing else.
    """
    def common(values: list) -> Any:
        return max(values, key=values.count)

    def plain(alpha: float) -> float:
        return int(alpha) if alpha == int(alpha) else alpha

    rank = common([rank for rank, _ in layers.values()])
    alpha = common([alpha for _, alpha in layers.values()])
    ends = sorted({name.rpartition(".")[2] for name in layers})
    simple = {name for name in linear if name.rpartition(".")[2] in ends} == set(layers)
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True,
        "r": rank, "lora_alpha": plain(alpha), "use_rslora": rslora,
        "target_modules": ends if simple else sorted(layers),
        "rank_pattern": {name: found for name, (found, _) in layers.items() if found != rank},
        "alpha_pattern": {name: plain(found) for name, (_, found) in layers.items()
                          if found != alpha},
        "fan_in_fan_out": any(end in CONV1D for end in ends), "init_lora_weights": True, **others}


def config_settings(settings: dict[str, Any], layers: dict[str, Any]) -> dict[str, Any]:
    """What adapter_config.json says as fields of LoRAConfig."""
    return {
        "r": settings["r"], "alpha": float(settings["lora_alpha"]),
        "dropout": settings.get("lora_dropout") or 0.0, "target_modules": tuple(layers),
        "bias": settings.get("bias") or "none", "use_rslora": bool(settings.get("use_rslora")),
        "use_dora": bool(settings.get("use_dora")),
        "modules_to_save": tuple(settings.get("modules_to_save") or ()),
        "rank_pattern": settings.get("rank_pattern") or {},
        "alpha_pattern": settings.get("alpha_pattern") or {}}


@torch.no_grad()
def save_lora(model: nn.Module, folder: str | Path,
              name: str | Mapping[str, float] = "default", base: str = "") -> None:
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
    tensors, layers, values = {}, {}, trained_values(model, shares)
    for layer, module in adapted_layers(model).items():
        parts = [(part, share) for name, share in shares.items()
                 for part in module.lora_adapters[name].values()] \
            if set(shares) & set(module.lora_adapters) else []
        if not parts:
            continue
        scale = parts[0][0].scale
        pairs = [(part, share * part.scale / scale, *part.factors()) for part, share in parts]
        A = torch.cat([A for _, _, A, _ in pairs])
        B = torch.cat([part.whole(B if factor == 1 else factor * B)
                       for part, factor, _, B in pairs], dim=1)
        layers[layer] = len(A), scale * (math.sqrt(len(A)) if config.use_rslora else len(A))
        tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"] = A, B
        if config.use_dora:                             # rows of no part keep their length
            length = weight_of(module.lora_unmerged or module.base_layer).square().sum(1).sqrt()
            for part, _ in parts:
                length[part.rows()] = part.lora_magnitude
            tensors[f"{layer}.lora_magnitude_vector"] = length
    settings = peft_settings(
        layers, list(linear_layers(model)), config.use_rslora, use_dora=config.use_dora,
        lora_dropout=config.dropout, bias=config.bias,
        modules_to_save=saved_modules(model, config) or None,
        base_model_name_or_path=base or getattr(model, "name_or_path", "") or None)
    for key, value in values.items():
        turned = settings["fan_in_fan_out"] and is_conv1d(key)
        owner, _, last = key.rpartition(".")
        key = f"{owner}.base_layer.{last}" if owner in layers else key
        tensors[key] = value.t() if turned else value
    write(folder, settings, tensors, {
        "base_hash": adapters.base_hash, "init": config.init, "quantize": config.quantize})
