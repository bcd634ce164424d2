"""Conversations to batches: ours against transformers' chat template and collator.

    python -m bench.chat [--from=FILE] [--tokenizer=gpt2] [--batch=32] [--save]

Both start from the same messages and the same vocabulary, write them as ChatML, mark what the
assistant says, and pad batches of the longest first: ours with render and Samples, theirs with
apply_chat_template (return_assistant_tokens_mask) and DataCollatorForSeq2Seq. `rendering` is ours
up to ids and labels, without batches. In one process, in turns; medians of the processor's time, so
that others on the machine count less. MB are of the messages' text. Labels of both are compared.
Needs the extra `dev` (transformers).
"""
import os
import statistics
import tempfile
import time
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.machine import CPU, publish, table, take_turns, where
from bpe import Tokenizer
from run.config import parse, run_command
from data import conversations, pydocs
from data.chat import encode, extend_tokenizer
from data.conversations import Message
from data.samples import Samples
from data.texts import RECORDS, find_files
from model import IGNORE

CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
          "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}"
          "{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}")


@dataclass(frozen=True)
class ChatBenchConfig:
    from_: str = ""  # a file of conversations; empty: questions about Python's library
    tokenizer: str = "gpt2"  # gpt2 or a tokenizer's path
    records: int = 2000  # how many of them, spread over it; 0: all
    batch: int = 32  # samples of a batch
    block_size: int = 1024  # longer samples are left out, on both sides
    repeats: int = 5  # turns of each way; the medians count
    save: bool = False  # write bench/results/chat.json


def ours(talks: list[list[Message]], tokenizer: Any, batch: int, block_size: int) -> list[Any]:
    flat, marks, offsets = array("i"), bytearray(), [0]
    for messages in talks:
        ids, spans = encode(messages, tokenizer, "chatml")
        flat.extend(ids)
        mask = bytearray(len(ids))
        for start, stop in spans:
            mask[start:stop] = b"\1" * (stop - start)
        marks += mask
        offsets.append(len(flat))
    samples = Samples(np.array(flat, np.int32), np.frombuffer(marks, np.bool_), np.array(offsets),
                      block_size)
    return list(samples.evaluation_batches(batch))


def theirs(talks: list[list[Message]], tokenizer: Any, collator: Any, batch: int) -> list[Any]:
    features = []
    for messages in talks:
        found = tokenizer.apply_chat_template(messages, return_dict=True,
                                              return_assistant_tokens_mask=True)
        ids, mask = found["input_ids"], found["assistant_masks"]
        features.append({"input_ids": ids, "attention_mask": found["attention_mask"],
                         "labels": [i if m else IGNORE for i, m in zip(ids, mask)]})
    features.sort(key=lambda feature: -len(feature["input_ids"]))
    return [collator(features[start:start + batch]) for start in range(0, len(features), batch)]


def load_theirs(tokenizer: Any) -> tuple[Any, Any]:
    """The same vocabulary in transformers, with its collator."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        from transformers import AutoTokenizer, DataCollatorForSeq2Seq
    except ModuleNotFoundError:
        raise ModuleNotFoundError('the benchmark needs the extra "dev": pip install '
                                  '-c constraints.txt -e ".[dev]"') from None
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        other = AutoTokenizer.from_pretrained(folder)
    other.chat_template = CHATML
    other.pad_token = other.pad_token or "<|im_end|>"
    return other, DataCollatorForSeq2Seq(other, pad_to_multiple_of=16)


def labels_of(batches: list[Any]) -> tuple[int, int]:
    """Tokens with a label, and the sum of their ids."""
    kept = [y[y != IGNORE] for y in batches]
    return sum(map(len, kept)), sum(int(y.sum()) for y in kept)


def report(found: dict[str, Any]) -> str:
    """A result as markdown."""
    return (f"`python -m bench.chat`, {where(found)}, {found['conversations']:,} conversations of "
            f"{found['source']}: ours is {found['ratio']:.2f} times as fast as transformers' "
            f"template and collator.\n\n"
            + table("way=name | seconds:.3f | MB/s=mb_per_s:.2f", found["rows"]))


def main(words: list[str]) -> None:
    config = parse(ChatBenchConfig, words, "python -m bench.chat", about=__doc__)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    tokenizer = extend_tokenizer(Tokenizer.load(config.tokenizer), "chatml")
    other, collator = load_theirs(tokenizer)
    talks = [talk["messages"] for talk in (
        conversations.read(find_files(config.from_, RECORDS))[0] if config.from_
        else pydocs.questions())]
    step = max(1, len(talks) // config.records) if config.records else 1
    talks = [[{"role": m["role"], "content": m["content"]} for m in talk] for talk in talks[::step]]
    talks = [talk for talk in talks
             if len(encode(talk, tokenizer, "chatml")[0]) <= config.block_size]
    size = sum(len(m["content"].encode()) for talk in talks for m in talk) / 1e6
    ways = {"rendering": lambda: [encode(talk, tokenizer, "chatml") for talk in talks],
            "ours": lambda: ours(talks, tokenizer, config.batch, config.block_size),
            "transformers": lambda: theirs(talks, other, collator, config.batch)}
    made: dict[str, Any] = {}

    def measure(name: str, _: list) -> dict[str, float]:
        start = time.process_time()
        made[name] = ways[name]()
        return {"s": time.process_time() - start}
    turns = take_turns(ways, measure, config.repeats + 1)           # the first turn warms up
    labels, their_labels = (labels_of([y for _, y in made["ours"]]),
                            labels_of([batch["labels"] for batch in made["transformers"]]))
    if labels != their_labels:
        print(f"labels differ: {labels[0]:,} of ours, {their_labels[0]:,} of theirs")
    medians = {name: statistics.median(row["s"] for row in rows[1:])
               for name, rows in turns.rows.items()}
    rows = [{"name": name, "seconds": round(median, 4), "mb_per_s": round(size / median, 2)}
            for name, median in medians.items()]
    publish(report, "chat", config.save, CPU, rows, turns.states, conversations=len(talks),
            ratio=round(medians["transformers"] / medians["ours"], 2),
            source=Path(config.from_).name or "pydocs")


if __name__ == "__main__":
    run_command(main)
