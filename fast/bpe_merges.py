"""Counts to merges: `learn_merges` gives exactly what `bpe.train_slowly` gives, fast.

- Each distinct piece is worked on once, however often it occurs.
- All pieces lie in one array, and each pair knows the *positions* where it starts, so a merge
  touches its own occurrences and nothing is ever rescanned.
- Where a merge makes (x, ab), it takes (x, a) as often, so known counts stay exact. They only fall,
  and a heap need not know it before such a pair comes to its top. The heap is *bounded*: it holds
  the few thousand most frequent pairs; others are looked up when those are used up.
- The most frequent pairs are merged *together*, about thirty at once, if none begins with what
  another ends with. Then no two overlap, and what they make comes after all of them: (x, ab) is
  no more frequent than (x, a) was, which is not among them.

In: {piece: count}, as `bpe_counts.count_pieces` gives it in bytes, or `bpe_encode.encode_pieces` in
ids. Out: the merges in their order.
"""
import heapq
import itertools
from typing import Any, Callable, Mapping, Sequence

import numpy as np
from tqdm import tqdm

from fast.bpe_table import Pieces

GONE = -2                           # where the second token of a pair began
PARTS = 16                          # that pairs are found in, one after the other: less memory


def learn_merges(pieces: Mapping[Sequence[int], int], num_merges: int, min_frequency: int = 1,
                 progress: bool = False, ids: Sequence[int] = range(256, 1 << 40),
                 tie: str = "ids") -> list[tuple[int, int]]:
    """The merges of `train_slowly`, fast; ids: rising, above those of the pieces. ValueError if
    positions and ids do not fit 63 bits.

    Pairs under the `floor`, which is most of them, are not on the heap; when its top falls under
    the floor, `index` finds the next best few thousand.
    """
    corpus = Corpus(pieces, ids[:num_merges])
    merges, heap, floor = [], [], None
    spelled = [larger_first(bytes([i])) for i in range(256)] if tie == "bytes" else []

    def ranked(pair: int) -> tuple:
        """A pair for the heap, which has the next one to merge on top."""
        if not spelled:
            return -corpus.counts[pair], pair
        return -corpus.counts[pair], *(spelled[i] for i in corpus.tokens(pair)), pair
    with tqdm(total=num_merges, desc="merging", unit="merge",
              disable=None if progress else True) as bar:   # None: only on a terminal
        while len(merges) < num_merges:
            top = pop_apart(heap, corpus, ranked, num_merges - len(merges), floor)
            while spelled and len(top) > 1 and heap and heap[0][0] <= top[-1][0]:
                heapq.heappush(heap, top.pop())     # by bytes a new one, as frequent, may precede
            if top:
                top = [pair for *_, pair in top]
                new = ids[len(merges):len(merges) + len(top)]
                merges += map(corpus.tokens, top)
                spelled += [spelled[a][:-1] + spelled[b] for a, b in merges[-len(top):] if spelled]
                for pair in corpus.merge(top, new, floor):
                    heapq.heappush(heap, ranked(pair))
                bar.update(len(top))
            elif floor is not None and floor <= min_frequency:
                break                                       # no pair is left that is as frequent
            else:
                pairs, floor = corpus.index(min_frequency)
                heap = list(map(ranked, pairs))
                heapq.heapify(heap)
    return merges


def pop_apart(heap: list[tuple], corpus: "Corpus", ranked: Callable, most: int, floor: int | None
              ) -> list[tuple]:
    """The most frequent pairs, up to one that begins with what another ends with; a pair of two
    equal tokens, which may overlap itself, is alone."""
    top, lefts, rights = [], set(), set()
    while heap and len(top) < most:
        count, *_, pair = heap[0]
        if corpus.counts[pair] != -count:                   # it has fallen
            heapq.heapreplace(heap, ranked(pair))
            continue
        a, b = corpus.tokens(pair)
        if -count < floor or a in rights or b in lefts or a == b and top:
            break
        top.append(heapq.heappop(heap))
        if a == b:
            break
        lefts.add(a)
        rights.add(b)
    return top


def larger_first(token: bytes) -> str:
    """What sorts tokens by their bytes, the largest first, a longer one before its beginning."""
    return "".join(chr(255 - byte) for byte in token) + chr(256)


class Corpus:
    """All distinct pieces end to end in one array of ids, a separator (-1) between them.

    A token keeps its id at its first place (in `first`) and at its last (in `last`), so the
    neighbours of the token at p are last[p - 1] and first[p + length], and a merge is three
    assignments. `index` leaves out the places between. A pair is one integer of its two tokens.
    """

    def __init__(self, pieces: Mapping[Sequence[int], int], ids: Sequence[int]):
        if isinstance(pieces, Pieces):
            sizes, counts = pieces.sizes + 1, pieces.counts
            self.first = np.frombuffer(b"\0" + pieces.text, np.uint8).astype(np.int32)
        else:
            sizes = np.fromiter(map(len, pieces), np.int64, len(pieces)) + 1
            counts = np.fromiter(pieces.values(), np.int64, len(pieces))
            flat = itertools.chain((0,), *((*piece, 0) for piece in pieces))
            self.first = np.fromiter(flat, np.int32, sizes.sum() + 1)
        self.first[0] = -1
        self.first[sizes.cumsum()] = -1
        def small(most: int) -> type:                   # half the memory, where it is enough
            return np.int32 if most < 1 << 31 else np.int64
        self.place = small(len(self.first))             # what positions are kept in
        self.weight = np.zeros(len(self.first), small(counts.max(initial=0)))
        self.weight[1:] = np.repeat(counts.astype(self.weight.dtype), sizes)    # of the piece
        most = max(int(self.first.max()), 255, *ids[-1:])
        self.length = np.ones(most + 1, np.int64)       # of a token in places, by id; see index
        self.id_bits = len(self.length).bit_length()
        self.position_bits = 63 - 2 * self.id_bits
        if len(self.first) >> self.position_bits:
            raise ValueError(f"{len(self.first):,} bytes of distinct pieces are too many for a "
                             f"vocabulary of {len(self.length):,}; make one of them smaller")
        self.counts: dict[int, int] = {}
        self.where: dict[int, np.ndarray] = {}

    def tokens(self, pair: Any) -> tuple:
        """The two tokens of a pair or of an array of pairs."""
        return pair >> self.id_bits, pair & (1 << self.id_bits) - 1

    def index(self, min_frequency: int, size: int = 6000) -> tuple[list[int], int]:
        """The `size` most frequent pairs, and the least count. Each token has one place again."""
        self.counts, self.where, self.last = {}, {}, None
        live = self.first != GONE
        if not live.all():
            self.first, self.weight = self.first[live], self.weight[live]
        del live
        self.length[:] = 1
        some = np.sort(self.first[::len(self.first) // 10_000 + 1])
        some = some[some >= 0][::len(some) // PARTS + 1]
        edges = np.unique([0, *some, len(self.length)]).tolist()    # of the left tokens in a part
        at, end, found = np.empty(len(self.first), self.place), 0, []
        for low, high in itertools.pairwise(edges):
            key = np.flatnonzero((self.first >= low) & (self.first < high))
            left, right = self.first[key].astype(np.int64), self.first[key + 1]
            # (left, right, position) in one integer: sorting these in place needs no second array.
            key = ((left << self.id_bits | right) << self.position_bits | key)[right >= 0]
            if not len(key):
                continue
            key.sort()
            pairs = key >> self.position_bits
            starts = group_starts(pairs)
            key &= (1 << self.position_bits) - 1        # the positions are left
            counts = np.add.reduceat(self.weight[key], starts, dtype=np.int64)
            found.append((pairs[starts], counts, end + starts))
            at[end:end + len(key)] = key
            end += len(key)
        if not end:
            return [], min_frequency
        pairs, counts, starts = map(np.concatenate, zip(*found))
        size = max(min(size, len(counts) // 4), 1)
        floor = max(min_frequency, int(np.partition(counts, -size)[-size]))
        pairs = self.keep(pairs, counts, at[:end], starts, floor)
        del at                                          # before there is one more array
        self.last = self.first.copy()
        return pairs, floor

    def keep(self, pairs: np.ndarray, counts: np.ndarray, at: np.ndarray, starts: np.ndarray,
             floor: int) -> list[int]:
        """Keep the counts and positions of those pairs that reach the floor."""
        hot = np.flatnonzero(counts >= floor)
        stops = np.append(starts[1:], len(at))[hot].tolist()
        pairs = pairs[hot].tolist()
        self.counts.update(zip(pairs, counts[hot].tolist()))
        self.where.update((pair, at[start:stop].copy())     # a view would keep all of `at` alive
                          for pair, start, stop in zip(pairs, starts[hot].tolist(), stops))
        return pairs

    def merge(self, pairs: list[int], ids: Sequence[int], floor: int) -> list[int]:
        """Make each pair its id everywhere; return the pairs this makes, if they reach the floor.
        No pair begins with what one ends with, but for a single one of two equal tokens."""
        where = [self.where.pop(pair) for pair in pairs]
        ids, (a, b) = np.array(ids), self.tokens(np.array(pairs))
        of = np.arange(len(pairs)).repeat(list(map(len, where)))
        at = np.concatenate(where).astype(np.int64)
        step = self.length[a]
        size = self.length[ids] = step + self.length[b]
        there = (self.first[at] == a[of]) & (self.first[at + step[of]] == b[of])
        at, of = at[there], of[there]
        if a[0] == b[0]:
            at = drop_overlaps(at, step[0])
            of = of[:len(at)]
        new, after = ids[of], at + size[of]
        self.first[at] = new
        self.first[at + step[of]] = GONE
        self.last[after - 1] = new
        left, right = self.last[at - 1].astype(np.int64), self.first[after]
        with_left = left >= 0
        with_right = (right >= 0) & (right < ids[0])    # two new tokens: a left one already
        key = np.concatenate(((left << self.id_bits | new)[with_left],
                              (new << self.id_bits | right)[with_right]))
        if not len(key):
            return []
        at = np.concatenate(((at - self.length[left])[with_left], at[with_right]))
        order = key.argsort()
        key, at = key[order], at[order]
        starts = group_starts(key)
        key = key[starts]
        counts = np.add.reduceat(self.weight[at], starts, dtype=np.int64)
        left, right = self.tokens(key)                  # what was there before, as often
        left = np.where(left >= ids[0], b[np.searchsorted(ids[:-1], left)], left)
        right = np.where(right >= ids[0], a[np.searchsorted(ids[:-1], right)], right)
        known = self.counts
        for pair, count in zip((left << self.id_bits | right).tolist(), counts.tolist()):
            if pair in known:
                known[pair] -= count
        return self.keep(key, counts, at.astype(self.place), starts, floor)


def group_starts(key: np.ndarray) -> np.ndarray:
    """Where each run of equal keys starts, in a sorted array."""
    return np.flatnonzero(np.concatenate(([True], key[1:] != key[:-1])))


def drop_overlaps(at: np.ndarray, step: int) -> np.ndarray:
    """Positions of a pair of equal tokens: within a run that overlaps, every other one."""
    at = np.sort(at)
    run_starts = group_starts(at - step * np.arange(len(at)))
    place = np.arange(len(at)) - np.repeat(run_starts, np.diff(np.append(run_starts, len(at))))
    return at[place % 2 == 0]
