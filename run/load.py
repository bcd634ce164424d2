"""A model and its tokenizer by name: a run, a Hugging Face folder, a checkpoint of llm.c, or GPT-2.

    model, tokenizer = load_model("out/demo")           as it was trained: a GPT or a Classifier
    model, tokenizer = load_writer("gpt2")              the same, but no classifier
    model, tokenizer = load_base("out/lora-demo")       to train on: adapters merged
    add_adapter_of(model, "out/lora-demo")              only the adapter that a run trained
"""
import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

import lora
from bpe import Tokenizer
from fast.linear import use_fast_products
from formats.files import read_json
from formats.gpt2 import OPENAI, count_weights, download
from model import GPT, SIZES, GPTConfig
from run import checkpoint
from run.classifier import Classifier
from run.config import build, given, warn
from run.device import host_memory

TOKENIZER_FILES = ("tok.json", "tokenizer.json", "vocab.bpe", "merges.txt")


def is_run(name: str | Path) -> bool:
    """Whether this is the folder of a run."""
    return (Path(name) / "run.json").exists()


def load_model(name: str | Path, device: torch.device | str = "cpu", dropout: float = 0.0,
               which: str = "best.pt") -> tuple[GPT | Classifier, Tokenizer | None]:
    """A model, in eval mode, and its tokenizer.

    Of a run, the best checkpoint is taken; the last one where nothing was evaluated yet. A run on
    texts with classes gives a Classifier; who needs a model that writes, calls `load_writer`.
    """
    model, tokenizer = (_load_run(Path(name), dropout, which) if is_run(name)
                        else _load_other(Path(name), name, dropout))
    if tokenizer and tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(f"the tokenizer in {name} has {tokenizer.vocab_size} tokens, the model "
                         f"{model.config.vocab_size}: it is another model's; put its own there")
    return use_fast_products(model).to(device).eval(), tokenizer


def load_writer(name: str | Path, device: torch.device | str = "cpu", dropout: float = 0.0
                ) -> tuple[GPT, Tokenizer | None]:
    """`load_model`, of a model that writes: a classifier is refused."""
    model, tokenizer = load_model(name, device, dropout)
    if isinstance(model, Classifier):
        raise ValueError(f"{name} is a classifier, and this needs a model that writes; "
                         f"python -m eval evaluates it")
    return model, tokenizer


def load_base(name: str | Path, dropout: float = 0.0, block_size: int | None = None
              ) -> tuple[GPT, Tokenizer | None]:
    """A model to train on, and its tokenizer; an adapter is merged, a longer context cropped."""
    model, tokenizer = load_writer(name, dropout=dropout)
    if hasattr(model, "adapters"):
        lora.merge_lora(model)
        lora.unload_lora(model)
    if block_size and block_size < model.config.block_size:
        model.crop_context(block_size)
    return model.requires_grad_(True).train(), tokenizer


def load_start(config: Any) -> tuple[GPT | None, Tokenizer | None]:
    """What a new run starts from, by the settings of train.py: `load_base` with the dropout and the
    context that are given; (None, None) of "scratch". ValueError where the rest of the shape is
    another. A dry run has GPT-2's shape without its weights, which it does not download."""
    name, asked, wanted = config.init_from, config.model, given(config, "model")
    if name == "scratch":
        return None, None
    cropped = asked.block_size if "block_size" in wanted else None
    if config.dry_run and name in SIZES:
        model, tokenizer = GPT(GPTConfig(**SIZES[name], dropout=asked.dropout)), Tokenizer.gpt2()
        model.crop_context(cropped or GPTConfig.block_size)
    else:
        model, tokenizer = load_base(name, asked.dropout, cropped)
    for field in wanted:
        value, has = getattr(asked, field), getattr(model.config, field)
        if value != has:
            raise ValueError(f"model.{field}={value}, but {name} has {has}; leave it out, "
                             f"init_from brings the shape")
    return model, tokenizer


def model_for(data: Any, start: GPT | None, config: Any) -> GPT | Classifier:
    """The network that learns from a data set (data/sets.py), by the settings of train.py: a new
    one, or the start with a row for each token, or with a head for the classes."""
    if start is None:
        if config.model.vocab_size != data.vocab_size and "vocab_size" in given(config, "model"):
            raise ValueError(f"model.vocab_size={config.model.vocab_size}, but the tokenizer of "
                             f"{config.data} has {data.vocab_size}; leave it out, training takes "
                             f"that")
        shape = dataclasses.replace(config.model, vocab_size=data.vocab_size)
        # Each rank makes it whole before it goes to a GPU or is split over the ranks, so that this
        # refuses nothing that would fit; gradients and the rest may be elsewhere.
        need, here = 4 * count_weights(dataclasses.asdict(shape)), host_memory()
        if need > here and not config.dry_run:
            raise ValueError(f"{shape} needs {need / 2**30:,.0f} GiB of memory for its weights "
                             f"alone, and there are {here / 2**30:,.0f}; make it smaller")
        with torch.device("meta" if config.dry_run else "cpu"):
            return GPT(shape)
    if data.classes:
        return Classifier(start, data.classes, config.pooling)
    if not (data.template or data.parts) and start.config.vocab_size != data.vocab_size:
        raise ValueError(f"{config.data} was made with another tokenizer than "
                         f"{config.init_from}'s: it has {data.vocab_size} tokens, not "
                         f"{start.config.vocab_size}; prepare it with "
                         f"--tokenizer={config.init_from}, or one that extends it")
    new = data.vocab_size - start.config.vocab_size
    if config.lora and new > 0 and "wte" not in " ".join(config.lora.modules_to_save):
        # Of a mean of rows, no logit is ever above the largest.
        lora.say(f"warning: {new:,} tokens of {config.data} are new to {config.init_from}, and "
                 f"LoRA alone will hardly learn to write them, so answers that end in one do not "
                 f"end; train the embedding too, --lora.modules_to_save=wte, or take a template "
                 f"without new tokens (plain, alpaca)")
    return grow_embedding(start, data.vocab_size, data.parts)


def parts_of_new(tokenizer: Tokenizer, base: Tokenizer) -> dict[int, list[int]] | None:
    """{id: the base's ids for it} of the tokens that merges make which the base's tokenizer has
    not. None where this is no extension of it, so that ids would mean something else."""
    count = len(base.merges)
    if not (tokenizer.merges[:count] == base.merges and tokenizer.pattern == base.pattern
            and tokenizer.merge_ids[:count] == base.merge_ids
            and tokenizer.byte_ids == base.byte_ids
            and base.special_tokens.items() <= tokenizer.special_tokens.items()):
        return None
    parts = {i: [i] for i in (*base.byte_ids, *base.merge_ids)}
    for i, (a, b) in zip(tokenizer.merge_ids[count:], tokenizer.merges[count:]):
        parts[i] = parts[a] + parts[b]
    return {i: parts[i] for i in tokenizer.merge_ids[count:]}


def grow_embedding(model: nn.Module, vocab_size: int, parts: dict[int, list[int]] = {}
                   ) -> nn.Module:
    """Give a GPT rows for new tokens, in place, each at the mean of its `parts`' rows, or where it
    has none of all rows; the head stays tied.

    The mean makes a new token as likely as an average one, and disturbs the others least (Hewitt
    2021, "Initializing New Word Embeddings for Pretrained Language Models").
    """
    if vocab_size < model.config.vocab_size:
        raise ValueError(f"vocab_size={vocab_size} is below the model's "
                         f"{model.config.vocab_size}; an embedding can only grow")
    if vocab_size == model.config.vocab_size and not parts:
        return model
    wte = model.transformer.wte
    old = wte.weight.detach()[:model.config.vocab_size]             # (V, C), without padding
    model.config = dataclasses.replace(model.config, vocab_size=vocab_size)
    rows = model.config.padded_vocab_size
    weight = torch.cat([old, old.mean(dim=0, keepdim=True).expand(rows - len(old), -1)])
    for i, ids in parts.items():
        weight[i] = old[ids].mean(dim=0)
    wte.weight = nn.Parameter(weight, requires_grad=wte.weight.requires_grad)
    model.lm_head.weight = wte.weight
    wte.num_embeddings = model.lm_head.out_features = rows
    return model


def add_adapter_of(model: nn.Module, run: str | Path) -> nn.Module:
    """Give a base the adapter of a run's best checkpoint, or its last one; returns the model,
    cropped to the context that the run had cropped it to."""
    state = _checkpoint_of(Path(run))
    if not state["config"].get("lora"):
        raise ValueError(f"the run {run} trained no adapter; it is a model itself")
    shape = build(GPTConfig, state["config"].get("model") or dataclasses.asdict(model.config))
    if shape.vocab_size > model.config.vocab_size:
        raise ValueError(f"{run} gave its base {shape.vocab_size - model.config.vocab_size} more "
                         f"tokens, and this model has not got them; take the run itself, whose "
                         f"base is known, without --adapter")
    if shape.block_size < model.config.block_size:
        lora.say(f"{run} was trained on a context of {shape.block_size}, and the model is cropped "
                 f"to that")
        model.crop_context(shape.block_size)
    return _with_adapter(model, state, Path(run))


def with_head(model: GPT, state: dict[str, Any]) -> GPT | Classifier:
    """The model as a Classifier, where a checkpoint is one's."""
    head = state["model"].get("head.weight")                        # (K, C)
    return model if head is None else Classifier(model, len(head), state["config"]["pooling"])


def run_settings(name: str | Path) -> dict[str, Any]:
    """The settings that a run was trained with; none of what is no run."""
    file = Path(name) / "config.json"
    if not is_run(name) or not file.exists():
        return {}
    settings = read_json(file)
    try:
        checkpoint.check_settings(settings)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {error!s:.300}") from None
    return settings


def run_template(name: str | Path) -> str:
    """The template that a run was trained with; "" of what is no such run."""
    return run_settings(name).get("template") or ""


def needs_tokenizer(tokenizer: Tokenizer | None, name: str | Path) -> Tokenizer:
    """The tokenizer; ValueError where the model or data set of this name has none."""
    if tokenizer is None:
        raise ValueError(f"{name} has no tokenizer.json; put its tokenizer there")
    return tokenizer


def _load_run(folder: Path, dropout: float, which: str
              ) -> tuple[GPT | Classifier, Tokenizer | None]:
    """The model of one of a run's checkpoints; an adapter's on its base."""
    state, file = _checkpoint_of(folder, which), folder / "tokenizer.json"
    tokenizer = Tokenizer.load(file) if file.exists() else None
    settings = state["config"]
    if settings.get("model") is None or settings.get("lora") and settings.get("init_from") is None:
        raise ValueError(f"the settings in {folder}'s checkpoint lack the model's, or its base")
    shape = build(GPTConfig, {**settings["model"], "dropout": dropout})
    if not settings.get("lora"):
        model = with_head(GPT(shape), state)
        checkpoint.load_trainable_state(model, state["model"], folder)
        return model, tokenizer
    try:
        model, base = load_base(settings["init_from"], dropout, shape.block_size)   # has the rest
    except RecursionError:
        raise ValueError(f"{folder} trained an adapter of {settings['init_from']:.200}, which is "
                         f"an adapter's run too, and so on without end") from None
    if shape.vocab_size > max(model.config.vocab_size, tokenizer.vocab_size if tokenizer else 0):
        raise ValueError(f"{folder} has a vocabulary of {shape.vocab_size}, and neither its base "
                         f"nor its tokenizer has so many tokens; put its tokenizer.json back")
    parts = parts_of_new(tokenizer, base) if tokenizer and base else {}
    if parts is None:
        raise ValueError(f"{file} neither is nor extends the tokenizer of {folder}'s base, "
                         f"{settings['init_from']:.200}; put its own back")
    if shape.vocab_size < model.config.vocab_size:
        raise ValueError(f"{folder} has a vocabulary of {shape.vocab_size}, and its base "
                         f"{settings['init_from']:.200} has {model.config.vocab_size}: it was "
                         f"trained on another")
    model = with_head(grow_embedding(model, shape.vocab_size, parts), state)
    return _with_adapter(model, state, folder, quiet=True), tokenizer


def _with_adapter(model: nn.Module, state: dict[str, Any], run: Path, quiet: bool = False
                  ) -> nn.Module:
    """The base with the adapter of a run's checkpoint. Ranks are compared before anything is
    made."""
    config = build(lora.LoRAConfig, state["config"]["lora"])
    for name, (layer, part, _) in lora.targets(model, config).items():
        key = f"{layer}.lora_adapters.default.{part}.lora_A"
        rank, _ = lora.rank_and_scale(config, name)
        found = len(state["model"].get(key, ()))
        if found != rank:
            raise ValueError(f"{run}: {key} has {found} rows, and its settings ask for rank "
                             f"{rank}; the checkpoint is damaged")
    lora.add_lora(model, config, quiet=quiet)
    if model.adapters.base_hash != state["base"]:
        raise ValueError(f"{run} trained an adapter of {state['config']['init_from']:.200}, which "
                         f"has changed since; put the old one back")
    checkpoint.load_trainable_state(model, state["model"], run)
    return model


def _load_other(folder: Path, name: str | Path, dropout: float) -> tuple[GPT, Tokenizer | None]:
    """A model that is not a run of ours."""
    if (folder / "best.pt").exists() or not folder.is_dir() and folder.parent.name == "out":
        raise FileNotFoundError(f"there is no run in {folder}")
    if not folder.exists():
        if str(name) in OPENAI:
            return GPT.from_pretrained(name, dropout), Tokenizer.gpt2()
        folder = download(str(name))
    model = GPT.from_pretrained(folder, dropout)
    if folder.is_dir() and any((folder / file).exists() for file in TOKENIZER_FILES):
        return model, Tokenizer.load(folder)
    if model.config.vocab_size != GPTConfig.vocab_size:
        return model, None
    if folder.is_dir():                                 # llm.c's files are of GPT-2's tokens
        warn(f"warning: {name} has no tokenizer; its vocabulary is as large as GPT-2's, whose "
             f"tokenizer is assumed; if it has another, put its tokenizer.json there")
    return model, Tokenizer.gpt2()


def _checkpoint_of(folder: Path, which: str = "best.pt") -> dict[str, Any]:
    state = (checkpoint.load(folder / which) if (folder / which).exists()
             else checkpoint.load_last(folder))
    if state is None:
        raise FileNotFoundError(f"the run {folder} has no checkpoint yet")
    return state
