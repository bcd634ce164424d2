"""Models in the files of others: Hugging Face folders in and out, llm.c checkpoints in.

    model = load("gpt2")                        # what GPT.from_pretrained calls
    save(model, folder, end=tokenizer.eot)      # what GPT.save_pretrained calls

A file is believed only as far as it is long: sizes that a config or header claims are compared with
the tensors that are there before anything of that size is made. A ValueError names the file.

References: transformers, models/gpt2; safetensors' format (github.com/huggingface/safetensors);
llm.c, train_gpt2.py (write_model) and train_gpt2.c (gpt2_build_from_checkpoint).
"""
import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import torch

from model import LAYER_NORM_EPS, SIZES, GPT, GPTConfig

LLMC_MAGIC, LLMC_HEADER = 20240326, 1024                            # the header's size in bytes
LLMC_DTYPES = {3: torch.float32, 5: torch.bfloat16}                 # by version
LLMC_LAYERS = [f"{name}.{kind}" for name in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2",
                                             "mlp.c_fc", "mlp.c_proj")
               for kind in ("weight", "bias")]                      # each stacked over the blocks


def load(name: str | Path, dropout: float = 0.0, block_size: int | None = None) -> GPT:
    """A model from a Hugging Face folder, an llm.c checkpoint (.bin), or by name from the hub.

    block_size: a shorter context than the file's, whose last positions are then left out.
    """
    if Path(name).is_file():
        config, tensors = read_llmc(Path(name))
    else:
        folder = Path(name) if Path(name).is_dir() else download(str(name))
        config, tensors = read_folder(folder)
    with torch.device("meta"):                                      # no init to be overwritten
        model = GPT(dataclasses.replace(config, dropout=dropout))
    model.load_state_dict(tensors, assign=True)
    model.lm_head.weight = model.transformer.wte.weight
    if block_size is not None:
        model.crop_context(block_size)
    return model


# ------------------------------------------------------------------------------------------------
# Hugging Face. There a linear layer of GPT-2 is a "Conv1D", whose weight is (in, out), the
# transpose of nn.Linear's; everything else has the same name and shape.

def read_folder(folder: Path) -> tuple[GPTConfig, dict[str, torch.Tensor]]:
    """The shape, and the tensors under our names and in our layout."""
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} has no config.json; it is no Hugging Face folder")
    config = read_config(folder / "config.json")
    tensors = {}
    for name, tensor in read_tensors(folder).items():
        if not name.startswith(("transformer.", "lm_head.")):
            name = "transformer." + name                            # a bare GPT2Model was saved
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue                                                # old files store the mask
        tensors[name] = tensor.t() if is_conv1d(name) and tensor.dim() == 2 else tensor
    if "transformer.wte.weight" in tensors:
        tensors.setdefault("lm_head.weight", tensors["transformer.wte.weight"])
    check_tensors(tensors, config, folder)
    if not torch.equal(tensors.pop("lm_head.weight"), tensors["transformer.wte.weight"]):
        raise ValueError(f"{folder}: lm_head.weight differs from wte.weight; GPT-2 ties them")
    # Copies: what is read above is a view of the file, which may be replaced while we use it.
    found = {name: tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
             for name, tensor in tensors.items()}
    return config, {**found, "lm_head.weight": found["transformer.wte.weight"]}


def read_config(path: Path) -> GPTConfig:
    """The shape that a config.json describes; ValueError if it is not that of a GPT-2."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is truncated or not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is no JSON object")
    expected = dict(model_type="gpt2", activation_function="gelu_new",
                    layer_norm_epsilon=LAYER_NORM_EPS, scale_attn_weights=True,
                    scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    for key, value in expected.items():
        if settings.get(key, value) != value:
            raise ValueError(f"{path}: {key} is {settings[key]!r:.80}; GPT-2 has {value!r}")
    names = dict(block_size="n_positions", vocab_size="vocab_size", n_layer="n_layer",
                 n_head="n_head", n_embd="n_embd")
    for key in names.values():
        if type(settings.get(key)) is not int or not 1 <= settings[key] < 2**31:
            raise ValueError(f"{path}: {key} is {settings.get(key)!r:.80}, no whole number from 1 "
                             f"to 2147483647")
    if settings.get("n_inner") not in (None, 4 * settings["n_embd"]):
        raise ValueError(f"{path}: n_inner is {settings['n_inner']!r:.80}; GPT-2 has 4 * n_embd")
    return shape(path, **{ours: settings[theirs] for ours, theirs in names.items()})


def shape(path: Path, **sizes: int) -> GPTConfig:
    """GPTConfig(**sizes), whose errors then name the file."""
    try:
        return GPTConfig(**sizes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's .safetensors files. FileNotFoundError without one, ValueError for a
    damaged one."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} has no .safetensors file")
    tensors: dict[str, torch.Tensor] = {}
    for file in files:                                              # a large model has several
        try:
            tensors.update(safetensors().torch.load_file(file))
        except (safetensors().SafetensorError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]             # it quotes what it finds
            raise ValueError(f"{file} is truncated or no safetensors file: {reason}") from None
    return tensors


def check_tensors(tensors: dict[str, torch.Tensor], config: GPTConfig, folder: Path) -> None:
    """ValueError that names a missing, extra or misshapen tensor."""
    def check(name: str, shape: tuple[int, ...]) -> None:
        if name not in tensors:
            raise ValueError(f"{folder} has no tensor {name!r}")
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"{folder}: tensor {name!r} is {tuple(tensors[name].shape)} in the "
                             f"file; config.json asks for {shape}")
        if not tensors[name].is_floating_point():
            raise ValueError(f"{folder}: tensor {name!r} is {tensors[name].dtype}, no float")

    # These three bound every size, before a model with those sizes is made, if only of shapes.
    check("transformer.wte.weight", (config.vocab_size, config.n_embd))
    check("transformer.wpe.weight", (config.block_size, config.n_embd))
    blocks = len({name.split(".")[2] for name in tensors if name.startswith("transformer.h.")})
    if config.n_layer > blocks:
        raise ValueError(f"{folder}: config.json asks for n_layer={config.n_layer}; the tensors "
                         f"are those of {blocks} blocks")
    with torch.device("meta"):
        wanted = GPT(config).state_dict()
    for name, tensor in wanted.items():
        check(name, tuple(tensor.shape))
    extra = sorted(tensors.keys() - wanted.keys())
    if extra:
        raise ValueError(f"{folder} has a tensor {extra[0]!r:.80} that GPT-2 does not"
                         + (f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""))


def save(model: GPT, folder: str | Path, end: int | None = None) -> None:
    """Write config.json, generation_config.json and model.safetensors.

    end: the token that begins and ends documents. Padded vocabulary rows are left out; without
    biases, zeros are written (GPT-2 has them, and zeros compute the same).
    """
    save_file = safetensors().torch.save_file
    folder, c = Path(folder), model.config
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":                                # tied to wte
            tensor = tensor[:c.vocab_size] if name == "transformer.wte.weight" else tensor
            tensors[name] = (tensor.t() if is_conv1d(name) else tensor).contiguous().cpu()
    for name in [name for name in tensors if not c.bias and has_bias(name)]:
        size = tensors[name].size(-1)                               # Conv1D weights are (in, out)
        tensors[name.replace(".weight", ".bias")] = tensors[name].new_zeros(size)
    ends = dict(bos_token_id=end, eos_token_id=end)
    write_json(folder / "config.json", dict(
        architectures=["GPT2LMHeadModel"], model_type="gpt2", vocab_size=c.vocab_size,
        n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
        activation_function="gelu_new", layer_norm_epsilon=LAYER_NORM_EPS,
        resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout,
        tie_word_embeddings=True, **ends))
    write_json(folder / "generation_config.json", dict(do_sample=False, pad_token_id=end, **ends))
    temporary = folder / "model.safetensors.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    os.replace(temporary, folder / "model.safetensors")


def is_conv1d(name: str) -> bool:
    """Whether GPT-2's files hold this weight transposed, (in, out)."""
    return name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight"))


def has_bias(name: str) -> bool:
    """Whether the layer of this weight has a bias, in models with biases."""
    return is_conv1d(name) or name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight"))


def safetensors():
    """The package, or an error that names the extra."""
    try:
        import safetensors.torch
    except ModuleNotFoundError:
        raise ModuleNotFoundError('Hugging Face folders need the extra "hf": '
                                  'pip install -c constraints.txt -e ".[hf]"') from None
    return safetensors


def download(name: str) -> Path:
    """The folder of a model on the hub, fetched once."""
    safetensors()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HfHubHTTPError, LocalEntryNotFoundError
    repository = f"openai-community/{name}" if name in SIZES else name
    try:
        return Path(snapshot_download(repository, allow_patterns=["config.json", "*.safetensors"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(f"{name!r} is neither a folder here nor a model that can be had "
                                f"from the Hugging Face hub ({type(error).__name__})") from error


# ------------------------------------------------------------------------------------------------
# llm.c: 256 int32 (magic, version, context, vocabulary, blocks, heads, channels, vocabulary with
# padding), then the embeddings, each tensor of a block stacked over the blocks, and the final
# LayerNorm. Weights are (out, in), as nn.Linear's.

def read_llmc(path: Path) -> tuple[GPTConfig, dict[str, torch.Tensor]]:
    """The shape, and the tensors under our names."""
    size = path.stat().st_size
    if size < LLMC_HEADER:
        raise ValueError(f"{path} is shorter than the header of an llm.c checkpoint")
    header = torch.from_file(str(path), size=LLMC_HEADER // 4, dtype=torch.int32).tolist()
    magic, version, block_size, vocab_size, n_layer, n_head, n_embd, padded = header[:8]
    if magic != LLMC_MAGIC or version not in LLMC_DTYPES:
        raise ValueError(f"{path} has magic {magic} and version {version}; an llm.c checkpoint has "
                         f"{LLMC_MAGIC}, and 3 (float32) or 5 (bfloat16)")
    if min(header[2:8]) < 1 or padded < vocab_size:
        raise ValueError(f"{path} has impossible sizes in its header: {header[2:8]}")
    config = shape(path, block_size=block_size, vocab_size=vocab_size, n_layer=n_layer,
                   n_head=n_head, n_embd=n_embd)
    dtype, C = LLMC_DTYPES[version], n_embd
    width = {"attn.c_attn.weight": (3 * C, C), "attn.c_attn.bias": (3 * C,),
             "attn.c_proj.weight": (C, C), "mlp.c_fc.weight": (4 * C, C), "mlp.c_fc.bias": (4 * C,),
             "mlp.c_proj.weight": (C, 4 * C)}
    layout = [("wte.weight", (1, padded, C)), ("wpe.weight", (1, block_size, C)),
              *((name, (n_layer, *width.get(name, (C,)))) for name in LLMC_LAYERS),
              ("ln_f.weight", (1, C)), ("ln_f.bias", (1, C))]
    counts = [math.prod(stacked) for _, stacked in layout]
    expected = LLMC_HEADER + dtype.itemsize * sum(counts)
    if size != expected:
        raise ValueError(f"{path} has {size:,} bytes; its header says {expected:,}")
    numbers = torch.from_file(str(path), size=size // dtype.itemsize, dtype=dtype)
    tensors, parts = {}, numbers[LLMC_HEADER // dtype.itemsize:].split(counts)
    for (name, stacked), part in zip(layout, parts):
        for i, tensor in enumerate(part.view(stacked)):
            place = f"h.{i}.{name}" if name in LLMC_LAYERS else name
            tensors["transformer." + place] = tensor.to(torch.float32, copy=True)
    tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"][:vocab_size].clone()
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    return config, tensors


# ------------------------------------------------------------------------------------------------
# Export.

def write_json(path: Path, content: dict[str, Any]) -> None:
    """An object as indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n")
