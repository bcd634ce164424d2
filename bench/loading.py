"""Does reading keep up with training? The loader's CPU time, and text to shards beside tiktoken.

    python -m bench.loading [--from=FILES] [--rounds=3] [--save]

Loader: CPU seconds for one pass through a generated shard in batches of data/loader.py, and what
share of a core that is at 2 million tokens/s, more than a rank of any GPU trains. It has to be less
than 5%.

Text: data.fineweb's whole way from a file to shards (reading, encoding, checksums, writing) against
tiktoken's encode_ordinary_batch of the same documents, which are in its memory already, with the
same tokenizer and as many threads. Each in a process of its own, in turn; medians of the rounds. It
has to be at least 0.9 of tiktoken's speed. Without --from the text is what every Python carries,
its documentation and standard library, as often as it takes.
"""
import contextlib
import io
import itertools
import json
import os
import tempfile
import time
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.machine import (CPU, Row, held, in_process, lasting, median_row, publish, table,
                           take_turns, where)
from bpe import Tokenizer
from data import shards
from data.corpus import documentation, named_tokenizer, sources
from data.fineweb import FinewebConfig, prepare
from data.loader import WindowLoader
from data.texts import find_files, read_documents
from data.writer import ShardWriter
from run.config import parse, run_command

RATE, MOST_OF_A_CORE = 2_000_000, 0.05      # tokens/s of a rank; what loading them may take
LEAST_OF_TIKTOKEN = 0.9
TOKENS, BLOCK_SIZE, MICRO_BATCHES = 64_000_000, 1024, (32, 64)      # of the generated shard
TEXT_BYTES = 60_000_000                     # where --from does not name a text
WHO = ("oneloop", "tiktoken")


@dataclass(frozen=True)
class LoadingConfig:
    from_: str = ""  # text: files or folders of .jsonl, .parquet and .txt, by comma; empty: what
        # every Python carries
    tokenizer: str = ""  # gpt2 or a tokenizer's path; empty: one that is trained on the text
    rounds: int = 3  # times each is measured; the median counts
    save: bool = False  # write bench/results/loading.json


def generated(folder: Path, train: int, val: int = 2, vocab_size: int = 50257) -> Path:
    """A data set of random ids: so many tokens in each split. Returns its folder."""
    tokenizer = types.SimpleNamespace(vocab_size=vocab_size, hash=None, save=lambda path: None)
    writer = ShardWriter(folder, tokenizer, "random numbers")
    rng = np.random.default_rng(0)
    for split, tokens in (("train", train), ("val", val)):
        writer.add(split, rng.integers(0, vocab_size, tokens, dtype=writer.dtype))
    writer.finish()
    return folder


def loader_row(folder: Path, micro_batch: int, block_size: int) -> Row:
    """CPU time of an epoch's batches, all full micro-batches of it."""
    torch.set_num_threads(1)                            # CPU time is counted over all threads
    tokens = shards.open_split(folder, "train")         # mapped anew: its pages cost time, too
    loader = WindowLoader(tokens, block_size, micro_batch * block_size, micro_batch)
    served, start = 0, time.process_time()
    for step in range(loader.rows_per_epoch // micro_batch):
        served += sum(x.numel() for x, _ in loader.batches(step))
    seconds = time.process_time() - start
    return {"micro_batch": micro_batch, "block_size": block_size, "tokens": served,
            "tokens_per_cpu_s": served / seconds, "of_a_core": RATE * seconds / served}


def text_row(who: str, source: str, tokenizer: str, threads: int) -> Row:
    """Milliseconds of one contestant in this process, and the tokens that it made of the text."""
    if who == "oneloop":
        with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
            seconds = lasting(lambda: prepare(FinewebConfig(
                from_=source, tokenizer=tokenizer, out=out, num_threads=threads)))
            meta = shards.read_meta(Path(out))
        tokens = sum(split["tokens"] for split in meta["splits"].values())
        starts = named_tokenizer(tokenizer).eot is not None             # one before each document
        return {"ms": 1000 * seconds, "tokens": tokens - meta["documents"] * starts}
    texts, rows = list(read_documents(find_files(source))), []
    encoding = named_tokenizer(tokenizer).to_tiktoken()
    encoding.encode_ordinary("loaded")
    seconds = lasting(lambda: rows.extend(
        encoding.encode_ordinary_batch(texts, num_threads=threads)))
    return {"ms": 1000 * seconds, "tokens": sum(map(len, rows))}


def write_text(path: Path, least: int) -> None:
    """JSON lines of what every Python carries, again and again until they are so many bytes."""
    with open(path, "w", encoding="utf-8") as file:
        for text in itertools.cycle(documentation() + sources()):
            text = text.encode(errors="replace").decode()               # no lone surrogates
            file.write(json.dumps({"text": text}) + "\n")
            if (least := least - len(text.encode())) <= 0:
                return


def compare_text(config: LoadingConfig, scratch: Path) -> tuple[Row, list[float]]:
    """The row of both contestants, with ours over tiktoken's speed, and the machine's states."""
    source, tokenizer = config.from_, config.tokenizer
    threads = os.cpu_count() or 1
    if not source:
        source = str(scratch / "text.jsonl")
        write_text(Path(source), TEXT_BYTES)
    texts = list(read_documents(find_files(source)))
    if not tokenizer:
        tokenizer = str(scratch / "tok.json")
        Tokenizer.train(texts, 32_000).save(tokenizer)
    turns = take_turns(WHO, lambda who: in_process(text_row, who, source, tokenizer, threads),
                       config.rounds)
    made = {row["tokens"] for rows in turns.rows.values() for row in rows}
    if len(made) > 1:
        raise ValueError(f"the two do not make the same tokens of {source}: {sorted(made)}")
    seconds = {who: median_row(rows, "ms")["ms"] / 1000 for who, rows in turns.rows.items()}
    return {"documents": len(texts), "bytes": sum(len(text.encode()) for text in texts),
            "tokens": made.pop(), "threads": threads,
            "tokenizer": "gpt2" if tokenizer == "gpt2" else named_tokenizer(tokenizer).vocab_size,
            "seconds": seconds, "of_tiktoken": seconds["tiktoken"] / seconds["oneloop"],
            "seconds_rounds": {who: [row["ms"] / 1000 for row in rows]
                               for who, rows in turns.rows.items()}}, turns.states


def report(found: dict[str, Any]) -> str:
    text, worst = found["text"], max(row["of_a_core"] for row in found["rows"])
    rows = [{"what": f"batches of {row['micro_batch']} x {row['block_size']}",
             "speed": f"{row['tokens_per_cpu_s'] / 1e6:.1f} million tokens a CPU second"}
            for row in found["rows"]]
    rows += [{"what": f"text to tokens, {who}, {text['threads']} threads",
              "speed": f"{text['bytes'] / 1e6 / seconds:.1f} MB/s"}
             for who, seconds in text["seconds"].items()]
    return (f"`python -m bench.loading`, {where(found)}. Batches for {RATE:,} tokens/s take "
            f"{worst:.1%} of a core (at most {MOST_OF_A_CORE:.0%}: "
            f"{held(worst < MOST_OF_A_CORE)}); text to shards has {text['of_tiktoken']:.2f} of the "
            f"speed of tiktoken's `encode_ordinary_batch` alone (at least {LEAST_OF_TIKTOKEN}: "
            f"{held(text['of_tiktoken'] >= LEAST_OF_TIKTOKEN)}).\n\n" + table("what | speed", rows))


def main(words: list[str]) -> None:
    config = parse(LoadingConfig, words, "python -m bench.loading", about=__doc__)
    with tempfile.TemporaryDirectory() as scratch:
        text, states = compare_text(config, Path(scratch))
        folder, loader = generated(Path(scratch) / "data", TOKENS), []
        for micro_batch in MICRO_BATCHES:
            rows = [loader_row(folder, micro_batch, BLOCK_SIZE) for _ in range(config.rounds)]
            loader.append(sorted(rows, key=lambda row: row["of_a_core"])[len(rows) // 2])
    publish(report, "loading", config.save, CPU, loader, states, text=text, rounds=config.rounds)


if __name__ == "__main__":
    run_command(main)
