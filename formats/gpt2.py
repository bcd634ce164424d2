"""GPT-2's weights in the files of others: Hugging Face folders in and out, llm.c checkpoints in.

    config, tensors = read("gpt2")              # or a folder, or gpt2_124M.bin
    write("folder", config, tensors, end=50256, idx=idx, logits=logits)

`config` has the sizes, named as GPT-2's settings are in model.py; `tensors` the weights, named as
in transformers, laid out as nn.Linear does, (out, in), in float32. GPT.from_pretrained and
GPT.save_pretrained call these.

A file is believed only as far as it is long: sizes that a config or header claims are compared with
the tensors that are there before anything of that size is made. A ValueError names the file.

Shapes: B batch, T time, C channels, H heads, D head size, V vocabulary.

References: transformers, models/gpt2; safetensors' format (github.com/huggingface/safetensors);
llm.c, train_gpt2.py (write_model) and train_gpt2.c (gpt2_build_from_checkpoint).
"""
import math
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from formats.files import atomic_write, read_json, write_json

OPENAI = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")           # the hub: openai-community/...
WTE, HEAD = "transformer.wte.weight", "lm_head.weight"              # one tensor under two names
LAYER_NORM_EPS = 1e-5
LARGEST = 2**31 - 1                                                 # of the sizes in a file
GPT2_VOCAB = 50257                                                  # the last: <|endoftext|>
LLMC_MAGIC, LLMC_HEADER = 20240326, 1024                            # the header's size in bytes
LLMC_DTYPES = {3: torch.float32, 5: torch.bfloat16}                 # by version

Config = dict[str, Any]
Tensors = dict[str, torch.Tensor]


def block_shapes(C: int) -> dict[str, tuple[int, ...]]:
    """The tensors of one block, in llm.c's order."""
    return {"ln_1.weight": (C,), "ln_1.bias": (C,),
            "attn.c_attn.weight": (3 * C, C), "attn.c_attn.bias": (3 * C,),
            "attn.c_proj.weight": (C, C), "attn.c_proj.bias": (C,),
            "ln_2.weight": (C,), "ln_2.bias": (C,),
            "mlp.c_fc.weight": (4 * C, C), "mlp.c_fc.bias": (4 * C,),
            "mlp.c_proj.weight": (C, 4 * C), "mlp.c_proj.bias": (C,)}


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The tensors of a GPT-2, less the head, which is the embedding."""
    C = config["n_embd"]
    blocks = {f"transformer.h.{i}.{name}": shape for i in range(config["n_layer"])
              for name, shape in block_shapes(C).items()}
    return {WTE: (config["vocab_size"], C), "transformer.wpe.weight": (config["block_size"], C),
            **blocks, "transformer.ln_f.weight": (C,), "transformer.ln_f.bias": (C,)}


def count_weights(config: Config) -> int:
    """The numbers in these tensors, without making a list of them."""
    C = config["n_embd"]
    block = sum(math.prod(shape) for shape in block_shapes(C).values())
    return (config["vocab_size"] + config["block_size"] + 2) * C + config["n_layer"] * block


def read(name: str | Path) -> tuple[Config, Tensors]:
    """A Hugging Face folder, an llm.c checkpoint (.bin), or a model of the hub by its name."""
    path = Path(name)
    if path.is_file():
        config, tensors = read_llmc(path)
    else:
        config, tensors = read_folder(path if path.is_dir() else download(str(name)))
    return config, {**tensors, HEAD: tensors[WTE]}


def logits_of(config: Config, tensors: Tensors, idx: torch.Tensor) -> torch.Tensor:
    """What GPT-2, so transformers, computes from these tensors: idx (B, T) -> (B, T, V)."""
    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], tensors[name + ".weight"], tensors[name + ".bias"],
                            LAYER_NORM_EPS)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, tensors[name + ".weight"], tensors[name + ".bias"])

    x = tensors[WTE][idx] + tensors["transformer.wpe.weight"][:idx.size(1)]     # (B, T, C)
    for i in range(config["n_layer"]):
        block = f"transformer.h.{i}."
        qkv = linear(norm(x, block + "ln_1"), block + "attn.c_attn")            # (B, T, 3C)
        q, k, v = (part.unflatten(2, (config["n_head"], -1)).transpose(1, 2)    # (B, H, T, D)
                   for part in qkv.chunk(3, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + linear(y.transpose(1, 2).flatten(2), block + "attn.c_proj")
        y = F.gelu(linear(norm(x, block + "ln_2"), block + "mlp.c_fc"), approximate="tanh")
        x = x + linear(y, block + "mlp.c_proj")
    return F.linear(norm(x, "transformer.ln_f"), tensors[WTE])


# ------------------------------------------------------------------------------------------------
# Hugging Face. There a linear layer of GPT-2 is a "Conv1D", whose weight is (in, out), the
# transpose of nn.Linear's; everything else has the same name and shape.

def is_conv1d(name: str) -> bool:
    """Whether GPT-2's files hold this weight transposed, (in, out)."""
    return name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight"))


def read_folder(folder: Path) -> tuple[Config, Tensors]:
    """`read` of a Hugging Face folder, without the head."""
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
    head = tensors.pop(HEAD, tensors.get(WTE))
    check_tensors(tensors, config, folder)
    if not torch.equal(head, tensors[WTE]):
        raise ValueError(f"{folder}: lm_head.weight differs from wte.weight; GPT-2 ties them")
    # Copies: what is read above is a view of the file, which may be replaced while we use it.
    return config, {name: tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
                    for name, tensor in tensors.items()}


def read_config(path: Path) -> Config:
    """The sizes that a config.json describes; ValueError if it is not that of a GPT-2."""
    settings = read_json(path)
    expected = dict(model_type="gpt2", activation_function="gelu_new",
                    layer_norm_epsilon=LAYER_NORM_EPS, scale_attn_weights=True,
                    scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    for key, value in expected.items():
        if settings.get(key, value) != value:
            raise ValueError(f"{path}: {key} is {settings[key]!r:.80}; GPT-2 has {value!r}")
    names = dict(block_size="n_positions", vocab_size="vocab_size", n_layer="n_layer",
                 n_head="n_head", n_embd="n_embd")
    for key in names.values():
        if type(settings.get(key)) is not int or not 1 <= settings[key] <= LARGEST:
            raise ValueError(f"{path}: {key} is {settings.get(key)!r:.80}, no whole number from 1 "
                             f"to {LARGEST}")
    if settings.get("n_inner") not in (None, 4 * settings["n_embd"]):
        raise ValueError(f"{path}: n_inner is {settings['n_inner']!r:.80}; GPT-2 has 4 * n_embd")
    return check_heads({ours: settings[theirs] for ours, theirs in names.items()}, path)


def check_heads(config: Config, path: Path) -> Config:
    """The config; ValueError if its heads do not share the channels evenly."""
    if config["n_embd"] % config["n_head"]:
        raise ValueError(f"{path}: n_embd={config['n_embd']} is not divisible by "
                         f"n_head={config['n_head']}")
    return config


def read_tensors(folder: Path) -> Tensors:
    """All tensors of a folder's .safetensors files; FileNotFoundError without one."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} has no .safetensors file")
    tensors: Tensors = {}
    for file in files:
        found, _ = load_tensors(file)
        if twice := sorted(found.keys() & tensors.keys()):
            raise ValueError(f"{folder} has {twice[0]!r:.80} in {file.name} and in another "
                             f".safetensors file; leave those of one model there")
        tensors |= found
    return tensors


def load_tensors(file: Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors of a .safetensors file, and its notes; ValueError for a damaged one."""
    package = safetensors()
    if not file.is_file():                                          # a pipe would be waited for
        raise FileNotFoundError(f"no such file: {file}")
    try:
        with package.safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
            return tensors, opened.metadata() or {}
    except (package.SafetensorError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]                 # it quotes what it finds
        raise ValueError(f"{file} is truncated or damaged: {reason}; copy it again") from None


def save_tensors(file: Path, tensors: Tensors, **notes: str) -> None:
    """Write a .safetensors file, whole or not at all."""
    package = safetensors()
    with atomic_write(file) as temporary:
        try:
            package.torch.save_file(tensors, temporary, metadata={"format": "pt", **notes})
        except package.SafetensorError as error:        # a full disk, of which it has no class
            raise OSError(str(error)) from None


def check_tensors(tensors: Tensors, config: Config, folder: Path) -> None:
    """ValueError that names a missing, extra or misshapen tensor."""
    # n_layer first: the shapes of all blocks are as many as it says.
    blocks = len({name.split(".")[2] for name in tensors if name.startswith("transformer.h.")})
    if config["n_layer"] > blocks:
        raise ValueError(f"{folder}: config.json asks for n_layer={config['n_layer']}; the tensors "
                         f"are those of {blocks} blocks")
    wanted = shapes(config)
    for name, shape in wanted.items():
        if name not in tensors:
            raise ValueError(f"{folder} has no tensor {name!r}")
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"{folder}: tensor {name!r} is {tuple(tensors[name].shape)} in the "
                             f"file; config.json asks for {shape}")
        if not tensors[name].is_floating_point():
            raise ValueError(f"{folder}: tensor {name!r} is {tensors[name].dtype}, no float")
    extra = sorted(tensors.keys() - wanted.keys())
    if extra:
        raise ValueError(f"{folder} has a tensor {extra[0]!r:.80} that GPT-2 does not"
                         + (f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""))


@torch.no_grad()
def write(folder: str | Path, config: Config, tensors: Tensors, end: int | None,
          idx: torch.Tensor, logits: torch.Tensor) -> None:
    """Write config.json, generation_config.json and model.safetensors, in the tensors' dtype.

    end: the token that begins and ends documents; None in a GPT-2 vocabulary: its own. Rows of a
    padded vocabulary are left out; missing biases are written as zeros, which compute the same.
    idx (B, T) and logits (B, T, V): what the model makes of some tokens. Where GPT-2 with these
    tensors makes something else of them, the files would be another model: a ValueError then, and
    nothing is written.
    """
    if end is None and config["vocab_size"] == GPT2_VOCAB:
        end = GPT2_VOCAB - 1
    safetensors()                                                   # or nothing is written
    folder = Path(folder)
    found = {name: tensor for name, tensor in tensors.items() if name != HEAD}
    found[WTE] = tensors[WTE][:config["vocab_size"]]
    wanted = shapes(config)
    for name, shape in wanted.items():
        if name.endswith(".bias"):
            found.setdefault(name, found[WTE].new_zeros(shape))
    odd = sorted(found.keys() ^ wanted.keys()) or [
        name for name, shape in wanted.items() if found[name].shape != shape]
    if odd:
        raise ValueError(f"{folder} is not written: the model differs from GPT-2 in {odd[0]!r}; an "
                         f"adapter has to be merged and unloaded first")
    expected = logits_of(config, found, idx)
    difference, largest = (logits - expected).abs().max(), expected.abs().max()
    if difference > largest * torch.finfo(logits.dtype).eps ** 0.5:
        raise ValueError(f"{folder} is not written: with these weights GPT-2 computes other logits "
                         f"than the model, by up to {difference:.3g} where the largest is "
                         f"{largest:.3g}; keep them by torch.save(model.state_dict(), FILE)")
    folder.mkdir(parents=True, exist_ok=True)
    ends, dropout = dict(bos_token_id=end, eos_token_id=end), config["dropout"]
    write_json(folder / "config.json", dict(
        architectures=["GPT2LMHeadModel"], model_type="gpt2", vocab_size=config["vocab_size"],
        n_positions=config["block_size"], n_embd=config["n_embd"], n_layer=config["n_layer"],
        n_head=config["n_head"], activation_function="gelu_new", layer_norm_epsilon=LAYER_NORM_EPS,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, tie_word_embeddings=True,
        **ends))
    write_json(folder / "generation_config.json", dict(do_sample=False, pad_token_id=end, **ends))
    save_tensors(folder / "model.safetensors", {
        name: (tensor.t() if is_conv1d(name) else tensor).contiguous().cpu()
        for name, tensor in found.items()})


def safetensors():
    """The package, or an error that names the extra."""
    try:
        import safetensors.torch
    except ModuleNotFoundError:
        raise ModuleNotFoundError('files of Hugging Face need the extra "hf": '
                                  'pip install -c constraints.txt -e ".[hf]"') from None
    return safetensors


def download(name: str, weights: bool = True) -> Path:
    """The folder of a model on the hub and its tokenizer's files, or of these alone, fetched once.
    """
    safetensors()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HfHubHTTPError, LocalEntryNotFoundError
    repository = f"openai-community/{name}" if name in OPENAI else name
    try:
        return Path(snapshot_download(repository, allow_patterns=[
            *("config.json", "*.safetensors") * weights, "tokenizer.json", "vocab.json",
            "merges.txt", "added_tokens.json"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(f"{name!r} is neither a folder here nor a model that can be had "
                                f"from the Hugging Face hub ({type(error).__name__})") from error


# ------------------------------------------------------------------------------------------------
# llm.c: 256 int32 (magic, version, context, vocabulary, blocks, heads, channels, vocabulary with
# padding), then the embeddings, each tensor of a block stacked over the blocks, and the final
# LayerNorm. Weights are (out, in), as nn.Linear's.

def read_llmc(path: Path) -> tuple[Config, Tensors]:
    """`read` of an llm.c checkpoint, without the head."""
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
    config = check_heads(dict(block_size=block_size, vocab_size=vocab_size, n_layer=n_layer,
                              n_head=n_head, n_embd=n_embd), path)
    dtype, block = LLMC_DTYPES[version], block_shapes(n_embd)
    stacked = {"wte.weight": (1, padded, n_embd), "wpe.weight": (1, block_size, n_embd),
               **{name: (n_layer, *shape) for name, shape in block.items()},
               "ln_f.weight": (1, n_embd), "ln_f.bias": (1, n_embd)}
    counts = [math.prod(shape) for shape in stacked.values()]
    expected = LLMC_HEADER + dtype.itemsize * sum(counts)
    if size != expected:
        raise ValueError(f"{path} has {size:,} bytes; its header says {expected:,}")
    numbers = torch.from_file(str(path), size=size // dtype.itemsize, dtype=dtype)
    tensors, parts = {}, numbers[LLMC_HEADER // dtype.itemsize:].split(counts)
    for (name, shape), part in zip(stacked.items(), parts):
        for i, tensor in enumerate(part.view(shape)):
            place = f"transformer.h.{i}.{name}" if name in block else f"transformer.{name}"
            tensors[place] = tensor.to(torch.float32, copy=True)
    tensors[WTE] = tensors[WTE][:vocab_size].clone()                # without padding
    return config, tensors
