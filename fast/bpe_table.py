"""Pieces of GPT-2's pattern in numpy: where they start in a text's bytes, and a number for each.

    table = PieceTable()
    table.count(data, gpt2_starts(data, begins))                    # a block of texts
    dict(table.pieces())                                            # {piece in bytes: count}

Text repeats its pieces, so what is done for each distinct one (counting, encoding) is done once,
and the rest is arithmetic on whole blocks. In: UTF-8. Out: what regex.findall gives, as numbers.
"""
import functools
from typing import Any, Iterator, Mapping

import numpy as np

from fast.bpe_pieces import SPACE, kinds

SLOTS = 1 << 14                 # of a new table
MANY = 1 << 14                  # pieces that are given to another process at once
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


class Pieces(Mapping[bytes, int]):
    """Distinct pieces and how often each occurs: {piece: count} in a tenth of a dict's memory.

    text: the pieces, a byte 0 after each; sizes: theirs, without it; counts: in the same order.
    """

    def __init__(self, text: bytes, sizes: np.ndarray, counts: np.ndarray):
        self.text, self.sizes, self.counts = text, sizes, counts

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[bytes]:
        stops = (self.sizes + 1).cumsum() - 1
        for stop, size in zip(stops.tolist(), self.sizes.tolist()):
            yield self.text[stop - size:stop]

    def __getitem__(self, piece: bytes) -> int:
        return self._as_dict[piece]

    @functools.cached_property
    def _as_dict(self) -> dict[bytes, int]:
        return dict(zip(self, self.counts.tolist()))


class PieceTable:
    """Distinct pieces, numbered as they come, and counts of them.

    A hash table with open addressing, at most a quarter full, of numbers alone, so that it is small.
    What is compared is beside it: a piece as two integers, its bytes and its length in the last of
    16. Longer pieces are in a dict.
    """

    def __init__(self):
        self.slots = np.zeros(SLOTS, np.int32)          # 1 + number; 0 is free
        self.keys = np.zeros((1, 2), np.uint64)         # by 1 + number, the integers; room for more
        self.long: dict[bytes, int] = {}
        self.text = bytearray()                         # as in Pieces
        self.length = 0                                 # how many there are
        self.stops = self.counts = np.zeros(0, np.int64)    # of each in the text; room for more

    def pieces(self, begin: int = 0, end: int | None = None) -> Pieces:
        """Those of these numbers, as often as they were counted."""
        stops = self.stops[begin:self.length if end is None else end]
        before = self.stops[begin - 1] if begin else -1
        text = self.text[before + 1:stops[-1] + 1 if len(stops) else 0]
        return Pieces(bytes(text), np.diff(stops, prepend=before) - 1,
                      self.counts[begin:begin + len(stops)])

    def parts(self) -> Iterator[Pieces]:
        """All of them, some at a time."""
        for begin in range(0, self.length, MANY):
            yield self.pieces(begin, min(begin + MANY, self.length))

    def count(self, data: bytes, starts: np.ndarray) -> None:
        """Count the pieces of a block."""
        self._add_counts(self.look_up(data, starts, np.append(starts[1:], len(data))), 1)

    def update(self, others: Pieces) -> None:
        """Count others as often as they were counted elsewhere."""
        stops = (others.sizes + 1).cumsum() - 1
        self._add_counts(self.look_up(others.text, stops - others.sizes, stops), others.counts)

    def _add_counts(self, number: np.ndarray, times: Any) -> None:
        self.counts = with_room(self.counts, self.length)
        np.add.at(self.counts, number, times)

    def look_up(self, data: bytes, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """The number of each piece of a block; new pieces get the next ones."""
        size = np.minimum(stops - starts, LONG)
        eight = np.ndarray(len(data) + 8, "<u8", data + bytes(16), strides=(1,))   # from each byte
        low = eight[starts] & LOW.take(size)
        high = eight[starts + 8] & HIGH.take(size) | LENGTH.take(size)
        slot = self._slots(low, high)
        number = self.slots[slot]
        found = self.keys.take(number, axis=0)
        left = np.flatnonzero((found[:, 0] != low) | (found[:, 1] != high) | (size == LONG))
        long, left = left[size[left] == LONG], left[size[left] < LONG]
        new = [left[:0]]
        while len(left):                                # another piece is there, or none
            new.append(left[number[left] == 0])
            left = left[number[left] != 0]
            slot[left] = slot[left] + 1 & len(self.slots) - 1
            number[left] = self.slots[slot[left]]
            found = self.keys[number[left]]
            left = left[(found[:, 0] != low[left]) | (found[:, 1] != high[left])]
        new = np.concatenate(new)
        order = new[np.lexsort((low[new], high[new]))]
        first = np.ones(len(order), bool)               # of equal ones
        first[1:] = (low[order[1:]] != low[order[:-1]]) | (high[order[1:]] != high[order[:-1]])
        number[order] = self.length + first.cumsum()
        order = order[first]
        self._place(np.stack((low[order], high[order]), 1))
        known = self.length + 1 + len(order)
        more = []                                       # of the long ones
        for k, i, j in zip(long.tolist(), starts[long].tolist(), stops[long].tolist()):
            number[k] = found = self.long.setdefault(data[i:j], known + len(more))
            if found == known + len(more):
                more.append(k)
        order = np.append(order, np.array(more, np.int64))
        if len(order):
            self._add(data, starts[order], stops[order])
        return number - 1

    def _add(self, data: bytes, starts: np.ndarray, stops: np.ndarray) -> None:
        """New pieces of a block, which have the next numbers."""
        begin, self.length = self.length, self.length + len(starts)
        self.stops = with_room(self.stops, self.length)
        self.stops[begin:self.length] = len(self.text) - 1 + (stops - starts + 1).cumsum()
        new = [data[i:j] for i, j in zip(starts.tolist(), stops.tolist())]
        self.text += b"\0".join((*new, b""))

    def _slots(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Where pieces are looked for first."""
        bits = len(self.slots).bit_length() - 1
        return ((low * FACTORS[0] ^ high * FACTORS[1]) >> np.uint64(64 - bits)).astype(np.int64)

    def _place(self, keys: np.ndarray) -> None:
        """Number new pieces in free slots, of a larger table where it would be too full."""
        begin, end, size = self.length + 1, self.length + 1 + len(keys), len(self.slots)
        self.keys = with_room(self.keys, end)
        self.keys[begin:end] = keys
        number = np.arange(begin, end)
        while 4 * end > size:
            size *= 2
        if size > len(self.slots):
            self.slots = np.zeros(size, np.int32)
            number = 1 + np.flatnonzero(self.keys[1:end, 1])        # but for the long ones
        slot = self._slots(*self.keys[number].T)
        while len(number):
            free = self.slots[slot] == 0
            self.slots[slot[free]] = number[free]       # of those that want one slot, one has it
            left = self.slots[slot] != number
            number, slot = number[left], slot[left] + 1 & size - 1


def with_room(array: np.ndarray, length: int) -> np.ndarray:
    """The array, or a longer one that begins with it."""
    if length <= len(array):
        return array
    longer = np.zeros((max(length, 2 * len(array)), *array.shape[1:]), array.dtype)
    longer[:len(array)] = array
    return longer
