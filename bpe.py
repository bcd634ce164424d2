"""Byte-level byte pair encoding (BPE): train, encode, decode, save, exchange.

A tokenizer turns text into integers and back. BPE starts from the 256 bytes, so nothing is ever
unknown, and learns `merges` from a corpus: it replaces the most frequent pair of neighbouring
tokens by a new token, again and again. Common words end up as one token, rare ones as several.
The whole algorithm is `train_slowly` and `encode_slowly` below; the rest of the file is the same
algorithm made fast (training in numpy, encoding in tiktoken), and the file formats.

Before that, a regular expression (the `pattern`) cuts the text into pieces such as " word" or
"123"; merges never cross pieces, so "dog", "dog." and "dog!" share one token for the word.

In: text, as files or strings. Out: a Tokenizer, kept in a readable tok.json.

    python bpe.py train FILE... --vocab-size=32000 --out=tok.json [--pattern=gpt2|gpt4|none|REGEX]
    python bpe.py encode --tokenizer=tok.json < text > ids
    python bpe.py decode --tokenizer=tok.json < ids > text
    python bpe.py compare FILE... --tokenizer=gpt2 --tokenizer=tok.json

    >>> tok = Tokenizer.train(["aaabdaaabac"], 259, special_tokens=())
    >>> tok.merges, tok.encode("aaabdaaabac")
    ([(97, 97), (97, 98), (256, 257)], [258, 100, 258, 97, 99])

Ids: 0..255 are the bytes, 256 + i is what merge i makes, special tokens come last. Tokenizers of
others may put their bytes in another order (GPT-2) or their special tokens first (Hugging Face).

References: BPE for text, Sennrich et al. 2016, arXiv 1508.07909. Byte level and the pattern:
GPT-2, Radford et al. 2019. Lazy evaluation of a falling score: Minoux 1978.
"""
import argparse
import functools
import hashlib
import heapq
import itertools
import json
import multiprocessing
import os
import queue
import re
import signal
import sys
import time
import unicodedata
import urllib.request
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import regex
import tiktoken
from tqdm import tqdm

GPT2_PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
GPT4_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+")
NO_PATTERN = r"[\s\S]+"
PATTERNS = {"gpt2": GPT2_PATTERN, "gpt4": GPT4_PATTERN, "none": NO_PATTERN}
END_OF_TEXT = "<|endoftext|>"

BLOCK = 1 << 18        # characters that are read, split and counted at once; fits the cache
MAX_PIECE = 1 << 22    # bytes


# ------------------------------------------------------------------------- 1. the specification

def train_slowly(pieces, num_merges, min_frequency=1):
    """The definition of BPE training. `pieces` maps bytes to counts; `learn_merges` is equal."""
    words = {piece: list(piece) for piece in pieces}
    merges = []
    for new in range(256, 256 + num_merges):
        counts = Counter()
        for piece, word in words.items():
            for pair in zip(word, word[1:]):
                counts[pair] += pieces[piece]
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))   # ties: the smaller pair
        if counts[best] < min_frequency:
            break
        merges.append(best)
        words = {piece: merge(word, best, new) for piece, word in words.items()}
    return merges


def merge(word, pair, new):
    """Replace each `pair` by `new`, left to right: merge([7, 7, 7], (7, 7), 8) is [8, 7]."""
    out, i = [], 0
    while i < len(word):
        if tuple(word[i:i + 2]) == pair:
            out.append(new)
            i += 2
        else:
            out.append(word[i])
            i += 1
    return out


# ---------------------------------------------------------------------------- 2. text to pieces

def compile_pattern(pattern):
    """The compiled pattern, or one line that says why it cannot serve."""
    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"pattern={pattern!r} is not a regular expression: {error}; allowed: "
                         f"{', '.join(PATTERNS)} or a regex of the `regex` module") from None
    if compiled.groups:
        raise ValueError(f"pattern={pattern!r} has capturing groups; write (?:...) for (...)")
    if pattern not in PATTERNS.values():
        split(compiled, PROBE)
    return compiled


# Every ASCII character and one or two characters of each other kind, between letters.
PROBE = "a".join([chr(i) for i in (*range(33, 128), *range(33))] + list(
    "éǅʰ中\u0301\u0903\u20dd٣Ⅷ²‿–‘’“”«§€¨©\u00a0\u2028\u2029\u3000\u200d\ue000\U0001f600"))


LETTER, NUMBER, SPACE = 1, 2, 3   # 0 is everything else
POINTS = np.concatenate((np.arange(0xD800), np.arange(0xE000, 0x40000))).astype("<u4")


@functools.cache
def kinds():
    """The kind of every code point as tiktoken knows it (Unicode has letters up to U+3FFFF)."""
    table = np.zeros(0x110000, np.uint8)
    every = POINTS.tobytes().decode("utf-32-le")
    for kind, name in ((LETTER, r"\p{L}+"), (NUMBER, r"\p{N}+"), (SPACE, r"\s+")):
        only = tiktoken.Encoding(name, pat_str=name, special_tokens={},
                                 mergeable_ranks={bytes([b]): b for b in range(256)})
        found = only.decode(only.encode_ordinary(every))   # it drops what does not match
        table[np.frombuffer(found.encode("utf-32-le"), "<u4")] = kind
    return table


@functools.cache
def shown_as():
    """For each code point one that `regex` takes for the same kind: itself, unless its Unicode
    version differs from tiktoken's, as it does for thousands of letters added since 2024."""
    table = np.arange(0x110000, dtype="<u4")
    every = POINTS.tobytes().decode("utf-32-le")
    seen = np.zeros(0x110000, np.uint8)
    for kind, name in ((LETTER, r"\p{L}+"), (NUMBER, r"\p{N}+"), (SPACE, r"\s+")):
        found = "".join(regex.findall(name, every))
        seen[np.frombuffer(found.encode("utf-32-le"), "<u4")] = kind
    for kind, example in enumerate("\u0378中² "):   # U+0378 is unassigned
        table[(kinds() == kind) & (seen != kind)] = ord(example)
    return table


def split(compiled, text):
    """The pieces of a text. A pattern that loses characters is refused, with an example."""
    shown = text
    if not text.isascii():
        codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
        shown = shown_as()[codes].tobytes().decode("utf-32-le")
    pieces = compiled.findall(shown)
    if sum(map(len, pieces)) != len(text) or "" in pieces:
        end = 0
        for match in compiled.finditer(shown):
            if match.start() != end or match.end() == end:
                break
            end = match.end()
        raise ValueError(f"pattern={compiled.pattern!r} drops {text[end:end + 1]!r} (it matches "
                         "nothing there); every character must fall into a piece: add |[\\s\\S]")
    if shown is not text and shown != text:
        ends = list(itertools.accumulate(map(len, pieces)))
        pieces = [text[i:j] for i, j in zip([0] + ends, ends)]
    return pieces


SAFE_PATTERNS = (GPT2_PATTERN, GPT4_PATTERN)


@functools.cache
def safe_cut():
    """Finds the last place in a text where it may be cut without changing its pieces: after a
    letter or a number, before anything else. In the GPT-2 and GPT-4 patterns no piece reaches
    across (a letter is followed by letters only, a number by numbers), and nothing looks back."""
    doubtful = np.flatnonzero(shown_as() != np.arange(0x110000))
    runs = np.split(doubtful, np.flatnonzero(np.diff(doubtful) != 1) + 1)
    ranges = [f"\\U{run[0]:08x}-\\U{run[-1]:08x}" for run in runs if len(run)]
    doubtful = "".join(ranges) + r"\uffff"
    return regex.compile(rf"(?rV1)(?<=[[\p{{L}}\p{{N}}]--[{doubtful}]])"
                         rf"(?=[^\p{{L}}\p{{N}}{doubtful}])")


def read_blocks(paths, pattern=GPT2_PATTERN, errors="strict", block=BLOCK):
    """Yield the text of files in blocks that can be split one by one, as if they were whole."""
    paths = list(paths)
    file_sizes(paths)
    for path in paths:
        rest = []   # what follows the last safe cut
        with open(path, "rb") as file:
            for text in decode_stream(file, path, errors, block):
                cut = safe_cut().search(text, 1) if pattern in SAFE_PATTERNS else None
                if cut:
                    yield "".join(rest) + text[:cut.start()]
                    rest = [text[cut.start():]]
                else:
                    rest.append(text)
        yield "".join(rest)


def file_sizes(paths):
    """The sizes in bytes; a file that is missing or empty is refused before any work is done."""
    for path in paths:
        if not Path(path).is_file():
            raise FileNotFoundError(f"no such file: {path}")
        if not Path(path).stat().st_size:
            raise ValueError(f"{path} is empty; give a file with text")
    return [Path(path).stat().st_size for path in paths]


def decode_stream(file, path, errors, block):
    """Decode UTF-8 block by block; an error names the byte offset in the file."""
    offset, tail, data = 0, b"", b"start"
    while data:
        data = file.read(block)
        raw = tail + data
        keep = len(raw)
        if data:   # do not cut inside a character: stop before the last byte that starts one
            for back in range(1, min(4, keep) + 1):
                if raw[-back] & 0xC0 != 0x80:
                    keep -= back
                    break
        try:
            yield raw[:keep].decode("utf-8", errors)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8: byte 0x{raw[error.start]:02x} at offset "
                             f"{offset + error.start}; --errors=replace goes on") from None
        offset, tail = offset + keep, raw[keep:]


def in_batches(texts, pattern):
    """Lists of texts, about one block together; long texts are cut where that is safe."""
    batch, size = [], 0
    for text in texts:
        check_surrogates(text)
        start = 0
        while start < len(text):
            cut = None
            if len(text) - start > 2 * BLOCK and pattern in SAFE_PATTERNS:
                cut = safe_cut().search(text, start + 1, start + BLOCK)
            stop = cut.start() if cut else len(text)
            batch.append(text[start:stop])
            size += stop - start
            start = stop
            if size >= BLOCK:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def count_pieces(texts, pattern, num_proc=None):
    """Count the distinct pieces (bytes) of the texts; memory grows with these, not the texts."""
    compile_pattern(pattern)
    kinds()   # before the fork, so that all processes share the table
    batches = in_batches(texts, pattern)
    head = list(itertools.islice(batches, 8))   # processes pay off for more than that
    batches = itertools.chain(head, batches)
    num_proc = os.cpu_count() if num_proc is None else num_proc
    if num_proc < 1:
        raise ValueError(f"num_proc={num_proc} is not allowed; give at least 1")
    if len(head) == 8 and num_proc > 1 and "fork" in multiprocessing.get_all_start_methods():
        counts = count_in_processes(batches, pattern, num_proc)
    else:
        counts = count_batches(batches, pattern)
    pieces = {}
    for key, count in counts.items():
        if isinstance(key, int):   # see count_gpt2
            key = key.to_bytes(8, "little")[:key >> 56]
        pieces[key.encode() if isinstance(key, str) else key] = count
    longest = max(map(len, pieces), default=0)
    if longest > MAX_PIECE:
        raise ValueError(f"a piece has {longest:,} bytes; allowed are {MAX_PIECE:,}, because a "
                         "piece is held and encoded as one: use pattern gpt2, or shorter texts")
    return pieces


def count_batches(batches, pattern):
    counts = Counter()
    compiled = regex.compile(pattern)
    for batch in batches:
        if pattern == GPT2_PATTERN:
            count_gpt2(batch, counts)
        else:
            for text in batch:
                counts.update(split(compiled, text))
    return counts


def count_in_processes(batches, pattern, num_proc):
    """Workers take batches from a queue of bounded length, so the reader cannot run ahead."""
    context = multiprocessing.get_context("fork")
    tasks, results = context.Queue(2 * num_proc), context.Queue()
    workers = [context.Process(target=count_worker, args=(pattern, tasks, results), daemon=True)
               for _ in range(num_proc)]
    with warnings.catch_warnings():   # Python 3.12+ warns of fork beside threads; we only count
        warnings.simplefilter("ignore", DeprecationWarning)
        for worker in workers:
            worker.start()
    try:
        counts = Counter()
        for batch in itertools.chain(batches, [None] * num_proc):
            wait_for(tasks.put, workers, batch)
        for _ in workers:
            part = wait_for(results.get, workers)
            if isinstance(part, Exception):
                raise part
            counts.update(part)
        return counts
    finally:
        tasks.cancel_join_thread()
        for worker in workers:
            worker.terminate()
            worker.join()


def wait_for(call, workers, *args):
    """A queue's put or get that notices when a worker was killed."""
    while True:
        try:
            return call(*args, timeout=1)
        except (queue.Full, queue.Empty):
            if any(worker.exitcode for worker in workers):
                raise RuntimeError("a counting process was killed, perhaps for its memory; "
                                   "use num_proc=1") from None


def count_worker(pattern, tasks, results):
    signal.signal(signal.SIGINT, signal.SIG_IGN)   # Ctrl-C is for the parent, which ends us
    try:
        results.put(count_batches(iter(tasks.get, None), pattern))
    except ValueError as error:
        results.put(error)
        for _ in iter(tasks.get, None):            # drain, so that the parent can finish writing
            pass


# The GPT-2 pattern in numpy: a fifth of the time of a regex engine, the same pieces. Each
# character has a kind, and a piece is a run of one kind, but for the spaces and the apostrophe.
ONE = [ord(c) for c in "sdmt"]
TWO = [ord(a) << 21 | ord(b) for a, b in ("ll", "ve", "re")]


def gpt2_starts(codes, begins):
    """Indices where a piece starts; `codes` are code points, `begins` marks starts of texts."""
    kind = kinds()[codes]
    start = begins.copy()
    start[1:] |= kind[1:] != kind[:-1]
    # Spaces before a word: the last one stands apart, and if it is " " the word takes it.
    space = kind == SPACE
    i = np.flatnonzero(space[:-1] & ~space[1:] & ~begins[1:])
    start[i] = True
    start[i[codes[i] == ord(" ")] + 1] = False
    # 's 'd 'm 't 'll 've 're where a piece would start with the apostrophe.
    i = np.flatnonzero(codes == ord("'"))
    i = i[start[i]]
    codes = np.concatenate((codes, [0, 0])).astype(np.int64)
    begins = np.concatenate((begins, [True, True]))
    after = np.where(begins[i + 1], 0, codes[i + 1])
    after2 = np.where(begins[i + 2], 0, codes[i + 2])
    one, two = np.isin(after, ONE), np.isin(after << 21 | after2, TWO)
    start[i[one | two] + 1] = False
    ends = np.concatenate((i[one] + 2, i[two] + 3))
    start[ends[ends < len(start)]] = True
    return np.flatnonzero(start)


def count_gpt2(batch, counts):
    """Add the pieces of a batch. Up to 7 bytes a piece is counted as an integer: its bytes, and
    its length in the eighth; sorting integers is much faster than hashing strings."""
    text = "".join(batch)
    data = text.encode()
    begins = np.zeros(len(text), bool)
    begins[np.cumsum([0] + [len(t) for t in batch[:-1]])] = True
    if text.isascii():
        starts = gpt2_starts(np.frombuffer(data, np.uint8), begins)
    else:
        codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
        size = 1 + (codes > 0x7F) + (codes > 0x7FF).astype(np.int64) + (codes > 0xFFFF)
        starts = (size.cumsum() - size)[gpt2_starts(codes, begins)]   # characters to bytes
    stops = np.append(starts[1:], len(data))
    size = stops - starts
    short = size < 8
    eight = np.ndarray(len(data), "<u8", data + bytes(8), strides=(1,))   # 8 bytes from each byte
    size = size[short].astype(np.uint64)
    shift = np.uint64(64) - size * np.uint64(8)
    key = eight[starts[short]] << shift >> shift | size << np.uint64(56)
    key, number = np.unique(key, return_counts=True)
    for k, n in zip(key.tolist(), number.tolist()):
        counts[k] += n
    counts.update([data[i:j] for i, j in zip(starts[~short].tolist(), stops[~short].tolist())])


# --------------------------------------------------------------------------- 3. pieces to merges

FEW = 16        # up to so many occurrences a Python loop beats a dozen numpy calls
RIGHT = 1 << 30  # added to an id to mark a right neighbour in a sort key


def learn_merges(pieces, num_merges, min_frequency=1, progress=False):
    """The merges of `train_slowly`, fast.

    New pairs always hold the newest token, so the count of a pair can only fall after the merge
    that made it. A count on the heap is therefore an upper bound: take the top, recount it from
    its positions (some may be gone), and if it is still right it is the true maximum. No count
    is ever updated in between. Pairs under the `floor` are dropped, which is most of them; when
    the top falls under the floor, `index` finds the next best few thousand.
    """
    corpus = Corpus(pieces, num_merges)
    merges, heap, floor = [], [], None
    with tqdm(total=num_merges, desc="merging", unit="merge",
              disable=None if progress else True) as bar:   # None: only on a terminal
        while len(merges) < num_merges:
            if not heap or -heap[0][0] < floor:
                if floor is not None and floor <= min_frequency:
                    break
                heap, floor = corpus.index(min_frequency)
                if not heap:
                    break
            upper_bound, a, b, at = heapq.heappop(heap)
            count, at = corpus.recount(a, b, at)
            if count == -upper_bound:
                for pair in corpus.merge(a, b, 256 + len(merges), at, floor):
                    heapq.heappush(heap, pair)
                merges.append((a, b))
                bar.update()
            elif count >= floor:
                heapq.heappush(heap, (-count, a, b, at))
    return merges


class Corpus:
    """All distinct pieces end to end in one array of bytes, a separator (-1) between them.

    A token keeps its id at its first byte (in `first`) and at its last byte (in `last`), so the
    neighbours of the token at p are last[p - 1] and first[p + length], and a merge is three
    assignments. A pair is known by the positions where it starts, so nothing is ever rescanned.
    Positions come as a list when there are few (most merges touch fewer than ten), else as an
    array; memoryviews give single elements without numpy's overhead.
    """

    def __init__(self, pieces, num_merges):
        flat = b"\0".join([b"", *pieces, b""])
        sizes = np.fromiter(map(len, pieces), np.int64, len(pieces)) + 1
        self.first = np.frombuffer(flat, np.uint8).astype(np.int32)
        self.first[0] = -1
        self.first[sizes.cumsum()] = -1
        self.last = self.first.copy()
        self.weight = np.zeros(len(flat), np.int64)     # how often the piece occurs
        self.weight[1:] = np.repeat(np.fromiter(pieces.values(), np.int64, len(pieces)), sizes)
        self.length = np.ones(256 + num_merges, np.int64)   # of a token in bytes, by id
        self.id_bits = len(self.length).bit_length()
        self.position_bits = 63 - 2 * self.id_bits
        if len(flat) >> self.position_bits:
            raise ValueError(f"{len(flat):,} bytes of distinct pieces are too many for a "
                             f"vocabulary of {len(self.length):,}; make one of them smaller")
        self.views = [memoryview(array) for array in
                      (self.first, self.last, self.weight, self.length)]

    def index(self, min_frequency, size=2000):
        """A heap of the `size` most frequent pairs with their positions, and the least count."""
        at = np.flatnonzero(self.first >= 0)
        left = self.first[at]
        right = self.first[at + self.length[left]]
        # (left, right, position) in one integer: sorting these in place needs no second array.
        key = left.astype(np.int64)
        key <<= self.id_bits
        key |= right
        key <<= self.position_bits
        key |= at
        del at, left
        key = key[right >= 0]
        if not len(key):
            return [], min_frequency
        key.sort()
        at = key & ((1 << self.position_bits) - 1)
        key >>= self.position_bits
        starts = group_starts(key)
        counts = np.add.reduceat(self.weight[at], starts)
        size = min(size, len(counts))
        floor = max(min_frequency, int(np.partition(counts, -size)[-size]))
        heap = [(-count, k >> self.id_bits, k & ((1 << self.id_bits) - 1),
                 few_or_many(at[start:stop].copy()))   # a view would keep all of `at` alive
                for k, count, start, stop in frequent(key, starts, counts, floor)]
        heapq.heapify(heap)
        return heap, floor

    def recount(self, a, b, at):
        """How often (a, b) still occurs, and where."""
        if type(at) is list:
            first, _, weight, length = self.views
            step = length[a]
            at = [p for p in at if first[p] == a and first[p + step] == b]
            return sum([weight[p] for p in at]), at
        at = at[(self.first[at] == a) & (self.first[at + self.length[a]] == b)]
        return int(self.weight[at].sum()), few_or_many(at)

    def merge(self, a, b, new, at, floor):
        """Make (a, b) `new` everywhere; return the pairs this makes, if they reach the floor."""
        self.length[new] = self.length[a] + self.length[b]
        return (self._merge_few if type(at) is list else self._merge_many)(a, b, new, at, floor)

    def _merge_few(self, a, b, new, at, floor):
        first, last, weight, length = self.views
        step, size = length[a], length[new]
        made = []
        for p in sorted(at) if a == b else at:
            if first[p + step] == b and first[p] == a:     # not taken by an overlap on its left
                first[p] = last[p + size - 1] = new
                first[p + step] = -2                       # b starts here no more
                made.append(p)
        pairs = {}
        for p in made:
            left, right = last[p - 1], first[p + size]
            if left >= 0:
                pairs.setdefault((left, new), []).append(p - length[left])
            if right >= 0 and right != new:                # (new, new) is a left one already
                pairs.setdefault((new, right), []).append(p)
        counts = [sum([weight[p] for p in where]) for where in pairs.values()]
        return [(-count, *pair, where)
                for count, (pair, where) in zip(counts, pairs.items()) if count >= floor]

    def _merge_many(self, a, b, new, at, floor):
        step, size = self.length[a], self.length[new]
        if a == b:
            at = drop_overlaps(at, step)
        self.first[at] = new
        self.first[at + step] = -2
        self.last[at + size - 1] = new
        key = np.concatenate((self.last[at - 1], self.first[at + size] + RIGHT))
        order = key.argsort()
        key = key[order]
        starts = group_starts(key)
        weight = self.weight[at]
        counts = np.add.reduceat(np.concatenate((weight, weight))[order], starts)
        pairs = []
        for k, count, start, stop in frequent(key, starts, counts, floor):
            where = order[start:stop]
            if 0 <= k < RIGHT - 1:
                pairs.append((-count, k, new, few_or_many(at[where] - self.length[k])))
            elif k >= RIGHT and k != new + RIGHT:
                pairs.append((-count, new, k - RIGHT, few_or_many(at[where - len(at)])))
        return pairs


def few_or_many(at):
    return at.tolist() if len(at) <= FEW else at


def group_starts(key):
    """Where each run of equal keys starts, in a sorted array."""
    return np.flatnonzero(np.concatenate(([True], key[1:] != key[:-1])))


def frequent(key, starts, counts, floor):
    """(key, count, start, stop) of the groups whose count reaches the floor."""
    hot = np.flatnonzero(counts >= floor)
    stops = np.append(starts[1:], len(key))
    return zip(key[starts[hot]].tolist(), counts[hot].tolist(),
               starts[hot].tolist(), stops[hot].tolist())


def drop_overlaps(at, step):
    """Positions of a pair of equal tokens: within a run that overlaps, every other one."""
    at = np.sort(at)
    run_starts = group_starts(at - step * np.arange(len(at)))
    place = np.arange(len(at)) - np.repeat(run_starts, np.diff(np.append(run_starts, len(at))))
    return at[place % 2 == 0]


# ---------------------------------------------------------------------------- 4. the tokenizer

class Tokenizer:
    """Merges, pattern and special tokens; everything else follows from them.

    Text is always encoded as ordinary text. A special token comes out only when it is allowed
    by name, tok.encode(text, allowed_special=("<|endoftext|>",)), or put in by its id, tok.eot:
    what a user types can never end a document.
    """

    def __init__(self, merges, pattern=GPT2_PATTERN, special_tokens=(END_OF_TEXT,),
                 byte_ids=range(256), first_merge=256):
        """`special_tokens` is a dict name -> id, or names whose ids follow the merges.

        byte_ids[b] is the id of byte b; merge i makes id first_merge + i. Both are the plain
        ones unless the tokenizer was made elsewhere (GPT-2's id 0 is "!").
        """
        compile_pattern(pattern)
        self.pattern = pattern
        self.merges = [(int(a), int(b)) for a, b in merges]
        self.byte_ids, self.first_merge = tuple(byte_ids), first_merge
        after = max(first_merge + len(self.merges), 256)
        self.special_tokens = check_specials(special_tokens, after)
        self.token_bytes = self._spell()
        self.vocab_size = len(self.token_bytes)
        self.eot = self.special_tokens.get(END_OF_TEXT)
        self._encoding = self._hash = None

    def _spell(self):
        """The bytes of every id; b"" for special tokens (and ids that nothing has)."""
        end = self.first_merge + len(self.merges)
        spelled = {i: bytes([b]) for b, i in enumerate(self.byte_ids)}
        if len(spelled) != 256 or max(spelled) >= self.first_merge:
            raise ValueError("byte_ids must be 256 different ids under "
                             f"first_merge={self.first_merge}")
        for i, (a, b) in enumerate(self.merges, self.first_merge):
            if a not in spelled or b not in spelled:
                raise ValueError(f"merges[{i - self.first_merge}]=({a}, {b}) uses an id that no "
                                 "byte or earlier merge has")
            spelled[i] = spelled[a] + spelled[b]
        if len(set(spelled.values())) != len(spelled):
            raise ValueError("two merges make the same token; no BPE trainer does that")
        for name, i in self.special_tokens.items():
            if i in spelled:
                raise ValueError(f"special token {name!r} has id {i}, which a byte or merge has")
        size = max([end, 256, *(i + 1 for i in self.special_tokens.values())])
        return [spelled.get(i, b"") for i in range(size)]

    @classmethod
    def train(cls, texts, vocab_size, pattern=GPT2_PATTERN, special_tokens=(END_OF_TEXT,),
              min_frequency=1, num_proc=None, progress=False):
        """Learn merges from an iterable of texts, which is read once and not kept."""
        pattern = PATTERNS.get(pattern, pattern)
        special_tokens = tuple(check_specials(special_tokens, 256))
        count_merges(vocab_size, special_tokens, min_frequency)
        texts = [texts] if isinstance(texts, str) else texts
        texts = tqdm(texts, desc="counting", unit="text", disable=None if progress else True)
        pieces = count_pieces(texts, pattern, num_proc)
        return cls.from_pieces(pieces, vocab_size, pattern, special_tokens, min_frequency, progress)

    @classmethod
    def from_pieces(cls, pieces, vocab_size, pattern=GPT2_PATTERN, special_tokens=(END_OF_TEXT,),
                    min_frequency=1, progress=False):
        """Learn merges from `count_pieces`' counts."""
        num_merges = count_merges(vocab_size, special_tokens, min_frequency)
        merges = learn_merges(pieces, num_merges, min_frequency, progress)
        if len(merges) < num_merges:
            warnings.warn(f"stopped after {len(merges):,} of {num_merges:,} merges: no pair is "
                          f"left that occurs {min_frequency} or more times", stacklevel=3)
        return cls(merges, pattern, special_tokens)

    @classmethod
    def gpt2(cls, folder=None):
        """GPT-2's own tokenizer; its two files are downloaded once unless a folder holds them."""
        return cls.load(folder or find_gpt2())

    def add_special_tokens(self, names):
        """A new tokenizer with more special tokens, their ids after all existing ones."""
        more = check_specials(names, self.vocab_size)
        for name in more:
            if name in self.special_tokens:
                raise ValueError(f"special token {name!r} exists already, as id "
                                 f"{self.special_tokens[name]}")
        return Tokenizer(self.merges, self.pattern, {**self.special_tokens, **more},
                         self.byte_ids, self.first_merge)

    def encode(self, text, allowed_special=()):
        """Ids of a text; special tokens only where `allowed_special` (names, or "all") says."""
        allowed = self._allowed(allowed_special) if allowed_special else ()
        if allowed:
            return self._encode_with(allowed, text)
        check_surrogates(text)
        encoding = self.to_tiktoken()
        try:
            return encoding.encode_ordinary(text)
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
        # tiktoken's regex engine gives up after a million steps back, as in a run of a million
        # spaces before a word; so split in Python, and let it merge piece by piece.
        whole = self._as_tiktoken(NO_PATTERN)
        pieces = split(regex.compile(self.pattern), text)
        return [i for piece in pieces for i in whole.encode_ordinary(piece)]

    def encode_batch(self, texts, num_threads=None):
        """Ids of each text, special tokens as ordinary text, in threads."""
        with ThreadPoolExecutor(num_threads or os.cpu_count()) as pool:
            return list(pool.map(self.encode, texts))

    def _encode_with(self, allowed, text):
        longest_first = sorted(allowed, key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
        ids = []
        for part in parts:   # every other part is a special token
            ids += [self.special_tokens[part]] if part in allowed else self.encode(part)
        return ids

    def encode_bytes(self, data):
        """Ids of any bytes: what is valid UTF-8 as text, each other byte as itself."""
        ids = []
        text = data.decode("utf-8", "surrogateescape")   # invalid byte 0xff is then U+DCFF
        for i, part in enumerate(re.split("([\udc80-\udcff]+)", text)):
            if i % 2:
                ids += [self.byte_ids[ord(char) - 0xDC00] for char in part]
            else:
                ids += self.encode(part)
        return ids

    def encode_slowly(self, text):
        """The definition of encoding: within a piece, apply the earliest merge, until none fits."""
        ranks = {pair: i for i, pair in enumerate(self.merges)}
        ids = []
        for piece in split(regex.compile(self.pattern), text):
            word = [self.byte_ids[byte] for byte in piece.encode()]
            while True:
                pairs = [pair for pair in zip(word, word[1:]) if pair in ranks]
                if not pairs:
                    break
                pair = min(pairs, key=ranks.get)
                word = merge(word, pair, self.first_merge + ranks[pair])
            ids += word
        return ids

    def decode_bytes(self, ids):
        """The bytes of ids; special tokens as their names."""
        names = {i: name.encode() for name, i in self.special_tokens.items()}
        out = []
        for i in ids:
            token = self.token_bytes[i] if 0 <= i < self.vocab_size else b""
            out.append(token or names.get(int(i)) or unknown_id(i, self.vocab_size))
        return b"".join(out)

    def decode(self, ids):
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def _allowed(self, names):
        names = list(self.special_tokens) if names == "all" else names
        for name in [names] if isinstance(names, str) else names:
            if name not in self.special_tokens:
                raise ValueError(f"allowed_special={name!r} is not a special token; allowed: "
                                 f"{', '.join(self.special_tokens) or 'none, there are none'}")
        return set([names] if isinstance(names, str) else names)

    # ------------------------------------------------------------------------ in and out

    @property
    def _state(self):
        """What a tokenizer is, in JSON; a token's spelling stands beside its merge, to read."""
        spell = [readable(token) for token in self.token_bytes]
        return {"pattern": self.pattern, "special_tokens": self.special_tokens,
                "byte_ids": list(self.byte_ids), "first_merge": self.first_merge,
                "merges": [[a, b, spell[i]] for i, (a, b) in
                           enumerate(self.merges, self.first_merge)]}

    @property
    def hash(self):
        """sha256 over pattern, merges and special tokens: equal means the same ids."""
        if self._hash is None:
            state = json.dumps(self._state, sort_keys=True)
            self._hash = hashlib.sha256(state.encode()).hexdigest()
        return self._hash

    def save(self, path):
        """tok.json: readable, one merge a line, with a checksum; written whole or not at all."""
        state = self._state
        merges = ",\n".join(json.dumps(row, ensure_ascii=False) for row in state.pop("merges"))
        head = {"format": FORMAT, "version": VERSION, "sha256": self.hash, **state}
        lines = [f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}"
                 for key, value in head.items()]
        write_text(path, "{\n" + ",\n".join(lines) + f',\n"merges": [\n{merges}\n]}}\n')

    @classmethod
    def load(cls, path):
        """Read our tok.json, a Hugging Face tokenizer.json, or a folder with one of them or with
        GPT-2's files (vocab.bpe and encoder.json, or merges.txt and vocab.json)."""
        path = Path(path)
        if path.is_dir():
            for name in ("tok.json", "tokenizer.json"):
                if (path / name).is_file():
                    return cls.load(path / name)
            for vocab, merges in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
                if (path / vocab).is_file() and (path / merges).is_file():
                    return cls(**from_gpt2_files(path / vocab, path / merges))
            raise FileNotFoundError(f"{path} holds no tok.json, tokenizer.json, or GPT-2 files "
                                    "(vocab.bpe and encoder.json, or merges.txt and vocab.json)")
        data = read_json(path)
        if isinstance(data, dict) and "model" in data:
            return cls(**from_hugging_face(data, path))
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"{path} is neither our tok.json nor a Hugging Face tokenizer.json")
        if data.get("version") != VERSION:
            raise ValueError(f"{path} has version {data.get('version')!r}; this code reads "
                             f"version {VERSION}: train again or use the code that wrote it")
        try:
            tok = cls([row[:2] for row in data["merges"]], data["pattern"],
                      data["special_tokens"], data["byte_ids"], data["first_merge"])
            intact = {**tok._state, "format": FORMAT, "version": VERSION, "sha256": tok.hash}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} was changed or damaged: {error!r}") from None
        if data != intact:
            raise ValueError(f"{path} was changed after it was written: its checksum does not fit")
        return tok

    def to_tiktoken(self):
        """The same tokenizer as a tiktoken.Encoding, which is what encodes, in Rust."""
        if self._encoding is None:
            gpt2 = self.pattern == GPT2_PATTERN
            self._encoding = self._as_tiktoken(TIKTOKEN_GPT2 if gpt2 else self.pattern)
        return self._encoding

    def _as_tiktoken(self, pattern):
        ranks = {token: i for i, token in enumerate(self.token_bytes) if token}
        try:
            return tiktoken.Encoding(f"oneloop-{self.hash[:8]}", pat_str=pattern,
                                     mergeable_ranks=ranks, special_tokens=self.special_tokens)
        except ValueError as error:
            raise ValueError(f"pattern={pattern!r} is not one that tiktoken's regex engine "
                             f"reads: {error}") from None

    @classmethod
    def from_tiktoken(cls, encoding):
        """From a tiktoken.Encoding. It keeps tokens without merges; a token's merge is the pair
        that is left of it when only the earlier tokens are known."""
        ranks = encoding._mergeable_ranks
        tokens = sorted(ranks, key=ranks.get)
        byte_ids = [ranks[bytes([b])] for b in range(256)]
        merges, known = [], {}
        for token in tokens[256:]:
            word = [ranks[bytes([b])] for b in token]
            while len(word) > 2:
                pair = min(zip(word, word[1:]), key=lambda pair: known.get(pair, len(ranks)))
                if pair not in known:
                    raise ValueError(f"token {token!r} of {encoding.name} is not made of two "
                                     "earlier ones, so this is no BPE")
                word = merge(word, pair, known[pair])
            merges.append(tuple(word))
            known[tuple(word)] = ranks[token]
        first = ranks[tokens[256]] if merges else 256
        if [ranks[t] for t in tokens[256:]] != list(range(first, first + len(merges))):
            raise ValueError(f"the ids of {encoding.name} have gaps; only gap-free ones are read")
        pattern = encoding._pat_str
        return cls(merges, GPT2_PATTERN if pattern == TIKTOKEN_GPT2 else pattern,
                   dict(encoding._special_tokens), byte_ids, first)

    def save_pretrained(self, folder):
        """tokenizer.json and tokenizer_config.json for Hugging Face's AutoTokenizer."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        spell = ["".join(BYTE_TO_CHAR[b] for b in token) for token in self.token_bytes]
        vocab = {token: i for i, token in enumerate(spell) if token} | self.special_tokens
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                      "use_regex": self.pattern == GPT2_PATTERN}
        pre_tokenizer = byte_level if byte_level["use_regex"] else {
            "type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated",
                 "invert": False}, byte_level]}
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        data = {
            "version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [{"id": i, "content": name, **flags, "special": True}
                             for name, i in sorted(self.special_tokens.items(),
                                                   key=lambda item: item[1])],
            "normalizer": None, "pre_tokenizer": pre_tokenizer, "post_processor": None,
            "decoder": byte_level,
            "model": {"type": "BPE", "dropout": None, "unk_token": None,
                      "continuing_subword_prefix": None, "end_of_word_suffix": None,
                      "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                      "vocab": vocab, "merges": [[spell[a], spell[b]] for a, b in self.merges]}}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": int(1e30),
                  "clean_up_tokenization_spaces": False}
        if self.eot is not None:
            config.update(bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, unk_token=END_OF_TEXT)
        write_text(folder / "tokenizer.json", json.dumps(data, ensure_ascii=False, indent=1))
        write_text(folder / "tokenizer_config.json", json.dumps(config, indent=1))


FORMAT, VERSION = "oneloop-bpe", 1
# GPT-2's pattern as tiktoken writes it: the same pieces, less backtracking.
TIKTOKEN_GPT2 = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s")


def count_merges(vocab_size, special_tokens, min_frequency):
    """How many merges fill the vocabulary."""
    least = 256 + len(special_tokens)
    if vocab_size < least:
        raise ValueError(f"vocab_size={vocab_size} is under 256 bytes + {len(special_tokens)} "
                         f"special tokens; give at least {least}")
    if min_frequency < 1:
        raise ValueError(f"min_frequency={min_frequency} is not allowed; give at least 1")
    return vocab_size - least


def check_specials(names, first_id):
    """Names (or name -> id) of special tokens as a dict; duplicates and empty ones are refused."""
    if isinstance(names, str):
        raise ValueError(f"special_tokens={names!r} is one string; give a list of names")
    names = names if isinstance(names, dict) else tuple(names)
    for name in names:
        if not isinstance(name, str) or not name:
            raise ValueError(f"special token {name!r} is empty or not a string; give it a name")
    if len(set(names)) != len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise ValueError(f"special token {twice!r} is given twice; each name may stand once")
    if not isinstance(names, dict):
        return {name: i for i, name in enumerate(names, first_id)}
    if len(set(names.values())) != len(names):
        raise ValueError(f"two special tokens share an id: {names}")
    return dict(names)


def check_surrogates(text):
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(surrogate_message(error)) from None


def surrogate_message(error):
    return (f"text has a lone surrogate, U+{ord(error.object[error.start]):04X} at character "
            f"{error.start}, which no UTF-8 can hold; clean it with "
            "text.encode('utf-8', 'replace').decode()")


def unknown_id(i, vocab_size):
    raise ValueError(f"id {i} is not in the vocabulary; allowed: 0 to {vocab_size - 1}")


# ------------------------------------------------------------------------- 5. others' files

def byte_to_char():
    """GPT-2's printable character for each byte, as its files and Hugging Face's spell tokens:
    visible Latin-1 characters stand for themselves, the others move up to U+0100 and on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in visible]
    return {**{b: chr(b) for b in visible}, **{b: chr(256 + i) for i, b in enumerate(hidden)}}


BYTE_TO_CHAR = byte_to_char()
CHAR_TO_BYTE = {char: b for b, char in BYTE_TO_CHAR.items()}


def from_vocab(vocab, merges, specials, pattern, path):
    """Tokenizer arguments from a vocabulary (spelling -> id) and merges of spellings."""
    try:
        byte_ids = [vocab[BYTE_TO_CHAR[b]] for b in range(256)]
        pairs = [(vocab[a], vocab[b]) for a, b in merges]
        made = [vocab[a + b] for a, b in merges]
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} is no byte-level BPE: its vocabulary lacks {error}") from None
    first = made[0] if made else max(256, max(byte_ids) + 1)
    if made != list(range(first, first + len(made))):
        raise ValueError(f"{path}: the ids of its merges are not consecutive, which is not "
                         "supported")
    extra = set(vocab) - set(specials) - set(BYTE_TO_CHAR.values()) - {a + b for a, b in merges}
    if extra:
        raise ValueError(f"{path}: token {min(extra)!r} is no byte, merge or special token")
    return {"merges": pairs, "pattern": pattern, "special_tokens": specials,
            "byte_ids": byte_ids, "first_merge": first}


def from_gpt2_files(vocab_path, merges_path):
    vocab = read_json(vocab_path)
    lines = Path(merges_path).read_text(encoding="utf-8").splitlines()
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    made = {a + b for a, b in merges}
    specials = {token: i for token, i in vocab.items()
                if token not in made and token not in CHAR_TO_BYTE}
    return from_vocab(vocab, merges, specials, GPT2_PATTERN, vocab_path)


def from_hugging_face(data, path):
    """Tokenizer arguments from a tokenizer.json; what would change ids silently is refused."""
    model, pre = data["model"], data.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    splits = [step for step in steps if step.get("type") == "Split"]
    levels = [step for step in steps if step.get("type") == "ByteLevel"]
    problems = [
        (model.get("type", "BPE") != "BPE", f"its model is {model.get('type')}, not BPE"),
        (data.get("normalizer"), "it normalizes text, so decoding would not give the text back"),
        (len(levels) != 1 or len(splits) + 1 != len(steps) or len(splits) > 1,
         "its pre-tokenizer is not byte-level with at most one split"),
        (levels and levels[0].get("add_prefix_space"), "it puts a space before the text"),
        (splits and (splits[0].get("behavior") != "Isolated" or splits[0].get("invert")
                     or levels[0].get("use_regex", True)), "it splits text in an unusual way"),
        (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
         or model.get("byte_fallback"), "it marks parts of words, so it is not byte-level"),
    ]
    for found, reason in problems:
        if found:
            raise ValueError(f"{path} cannot be read exactly: {reason}")
    if splits:
        pattern = splits[0]["pattern"].get("Regex") or regex.escape(splits[0]["pattern"]["String"])
    else:
        pattern = GPT2_PATTERN if levels[0].get("use_regex", True) else NO_PATTERN
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    specials = {token["content"]: token["id"] for token in data.get("added_tokens", [])}
    return from_vocab(model["vocab"], merges, specials, pattern, path)


GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"}


def gpt2_folder():
    """Where GPT-2's two files are or shall be: beside the repository, else in the cache."""
    shared = Path(os.environ.get("ONELOOP_SHARED",
                                 Path(__file__).resolve().parent.parent / "shared/data"))
    if (shared / "gpt2_vocab").is_dir():
        return shared / "gpt2_vocab"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "oneloop" / "gpt2"


def has_gpt2():
    return all((gpt2_folder() / name).is_file() for name in GPT2_SHA256)


def find_gpt2():
    """The folder of GPT-2's two files, after downloading them once if need be."""
    folder = gpt2_folder()
    for name, sha256 in GPT2_SHA256.items():
        if (folder / name).is_file():
            continue
        try:
            with urllib.request.urlopen(GPT2_URL + name, timeout=60) as response:
                data = response.read()
        except OSError as error:
            raise FileNotFoundError(f"cannot download {GPT2_URL + name} ({error}); put vocab.bpe "
                                    f"and encoder.json into {folder}") from None
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ValueError(f"{GPT2_URL + name} has not the expected sha256 {sha256}")
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / name, data)
    return folder


def readable(token):
    """A token for people: text where it is text, \\x.. where it is not."""
    text = token.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no such file: {path}") from None
    except ValueError as error:
        raise ValueError(f"{path} is truncated or not JSON: {error}") from None


def write_text(path, text):
    write_bytes(path, text.encode())


def write_bytes(path, data):
    """Write beside and rename, so that no reader ever sees half a file."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


# ------------------------------------------------------------------------- 6. the command line

def train_command(args):
    pattern = PATTERNS.get(args.pattern, args.pattern)
    special = check_specials(args.special or [END_OF_TEXT], 256)
    count_merges(args.vocab_size, special, args.min_frequency)
    compile_pattern(pattern)
    if not Path(args.out).parent.is_dir():
        raise FileNotFoundError(f"no such folder: {Path(args.out).parent}, for --out={args.out}")
    sizes = file_sizes(args.files)
    held_out, start = [], time.time()

    def training_blocks():
        """Nine of ten blocks; the tenth is kept to measure on, some 8 MB at most."""
        blocks = read_blocks(args.files, pattern, args.errors, min(BLOCK, max(sum(sizes) // 50, 1)))
        with tqdm(total=sum(sizes), desc="counting", unit="B", unit_scale=True,
                  disable=None) as bar:   # None: only on a terminal
            for i, text in enumerate(blocks):
                bar.update(len(text.encode()))
                if i % 10 == 9 and len(held_out) < 32 and not args.no_held_out:
                    held_out.append(text)
                else:
                    yield text

    pieces = count_pieces(training_blocks(), pattern, args.num_proc)
    with warnings.catch_warnings(record=True) as caught:   # a line each, not Python's two
        warnings.simplefilter("always")
        tok = Tokenizer.from_pieces(pieces, args.vocab_size, pattern, tuple(special),
                                    args.min_frequency, progress=True)
    for warning in caught:
        print(f"bpe.py: {warning.message}", file=sys.stderr)
    tok.save(args.out)
    print(f"{sum(sizes):,} bytes, {len(pieces):,} distinct pieces, vocabulary "
          f"{tok.vocab_size:,}, {time.time() - start:.1f} s: {args.out}")
    if held_out:
        size = sum(len(text.encode()) for text in held_out)
        tokens = sum(map(len, tok.encode_batch(held_out)))
        print(f"held-out text: {size:,} bytes, {size / tokens:.3f} bytes per token")
    made = [readable(token) for token in tok.token_bytes[256:256 + len(tok.merges)]]
    print("first merges:  ", *(f"[{token}]" for token in made[:10]))
    print("last merges:   ", *(f"[{token}]" for token in made[-10:]))
    print("longest tokens:", *(f"[{token}]" for token in sorted(made, key=len)[:-6:-1]))


def find_tokenizer(name):
    return Tokenizer.gpt2() if name == "gpt2" else Tokenizer.load(name)


def encode_command(args):
    print(*find_tokenizer(args.tokenizer).encode_bytes(sys.stdin.buffer.read()))


def decode_command(args):
    words = sys.stdin.read().split()
    for word in words:
        if not word.isdecimal():
            raise ValueError(f"{word!r} is not an id; give whole numbers separated by spaces")
    data = find_tokenizer(args.tokenizer).decode_bytes(map(int, words))
    sys.stdout.buffer.write(data)


def compare_command(args):
    toks = {name: find_tokenizer(name) for name in args.tokenizer or ["gpt2"]}
    rows = {path: compare_file(path, toks.values(), args.errors) for path in args.files}
    languages = {}
    for language, size, figures in rows.values():
        total = languages.setdefault(language, [0, np.zeros((len(toks), 2), np.int64), 0])
        languages[language] = [total[0] + size[0], total[1] + figures, total[2] + size[1]]
    table = [["file", "language (script)", "bytes"]]
    for name in toks:
        table[0] += [f"{name}: tokens", "bytes/token", "split characters"]
    lines = [(path, language, size[0], figures, size[1])
             for path, (language, size, figures) in rows.items()]
    if len(rows) > 1:
        lines += [(f"all {language}", language, *total) for language, total in languages.items()]
    for name, language, size, figures, characters in lines:
        table.append([str(name), language, f"{size:,}"])
        for tokens, split_characters in figures.tolist():
            table[-1] += [f"{tokens:,}", f"{size / tokens:.2f}",
                          f"{split_characters / characters:.1%}"]
    for row in [table[0], ["---"] * 3 + ["---:"] * (len(table[0]) - 3), *table[1:]]:
        print("| " + " | ".join(row) + " |")


def compare_file(path, toks, errors):
    """Language, (bytes, characters) and for each tokenizer (tokens, characters split)."""
    size, figures, letters = np.zeros(2, np.int64), np.zeros((len(toks), 2), np.int64), Counter()
    pattern = next((tok.pattern for tok in toks if tok.pattern not in SAFE_PATTERNS), GPT2_PATTERN)
    for text in read_blocks([path], pattern, errors):
        data = text.encode()
        size += len(data), len(text)
        letters.update(unicodedata.name(char, "?").split()[0]
                       for char in text[:2000] if char.isalpha())
        starts = np.frombuffer(data, np.uint8) & 0xC0 != 0x80     # bytes that start a character
        for i, tok in enumerate(toks):
            ids = tok.encode(text)
            ends = np.cumsum([len(tok.token_bytes[j]) for j in ids])[:-1]
            inside = ends[~starts[ends]]                          # a token ends inside a character
            figures[i] += len(ids), len(np.unique(starts.cumsum()[inside]))
    return letters.most_common(1)[0][0] if letters else "none", size, figures


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line, as all of ours are."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def parse(argv):
    parser = Parser(prog="bpe.py", description=__doc__.split("\n")[0],
                    epilog="all options: python bpe.py COMMAND --help")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="learn merges from text files")
    train.set_defaults(run=train_command)
    train.add_argument("--vocab-size", type=int, required=True,
                       help="256 bytes + merges + special tokens")
    train.add_argument("--out", required=True, help="the tok.json to write")
    train.add_argument("--pattern", default="gpt2",
                       help="gpt2, gpt4, none, or a regex (default gpt2)")
    train.add_argument("--special", action="append", metavar="TOKEN",
                       help=f"a special token, repeatable (default {END_OF_TEXT})")
    train.add_argument("--min-frequency", type=int, default=1,
                       help="stop when the most frequent pair is rarer (default 1)")
    train.add_argument("--num-proc", type=int, help="counting processes (default: all cores)")
    train.add_argument("--no-held-out", action="store_true",
                       help="train on everything; else a tenth is kept to measure compression on")
    encode = commands.add_parser("encode", help="bytes on stdin to ids on stdout")
    encode.set_defaults(run=encode_command)
    decode = commands.add_parser("decode", help="ids on stdin to bytes on stdout")
    decode.set_defaults(run=decode_command)
    compare = commands.add_parser("compare", help="tokens and compression, per file and language")
    compare.set_defaults(run=compare_command)
    for command in (train, compare):
        command.add_argument("files", nargs="+", metavar="FILE", help="UTF-8 text files")
        command.add_argument("--errors", choices=("strict", "replace"), default="strict",
                             help="what to do with bytes that are not UTF-8 (default strict)")
    for command in (encode, decode):
        command.add_argument("--tokenizer", default="gpt2",
                             help="gpt2, a file or a folder (default gpt2)")
    compare.add_argument("--tokenizer", action="append",
                         help="gpt2, a file or a folder; repeatable (default gpt2)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    try:
        args.run(args)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"bpe.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bpe.py: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
