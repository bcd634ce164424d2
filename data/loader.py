"""Batches: the batch of step s is a pure function of (data, seed, s).

A loader serves rows of up to T tokens. Each epoch serves all rows in a new permutation drawn from
(seed, epoch), and step s takes the next batch_tokens / T of them, however many ranks or
micro-batches share the work; so nothing has to be saved to resume.

Here a row is a window: a split of N tokens has ceil((N - 1) / T) of them. Window w reads T inputs
from token w * T and has the tokens one further on as targets; the last one is shorter and padded
with IGNORE targets. So every token (the very first has no context) is a target exactly once per
epoch. Rows of conversations: data/samples.py.

A mixture of sources (--data=a:0.7,b:0.3) deals its rows out to them in proportion to their weights,
each row as near to it as whole rows allow, so that this too depends on the row's number alone; each
source has its own epochs.

    loader = WindowLoader(tokens, block_size=1024, batch_tokens=2**19, micro_batch=16, seed=0)
    loader = MixtureLoader([loader, other], weights=[0.7, 0.3])
    for x, y in loader.batches(step): ...          # x, y (B, T) int64, this rank's micro-batches
"""
from fractions import Fraction
from typing import Iterator, Sequence

import numpy as np
import torch

from data.shards import Tokens
from model import IGNORE

Batch = tuple[torch.Tensor, ...]


class RowLoader:
    """Serves rows to one rank of `world`. Shapes: B micro_batch, T block_size.

    A subclass has what the rows are made of: `read` makes a batch of some of them, inputs and
    targets (B, T) int64 each and what else the model takes; `labels_of` counts their labelled
    tokens, without reading or communicating.
    """
    one_shape = True                    # all batches: what is compiled for one serves all

    def __init__(self, rows: int, block_size: int, batch_tokens: int, micro_batch: int,
                 seed: int = 0, rank: int = 0, world: int = 1, pin: bool = False):
        self.block_size, self.seed = block_size, seed
        self.rank, self.world, self.pin = rank, world, pin
        self.rows_per_epoch, self.rows_per_step = rows, batch_tokens // block_size
        self.accumulation, self.micro_batch = divide_step(batch_tokens, micro_batch, block_size,
                                                          world)
        self.tokens_per_step = float(self.rows_per_step * block_size)       # mean, no padding
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0))     # the one at hand, in order

    def tokens_of(self, rows: np.ndarray) -> int:
        """Tokens that a model reads in these rows: all but padding."""
        return self.labels_of(rows)

    def labels(self, step: int) -> int:
        """Labelled tokens of a step over all ranks."""
        return self.labels_of(self.order(step))

    def tokens_at(self, step: int) -> int:
        """Tokens of a step over all ranks, padding left out."""
        return self.tokens_of(self.order(step))

    def tokens_before(self, step: int) -> int:
        """The same of all steps before this one."""
        end, some = step * self.rows_per_step, 2**20
        return sum(self.tokens_of(self.served(np.arange(i, min(i + some, end))))
                   for i in range(0, end, some))

    def permutation(self, epoch: int, rng: np.random.Generator) -> np.ndarray:
        """All rows in the order of an epoch."""
        return rng.permutation(self.rows_per_epoch)

    def order(self, step: int) -> np.ndarray:
        """The rows of a step, for all ranks together: (batch_tokens / T,) int64."""
        first = step * self.rows_per_step
        return self.served(np.arange(first, first + self.rows_per_step))

    def served(self, numbers: np.ndarray) -> np.ndarray:
        """The rows that are served as number 0, 1, 2 ... since the run began."""
        epochs, places = np.divmod(numbers, self.rows_per_epoch)
        chosen = np.empty_like(places)
        for epoch in np.unique(epochs):
            if self._epoch[0] != epoch:
                rng = np.random.default_rng((self.seed, int(epoch)))
                self._epoch = (epoch, self.permutation(int(epoch), rng))
            chosen[epochs == epoch] = self._epoch[1][places[epochs == epoch]]
        return chosen

    def batches(self, step: int) -> Iterator[Batch]:
        """This rank's micro-batches of a step."""
        mine = self.order(step).reshape(self.accumulation, self.world, self.micro_batch)
        for rows in mine[:, self.rank]:
            batch = self.read(rows)
            yield tuple(map(self._pinned, batch)) if self.pin else batch

    def _pinned(self, part: torch.Tensor) -> torch.Tensor:
        # Memory that the GPU copies from by itself. Always as much as the largest batch needs:
        # shapes that vary would have the allocator look for more, and wait, all the time.
        room = torch.empty(self.micro_batch * self.block_size, dtype=part.dtype, pin_memory=True)
        return room[:part.numel()].view(part.shape).copy_(part)


class WindowLoader(RowLoader):
    """Serves the windows of a split. Its other settings are those of RowLoader."""

    def __init__(self, tokens: Tokens, block_size: int, *rest: int, **settings: int):
        if len(tokens) <= block_size:
            raise ValueError(f"block_size={block_size} is longer than the data, which has "
                             f"{len(tokens):,} tokens; choose one below that or prepare more data")
        self.tokens = tokens
        super().__init__(count_windows(tokens, block_size), block_size, *rest, **settings)

    def read(self, rows: np.ndarray) -> Batch:
        """These windows as inputs and targets, (B, T) int64 each."""
        return read_windows(self.tokens, rows, self.block_size)

    def labels_of(self, rows: np.ndarray) -> int:
        """Labelled tokens of these rows, which are all: the last window is short."""
        short = self.rows_per_epoch * self.block_size - (len(self.tokens) - 1)
        last = np.count_nonzero(rows == self.rows_per_epoch - 1)
        return len(rows) * self.block_size - short * int(last)

    def where(self, step: int) -> str:
        """The places in the shards that a step reads, for a person to look at."""
        places = self.places(self.order(step))
        more = f" and {len(places) - 4} more" if len(places) > 4 else ""
        return f"{self.block_size} tokens each from {', '.join(places[:4])}{more}"

    def places(self, rows: np.ndarray) -> list[str]:
        """File and token at which each row begins."""
        found = []
        for start in rows * self.block_size:
            i = int(np.searchsorted(self.tokens.starts, start, side="right")) - 1
            found.append(f"{self.tokens.names[i]} at token {start - self.tokens.starts[i]:,}")
        return found


class MixtureLoader(WindowLoader):
    """Serves the windows of several sources, by weight. Its rows are theirs, one after another."""

    def __init__(self, sources: list[WindowLoader], weights: Sequence[float | Fraction]):
        one, self.sources = sources[0], sources
        self.weights = [Fraction(weight) for weight in weights]
        self.starts = np.cumsum([0, *(source.rows_per_epoch for source in sources)])
        # An epoch ends where the first source has been served once.
        epoch = min(source.rows_per_epoch * sum(self.weights) / weight
                    for source, weight in zip(sources, self.weights))
        RowLoader.__init__(self, int(epoch), one.block_size, one.rows_per_step * one.block_size,
                           one.micro_batch, one.seed, one.rank, one.world, one.pin)

    def served(self, numbers: np.ndarray) -> np.ndarray:
        """As RowLoader's, among the rows of all sources."""
        which, place = deal(numbers, self.weights)
        chosen = np.empty_like(numbers)
        for i, source in enumerate(self.sources):
            chosen[which == i] = self.starts[i] + source.served(place[which == i])
        return chosen

    def split(self, rows: np.ndarray) -> Iterator[tuple[WindowLoader, np.ndarray, np.ndarray]]:
        """Each source, which of the rows are its own, and their numbers there."""
        which = np.searchsorted(self.starts, rows, side="right") - 1
        for i, source in enumerate(self.sources):
            yield source, which == i, rows[which == i] - self.starts[i]

    def read(self, rows: np.ndarray) -> Batch:
        """These windows as inputs and targets, (B, T) int64 each."""
        x = torch.empty(len(rows), self.block_size, dtype=torch.int64)
        y = torch.empty_like(x)
        for source, here, theirs in self.split(rows):
            x[torch.from_numpy(here)], y[torch.from_numpy(here)] = source.read(theirs)
        return x, y

    def labels_of(self, rows: np.ndarray) -> int:
        """Labelled tokens of these rows."""
        return sum(source.labels_of(theirs) for source, _, theirs in self.split(rows))

    def places(self, rows: np.ndarray) -> list[str]:
        """File and token at which each row begins, a source after the other."""
        return [place for source, _, theirs in self.split(rows) for place in source.places(theirs)]


def deal(numbers: np.ndarray, weights: Sequence[Fraction]) -> tuple[np.ndarray, np.ndarray]:
    """Deal rows 0, 1, 2 ... out to sources: of each, its source, and how many that had before.

    Of the first n rows the last source's are those that are not the others', and the others' are
    their share of n, rounded; among those the same is done again. So each source's number never
    strays from its share by more than a row for each source, and no row but n has to be known.
    """
    source, place = np.zeros_like(numbers), numbers.copy()
    left = np.ones(len(numbers), bool)                  # rows that no source has yet
    for i in range(len(weights) - 1, 0, -1):
        # Of the sources before i, to 1e-9 at worst: its product with 4e9 rows has to fit 64 bits.
        share = (sum(weights[:i]) / sum(weights[:i + 1])).limit_denominator(10**9)
        whole, half = 2 * share.denominator, share.denominator
        before, after = ((2 * share.numerator * n + half) // whole for n in (place, place + 1))
        others = left & (after > before)
        mine = left & ~others
        source[mine], place[mine] = i, (place - before)[mine]
        place[others], left = before[others], others
    return source, place


def divide_step(batch_tokens: int, micro_batch: int, block_size: int,
                world: int) -> tuple[int, int]:
    """Micro-batches of a step on each rank, and sequences in each.

    A rank that has fewer than micro_batch sequences to do takes them at once. ValueError when the
    work does not divide evenly, with the nearest batch_tokens that does.
    """
    per_rank = batch_tokens // (block_size * world)
    if 0 < per_rank <= micro_batch and batch_tokens % (block_size * world) == 0:
        return 1, per_rank
    once = micro_batch * block_size * world
    if batch_tokens < once or batch_tokens % once:
        near = sorted({max(1, batch_tokens // once) * once, -(-batch_tokens // once) * once})
        raise ValueError(
            f"batch_tokens={batch_tokens:,} is no multiple of micro_batch x block_size x ranks = "
            f"{micro_batch} x {block_size} x {world} = {once:,}; "
            f"try batch_tokens={' or '.join(map(str, near))}, or another micro_batch")
    return batch_tokens // once, micro_batch


def count_windows(tokens: Tokens, block_size: int) -> int:
    """The windows of a split; the last one may be shorter."""
    return -(-(len(tokens) - 1) // block_size)


def read_windows(tokens: Tokens, windows: np.ndarray, block_size: int) -> Batch:
    """Windows as inputs and targets, (B, T) int64 each, padded with 0 and IGNORE at the end."""
    x = np.zeros((len(windows), block_size), np.int64)      # slices cost less than PyTorch's
    y = np.full_like(x, IGNORE)
    for row, window in enumerate(windows):
        start = int(window) * block_size
        ids = tokens.read(start, start + block_size + 1)
        x[row, :len(ids) - 1], y[row, :len(ids) - 1] = ids[:-1], ids[1:]
    return torch.from_numpy(x), torch.from_numpy(y)


def evaluation_batches(tokens: Tokens, block_size: int, batch_size: int, limit: int | None = None,
                       rank: int = 0, world: int = 1) -> Iterator[Batch]:
    """A split once through, in order: this rank's share, as (x, y) of up to batch_size windows.

    With a limit, that many tokens (rounded up to windows) spread evenly over the split.
    """
    count = count_windows(tokens, block_size)
    windows = np.arange(count)
    if limit and limit < count * block_size:
        windows = np.linspace(0, count - 1, -(-limit // block_size)).astype(np.int64)
    mine = windows[rank::world]
    for start in range(0, len(mine), batch_size):
        yield read_windows(tokens, mine[start:start + batch_size], block_size)
