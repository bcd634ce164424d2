"""Look at conversations before training on them: python -m data.chat inspect FILE|NAME.

Prints one rendered example with what has a label in colour, how many turns and system messages
there are, the lengths of prompts and answers, which answers repeat, and what a block_size would
cut. NAME is a prepared data set (data/NAME or a folder); a FILE may be of any format that
data/conversations.py reads. Without --tokenizer a token is a byte.
"""
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from bpe import Tokenizer
from data import conversations
from data.corpus import named_tokenizer
from data.prepared import DATA, read_meta, read_split
from data.templates import cut, encode, extend_tokenizer, find_template, render
from model import IGNORE
from run.config import parse
from run.load import run_settings
from run.log import printable

GREEN, GREY, PLAIN = "\033[32m", "\033[90m", "\033[0m"


@dataclass(frozen=True)
class InspectConfig:
    tokenizer: str = "bytes"  # bytes, gpt2, a tokenizer's path, or a run
    template: str = "chatml"  # how conversations are written: alpaca, plain, chatml, llama3, none
    block_size: int = 0  # what is longer counts as truncated; 0: that of the run, or 1024
    split: Literal["train", "val"] = "train"  # of a prepared data set
    example: int = 0  # which conversation is shown; the first is 0


def load(name: str, split: str) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The conversations of a file or of a prepared data set, and what was dropped why."""
    if Path(name).is_file():
        return conversations.read([Path(name)])
    folder = Path(name) if Path(name).is_dir() else DATA / name
    return list(read_split(folder, "chat", split)), read_meta(folder, "chat")["dropped"]


def examine(talks: list[dict[str, Any]], tokenizer: Tokenizer, template: str,
            block_size: int) -> dict[str, Any]:
    """Figures of conversations. Lengths are in tokens; a prompt is all that has no label."""
    tokenizer = extend_tokenizer(tokenizer, template)
    prompts, lengths, answers, counts = [], [], Counter(), Counter()
    for talk in talks:
        messages = talk["messages"]
        ids, spans = encode(messages, tokenizer, template)
        labelled = [end - start for start, end in spans]
        fitting, whole = cut(spans, block_size + 1)
        lengths += labelled
        prompts.append(spans[-1][1] - sum(labelled))
        answers.update(m["content"].strip() for m in messages
                       if m["role"] == "assistant" and m.get("weight", 1))
        counts.update({"several turns": sum(m["role"] == "assistant" for m in messages) > 1,
                       "system message": messages[0]["role"] == "system",
                       "truncated": bool(fitting) and not whole, "unlabelled": not fitting})
    return {**counts, "conversations": len(talks), "answers": len(lengths),
            "repeated answers": len(lengths) - len(answers), "prompts": sorted(prompts),
            "lengths": sorted(lengths), "common": answers.most_common(3)}


def coloured(messages: list[dict[str, str]], tokenizer: Tokenizer, template: str,
             colour: bool) -> str:
    """The rendered text, labels in green or, where there is no colour, in [[ ]]."""
    tokenizer = extend_tokenizer(tokenizer, template)
    ids, labels = render(messages, tokenizer, template)
    shown = ""
    for has_label, part in groupby(zip(ids, labels), key=lambda pair: pair[1] != IGNORE):
        text = printable(tokenizer.decode([i for i, _ in part]))
        if colour:
            shown += f"{GREEN if has_label else GREY}{text}{PLAIN}"
        else:
            shown += f"[[{text}]]" if has_label else text
    return shown


def main(names: list[str], words: list[str]) -> None:
    config = parse(InspectConfig, words, "python -m data.chat inspect FILE|NAME", about=__doc__)
    if len(names) != 1:
        raise ValueError("name a file or a data set to inspect: python -m data.chat inspect pydocs")
    find_template(config.template)
    talks, dropped = load(names[0], config.split)
    if not 0 <= config.example < len(talks):
        raise ValueError(f"example={config.example}, but {names[0]} has {len(talks):,} "
                         f"conversations; the first is 0")
    tokenizer = named_tokenizer(config.tokenizer)
    colour = sys.stdout.isatty()
    print(f"--- conversation {config.example}, template {config.template}; "
          f"{'green' if colour else '[[ ]]'} has a label")
    print(coloured(talks[config.example]["messages"], tokenizer, config.template, colour))
    print("---")
    settings = run_settings(config.tokenizer).get("model") or {}
    block_size = config.block_size or settings.get("block_size", 1024)
    report = examine(talks, tokenizer, config.template, block_size)
    n = report["conversations"]
    print(f"{n:,} conversations, {report['answers']:,} answers; {report['several turns']:,} of "
          f"several turns, {report['system message']:,} with a system message")
    for reason, count in sorted(dropped.items()):
        print(f"dropped {count:,}: {printable(reason)}")
    for title, values in (("prompts, tokens without a label", report["prompts"]),
                          ("answers, tokens with a label", report["lengths"])):
        some = ", ".join(f"{values[len(values) * part // 100]:,}" for part in (10, 50, 90))
        print(f"{title}: {some} at 10, 50 and 90%, longest {values[-1]:,}, {sum(values):,} in all")
    print(f"repeated answers: {report['repeated answers']:,}"
          + "".join(f"\n  {count:,} times {text[:60]!r}" for text, count in report["common"]
                    if count > 1))
    print(f"block_size={block_size}: {report['truncated'] / n:.1%} truncated, "
          f"{report['unlabelled'] / n:.1%} without a label left, which training leaves out")
