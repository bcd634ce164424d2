"""Batches: the batch of step s is a pure function of (data, seed, s).

A loader serves rows of up to T tokens. Each epoch serves all rows in a new permutation drawn from
(seed, epoch), and step s takes the next batch_tokens / T of them, however many ranks or
micro-batches share the work; so nothing has to be saved to resume.

Here a row is a window: a split of N tokens has ceil((N - 1) / T) of them. Window w reads T inputs
from token w * T and has the tokens one further on as targets; the last one is shorter and padded
with IGNORE targets. So every token (the very first has no context) is a target exactly once per
epoch. Rows of conversations: data/samples.py.

    loader = WindowLoader(tokens, block_size=1024, batch_tokens=2**19, micro_batch=16, seed=0)
    for x, y in loader.batches(step): ...          # x, y (B, T) int64, this rank's micro-batches
"""
from typing import Iterator

import numpy as np
import torch

from data.shards import Tokens
from model import IGNORE

Batch = tuple[torch.Tensor, ...]


class RowLoader:
    """Serves rows to one rank of `world`. Shapes: B micro_batch, T block_size.

    A subclass has what the rows are made of: `read` makes a batch of some of them.
    """
    one_shape = True                    # all batches: what is compiled for one serves all

    def __init__(self, rows: int, block_size: int, batch_tokens: int, micro_batch: int,
                 seed: int = 0, rank: int = 0, world: int = 1, pin: bool = False):
        self.block_size, self.seed = block_size, seed
        self.rank, self.world, self.pin = rank, world, pin
        self.rows_per_epoch, self.rows_per_step = rows, batch_tokens // block_size
        self.accumulation, self.micro_batch = divide_step(batch_tokens, micro_batch, block_size,
                                                          world)
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0))     # the one at hand, in order

    def read(self, rows: np.ndarray) -> Batch:
        """These rows as inputs and targets, (B, T) int64 each, and what else the model takes."""
        raise NotImplementedError

    def permutation(self, epoch: int, rng: np.random.Generator) -> np.ndarray:
        """All rows in the order of an epoch."""
        return rng.permutation(self.rows_per_epoch)

    def order(self, step: int) -> np.ndarray:
        """The rows of a step, for all ranks together: (batch_tokens / T,) int64."""
        first = step * self.rows_per_step
        epochs, places = np.divmod(np.arange(first, first + self.rows_per_step),
                                   self.rows_per_epoch)
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
    """Serves the windows of a split. Its settings are those of RowLoader."""

    def __init__(self, tokens: Tokens, block_size: int, batch_tokens: int, micro_batch: int,
                 seed: int = 0, rank: int = 0, world: int = 1, pin: bool = False):
        if len(tokens) <= block_size:
            raise ValueError(f"block_size={block_size} is longer than the data, which has "
                             f"{len(tokens):,} tokens; choose one below that or prepare more data")
        self.tokens = tokens
        super().__init__(count_windows(tokens, block_size), block_size, batch_tokens, micro_batch,
                         seed, rank, world, pin)

    def read(self, rows: np.ndarray) -> Batch:
        """These windows as inputs and targets, (B, T) int64 each."""
        return read_windows(self.tokens, rows, self.block_size)

    def labels(self, step: int) -> int:
        """Labelled tokens of a step over all ranks, known without reading or communicating."""
        short = self.rows_per_epoch * self.block_size - (len(self.tokens) - 1)  # of the last window
        last = np.count_nonzero(self.order(step) == self.rows_per_epoch - 1)
        return self.rows_per_step * self.block_size - short * int(last)

    def where(self, step: int) -> str:
        """The places in the shards that a step reads, for a person to look at."""
        places = []
        for start in self.order(step) * self.block_size:
            i = int(np.searchsorted(self.tokens.starts, start, side="right")) - 1
            name = getattr(self.tokens.shards[i], "filename", f"shard {i}")
            places.append(f"{name} at token {start - self.tokens.starts[i]:,}")
        more = f" and {len(places) - 4} more" if len(places) > 4 else ""
        return f"{self.block_size} tokens each from {', '.join(places[:4])}{more}"


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
