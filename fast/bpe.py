"""How bpe.py trains fast: text to pieces, pieces to counts, counts to merges.

`learn_merges` gives exactly what `bpe.train_slowly` gives. What makes it fast:

- Each distinct piece is counted once and then worked on once, however often it occurs. Files are
  read in blocks that end at a *safe cut*, a place that no piece reaches across, so blocks can be
  split one by one, in processes, and memory grows with the distinct pieces, not with the corpus.
- The GPT-2 pattern is computed in numpy: a fifth of the time of a regex engine, the same pieces.
- All pieces lie in one array, and each pair knows the *positions* where it starts, so a merge
  touches its own occurrences and nothing is ever rescanned.
- The count of a pair can only fall, so an old count is an upper bound, corrected only when it comes
  to the top of the heap. The *heap is bounded*: it holds the few thousand most frequent pairs, and
  the others are looked up when those are used up.

In: texts or files, and a pattern. Out: `count_pieces` gives {piece in bytes: count}, and from these
`learn_merges` gives the merges, from which bpe.py makes a tokenizer.

References: lazy evaluation of a falling score, Minoux 1978. The GPT-2 pattern: Radford et al. 2019.
"""
import functools
import heapq
import itertools
import multiprocessing
import os
import queue
import signal
import warnings
from collections import Counter
from pathlib import Path
from typing import BinaryIO, Callable, Iterable, Iterator

import numpy as np
import regex
import tiktoken
from tqdm import tqdm

GPT2_PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
GPT4_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+")
NO_PATTERN = r"[\s\S]+"    # the whole text is one piece
PATTERNS = {"gpt2": GPT2_PATTERN, "gpt4": GPT4_PATTERN, "none": NO_PATTERN}
SAFE_PATTERNS = (GPT2_PATTERN, GPT4_PATTERN)   # a text can be cut at a `safe_cut`

BLOCK = 1 << 18       # characters that are read, split and counted at once; fits the cache
MAX_PIECE = 1 << 22   # bytes

LETTER, NUMBER, SPACE = 1, 2, 3   # the kinds of characters; 0 is everything else
KINDS = ((LETTER, r"\p{L}+"), (NUMBER, r"\p{N}+"), (SPACE, r"\s+"))
POINTS = np.concatenate((np.arange(0xD800), np.arange(0xE000, 0x40000))).astype("<u4")
# Every ASCII character and one or two characters of each other kind, between letters: a pattern
# that loses a character loses one of these.
PROBE = "a".join([chr(i) for i in (*range(33, 128), *range(33))] + list(
    "éǅʰ中\u0301\u0903\u20dd٣Ⅷ²‿–‘’“”«§€¨©\u00a0\u2028\u2029\u3000\u200d\ue000\U0001f600"))


# ---------------------------------------------------------------------------- 1. text to pieces

def compile_pattern(pattern: str) -> regex.Pattern:
    """The compiled pattern; ValueError if it is no regex, has groups, or loses characters."""
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


def split(compiled: regex.Pattern, text: str) -> list[str]:
    """The pieces of a text, which joined are the text.

    ValueError, with an example, if the pattern loses characters.
    """
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


def check_surrogates(text: str) -> None:
    """ValueError, with its place, if the text has a lone surrogate."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text has a lone surrogate, U+{ord(text[error.start]):04X} at character "
                f"{error.start}, which no UTF-8 can hold; clean it with "
                "text.encode('utf-8', 'replace').decode()") from None


def kinds_by(findall: Callable[[str, str], Iterable[str]]) -> np.ndarray:
    """The kind of every code point, as the engine with this `findall(pattern, text)` knows it."""
    table = np.zeros(0x110000, np.uint8)
    every = POINTS.tobytes().decode("utf-32-le")
    for kind, pattern in KINDS:
        found = "".join(findall(pattern, every))
        table[np.frombuffer(found.encode("utf-32-le"), "<u4")] = kind
    return table


@functools.cache
def kinds() -> np.ndarray:
    """The kind of every code point as tiktoken knows it (Unicode has letters up to U+3FFFF)."""
    def findall(pattern, text):   # tiktoken drops what does not match
        only = tiktoken.Encoding(pattern, pat_str=pattern, special_tokens={},
                                 mergeable_ranks={bytes([b]): b for b in range(256)})
        return only.decode(only.encode_ordinary(text))

    return kinds_by(findall)


@functools.cache
def shown_as() -> np.ndarray:
    """For each code point one that `regex` takes for the same kind: itself, unless its Unicode
    version differs from tiktoken's, as it does for thousands of letters added since 2024."""
    table = np.arange(0x110000, dtype="<u4")
    seen = kinds_by(regex.findall)
    for kind, example in enumerate("\u0378中² "):   # U+0378 is unassigned
        table[(kinds() == kind) & (seen != kind)] = ord(example)
    return table


# ------------------------------------------------------------------------- 2. files to blocks

@functools.cache
def safe_cut() -> regex.Pattern:
    """Finds the last place in a text where it may be cut without changing its pieces: after a
    letter or a number, before anything else. In the GPT-2 and GPT-4 patterns no piece reaches
    across (a letter is followed by letters only, a number by numbers), and nothing looks back."""
    doubtful = np.flatnonzero(shown_as() != np.arange(0x110000))
    runs = np.split(doubtful, np.flatnonzero(np.diff(doubtful) != 1) + 1)
    ranges = [f"\\U{run[0]:08x}-\\U{run[-1]:08x}" for run in runs if len(run)]
    doubtful = "".join(ranges) + r"\uffff"
    return regex.compile(rf"(?rV1)(?<=[[\p{{L}}\p{{N}}]--[{doubtful}]])"
                         rf"(?=[^\p{{L}}\p{{N}}{doubtful}])")


def read_blocks(paths: Iterable[str | Path], pattern: str = GPT2_PATTERN, errors: str = "strict",
                block: int = BLOCK) -> Iterator[str]:
    """Yield the text of files in blocks that can be split one by one, as if they were whole.

    errors: "strict" or "replace", for bytes that are not UTF-8; block: bytes read at once.
    FileNotFoundError for a missing file; ValueError for an empty one or, if strict, not UTF-8.
    """
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


def file_sizes(paths: Iterable[str | Path]) -> list[int]:
    """The sizes in bytes; a file that is missing or empty is refused before any work is done."""
    for path in paths:
        if not Path(path).is_file():
            raise FileNotFoundError(f"no such file: {path}")
        if not Path(path).stat().st_size:
            raise ValueError(f"{path} is empty; give a file with text")
    return [Path(path).stat().st_size for path in paths]


def decode_stream(file: BinaryIO, path: str | Path, errors: str, block: int) -> Iterator[str]:
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


# --------------------------------------------------------------------------- 3. texts to counts

def in_batches(texts: Iterable[str], pattern: str) -> Iterator[list[str]]:
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


def count_pieces(texts: Iterable[str], pattern: str, num_proc: int | None = None
                 ) -> dict[bytes, int]:
    """How often each distinct piece occurs; memory grows with these, not with the texts.

    num_proc: counting processes; None is one per core. ValueError for a pattern that cannot
    serve, a lone surrogate, or a piece over MAX_PIECE bytes.
    """
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


def count_batches(batches: Iterable[list[str]], pattern: str) -> Counter:
    """How often each piece occurs in batches of texts."""
    counts = Counter()
    compiled = regex.compile(pattern)
    for batch in batches:
        if pattern == GPT2_PATTERN:
            count_gpt2(batch, counts)
        else:
            for text in batch:
                counts.update(split(compiled, text))
    return counts


def count_in_processes(batches: Iterable[list[str]], pattern: str, num_proc: int) -> Counter:
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
    """A counting process: batches from `tasks`, up to a None; counts, or an error, to `results`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)   # Ctrl-C is for the parent, which ends us
    try:
        results.put(count_batches(iter(tasks.get, None), pattern))
    except ValueError as error:
        results.put(error)
        for _ in iter(tasks.get, None):            # drain, so that the parent can finish writing
            pass


# The GPT-2 pattern in numpy. Each character has a kind, and a piece is a run of one kind, but for
# the spaces and the apostrophe.
ONE = [ord(c) for c in "sdmt"]
TWO = [ord(a) << 21 | ord(b) for a, b in ("ll", "ve", "re")]


def gpt2_starts(codes: np.ndarray, begins: np.ndarray) -> np.ndarray:
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


def count_gpt2(batch: list[str], counts: Counter) -> None:
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


# --------------------------------------------------------------------------- 4. pieces to merges

FEW = 16        # up to so many occurrences a Python loop beats a dozen numpy calls
RIGHT = 1 << 30  # added to an id to mark a right neighbour in a sort key
Positions = list[int] | np.ndarray


def learn_merges(pieces: dict[bytes, int], num_merges: int, min_frequency: int = 1,
                 progress: bool = False) -> list[tuple[int, int]]:
    """The merges of `train_slowly`, fast. ValueError if positions and ids do not fit 63 bits.

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

    def __init__(self, pieces: dict[bytes, int], num_merges: int):
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

    def index(self, min_frequency: int, size: int = 2000) -> tuple[list[tuple], int]:
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

    def recount(self, a: int, b: int, at: Positions) -> tuple[int, Positions]:
        """How often (a, b) still occurs, and where."""
        if type(at) is list:
            first, _, weight, length = self.views
            step = length[a]
            at = [p for p in at if first[p] == a and first[p + step] == b]
            return sum([weight[p] for p in at]), at
        at = at[(self.first[at] == a) & (self.first[at + self.length[a]] == b)]
        return int(self.weight[at].sum()), few_or_many(at)

    def merge(self, a: int, b: int, new: int, at: Positions, floor: int) -> list[tuple]:
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
    """Positions as a list where they are few, which Python walks faster than an array."""
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


