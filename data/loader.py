"""Batches: the batch of step s is a pure function of (data, seed, s).

A split of N tokens has ceil((N - 1) / T) windows: window w reads T inputs from token w * T and has
the tokens one further on as targets; the last one is shorter and padded with IGNORE targets. So
every token (the very first has no context) is a target exactly once per epoch. Each epoch serves
the windows in a new permutation drawn from (seed, epoch). Step s takes the next batch_tokens / T of
them, however many ranks or micro-batches share the work, and nothing has to be saved to resume.

    loader = WindowLoader(tokens, block_size=1024, batch_tokens=2**19, micro_batch=16, seed=0)
    for x, y in loader.batches(step): ...          # x, y (B, T) int64, this rank's micro-batches
"""
from typing import Iterator

import numpy as np
import torch

from data.shards import Tokens

IGNORE = -100                   # as in model.py; this file imports nothing above it


class WindowLoader:
    """Serves a split to one rank of `world`. Shapes: B micro_batch, T block_size."""
    one_shape = True                    # all batches: what is compiled for one serves all

    def __init__(self, tokens: Tokens, block_size: int, batch_tokens: int, micro_batch: int,
                 seed: int = 0, rank: int = 0, world: int = 1, pin: bool = False):
        if len(tokens) <= block_size:
            raise ValueError(f"block_size={block_size} is longer than the data, which has "
                             f"{len(tokens):,} tokens; choose one below that or prepare more data")
        self.tokens, self.block_size, self.seed = tokens, block_size, seed
        self.rank, self.world, self.pin = rank, world, pin
        self.windows = -(-(len(tokens) - 1) // block_size)          # per epoch
        self.per_step = batch_tokens // block_size
        self.accumulation, self.micro_batch = divide_step(batch_tokens, micro_batch, block_size,
                                                          world)
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))     # the epoch at hand, permuted

    def order(self, step: int) -> np.ndarray:
        """The windows of a step, for all ranks together: (batch_tokens / T,) int64."""
        positions = np.arange(step * self.per_step, (step + 1) * self.per_step)
        chosen = np.empty_like(positions)
        for epoch in np.unique(positions // self.windows):
            if self._order[0] != epoch:
                rng = np.random.default_rng((self.seed, int(epoch)))
                self._order = (epoch, rng.permutation(self.windows))
            here = positions // self.windows == epoch
            chosen[here] = self._order[1][positions[here] % self.windows]
        return chosen

    def labels(self, step: int) -> int:
        """Labelled tokens of a step over all ranks, known without reading or communicating."""
        short = self.windows * self.block_size - (len(self.tokens) - 1)     # of the last window
        last = np.count_nonzero(self.order(step) == self.windows - 1)
        return self.per_step * self.block_size - short * int(last)

    def where(self, step: int) -> str:
        """The places in the shards that a step reads, for a person to look at."""
        places = []
        for start in self.order(step) * self.block_size:
            i = int(np.searchsorted(self.tokens.starts, start, side="right")) - 1
            name = getattr(self.tokens.shards[i], "filename", f"shard {i}")
            places.append(f"{name} at token {start - self.tokens.starts[i]:,}")
        more = f" and {len(places) - 4} more" if len(places) > 4 else ""
        return f"{self.block_size} tokens each from {', '.join(places[:4])}{more}"

    def batches(self, step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """This rank's micro-batches of a step: inputs and targets, (B, T) int64 each."""
        mine = self.order(step).reshape(self.accumulation, self.world, self.micro_batch)
        for windows in mine[:, self.rank]:
            x, y = read_windows(self.tokens, windows, self.block_size)
            yield (x.pin_memory(), y.pin_memory()) if self.pin else (x, y)  # pinned: copied aside


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


def read_windows(tokens: Tokens, windows: np.ndarray, block_size: int):
    """Windows as inputs and targets, (B, T) int64 each, padded with 0 and IGNORE at the end."""
    x = np.zeros((len(windows), block_size), np.int64)      # slices cost less than PyTorch's
    y = np.full_like(x, IGNORE)
    for row, window in enumerate(windows):
        start = int(window) * block_size
        ids = tokens.read(start, start + block_size + 1)
        x[row, :len(ids) - 1], y[row, :len(ids) - 1] = ids[:-1], ids[1:]
    return torch.from_numpy(x), torch.from_numpy(y)


def evaluation_batches(tokens: Tokens, block_size: int, batch_size: int, limit: int | None = None,
                       rank: int = 0, world: int = 1):
    """A split once through, in order: this rank's share, as (x, y) of up to batch_size windows.

    With a limit, that many tokens (rounded up to windows) spread evenly over the split.
    """
    count = -(-(len(tokens) - 1) // block_size)
    windows = np.arange(count)
    if limit and limit < count * block_size:
        windows = np.linspace(0, count - 1, -(-limit // block_size)).astype(np.int64)
    mine = windows[rank::world]
    for start in range(0, len(mine), batch_size):
        yield read_windows(tokens, mine[start:start + batch_size], block_size)
