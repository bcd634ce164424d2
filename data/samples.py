"""Batches of conversations: every sample once per epoch, the loss of a step over all its labels.

    samples = data.chat.load_samples(folder, "train", tokenizer, "chatml", block_size=1024)
    loader = SampleLoader(samples, block_size=1024, batch_tokens=2**15, micro_batch=8, seed=0)
    for x, y in loader.batches(step): ...           # (B, T) int64, this rank's micro-batches
    for x, y, positions in loader.batches(step): ...            # with packing=True

A row is one sample, or with packing several; a step has batch_tokens / block_size rows, and which
ones depends on (data, seed, step) only, not on ranks or micro-batches. y[t] is the label of the
token after x[t], IGNORE where it has none.

Padded: the epoch's permutation is cut into groups of GROUP steps, each sorted by length, so that
the rows of a step are about equally long; then the steps are shuffled. A micro-batch is padded to
its longest row, rounded up to a multiple of MULTIPLE. Packed: samples are put into rows of
block_size by best fit, once; positions restart with each sample, which is how the model keeps
samples apart; the padding behind the last is a sample of its own.
"""
from typing import Iterator

import numpy as np
import torch

from data.loader import Batch, RowLoader
from model import IGNORE

GROUP = 16              # steps sorted by length together: more pad less and shuffle less
MULTIPLE = 16           # of padded lengths: fewer shapes to compile for


class Samples:
    """Rendered conversations: all ids in one row, a mark for those with a label, and offsets.

    ids (N,) int32, labelled (N,) bool, offsets (samples + 1,) int64. counts: of the records that
    these are what is left of (records, kept, truncated, dropped).
    """

    def __init__(self, ids: np.ndarray, labelled: np.ndarray, offsets: np.ndarray, block_size: int,
                 counts: dict[str, int] | None = None):
        self.ids, self.labelled, self.offsets = ids, labelled, offsets
        self.block_size, self.counts = block_size, counts or {}
        self.lengths = np.diff(offsets) - 1             # of inputs: the last id is a target only
        marks = np.concatenate([[0], np.cumsum(labelled)])
        firsts = labelled[offsets[:-1]]                 # nothing predicts a sample's first token
        self.label_counts = marks[offsets[1:]] - marks[offsets[:-1]] - firsts
        if len(self) == 0 or self.lengths.min() < 1 or self.lengths.max() > block_size:
            raise ValueError(f"samples must be of 2 to block_size + 1 = {block_size + 1} ids, and "
                             f"there must be one")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of a sample, (length,) each."""
        ids = self.ids[self.offsets[i]:self.offsets[i + 1]]
        labelled = self.labelled[self.offsets[i] + 1:self.offsets[i + 1]]
        return ids[:-1], np.where(labelled, ids[1:], IGNORE)

    def summary(self) -> str:
        """What became of the records, in a line."""
        c = self.counts
        tokens, labels = int(self.lengths.sum()), int(self.label_counts.sum())
        return (f"{len(self):,} of {c.get('records', len(self)):,} samples, {tokens:,} tokens, "
                f"{labels / tokens:.0%} of them labelled; {c.get('truncated', 0):,} cut to "
                f"block_size={self.block_size}, {c.get('dropped', 0):,} dropped (no label left)")

    def padded(self, chosen: np.ndarray) -> Batch:
        """These samples as x, y (B, T), padded with 0 and IGNORE."""
        T = min(-(-int(self.lengths[chosen].max()) // MULTIPLE) * MULTIPLE, self.block_size)
        x, y = np.zeros((len(chosen), T), np.int64), np.full((len(chosen), T), IGNORE, np.int64)
        for row, i in enumerate(chosen):
            end = self.lengths[i]
            x[row, :end], y[row, :end] = self.read(i)
        return torch.from_numpy(x), torch.from_numpy(y)

    def evaluation_batches(self, batch_size: int, limit: int | None = None, rank: int = 0,
                           world: int = 1) -> Iterator[Batch]:
        """All samples once, the longest first: this rank's share, up to batch_size at a time.

        With a limit, samples spread evenly over the split that have about that many tokens.
        """
        chosen = np.arange(len(self))
        if limit and limit < self.lengths.sum():
            count = max(1, round(limit / self.lengths.mean()))
            chosen = np.linspace(0, len(self) - 1, count).astype(np.int64)
        chosen = chosen[np.argsort(-self.lengths[chosen], kind="stable")][rank::world]
        for start in range(0, len(chosen), batch_size):
            yield self.padded(chosen[start:start + batch_size])


class SampleLoader(RowLoader):
    """Serves samples, one a row or packed. The other settings are those of data.loader.RowLoader.

    T is block_size where packed, else the length of a micro-batch's longest row, rounded up.
    """

    def __init__(self, samples: Samples, block_size: int, *rest: int, packing: bool = False,
                 **settings: int):
        if samples.lengths.max() > block_size:
            raise ValueError(f"block_size={block_size} is below the longest sample, which has "
                             f"{samples.lengths.max()} tokens; load them with this block_size")
        self.samples, self.packing, self.one_shape = samples, packing, packing
        self.rows = pack(samples.lengths, block_size) if packing else \
            [[i] for i in range(len(samples))]          # the samples of each row
        self.row_lengths, self.row_labels = (
            np.array([counts[row].sum() for row in self.rows]) if packing else counts
            for counts in (samples.lengths, samples.label_counts))
        super().__init__(len(self.rows), block_size, *rest, **settings)
        self.tokens_per_step = self.rows_per_step * float(self.row_lengths.mean())

    def order(self, step: int) -> np.ndarray:
        """The rows of a step for all ranks, by length: (batch_tokens / block_size,) int64."""
        rows = super().order(step)
        return rows[np.argsort(self.row_lengths[rows], kind="stable")]

    def permutation(self, epoch: int, rng: np.random.Generator) -> np.ndarray:
        """All rows in the order of an epoch: where padded, steps of similar lengths, shuffled.

        Rows of a step that two epochs share stay as drawn.
        """
        rows = super().permutation(epoch, rng)
        first = -epoch * len(rows) % self.rows_per_step     # where the first step of its own begins
        steps = max(0, (len(rows) - first) // self.rows_per_step)
        if self.packing or not steps:
            return rows
        own = rows[first:first + steps * self.rows_per_step]
        size = GROUP * self.rows_per_step
        own = np.concatenate([group[np.argsort(self.row_lengths[group], kind="stable")]
                              for group in np.split(own, range(size, len(own), size))])
        own = own.reshape(steps, self.rows_per_step)[rng.permutation(steps)].ravel()
        return np.concatenate([rows[:first], own, rows[first + len(own):]])

    def read(self, rows: np.ndarray) -> Batch:
        """These rows as x, y, or x, y, positions where packed, (B, T) int64 each."""
        if not self.packing:
            return self.samples.padded(rows)
        shape = (len(rows), self.block_size)
        x, y = np.zeros(shape, np.int64), np.full(shape, IGNORE, np.int64)
        positions = np.empty_like(x)
        for row, members in enumerate(rows):
            at = 0
            for i in self.rows[members]:
                end = at + self.samples.lengths[i]
                x[row, at:end], y[row, at:end] = self.samples.read(i)
                positions[row, at:end] = np.arange(end - at)
                at = end
            positions[row, at:] = np.arange(self.block_size - at)
        return tuple(map(torch.from_numpy, (x, y, positions)))

    def labels_of(self, rows: np.ndarray) -> int:
        """Labelled tokens of these rows."""
        return int(self.row_labels[rows].sum())

    def tokens_of(self, rows: np.ndarray) -> int:
        """Tokens of these rows, without the padding behind them."""
        return int(self.row_lengths[rows].sum())

    def where(self, step: int) -> str:
        """The samples that a step reads, by their number, for a person to look at."""
        found = [i for row in self.order(step) for i in self.rows[row]]
        more = f" and {len(found) - 8} more" if len(found) > 8 else ""
        return f"samples {', '.join(map(str, found[:8]))}{more} of the training split"


def pack(lengths: np.ndarray, size: int) -> list[list[int]]:
    """Rows of samples that fill `size` together: each into the row it leaves least room in, the
    longest first (best fit decreasing, Johnson 1973). The same for the same lengths."""
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(size + 1)]      # by the room that is left
    rooms = 0                                                       # bit r: a row has room r
    for i in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[i])
        fitting = rooms >> length
        room = length + (fitting & -fitting).bit_length() - 1 if fitting else size
        if fitting:
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms ^= 1 << room
        else:
            row = len(rows)
            rows.append([])
        rows[row].append(i)
        left = room - length
        if left:
            if not open_rows[left]:
                rooms |= 1 << left
            open_rows[left].append(row)
    return rows
