"""A model for transformers, vLLM and the like: GPT2LMHeadModel's files, with the tokenizer.

    python -m run.export out/demo --out=FOLDER                      a run, its best checkpoint
    python -m run.export gpt2 --adapter=out/lora --out=FOLDER       a base with an adapter merged in
    python -m run.export gpt2_124M.bin --out=FOLDER                 a checkpoint of llm.c

An adapter is a run that trained one, or a folder in PEFT's format. A run that trained an adapter
needs no other word: its base is known, and the adapter is merged. (lora.save_lora writes one alone,
as PEFT reads it.) What is written generates as sample.py --temperature=0 does; that of a run on
conversations ends an answer at any special token, as --chat does:

    python -c 'import transformers; print(transformers.pipeline("text-generation", "FOLDER")("A"))'
"""
from dataclasses import dataclass
from pathlib import Path

import torch

import lora
from formats.files import read_json, write_json
from run.config import parse, run_command
from run.load import add_adapter_of, is_run, load_base, needs_tokenizer, run_template


@dataclass(frozen=True)
class ExportConfig:
    adapter: str = ""  # an adapter to merge in: a run, or a folder in PEFT's format
    out: str = ""  # folder to write

    def __post_init__(self):
        if not self.out:
            raise ValueError("out is missing; give --out=FOLDER")
        if is_run(self.out):
            raise ValueError(f"out={self.out} is a run, whose tokenizer.json would be replaced; "
                             f"export into another folder")


def export(source: str | Path, folder: str | Path, adapter: str | Path = "") -> None:
    """Write a model and its tokenizer into a folder, with an adapter merged where one is named."""
    model, tokenizer = load_base(source)
    tokenizer = needs_tokenizer(tokenizer, source)
    if adapter:
        (add_adapter_of if is_run(adapter) else lora.load_lora)(model, adapter)
        tokens = torch.randint(model.config.vocab_size, (2, min(64, model.config.block_size)),
                               generator=torch.Generator().manual_seed(0))
        lora.merge_lora(model, tokens)                              # says how far logits moved
        lora.unload_lora(model)
    model.save_pretrained(folder, tokenizer.eot)
    if adapter and run_template(adapter) or run_template(source):   # special tokens end an answer
        file = Path(folder) / "generation_config.json"
        ends = sorted(tokenizer.special_tokens.values())
        write_json(file, {**read_json(file), "eos_token_id": ends})
    tokenizer.save_pretrained(folder)


def main(words: list[str]) -> None:
    source = words.pop(0) if words and not words[0].startswith("-") else ""
    config = parse(ExportConfig, words, "python -m run.export RUN|FOLDER|gpt2", about=__doc__)
    if not source:
        raise ValueError("say what to export: python -m run.export RUN|FOLDER|gpt2 --out=FOLDER")
    export(source, config.out, config.adapter)
    print(f"{source} is in {config.out}, for transformers and for init_from={config.out}")


if __name__ == "__main__":
    run_command(main)
