"""Counts to merges: `learn_merges` gives exactly what `bpe.train_slowly` gives, fast.

- Each distinct piece is worked on once, however often it occurs.
- All pieces lie in one array, and each pair knows the *positions* where it starts, so a merge
  touches its own occurrences and nothing is ever rescanned.
- The count of a pair can only fall, so an old count is an upper bound, corrected only when it comes
  to the top of the heap. The *heap is bounded*: it holds the few thousand most frequent pairs, and
  the others are looked up when those are used up.

In: {piece: count}, as `bpe_counts.count_pieces` gives it in bytes, or `bpe_encode.encode_pieces` in
ids. Out: the merges in their order.

Reference: lazy evaluation of a falling score, Minoux 1978.
"""
import heapq
import itertools
from typing import Sequence

import numpy as np
from tqdm import tqdm

FEW = 16        # up to so many occurrences a Python loop beats a dozen numpy calls
RIGHT = 1 << 30  # added to an id to mark a right neighbour in a sort key
Positions = list[int] | np.ndarray


def learn_merges(pieces: dict[Sequence[int], int], num_merges: int, min_frequency: int = 1,
                 progress: bool = False, ids: Sequence[int] = range(256, 1 << 40),
                 tie: str = "ids") -> list[tuple[int, int]]:
    """The merges of `train_slowly`, fast. ValueError if positions and ids do not fit 63 bits.

    New pairs always hold the newest token, so the count of a pair can only fall after the merge
    that made it. A count on the heap is therefore an upper bound: take the top, recount it from
    its positions (some may be gone), and if it is still right it is the true maximum. No count
    is ever updated in between. Pairs under the `floor` are dropped, which is most of them; when
    the top falls under the floor, `index` finds the next best few thousand.
    """
    corpus = Corpus(pieces, ids[:num_merges])
    merges, heap, floor = [], [], None
    keys = [larger_first(bytes([i])) for i in range(256)] if tie == "bytes" else []

    def ranked(pair: tuple) -> tuple:
        """A pair of the heap with what decides ties, where that is not its ids."""
        count, a, b, at = pair
        return (count, keys[a], keys[b], a, b, at) if keys else pair
    with tqdm(total=num_merges, desc="merging", unit="merge",
              disable=None if progress else True) as bar:   # None: only on a terminal
        while len(merges) < num_merges:
            if not heap or -heap[0][0] < floor:
                if floor is not None and floor <= min_frequency:
                    break
                heap, floor = corpus.index(min_frequency)
                if not heap:
                    break
                if keys:
                    heap = list(map(ranked, heap))
                    heapq.heapify(heap)
            upper_bound, *_, a, b, at = heapq.heappop(heap)
            count, at = corpus.recount(a, b, at)
            if count == -upper_bound:
                if keys:
                    keys.append(keys[a][:-1] + keys[b])
                for pair in corpus.merge(a, b, ids[len(merges)], at, floor):
                    heapq.heappush(heap, ranked(pair))
                merges.append((a, b))
                bar.update()
            elif count >= floor:
                heapq.heappush(heap, ranked((-count, a, b, at)))
    return merges


def larger_first(token: bytes) -> str:
    """What sorts tokens by their bytes, the largest first, a longer one before its beginning."""
    return "".join(chr(255 - byte) for byte in token) + chr(256)


class Corpus:
    """All distinct pieces end to end in one array of ids, a separator (-1) between them.

    A token keeps its id at its first place (in `first`) and at its last (in `last`), so the
    neighbours of the token at p are last[p - 1] and first[p + length], and a merge is three
    assignments. A pair is known by the positions where it starts, so nothing is ever rescanned.
    Positions come as a list when there are few (most merges touch fewer than ten), else as an
    array; memoryviews give single elements without numpy's overhead.
    """

    def __init__(self, pieces: dict[Sequence[int], int], ids: Sequence[int]):
        sizes = np.fromiter(map(len, pieces), np.int64, len(pieces)) + 1
        if isinstance(next(iter(pieces), b""), bytes):
            flat = b"\0".join([b"", *pieces, b""])
            self.first = np.frombuffer(flat, np.uint8).astype(np.int32)
        else:
            flat = itertools.chain((0,), *((*piece, 0) for piece in pieces))
            self.first = np.fromiter(flat, np.int32, sizes.sum() + 1)
        self.first[0] = -1
        self.first[sizes.cumsum()] = -1
        self.last = self.first.copy()
        self.weight = np.zeros(len(self.first), np.int64)   # how often the piece occurs
        self.weight[1:] = np.repeat(np.fromiter(pieces.values(), np.int64, len(pieces)), sizes)
        most = max(int(self.first.max()), 255, *ids[-1:])
        self.length = np.ones(most + 1, np.int64)       # of a token in places, by id
        self.id_bits = len(self.length).bit_length()
        self.position_bits = 63 - 2 * self.id_bits
        if len(self.first) >> self.position_bits:
            raise ValueError(f"{len(self.first):,} bytes of distinct pieces are too many for a "
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
