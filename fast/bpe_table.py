"""Pieces of GPT-2's pattern in numpy: where they start in a text's bytes, and a number for each.

    table = PieceTable()
    numbers = table.look_up(data, gpt2_starts(data, begins))        # of each piece of a block
    table.pieces[numbers[0]]                                        # the first piece, in bytes

Text repeats its pieces, so what is done for each distinct one (counting, encoding) is done once,
and the rest is arithmetic on whole blocks. In: UTF-8. Out: what regex.findall gives, as numbers.
"""
import functools
from collections import Counter

import numpy as np

from fast.bpe_pieces import SPACE, kinds

BITS = 19                       # of a slot's index; the rows take 12 MiB
MOST, MOST_BYTES = 1 << 17, 1 << 26         # pieces in a table, so that it stays small and quick
LONG = 16                       # bytes of a piece that is looked up in a dict instead
ONE = [ord(c) for c in "sdmt"]
TWO = [ord(a) << 8 | ord(b) for a, b in ("ll", "ve", "re")]
FACTORS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], np.uint64)     # odd, bits at random
LOW = np.array([(1 << 8 * min(n, 8)) - 1 for n in range(LONG + 1)], np.uint64)
HIGH = np.array([(1 << 8 * max(n - 8, 0)) - 1 for n in range(LONG)] + [0], np.uint64)
LENGTH = np.arange(LONG + 1, dtype=np.uint64) << np.uint64(56)


@functools.cache
def ascii_kinds() -> bytes:
    """The kind of each byte that is a character, for bytes.translate; 0 for the others."""
    return bytes(kinds()[:128].tolist() + [0] * 128)


def byte_kinds(data: bytes) -> np.ndarray:
    """The kind of the character that each byte is a part of."""
    kind = np.frombuffer(data.translate(ascii_kinds()), np.uint8)
    if data.isascii():
        return kind
    kind, padded = kind.copy(), np.frombuffer(data + bytes(3), np.uint8)
    lead = np.flatnonzero(padded[:-3] >= 0xC0)          # first bytes of longer characters
    first, second, third, fourth = (padded[lead + i].astype(np.int32) for i in range(4))
    size = 2 + (first >= 0xE0) + (first >= 0xF0)
    point = (first & (0x7F >> size)) << 6 | second & 0x3F
    point = np.where(size > 2, point << 6 | third & 0x3F, point)
    point = np.where(size > 3, point << 6 | fourth & 0x3F, point)
    of_point = kinds()[point]
    for i in range(4):
        there = slice(None) if i < 2 else size > i
        kind[lead[there] + i] = of_point[there]
    return kind


def gpt2_starts(data: bytes, begins: np.ndarray) -> np.ndarray:
    """Indices of the bytes where a piece of GPT-2's pattern starts; begins: those of the texts.

    A piece is a run of characters of one kind, but for the spaces and the apostrophe.
    """
    code, kind = np.frombuffer(data, np.uint8), byte_kinds(data)
    new = np.zeros(len(data) + 1, bool)
    new[begins] = True
    new = new[:-1]                                      # an empty text at the end begins nothing
    start = new.copy()
    start[1:] |= kind[1:] != kind[:-1]
    # Spaces before a word: the last one stands apart, and if it is " " the word takes it.
    space = kind == SPACE
    i = np.flatnonzero(space[:-1] & ~space[1:] & ~new[1:])          # the last byte of the last one
    single = code[i] < 0x80
    start[i[single]] = True
    start[i[code[i] == ord(" ")] + 1] = False
    i = i[~single]
    start[np.where(code[i - 1] >= 0xC0, i - 1, i - 2)] = True       # no space has four bytes
    # 's 'd 'm 't 'll 've 're where a piece would start with the apostrophe.
    i = np.flatnonzero(code == ord("'"))
    i = i[start[i]]
    ends = np.append(begins[1:], len(data))                         # of the texts
    left = ends[np.searchsorted(begins, i, "right") - 1] - i        # bytes to the text's end
    after = np.where(left > 1, code.take(i + 1, mode="clip"), 0)
    after2 = np.where(left > 2, code.take(i + 2, mode="clip"), 0).astype(np.int64)
    one, two = np.isin(after, ONE), np.isin(after.astype(np.int64) << 8 | after2, TWO)
    start[i[one | two] + 1] = False
    ends = np.concatenate((i[one] + 2, i[two] + 3))
    start[ends[ends < len(start)]] = True
    return np.flatnonzero(start)


class PieceTable:
    """Distinct pieces, numbered as they come.

    A hash table with open addressing: a row is a piece as two integers (its bytes, and its length
    in the last of 16) and its number. Longer pieces are in a dict.
    """

    def __init__(self):
        self.rows = np.zeros((1 << BITS, 3), np.uint64)
        self.pieces: list[bytes] = []
        self.numbers: dict[bytes, int] = {}
        self.size = 0                                   # bytes of the pieces
        self.counts = np.zeros(0, np.int64)             # of the pieces that were counted

    def is_full(self) -> bool:
        """Whether it is time for a new table."""
        return len(self.pieces) >= MOST or self.size >= MOST_BYTES

    def count(self, data: bytes, starts: np.ndarray) -> None:
        """Count the pieces of a block."""
        number = self.look_up(data, starts)
        counts = np.bincount(number, minlength=len(self.pieces))
        counts[:len(self.counts)] += self.counts
        self.counts = counts

    def add_to(self, counts: Counter) -> None:
        """Add to others what was counted here."""
        for piece, count in zip(self.pieces, self.counts.tolist()):
            counts[piece] += count

    def look_up(self, data: bytes, starts: np.ndarray) -> np.ndarray:
        """The number of each piece of a block; new pieces get the next ones."""
        stops = np.append(starts[1:], len(data))
        size = np.minimum(stops - starts, LONG)
        eight = np.ndarray(len(data) + 8, "<u8", data + bytes(16), strides=(1,))   # from each byte
        low = eight[starts] & LOW[size]
        high = eight[starts + 8] & HIGH[size] | LENGTH[size]
        slot = ((low * FACTORS[0] ^ high * FACTORS[1]) >> np.uint64(64 - BITS)).astype(np.int64)
        found = self.rows.take(slot, axis=0)
        number = found[:, 2].astype(np.int64)
        left = np.flatnonzero((found[:, 0] != low) | (found[:, 1] != high) | (size == LONG))
        long, left = left[size[left] == LONG], left[size[left] < LONG]
        new = [left[:0]]
        while len(left):                                # another piece is there, or none
            empty = self.rows[slot[left], 1] == 0
            new.append(left[empty])
            left = left[~empty]
            slot[left] = slot[left] + 1 & (1 << BITS) - 1
            found = self.rows[slot[left]]
            right = (found[:, 0] == low[left]) & (found[:, 1] == high[left])
            number[left[right]] = found[right, 2]
            left = left[~right]
        new = np.concatenate(new)
        order = new[np.lexsort((low[new], high[new]))]
        first = np.ones(len(order), bool)               # of equal ones
        first[1:] = (low[order[1:]] != low[order[:-1]]) | (high[order[1:]] != high[order[:-1]])
        number[order] = len(self.pieces) + first.cumsum() - 1
        order = order[first]
        self._add(data, starts[order], stops[order])
        self._place(np.stack((low[order], high[order], number[order].astype(np.uint64)), 1),
                    slot[order])
        for k, i, j in zip(long.tolist(), starts[long].tolist(), stops[long].tolist()):
            known = self.numbers.get(data[i:j])
            if known is None:
                known = self.numbers[data[i:j]] = len(self.pieces)
                self._add(data, starts[k:k + 1], stops[k:k + 1])
            number[k] = known
        return number

    def _add(self, data: bytes, starts: np.ndarray, stops: np.ndarray) -> None:
        """New pieces of a block, which have the next numbers."""
        self.pieces += [data[i:j] for i, j in zip(starts.tolist(), stops.tolist())]
        self.size += int((stops - starts).sum())

    def _place(self, rows: np.ndarray, slot: np.ndarray) -> None:
        """Write different new rows into free slots, from these on."""
        while len(rows):
            free = np.flatnonzero(self.rows[slot, 1] == 0)
            free = free[np.unique(slot[free], return_index=True)[1]]    # one for each slot
            self.rows[slot[free]] = rows[free]
            rows, slot = np.delete(rows, free, 0), np.delete(slot, free) + 1 & (1 << BITS) - 1
