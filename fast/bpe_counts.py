"""Texts to counts: how often each distinct piece occurs, in processes and blocks.

`count_pieces` gives Counter(piece for text in texts for piece in split(pattern, text)), its keys
in UTF-8. What makes it fast:

- Texts and files are cut at a *safe cut*, a place that no piece reaches across, so blocks can be
  split one by one, in processes, and memory grows with the distinct pieces, not with the corpus.
- The GPT-2 pattern is computed in numpy, and its pieces are counted there (bpe_table.py).

In: texts, or files by `read_blocks`, and a pattern. Out: {piece in bytes: count}.
"""
import codecs
import functools
import itertools
import multiprocessing
import os
import queue
import signal
import warnings
from collections import Counter
from pathlib import Path
from typing import BinaryIO, Iterable, Iterator, Mapping

import numpy as np
import regex
from tqdm import tqdm

from fast.bpe_pieces import (GPT2_PATTERN, GPT4_PATTERN, NANOCHAT_PATTERN, O200K_PATTERN,
                             check_surrogates, classes, compile_pattern, kinds, split)
from fast.bpe_table import PieceTable, gpt2_starts

# Patterns whose texts can be cut, with what stands behind a `safe_cut`, and those with fewer last.
SAFE_PATTERNS = {GPT2_PATTERN: r"^\p{L}\p{N}", GPT4_PATTERN: r"^\p{L}\p{N}",
                 NANOCHAT_PATTERN: r"^\p{L}\p{N}", O200K_PATTERN: r"\s"}
BLOCK = 1 << 17       # characters that are read, split and counted at once; fits the cache
MAX_PIECE = 1 << 22   # bytes


# ------------------------------------------------------------------------------- files to blocks

@functools.cache
def safe_cut(pattern: str) -> regex.Pattern:
    """Finds the last place in a text where it may be cut without changing its pieces: after a
    letter or a number, before anything else. In the GPT-2 and GPT-4 patterns no piece reaches
    across (a letter is followed by letters only, a number by numbers), and nothing looks back. In
    o200k a mark or 's may follow a letter, so there it is before white space."""
    doubtful = classes()[1]
    runs = np.split(doubtful, np.flatnonzero(np.diff(doubtful) != 1) + 1)
    ranges = [f"\\U{run[0]:08x}-\\U{run[-1]:08x}" for run in runs if len(run)]
    never, behind = "".join(ranges) + r"\uffff", SAFE_PATTERNS[pattern]
    return regex.compile(rf"(?rV1)(?<=[[\p{{L}}\p{{N}}]--[{never}]])(?=[[{behind}]--[{never}]])")


def read_blocks(paths: Iterable[str | Path], pattern: str = GPT2_PATTERN, errors: str = "strict",
                block: int | None = None, held_out: list[str] | None = None, progress: bool = False
                ) -> Iterator[str]:
    """Yield the text of files in blocks that can be split one by one, as if they were whole.

    errors: "strict" or "replace", for bytes that are not UTF-8; block: bytes read at once;
    held_out: takes each tenth block instead, up to 32 of them; then a block is at most a 50th of
    the files. FileNotFoundError for a missing file; ValueError for an empty one or, if strict, not
    UTF-8.
    """
    paths = list(paths)
    size = sum(file_sizes(paths))
    block = block or (BLOCK if held_out is None else min(BLOCK, max(size // 50, 1)))
    texts = (text for path in paths for text in read_file(path, pattern, errors, block))
    with tqdm(total=size, desc="counting", unit="B", unit_scale=True,
              disable=None if progress else True) as bar:       # None: only on a terminal
        for i, text in enumerate(texts):
            if progress:
                bar.update(len(text.encode()))
            if held_out is not None and i % 10 == 9 and len(held_out) < 32:
                held_out.append(text)
            else:
                yield text


def read_file(path: str | Path, pattern: str, errors: str, block: int) -> Iterator[str]:
    """The text of one file, cut where that is safe."""
    rest = []   # what follows the last safe cut
    with open(path, "rb") as file:
        for text in decode_stream(file, path, errors, block):
            cut = safe_cut(pattern).search(text, 1) if pattern in SAFE_PATTERNS else None
            if cut:
                yield "".join(rest) + text[:cut.start()]
                rest = [text[cut.start():]]
            else:
                rest.append(text)
    yield "".join(rest)


def file_sizes(paths: Iterable[str | Path]) -> list[int]:
    """The sizes in bytes; a file that is missing or empty is refused before any work is done."""
    for path in paths:
        if not Path(path).is_file():
            fix = f", it is a folder; name its files, {path}/*.txt" if Path(path).is_dir() else ""
            raise FileNotFoundError(f"no such file: {path}{fix}")
        if not Path(path).stat().st_size:
            raise ValueError(f"{path} is empty; give a file with text")
    return [Path(path).stat().st_size for path in paths]


def decode_stream(file: BinaryIO, path: str | Path, errors: str, block: int) -> Iterator[str]:
    """Decode UTF-8 block by block, without a byte order mark, which data sets have not either; an
    error names the byte offset in the file."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")(errors)     # keeps a character that is cut
    size, data = 0, b"start"
    while data:
        data = file.read(block)
        size += len(data)
        try:
            yield decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at "
                             f"offset {size - len(error.object) + error.start}; --errors=replace "
                             f"goes on") from None


# ------------------------------------------------------------------------------- texts to counts

def in_batches(texts: Iterable[str], pattern: str, block: int) -> Iterator[list[tuple[str, bool]]]:
    """Lists of (text, whether it ends here), about a block of characters together; long texts are
    cut where that is safe."""
    batch, size = [], 0
    for text in texts:
        check_surrogates(text)
        start = 0
        if not text:
            batch.append((text, True))
        while start < len(text):
            cut = None
            if len(text) - start > 2 * block and pattern in SAFE_PATTERNS:
                cut = safe_cut(pattern).search(text, start + 1, start + block)
            stop = cut.start() if cut else len(text)
            batch.append((text[start:stop], stop == len(text)))
            size += stop - start
            start = stop
            if size >= block:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def count_pieces(texts: Iterable[str], pattern: str, num_proc: int | None = None,
                 progress: bool = False) -> Mapping[bytes, int]:
    """How often each distinct piece occurs; memory grows with these, not with the texts.

    num_proc: counting processes; None is one per core. ValueError for a pattern that cannot
    serve, a lone surrogate, or a piece over MAX_PIECE bytes.
    """
    compile_pattern(pattern)
    kinds()   # before the fork, so that all processes share the table
    texts = tqdm(texts, desc="counting", unit="text", disable=None if progress else True)
    batches = in_batches(texts, pattern, BLOCK)
    head = list(itertools.islice(batches, 8))   # processes pay off for more than that
    batches = itertools.chain(head, batches)
    num_proc = os.cpu_count() if num_proc is None else num_proc
    if num_proc < 1:
        raise ValueError(f"num_proc={num_proc} is not allowed; give at least 1")
    if len(head) == 8 and num_proc > 1 and "fork" in multiprocessing.get_all_start_methods():
        counts = count_in_processes(batches, pattern, num_proc)
    else:
        counts = count_batches(batches, pattern)
    pieces = counts.pieces() if pattern == GPT2_PATTERN else {
        piece.encode(): count for piece, count in counts.items()}
    longest = max(map(len, pieces), default=0)
    if longest > MAX_PIECE:
        raise ValueError(f"a piece has {longest:,} bytes; allowed are {MAX_PIECE:,}, because a "
                         "piece is held and encoded as one: use pattern gpt2, or shorter texts")
    return pieces


def count_batches(batches: Iterable[list[tuple[str, bool]]], pattern: str) -> Counter | PieceTable:
    """How often each piece occurs in batches of texts; a table with GPT-2's pattern."""
    counts, table = Counter(), PieceTable()
    for batch in batches:
        if pattern != GPT2_PATTERN:
            for text, _ in batch:
                counts.update(split(pattern, text))
            continue
        encoded = [text.encode() for text, _ in batch]
        begins = np.cumsum([0, *map(len, encoded)])[:-1]
        data = b"".join(encoded)
        table.count(data, gpt2_starts(data, begins))
    return table if pattern == GPT2_PATTERN else counts


def count_in_processes(batches: Iterable[list[str]], pattern: str, num_proc: int
                       ) -> Counter | PieceTable:
    """Workers take batches from a queue of bounded length; what finds no room there is counted
    here, so the reader cannot run ahead."""
    context = multiprocessing.get_context("fork")
    tasks, results = context.Queue(2 * num_proc), context.Queue()
    workers = [context.Process(target=count_worker, args=(pattern, tasks, results), daemon=True)
               for _ in range(num_proc - 1)]
    with warnings.catch_warnings():   # Python 3.12+ warns of fork beside threads; we only count
        warnings.simplefilter("ignore", DeprecationWarning)
        for worker in workers:
            worker.start()
    try:
        counts = count_batches(without_room(batches, tasks, workers), pattern)
        for _ in workers:
            wait_for(tasks.put, workers, None)
        for _ in workers:                               # each ends with a None
            for part in iter(lambda: wait_for(results.get, workers), None):
                if isinstance(part, Exception):
                    raise part
                counts.update(part)
        return counts
    finally:
        tasks.cancel_join_thread()
        for worker in workers:
            worker.terminate()
            worker.join()


def without_room(batches, tasks, workers):
    """Those of the batches that the queue of tasks has no room for."""
    for batch in batches:
        try:
            tasks.put_nowait(batch)
        except queue.Full:
            check_alive(workers)
            yield batch


def wait_for(call, workers, *args):
    """A queue's put or get that notices when a worker was killed."""
    while True:
        try:
            return call(*args, timeout=1)
        except (queue.Full, queue.Empty):
            check_alive(workers)


def check_alive(workers):
    """RuntimeError if one was killed."""
    if any(worker.exitcode for worker in workers):
        raise RuntimeError("a counting process was killed, perhaps for its memory; use num_proc=1")


def count_worker(pattern, tasks, results):
    """A counting process: batches from `tasks`, up to a None; counts, or an error, to `results`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)   # Ctrl-C is for the parent, which ends us
    try:
        counts = count_batches(iter(tasks.get, None), pattern)
        for part in counts.parts() if pattern == GPT2_PATTERN else [counts]:
            results.put(part)
        results.put(None)
    except ValueError as error:
        results.put(error)
        for _ in iter(tasks.get, None):            # drain, so that the parent can finish writing
            pass
