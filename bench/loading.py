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
import json
import os
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.machine import (CPU, Row, check_known, check_least, held, in_process, lasting,
                           median_row, publish, table, take_turns, where)
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
WHO = ("oneloop", "tiktoken")


@dataclass(frozen=True)
class LoadingConfig:
    from_: str = ""  # text: files or folders of .jsonl, .parquet and .txt, by comma; empty: what
        # every Python carries
    tokenizer: str = ""  # gpt2 or a tokenizer's path; empty: one that is trained on the text
    megabytes: float = 60.0  # text, where --from does not name it
    threads: int = 0  # threads that encode; 0: one for each core
    tokens: int = 64_000_000  # tokens of the generated shard
    micro_batches: tuple[int, ...] = (32, 64)  # sequences of a batch
    block_size: int = 1024  # tokens of a sequence
    rounds: int = 3  # times each is measured; the median counts
    save: bool = False  # write bench/results/loading.json
    who: str = "oneloop"  # whose text --row measures: oneloop, tiktoken (used inside)
    row: bool = False  # print one measurement as JSON (used inside)

    def __post_init__(self):
        check_known(self, who=WHO)
        check_least(self, megabytes=0.001, tokens=1, block_size=1, rounds=1, threads=0)


class Numbers:
    """A tokenizer as far as ShardWriter asks: there are ids, and no text behind them."""
    hash = None

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def save(self, path: Path) -> None:
        pass


def generated(folder: Path, train: int, val: int = 2, vocab_size: int = 50257) -> Path:
    """A data set of random ids: so many tokens in each split. Returns its folder."""
    writer = ShardWriter(folder, Numbers(vocab_size), "random numbers")
    rng = np.random.default_rng(0)
    for split, tokens in (("train", train), ("val", val)):
        writer.add(split, rng.integers(0, vocab_size, tokens, dtype=writer.dtype))
    writer.finish()
    return folder


def loader_row(folder: Path, micro_batch: int, block_size: int) -> dict[str, Any]:
    """CPU time of an epoch's batches, all full micro-batches of it."""
    torch.set_num_threads(1)                            # CPU time is counted over all threads
    tokens = shards.open_split(folder, "train")         # mapped anew: its pages cost time, too
    loader = WindowLoader(tokens, block_size, micro_batch * block_size, micro_batch)
    steps, served = loader.rows_per_epoch // micro_batch, 0
    if not steps:
        raise ValueError(f"tokens={len(tokens):,} fill no batch of {micro_batch} x {block_size}; "
                         f"give more")
    start = time.process_time()
    for step in range(steps):
        for x, _ in loader.batches(step):
            served += x.numel()
    seconds = time.process_time() - start
    return {"micro_batch": micro_batch, "block_size": block_size, "tokens": served,
            "tokens_per_cpu_s": served / seconds, "of_a_core": RATE * seconds / served}


def measure_loader(config: LoadingConfig) -> list[Row]:
    """A row for each micro-batch, the median of the rounds."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = generated(Path(scratch) / "data", config.tokens)
        found = [[loader_row(folder, micro_batch, config.block_size) for _ in range(config.rounds)]
                 for micro_batch in config.micro_batches]
    return [sorted(rows, key=lambda row: row["of_a_core"])[len(rows) // 2] for rows in found]


def measure_text(config: LoadingConfig) -> Row:
    """What --row prints: seconds of one contestant in this process, and the tokens it made."""
    if config.who == "oneloop":
        with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
            seconds = lasting(lambda: prepare(FinewebConfig(
                from_=config.from_, tokenizer=config.tokenizer, out=out,
                num_threads=config.threads)))
            meta = shards.read_meta(Path(out))
        tokens = sum(split["tokens"] for split in meta["splits"].values())
        starts = named_tokenizer(config.tokenizer).eot is not None      # one before each document
        return {"ms": 1000 * seconds, "tokens": tokens - meta["documents"] * starts}
    texts, rows = list(read_documents(find_files(config.from_))), []
    encoding = named_tokenizer(config.tokenizer).to_tiktoken()
    encoding.encode_ordinary("loaded")
    seconds = lasting(lambda: rows.extend(
        encoding.encode_ordinary_batch(texts, num_threads=config.threads)))
    return {"ms": 1000 * seconds, "tokens": sum(map(len, rows))}


def write_text(path: Path, megabytes: float) -> None:
    """JSON lines of what every Python carries, again and again until it is enough."""
    documents, size = documentation() + sources(), 0
    documents = [text.encode(errors="replace").decode() for text in documents]  # no surrogates
    with open(path, "w", encoding="utf-8") as file:
        while size < megabytes * 1e6:
            for text in documents:
                size += len(text.encode())
                file.write(json.dumps({"text": text}) + "\n")
                if size >= megabytes * 1e6:
                    break


def compare_text(config: LoadingConfig, scratch: Path) -> tuple[Row, list[float]]:
    """The row of both contestants, with ours over tiktoken's speed, and the machine's states."""
    source, tokenizer = config.from_, config.tokenizer
    if not source:
        source = str(scratch / "text.jsonl")
        write_text(Path(source), config.megabytes)
    texts = list(read_documents(find_files(source)))
    size = sum(len(text.encode()) for text in texts)
    if not tokenizer:
        tokenizer = str(scratch / "tok.json")
        Tokenizer.train(texts, 32_000).save(tokenizer)
    config = replace(config, from_=source, tokenizer=tokenizer,
                     threads=config.threads or os.cpu_count() or 1)
    turns = take_turns(WHO, lambda who, _: in_process("loading", config, who=who), config.rounds)
    made = {row["tokens"] for rows in turns.rows.values() for row in rows}
    if len(made) > 1:
        raise ValueError(f"the two do not make the same tokens of {source}: {sorted(made)}")
    seconds = {who: median_row(rows, "ms")["ms"] / 1000 for who, rows in turns.rows.items()}
    return {"documents": len(texts), "bytes": size, "tokens": made.pop(),
            "threads": config.threads,
            "tokenizer": "gpt2" if tokenizer == "gpt2" else named_tokenizer(tokenizer).vocab_size,
            "seconds": seconds, "of_tiktoken": seconds["tiktoken"] / seconds["oneloop"],
            "seconds_rounds": {who: [row["ms"] / 1000 for row in rows]
                               for who, rows in turns.rows.items()}}, turns.states


def report(found: dict[str, Any]) -> str:
    """A result as markdown."""
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
            f"{held(text['of_tiktoken'] >= LEAST_OF_TIKTOKEN)}).\n\n"
            + table("what | speed", rows))


def main(words: list[str]) -> None:
    config = parse(LoadingConfig, words, "python -m bench.loading", about=__doc__)
    if config.row:
        print(json.dumps(measure_text(config)))
        return
    loader = measure_loader(config)
    with tempfile.TemporaryDirectory() as scratch:
        text, states = compare_text(config, Path(scratch))
    publish(report, "loading", config.save, CPU, loader, states, text=text, rounds=config.rounds)


if __name__ == "__main__":
    run_command(main)
