"""A corpus into ids: those of `bpe.encode_slowly` for each text, in arrays, by blocks in threads.

Text repeats its pieces. With GPT-2's pattern a block is split in numpy, each distinct piece is
encoded once, and the ids are gathered. Other patterns go through tiktoken text by text, and so do
blocks that follow one of mostly new pieces: in Chinese a piece is what stands between two commas.
"""
import functools
import os
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Iterable, Iterator

import numpy as np
import tiktoken

from fast.bpe_counts import in_batches
from fast.bpe_encode import encode_with_tiktoken
from fast.bpe_pieces import GPT2_PATTERN, NO_PATTERN, kinds
from fast.bpe_table import PieceTable, gpt2_starts, with_room

BLOCK = 1 << 19                 # characters together; many, for threads take turns
AHEAD = 8                       # blocks that are read ahead of the reader of ids, for each thread
PLAIN = 15                      # blocks that go the plain way after one of mostly new pieces
MOST, MOST_BYTES = 1 << 17, 1 << 26     # pieces in a table, so that it stays small and quick
BETWEEN, MARK = "\U0010ffff", 1 << 30   # a character that is none, and an id that nothing has


def encode_corpus(encoding: tiktoken.Encoding, pattern: str, texts: Iterable[str],
                  num_threads: int | None = None) -> Iterator[np.ndarray]:
    """The ids of each text in order, special tokens as ordinary text. num_threads: None is one per
    core. ValueError for a lone surrogate."""
    whole, own = as_pieces(encoding), threading.local()     # each thread has its own table
    if pattern == GPT2_PATTERN:
        kinds()                                         # once, and not in each of them

    def encode(batch: list[tuple[str, bool]]) -> list[tuple[np.ndarray, bool]]:
        parts = [text for text, _ in batch]
        if pattern == GPT2_PATTERN:
            if not hasattr(own, "encoder"):
                own.encoder, own.plain = PieceEncoder(whole), 0
            own.plain -= 1
        if pattern == GPT2_PATTERN and own.plain < 0:
            found, repeats = own.encoder.encode(parts)
            own.plain = 0 if repeats else PLAIN
        else:
            found = [np.array(encode_with_tiktoken(encoding, text, as_array=True), np.uint32)
                     for text in parts]
        return [(ids, last) for ids, (_, last) in zip(found, batch)]

    num_threads = num_threads or os.cpu_count() or 1
    pending: deque = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        def encoded() -> Iterator[tuple[np.ndarray, bool]]:
            for batch in in_batches(texts, pattern, BLOCK):
                pending.append(pool.submit(encode, batch))
                if len(pending) > num_threads * AHEAD:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()

        begun = []                                      # parts of a long text
        for ids, last in encoded():
            begun.append(ids)
            if last:
                yield np.concatenate(begun) if len(begun) > 1 else ids
                begun = []


@functools.lru_cache(4)
def as_pieces(encoding: tiktoken.Encoding) -> tiktoken.Encoding:
    """The same, of what is between two special tokens as one piece."""
    return tiktoken.Encoding(encoding.name, pat_str=NO_PATTERN, special_tokens={BETWEEN: MARK},
                             mergeable_ranks=encoding._mergeable_ranks)


class PieceEncoder:
    """Ids of texts by a table of pieces, which is begun anew when it is full."""

    def __init__(self, whole: tiktoken.Encoding):
        self.whole = whole
        self.begin()

    def begin(self) -> None:
        """Forget all pieces."""
        self.table = PieceTable()
        self.known = self.end = 0                       # pieces, and ids of all of them
        self.ids = np.zeros(0, np.uint32)               # end to end; room for more, as in these:
        self.count = self.offset = np.zeros(0, np.int64)    # of each piece's ids

    def encode(self, texts: list[str]) -> tuple[list[np.ndarray], bool]:
        """The ids of each text, and whether half of it or more were pieces that had been before."""
        if self.table.length >= MOST or len(self.table.text) >= MOST_BYTES:
            self.begin()
        encoded = [text.encode() for text in texts]
        ends = np.cumsum([0, *map(len, encoded)])
        data = b"".join(encoded)
        starts = gpt2_starts(data, ends[:-1])
        number = self.table.look_up(data, starts, np.append(starts[1:], len(data)))
        new = list(self.table.pieces(self.known))
        self.learn(new)
        count = self.count[number]
        stops = np.append(0, count.cumsum())            # of the pieces' ids in the block's
        ids = self.ids[np.repeat(self.offset[number] - stops[:-1], count) + np.arange(stops[-1])]
        repeats = 2 * sum(map(len, new)) <= len(data)
        return np.split(ids, stops[np.searchsorted(starts, ends[1:-1])]), repeats

    def learn(self, pieces: list[bytes]) -> None:
        """Encode new pieces, all at once."""
        if not pieces:
            return
        between = BETWEEN.encode()
        if any(between in piece for piece in pieces):
            rows = [np.array(self.whole._encode_single_piece(piece), np.uint32) for piece in pieces]
            ids, count = np.concatenate(rows), np.array(list(map(len, rows)))
        else:
            text = between.join((*pieces, b"")).decode()
            ids = self.whole.encode_to_numpy(text, allowed_special={BETWEEN})
            count = np.diff(np.flatnonzero(ids == MARK), prepend=-1) - 1
            ids = ids[ids != MARK]
        begin, self.known = self.known, self.known + len(pieces)
        self.count = with_room(self.count, self.known)
        self.offset = with_room(self.offset, self.known)
        self.count[begin:self.known] = count
        self.offset[begin:self.known] = self.end + count.cumsum() - count
        begin, self.end = self.end, self.end + len(ids)
        self.ids = with_room(self.ids, self.end)
        self.ids[begin:self.end] = ids
