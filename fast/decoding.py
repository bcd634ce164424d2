"""Text from a GPU without waiting for its host: a token's step is one recorded CUDA graph.

    record_steps(model, torch.bfloat16)     # in place: generate, and a chat, then go by it on CUDA
    compile_blocks(model)                   # before it or without it: fewer kernels a step

The step of a token is some 200 small kernels, which a GPU runs faster than a host can start them. A
graph starts them at once, but on addresses and shapes that never change. So the cache has its full
length from the first token on, of which a mask shows what is filled, and the position is a number
on the device. The plain forms are `next_logits` and `new_cache` of the model.

Shapes: B rows, H heads, D head size, S slots of the cache, V vocabulary.
"""
import sys

import torch
import torch.nn as nn
from torch.nn.attention import SDPBackend, sdpa_kernel

KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
SLOTS = 16              # a cache has a multiple of these: attention's kernels want aligned masks
CLOSE = 0.1             # how far a recorded step may be from a plain one, in deviations of logits


class Slot:
    """Stands in for a layer's keys or values (B, H, S, D): what is written goes to the slot at
    `position`, a tensor, and all slots are read, whichever are asked for."""

    def __init__(self, buffer: torch.Tensor, position: torch.Tensor):
        self.buffer, self.position = buffer, position

    def __setitem__(self, where: tuple, new: torch.Tensor) -> None:
        self.buffer.index_copy_(2, self.position, new.to(self.buffer.dtype))

    def __getitem__(self, where: tuple) -> torch.Tensor:
        return self.buffer


class StaticCache:
    """Stands in for a model's cache of keys and values (layer, B, H, S, D); with what a recorded
    step reads and writes."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        self.keys, self.values, self.length = keys.zero_(), values.zero_(), 0   # no NaN to be read
        self.position = torch.zeros(1, dtype=torch.long, device=keys.device)
        self.slots = torch.arange(keys.size(3), device=keys.device)
        self.idx = torch.zeros(keys.size(1), 1, dtype=torch.long, device=keys.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits = torch.empty(0)                                # (B, V), of the graph

    def __getitem__(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        return self.keys[layer], self.values[layer], self.length


def on_a_gpu(idx: torch.Tensor) -> bool:
    """Where there are CUDA graphs; elsewhere a step runs as it is, for tests."""
    return idx.is_cuda


class RecordedSteps:
    """A model whose steps of a single token read a StaticCache; on CUDA, as recorded."""

    def new_cache(self, batch_size: int, capacity: int | None = None) -> StaticCache:
        """As the model's own, of a few slots more."""
        capacity = -(-(capacity or self.config.block_size) // SLOTS) * SLOTS
        plain = super().new_cache(batch_size, capacity)
        return StaticCache(plain.keys, plain.values)

    def next_logits(self, idx: torch.Tensor, cache: StaticCache | None = None) -> torch.Tensor:
        """As the model's own; logits (B, V) that are written over by the next step."""
        if cache is None or idx.size(1) > 1 or self.broken:
            return super().next_logits(idx, cache)
        cache.idx.copy_(idx)
        cache.position.fill_(cache.length)
        if on_a_gpu(idx) and cache.graph is None:
            return self._first(idx, cache)
        cache.length += 1
        if not on_a_gpu(idx):
            return self._step(cache)
        cache.graph.replay()
        return cache.logits

    @sdpa_kernel(KERNELS)
    def _step(self, cache: StaticCache) -> torch.Tensor:
        parts = self.transformer
        mask = torch.zeros_like(cache.slots, dtype=cache.keys.dtype)[None]      # (1, S)
        mask.masked_fill_(cache.slots > cache.position, float("-inf"))
        x = parts.wte(cache.idx) + parts.wpe(cache.position)        # (B, 1, C)
        for layer, block in enumerate(parts.h):
            x = block(x, mask, (Slot(cache.keys[layer], cache.position),
                                Slot(cache.values[layer], cache.position), 0))
        return self.lm_head(parts.ln_f(x)[:, -1])[:, :self.config.vocab_size].float()   # (B, V)

    def _first(self, idx: torch.Tensor, cache: StaticCache) -> torch.Tensor:
        """Record a step, and compare it with a plain one, whose result is returned."""
        expected = super().next_logits(idx, cache)
        kind = idx.device.type
        try:
            # Weights that autocast keeps for a while would be gone when the graph reads them.
            with torch.autocast(kind, torch.get_autocast_dtype(kind),
                                torch.is_autocast_enabled(kind), cache_enabled=False):
                self._step(cache)                                   # libraries set themselves up
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    cache.logits = self._step(cache)
            graph.replay()
            off = float((cache.logits - expected).abs().max() / expected.std())
            if not off < CLOSE:
                raise RuntimeError(f"it is off by {off:.2g} standard deviations of the logits")
            cache.graph = graph
        except RuntimeError as error:
            self.broken = True
            print(f"warning: a step could not be recorded as a CUDA graph, going on without: "
                  f"{str(error).splitlines()[0]:.200}", file=sys.stderr)
        return expected


def record_steps(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model, made to write text by recorded steps: for good, it is no more to be trained.

    Weights of linear layers are put into dtype, that of autocast, which would do so in each step.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.to(dtype), requires_grad=False)  # not tied
    plain = type(model)
    model.__class__ = type(plain.__name__, (RecordedSteps, plain), {"broken": False})
    return model


def compile_blocks(model: nn.Module) -> None:
    """Compile what a token goes through, in place: seconds, at the first tokens."""
    for module in (*model.transformer.h, model.lm_head):            # the blocks share their code
        module.compile()
