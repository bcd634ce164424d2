"""Text from a model: a run, a Hugging Face folder, or GPT-2.

    python sample.py out/demo --prompt="Return the" --samples=3
    python sample.py gpt2 --temperature=0

    model, tokenizer = load_model("out/demo")
    text = continue_text(model, tokenizer, "Return the", max_new_tokens=50)
"""
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import checkpoint
from bpe import Tokenizer
from config import build, option, parse, run_command
from device import autocast, pick_device, pick_dtype
from model import GPT, GPTConfig


@dataclass(frozen=True)
class SampleConfig:
    prompt: str = option("", "the text to continue; empty: the start of a document")
    samples: int = option(1, "how many continuations")
    max_new_tokens: int = option(200, "tokens of each, at most; a document's end ends it before")
    temperature: float = option(0.8, "0: always the likeliest token; 1: as the model predicts")
    top_k: int = option(50, "choose among so many likeliest tokens; 0: all")
    top_p: float = option(1.0, "choose among the likeliest tokens with this probability together")
    seed: int = option(0, "of the sampling")
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = option("auto", "precision")


def load_model(name: str | Path, device: torch.device | str = "cpu", dropout: float = 0.0,
               which: str = "best.pt") -> tuple[GPT, Tokenizer | None]:
    """A model, in eval mode, and its tokenizer: from a run, a Hugging Face folder or the hub.

    Of a run, the best checkpoint is taken; the last one where nothing was evaluated yet.
    """
    folder = Path(name)
    if not (folder / "run.json").exists():
        if (folder / "best.pt").exists() or not folder.is_dir() and folder.parent.name == "out":
            raise FileNotFoundError(f"there is no run in {folder}")
        model = GPT.from_pretrained(name, dropout)
        has_tokenizer = folder.is_dir() and any((folder / file).exists() for file in
                                                ("tokenizer.json", "vocab.bpe", "merges.txt"))
        tokenizer = (Tokenizer.load(folder) if has_tokenizer else
                     Tokenizer.gpt2() if model.config.vocab_size == 50257 else None)
        return model.to(device).eval(), tokenizer
    state = (checkpoint.load(folder / which) if (folder / which).exists()
             else checkpoint.load_last(folder))
    if state is None:
        raise FileNotFoundError(f"the run {folder} has no checkpoint yet")
    shape = build(GPTConfig, {**state["config"]["model"], "dropout": dropout})
    model = GPT(shape)
    model.load_state_dict(state["model"])
    file = folder / "tokenizer.json"
    return model.to(device).eval(), Tokenizer.load(file) if file.exists() else None


def continue_text(model: GPT, tokenizer: Tokenizer, prompt: str = "", max_new_tokens: int = 200,
                  temperature: float = 0.8, top_k: int = 50, top_p: float = 1.0,
                  seed: int = 0) -> str:
    """The prompt and its continuation; without a prompt, a document from its start."""
    device = model.transformer.wte.weight.device
    ids = tokenizer.encode(prompt)
    if not ids:                         # documents follow the end of the one before them
        ids = [tokenizer.eot if tokenizer.eot is not None else tokenizer.encode("\n")[0]]
    idx = torch.tensor([ids], device=device)
    generator = torch.Generator(device).manual_seed(seed)
    stops = () if tokenizer.eot is None else (tokenizer.eot,)
    out = model.generate(idx, max_new_tokens, temperature, top_k or None, top_p, stops, generator)
    new = [token for token in out[0, len(ids):].tolist() if token not in stops]
    return prompt + tokenizer.decode(new)


def main(words: list[str]) -> None:
    if not words or words[0].startswith("-"):
        words = ["out/demo", *words]
    config = parse(SampleConfig, words[1:], "sample.py RUN|FOLDER|gpt2", about=__doc__)
    device = pick_device(config.device)
    model, tokenizer = load_model(words[0], device)
    if tokenizer is None:
        raise ValueError(f"{words[0]} has no tokenizer.json; put its tokenizer there")
    with autocast(device, pick_dtype(config.dtype, device)):
        for i in range(config.samples):
            print(continue_text(model, tokenizer, config.prompt, config.max_new_tokens,
                                config.temperature, config.top_k, config.top_p, config.seed + i))
            print("-" * 80)


if __name__ == "__main__":
    run_command(main)
