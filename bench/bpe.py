"""Training and encoding speed and memory of bpe.py beside Hugging Face, rustbpe, minbpe, tiktoken,
and bpeasy, fast-bpe-rs and ffbpe where they are installed.

    python -m bench.bpe [--data=FOLDER] [--sizes=20,100] [--repeats=3] [--minbpe=CHECKOUT]

Every figure comes from a process of its own; times are medians of runs taken in turn, and each is
given as a ratio to ours. Training is timed twice: the call, and the whole process with its imports.
Memory is the most that such a process and its workers held together (proportional set size), or its
own peak resident size if that is more.

In: a folder with novels/*.txt, imdb/*.jsonl, chinese/*.txt; the code is this Python's standard
library and installed packages. Out: a table, and bench/results/bpe.json.
"""
import importlib
import importlib.metadata
import itertools
import json
import os
import random
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Callable

from bench.machine import (CPU, REPOSITORY, Row, in_process, lasting, median_row, publish, table,
                           take_turns, where)
from bpe import GPT2_PATTERN, Tokenizer
from fast.bpe_encode import TIKTOKEN_GPT2
from run.config import parse, run_command

PEERS = ("ours", "Hugging Face", "rustbpe", "bpeasy", "fast-bpe-rs", "ffbpe", "tiktoken", "minbpe")
MODULES = {"Hugging Face": "tokenizers", "rustbpe": "rustbpe", "bpeasy": "bpeasy",
           "fast-bpe-rs": "fast_bpe_rs", "ffbpe": "ffbpe"}      # importing is not timed


@dataclass(frozen=True)
class BPEBenchConfig:
    data: str = ""  # folder of the texts; empty: what ONELOOP_SHARED names
    sizes: tuple[int, ...] = (20, 100)  # megabytes of the mixed texts
    repeats: int = 3  # runs of each; the median counts
    vocab_size: int = 32_000  # tokens to train
    minbpe: str = ""  # a checkout of karpathy/minbpe, to measure it too
    save: bool = True  # write bench/results/bpe.json


# ---------------------------------------------------------------------------------------- texts

def documents(folder: Path) -> tuple[list[str], list[str]]:
    """(English texts, Python source files), each shuffled with a fixed seed."""
    english = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("novels/*.txt"))]
    for path in sorted(folder.glob("imdb/*.jsonl")):
        english += [json.loads(line)["text"] for line in path.open(encoding="utf-8")]
    if not english:
        raise FileNotFoundError(f"data={folder} has no novels/*.txt; name the folder of the texts")
    code = []
    roots = (Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib"))
    for path in sorted({path for root in roots for path in root.rglob("*.py")}):
        try:
            code.append(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, FileNotFoundError):
            continue   # the standard library has test files in other encodings
    for texts in (english, code):
        random.Random(0).shuffle(texts)
    return english, code


def write_texts(source: Path, folder: Path, sizes: tuple[int, ...]) -> dict[str, Path]:
    """Files by name: mixes of English and code, half of each, repeated to fill it."""
    pools, made = documents(source), {}

    def write(name: str, data: bytes) -> None:
        made[name] = folder / f"{len(made)}.txt"
        made[name].write_bytes(data)

    def whole(data: bytes) -> bytes:                    # without a last character that was cut
        return data.decode("utf-8", "ignore").encode()
    for megabytes in sizes:
        texts = []
        for pool in pools:
            left, again = megabytes * 500_000, itertools.cycle(pool)
            while left > 0:
                texts.append(next(again))
                left -= len(texts[-1].encode())
        random.Random(1).shuffle(texts)
        write(f"mix {megabytes} MB", whole("\n".join(texts).encode()[:megabytes * 1_000_000]))
    mix = made[f"mix {sizes[0]} MB"].read_bytes()
    write(f"mix {sizes[0]} MB, one line", b" ".join(mix.split()))
    chinese = "".join(path.read_text(encoding="utf-8") for path in source.glob("chinese/*.txt"))
    write("Chinese, one line", "".join(chinese.split()).encode())
    write(f"mix {sizes[-1]} MB, 4 times", 4 * made[f"mix {sizes[-1]} MB"].read_bytes())
    write("mix 0.3 MB", whole(mix[:300_000]))
    return made


# --------------------------------------------------- what is measured, each in its own process

# Training, as a command each: its process is timed and weighed whole, imports included, and here the
# call alone, with the imports done before.
BLOCKS = ("file = open(path, encoding='utf-8')\n"
          "blocks = iter(lambda: ''.join(file.readlines(1 << 20)), '')\n")
COMMANDS = {
    "ours": "from bpe import Tokenizer; from fast.bpe_counts import read_blocks\n"
            "Tokenizer.train(read_blocks([path]), size, special_tokens=())",
    "Hugging Face": "from tokenizers import Tokenizer, models, pre_tokenizers, trainers\n"
                    "level = pre_tokenizers.ByteLevel; tok = Tokenizer(models.BPE())\n"
                    "tok.pre_tokenizer = level(add_prefix_space=False, use_regex=True)\n"
                    "tok.train([path], trainers.BpeTrainer(vocab_size=size, "
                    "initial_alphabet=level.alphabet(), show_progress=False))",
    "rustbpe": BLOCKS + "import rustbpe; rustbpe.Tokenizer().train_from_iterator(blocks, size, "
                        "buffer_size=16, pattern=pattern)",
    "bpeasy": BLOCKS + "import bpeasy; bpeasy.train_bpe(blocks, pattern, 1 << 20, size, 16)",
    "fast-bpe-rs": BLOCKS + "from fast_bpe_rs import BPE; BPE(pattern).train(size, list(blocks))",
    "ffbpe": BLOCKS + "from ffbpe import BpeTrainer, PreTokenizer\n"
                      "counter = PreTokenizer([], pat_str=pattern).word_counter()\n"
                      "counter.add_source(blocks); trainer = BpeTrainer([], unit='byte')\n"
                      "trainer.add_word_counter(counter); trainer.train(size)",
    "minbpe": "from minbpe import RegexTokenizer\n"
              "RegexTokenizer(pattern).train(open(path, encoding='utf-8').read(), size)"}


def encode_ours(texts: list[str]) -> Callable[[], Any]:
    tok = Tokenizer.gpt2()
    tok.encode("loaded")
    return lambda: list(tok.encode_corpus(texts, num_threads=os.cpu_count()))


def encode_tiktoken(texts: list[str]) -> Callable[[], Any]:
    import tiktoken
    gpt2 = Tokenizer.gpt2()
    encoding = tiktoken.Encoding(
        "gpt2", pat_str=TIKTOKEN_GPT2, special_tokens=gpt2.special_tokens,
        mergeable_ranks={token: i for i, token in enumerate(gpt2.token_bytes) if token})
    return lambda: encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count())


def encode_hugging_face(texts: list[str]) -> Callable[[], Any]:
    from tokenizers import Tokenizer as HF
    with tempfile.TemporaryDirectory() as folder:
        Tokenizer.gpt2().save_pretrained(folder)
        tok = HF.from_file(f"{folder}/tokenizer.json")
    return lambda: [encoding.ids for encoding in tok.encode_batch(texts)]


def started(who: str, path: str, vocab_size: int) -> subprocess.Popen:
    """A Python that trains and does nothing else."""
    given = f"path, size, pattern = {path!r}, {vocab_size}, {GPT2_PATTERN!r}\n"
    return subprocess.Popen([sys.executable, "-c", given + COMMANDS[who]], cwd=REPOSITORY)


def peak_memory(who: str, path: str, vocab_size: int) -> int:
    """The most MiB that such a process and its workers hold together, which is looked at so often
    that the process takes a little longer."""
    most, process = 0.0, started(who, path, vocab_size)
    while process.poll() is None:
        most = max(most, memory_of_tree(process.pid), own_peak(process.pid))
        time.sleep(0.03)
    succeeded(process)
    return round(most)


def succeeded(process: subprocess.Popen) -> None:
    """Wait for it; CalledProcessError where it failed."""
    if process.wait():
        raise subprocess.CalledProcessError(process.returncode, process.args)


ENCODERS = {"ours": encode_ours, "tiktoken": encode_tiktoken, "Hugging Face": encode_hugging_face}


def measure(kind: str, who: str, path: str, vocab_size: int) -> Row:
    """Milliseconds of one contestant's call, in this process."""
    if kind == "train":
        if who in MODULES:
            importlib.import_module(MODULES[who])
        given = {"path": path, "size": vocab_size, "pattern": GPT2_PATTERN}
        return {"ms": 1000 * lasting(lambda: exec(COMMANDS[who], given))}
    text = Path(path).read_text(encoding="utf-8")
    return {"ms": 1000 * lasting(ENCODERS[who]([text[i:i + 4000]
                                                for i in range(0, len(text), 4000)]))}


def own_peak(pid: int) -> float:
    """MiB that a process held at most until now, by itself."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:                                     # it has ended
        return 0.0
    found = re.search(r"VmHWM:\s+(\d+)", status)
    return int(found[1]) / 1024 if found else 0.0


def memory_of_tree(pid: int) -> float:
    """MiB of a process and all below it; what several share counts in parts."""
    folder = Path(f"/proc/{pid}")
    try:
        lines = (folder / "smaps_rollup").read_text().splitlines()
        children = [int(child) for path in folder.glob("task/*/children")
                    for child in path.read_text().split()]
    except OSError:                                     # it has ended
        return 0.0
    own = sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
    return own + sum(map(memory_of_tree, children))


# -------------------------------------------------------------------------------------- compare

def compare(case: str, kind: str, who: tuple[str, ...], path: Path, vocab_size: int, repeats: int,
            memory: bool) -> Row:
    """The row of a text: median seconds of each contestant in turn, and the memory of a run."""
    def turn(name: str) -> Row:
        row = in_process(measure, kind, name, str(path), vocab_size)
        if kind == "train" and name != "minbpe":
            row["process_ms"] = 1000 * lasting(
                lambda: succeeded(started(name, str(path), vocab_size)))
        return row
    turns = take_turns(who, turn, repeats)
    return {"case": case, "kind": kind, "megabytes": round(path.stat().st_size / 1e6, 1),
            "vocab_size": vocab_size,
            "seconds": {name: round(median_row(rows, "ms")["ms"] / 1000, 2)
                        for name, rows in turns.rows.items()},
            "process_seconds": {name: round(median_row(rows, "process_ms")["process_ms"] / 1000, 2)
                                for name, rows in turns.rows.items() if "process_ms" in rows[0]},
            "memory_mb": {name: peak_memory(name, str(path), vocab_size) for name in who if memory},
            "states": turns.states}


def report(found: dict[str, Any]) -> str:
    def cells(row: Row) -> Row:
        return {name: f"{seconds:.2f} s ({seconds / row['seconds']['ours']:.2f}x)"
                + (f", process {row['process_seconds'][name]:.2f} s "
                   f"({row['process_seconds'][name] / row['process_seconds']['ours']:.2f}x)"
                   if name in row.get("process_seconds", {}) else "")
                + (f", {row['memory_mb'][name]:,} MB" if name in row["memory_mb"] else "")
                for name, seconds in row["seconds"].items()}
    return (f"`python -m bench.bpe`, {where(found)}, medians of {found['repeats']} in turn; times "
            f"as ratios to ours, GPT-2's pattern, encoding in batches:\n\n"
            + table("what=kind | text=case | vocabulary=vocab_size:,d | " + " | ".join(PEERS),
                    ({**row, **cells(row)} for row in found["rows"])))


def main(words: list[str]) -> None:
    config = parse(BPEBenchConfig, words, "python -m bench.bpe", about=__doc__)
    source = Path(config.data or os.environ.get("ONELOOP_SHARED", "data"))
    Tokenizer.gpt2()                    # the last cases encode by it: missed now, not after minutes
    with tempfile.TemporaryDirectory() as folder:
        rows, texts = [], write_texts(source, Path(folder), config.sizes)
        for case, path in texts.items():
            vocab_size, repeats = config.vocab_size, config.repeats
            who = ("ours", *(name for name, module in MODULES.items() if find_spec(module)))
            if "4 times" in case:
                who, repeats = ("ours", "rustbpe"), 1
            if case == "mix 0.3 MB":
                who, vocab_size, repeats = ("ours", "minbpe"), 512, 1
                if not config.minbpe:
                    continue
                sys.path.insert(0, config.minbpe)       # processes that start find it, too
            rows.append(compare(case, "train", who, path, vocab_size, repeats, "minbpe" not in who))
        case = f"mix {config.sizes[0]} MB"
        rows.append(compare(case, "encode", tuple(ENCODERS), texts[case], 50257, config.repeats,
                            memory=False))
    versions = {name: importlib.metadata.version(name) for name in (
        "tokenizers", "rustbpe", "bpeasy", "fast-bpe-rs", "ffbpe", "tiktoken", "numpy", "regex")
        if find_spec(name.replace("-", "_"))}
    states = [state for row in rows for state in row.pop("states")]
    publish(report, "bpe", config.save, CPU, rows, states, versions=versions,
            repeats=config.repeats)


if __name__ == "__main__":
    run_command(main)
