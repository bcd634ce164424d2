"""Adapters as files, in PEFT's format: adapter_config.json and adapter_model.safetensors.

    write("adapter", layers, magnitudes, others, fields, linear, tied, base, notes)
    fields, layers, others, notes = read("adapter", sizes, modules, tied)

Names: base_model.model.NAME.lora_A.weight (R, in), NAME.lora_B.weight (out, R) and
NAME.lora_magnitude_vector (out,) for a layer; NAME.base_layer.bias for its bias; other trained
tensors under the name that they have in the model. `notes` are what PEFT has no place for; they
stand in the header of the safetensors file, which PEFT does not read.

transformers' GPT-2 holds its linear layers as "Conv1D", whose weight is (in, out): PEFT calls that
fan_in_fan_out. A and B are not affected, a whole layer that was trained is.

Needs the extra "hf" (safetensors).
"""
import difflib
import hashlib
import json
import math
import numbers
from pathlib import Path
from typing import Any, Iterable

import regex
import torch

from formats.files import read_json, write_json
from formats.gpt2 import is_conv1d, load_tensors, safetensors, save_tensors

PREFIX = "base_model.model."
PATIENCE = 1                    # seconds for a pattern and a name
KINDS = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_magnitude_vector": "magnitude"}
UNSUPPORTED = ("lora_bias", "trainable_token_indices", "target_parameters", "layer_replication",
               "megatron_config", "use_qalora", "use_bdlora", "alora_invocation_tokens",
               "arrow_config", "kasa_config", "monteclora_config", "velora_config")

CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")       # PEFT's init_lora_weights


def positive(value: Any, kind: type = numbers.Real) -> bool:
    """Whether this is a number above 0 that a float can hold and divide by."""
    return isinstance(value, kind) and not isinstance(value, bool) and 0 < value < 1e30


FIELDS = {      # of adapter_config.json: our name, the default, whether a value may be, in words
    "r": ("r", None, lambda r: positive(r, numbers.Integral), "a whole number above 0"),
    "lora_alpha": ("alpha", None, positive, "a finite number above 0"),
    "lora_dropout": ("dropout", 0.0, lambda p: p == 0 or positive(p) and p < 1, "in [0, 1)"),
    "bias": ("bias", "none", lambda name: name in ("none", "all", "lora_only"),
             "none, all or lora_only"),
    "use_rslora": ("use_rslora", False, lambda on: type(on) is bool, "true or false"),
    "use_dora": ("use_dora", False, lambda on: type(on) is bool, "true or false"),
    "modules_to_save": ("modules_to_save", [], lambda names: type(names) in (list, tuple) and all(
        type(name) is str and name for name in names), "a list of names"),
    "rank_pattern": ("rank_pattern", {}, lambda ranks: type(ranks) is dict and all(
        positive(r, numbers.Integral) for r in ranks.values()), "whole numbers above 0 by name"),
    "alpha_pattern": ("alpha_pattern", {}, lambda alphas: type(alphas) is dict and all(
        map(positive, alphas.values())), "finite numbers above 0 by name")}


def write(folder: str | Path, layers: dict[str, list[tuple[float, torch.Tensor, torch.Tensor]]],
          magnitudes: dict[str, torch.Tensor], others: dict[str, torch.Tensor],
          fields: dict[str, Any], linear: Iterable[str], tied: dict[str, str], base: str | None,
          notes: dict[str, Any]) -> None:
    """Write the changes of some of a model's `linear` layers, each a sum of scale * B A.

    A file has one A and B for a layer, so the sum becomes one product of a larger rank. `others`
    are trained tensors by name, `fields` settings by our names, `base` is the base's name. `tied`,
    {second name: first}, have one value here; in PEFT each has its own.
    """
    safetensors()                           # or nothing is written
    folder = Path(folder)
    tensors, ranks, alphas = {}, {}, {}
    for layer, terms in layers.items():
        scale = abs(terms[0][0]) or 1.0                     # of a share of 0 or below, B has it
        A = torch.cat([A for _, A, _ in terms])
        B = torch.cat([own / scale * B for own, _, B in terms], dim=1)
        tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"] = A, B
        ranks[layer] = len(A)
        alpha = scale * (math.sqrt(len(A)) if fields["use_rslora"] else len(A))
        alphas[layer] = int(alpha) if alpha == int(alpha) else alpha
    for layer, lengths in magnitudes.items():
        tensors[f"{layer}.lora_magnitude_vector"] = lengths
    # The commonest rank and alpha are the adapter's, the others its patterns. Targets are written
    # by their last names where these match nothing else.
    rank, alpha = (max(found.values(), key=list(found.values()).count) for found in (ranks, alphas))
    ends = sorted({name.rpartition(".")[2] for name in layers})
    simple = {name for name in linear if name.rpartition(".")[2] in ends} == set(layers)
    conv1d = any(is_conv1d(f"{layer}.weight") for layer in layers)
    both = {second: others[first] for second, first in tied.items() if first in others}
    saved = [*fields["modules_to_save"], *(key.removesuffix(".weight") for key in both)]
    for key, value in (others | both).items():
        owner, _, last = key.rpartition(".")
        name = f"{owner}.base_layer.{last}" if owner in layers else key
        tensors[name] = value.t() if conv1d and is_conv1d(key) else value
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "adapter_config.json", {
        **{key: fields[name] for key, (name, *_) in FIELDS.items()},
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True,
        "r": rank, "lora_alpha": alpha, "target_modules": ends if simple else sorted(layers),
        "rank_pattern": {name: found for name, found in ranks.items() if found != rank},
        "alpha_pattern": {name: found for name, found in alphas.items() if found != alpha},
        "modules_to_save": list(dict.fromkeys(saved)) or None, "base_model_name_or_path": base,
        "fan_in_fan_out": conv1d, "init_lora_weights": True})
    save_tensors(folder / "adapter_model.safetensors", {
        PREFIX + name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in tensors.items()}, oneloop=json.dumps(notes))


def read(folder: str | Path, sizes: dict[str, tuple[int, int]], modules: Iterable[str],
         tied: dict[str, str]):
    """(fields, {layer: {"A", "B", maybe "magnitude"}}, {name: tensor} of the rest, notes).

    `sizes` are (in, out) of the model's linear layers, `modules` the names of all, `tied` as in
    `write`: `others` holds them by their first names. FileNotFoundError without the two files;
    ValueError, of one line, for what is damaged, does not fit or is of a kind that is not here.
    """
    folder = Path(folder)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / file).exists():
            raise FileNotFoundError(f"{folder} has no {file}; it is no adapter in PEFT's format")
    settings = read_json(folder / "adapter_config.json", "save the adapter anew")
    fields = _fields(folder / "adapter_config.json", settings)
    tensors, notes = _tensors(folder / "adapter_model.safetensors")
    layers: dict[str, dict[str, torch.Tensor]] = {}
    others: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        kind = next((kind for kind in KINDS if name.endswith("." + kind)), None)
        if kind:
            layers.setdefault(name[:-len(kind) - 1], {})[KINDS[kind]] = tensor
        elif not {"original_module", "modules_to_save"} & set(name.split(".")):
            name = name.replace(".base_layer.", ".")
            turned = settings.get("fan_in_fan_out") and is_conv1d(name)
            others[name] = tensor.t() if turned else tensor
    if not layers:
        raise ValueError(f"{folder}/adapter_model.safetensors has no tensor of a LoRA adapter "
                         f"(NAME.lora_A.weight); save the adapter anew")
    for layer, found in layers.items():
        if layer not in sizes:
            raise ValueError(f"{folder} adapts {layer:.200}, which this model does not have as a "
                             f"linear layer")
        r, (size, out) = by_pattern(fields["rank_pattern"], layer, fields["r"]), sizes[layer]
        shapes = {"A": (r, size), "B": (out, r), "magnitude": (out,)}
        for kind in ("A", "B", "magnitude")[:3 if fields["use_dora"] else 2]:
            if kind not in found:
                raise ValueError(f"{folder} has no {kind} of layer {layer}")
            if found[kind].shape != shapes[kind]:
                raise ValueError(f"{folder}: {kind} of {layer} is {tuple(found[kind].shape)}; rank "
                                 f"{r} and the model ask for {shapes[kind]}")
    for second, first in tied.items():
        if first in others and not (second in others and torch.equal(others[first],
                                                                     others.pop(second))):
            raise ValueError(f"{folder}: its {first} and {second} are not equal, and here they "
                             f"are one weight")
    ends = tuple(fields["modules_to_save"])             # in PEFT even within a word
    fields["modules_to_save"] = tuple(name for name in modules if name.endswith(ends))
    return fields, layers, others, {"base": settings.get("base_model_name_or_path"), **notes}


def _fields(file: Path, settings: dict[str, Any]) -> dict[str, Any]:
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{file.parent} holds a {settings.get('peft_type')!s:.80} adapter; only "
                         f"LORA is read")
    for key in UNSUPPORTED:
        if settings.get(key):
            raise ValueError(f"{file.parent}: {key}={settings[key]!s:.80} is not supported")
    init = settings.get("init_lora_weights")
    if str(init).lower().startswith(CHANGE_THE_BASE):
        raise ValueError(f"{file.parent}: init_lora_weights={init!s:.80} changed the base too; "
                         f"convert the adapter by PEFT's save_pretrained(FOLDER, "
                         f"path_initial_model_for_weight_conversion=WHERE_IT_STARTED)")
    fields = {}
    for key, (name, default, allowed, what) in FIELDS.items():
        value = default if settings.get(key) is None else settings[key]
        if value is None:
            raise ValueError(f"{file} has no {key}; it must be {what}")
        if not allowed(value):
            raise ValueError(f"{file}: {key}={value!r:.80} must be {what}")
        fields[name] = value
    return fields


def _tensors(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors, header = load_tensors(file)
    try:
        notes = json.loads(header.get("oneloop", "{}"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged in its header: {error}; copy it again") from None
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{file}: {key:.200} holds values that are not finite; its training "
                             f"diverged, or the file is damaged")
    return tensors, notes if isinstance(notes, dict) else {}


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern is a name, or the end of one from a dot on; it may be a regular expression.
    """
    try:        # `re` has no time limit, and some patterns take years: (a+)+b
        return bool(regex.fullmatch(rf"(.*\.)?({pattern})", name, timeout=PATIENCE))
    except TimeoutError:
        raise ValueError(f"{pattern!r:.200} takes more than {PATIENCE} s to be compared with a "
                         f"name; write it without repeats of repeats") from None
    except regex.error as error:
        raise ValueError(f"{pattern!r:.200} is neither a module nor a regular expression: "
                         f"{error}") from None


def choose(setting: str, patterns: Iterable[str], names: Iterable[str], what: str) -> list[str]:
    """The names that the patterns of a setting match; ValueError for a pattern without any."""
    chosen = []
    for pattern in patterns:
        hits = [name for name in names if matches(pattern, name)]
        if not hits:
            ends = dict.fromkeys(name.rpartition(".")[2] for name in names)
            near = difflib.get_close_matches(pattern.rpartition(".")[2], ends, cutoff=0.4) or ends
            raise ValueError(f"lora.{setting}: {pattern!r} matches no {what}; did you mean "
                             f"{', '.join(near)}?")
        chosen += hits
    return chosen


def by_pattern(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that matches a name."""
    return next((value for key, value in patterns.items() if matches(key, name)), default)


def base_hash(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Identifies a base by names, shapes and values; empty where there are no values."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        if tensor.is_meta:
            return ""
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
