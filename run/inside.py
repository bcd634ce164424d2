"""Inside a run: what each block computes and learns, every --watch_every steps.

    inside = Inside(model, config, world, dtype, log)
    with inside.look(step, lr, batch):          # batch: the step's last, (x, y[, positions])
        take_step(optimizer, scaler, skip)      # between the gradients and the new weights

log.jsonl gets a list for each figure, a number for each block, and TensorBoard a curve:

block_activation  root mean square (RMS) of the residual stream that leaves the block
block_added       RMS of what the block adds, as a share of the RMS of what came in
block_gradient    RMS of the gradients of its trained parameters, as clipped
block_update      norm of the step's change of them, as a share of their own norm
block_logit       the largest attention score q k / sqrt(D) that any token gives
block_saturated   share of the tokens whose attention has 99% of its weight on one token
block_dead        share of the MLP's units that are negative or zero at every token

The activations are those of rank 0's first rows, in a forward pass of their own: eager, without
dropout and gradients. That way nothing is added to what is compiled or sharded, and a run that is
looked at computes the same bits as one that is not.
"""
from contextlib import contextmanager
from typing import Any, Iterator

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from run.device import autocast
from run.log import RunLog
from run.parallel import is_split
from run.processes import Processes

ROWS = 4                # of a batch; of the first one the attention scores too
SEEN = 8                # a token that sees fewer has too little choice to be called saturated
ACTIVATIONS = (F.gelu, F.relu, torch.relu, F.silu)
# What is said to be unusual. A block that adds less than this share of its input hardly takes part;
# a change per step around 1e-3 of the weight is the rule of thumb for a learning rate that fits.
VANISHING, SLOW, FAST, LARGE_LOGIT, SHARE = 0.01, 1e-4, 1e-2, 30.0, 0.5


class Inside:
    """Looks into the blocks of a model as it trains; with config.watch_every = 0, never."""

    def __init__(self, model: nn.Module, config: Any, world: Processes, dtype: torch.dtype,
                 log: RunLog):
        self.model, self.world, self.dtype, self.log = model, world, dtype, log
        self.every, self.peak = config.watch_every, config.learning_rate
        self.logits: list[float] = []               # of the first look
        self.said: set[tuple[int, str]] = set()

    @contextmanager
    def look(self, step: int, lr: float, batch: tuple[torch.Tensor, ...]) -> Iterator[None]:
        """Around the optimizer's step. All ranks call it."""
        if not self.every or step % self.every:
            yield
            return
        self.log.lap()
        figures = self._computed(batch)
        trained = [[p for p in block.parameters() if p.requires_grad]
                   for block in self.model.transformer.h]
        gradient = self._squares([[p.grad for p in block] for block in trained])
        before = [[local(p).clone() for p in block] for block in trained]
        weight = self._squares(before)
        self.log.lap(training=False)
        yield
        self.log.lap()
        change = self._squares([[local(p) - old for p, old in zip(block, olds)]
                                for block, olds in zip(trained, before)])
        number = torch.tensor([sum(p.numel() for p in block) or 1 for block in trained])
        figures["gradient"] = (gradient / number).sqrt().tolist()
        figures["update"] = (change / weight.clamp_min(1e-30)).sqrt().tolist()
        self.log.write({"step": step, **{f"block_{key}": [round(v, 9) for v in values]
                                         for key, values in figures.items()}})
        self.logits = self.logits or figures["logit"]
        ranges = ", ".join(f"{key} {min(values):.2g} to {max(values):.2g}"
                           for key, values in figures.items())
        self.log.say(f"step {step}: blocks: {ranges}")
        for text in self._unusual(figures, lr):
            self.log.say(f"step {step}: {text}")
        self.log.lap(training=False)

    def _squares(self, tensors: list[list[torch.Tensor | None]]) -> torch.Tensor:
        """The sum of squares of each block's tensors (L,), of all ranks' parts where split."""
        sums = torch.stack([sum((local(t).float().square().sum() for t in block if t is not None),
                                torch.zeros((), device=self.world.device)) for block in tensors])
        split = any(is_split(p) for p in self.model.parameters())
        return (self.world.sum(sums) if split else sums).cpu()

    @torch.no_grad()
    def _computed(self, batch: tuple[torch.Tensor, ...]) -> dict[str, list[float]]:
        """The figures of a forward pass, a list over blocks each."""
        device, training = self.world.device, self.model.training
        notes, blocks = _Notes(), self.model.transformer.h
        hooks = [block.register_forward_hook(notes.block) for block in blocks]
        try:
            with autocast(device, self.dtype), notes:
                self.model.eval()(*(part[:ROWS].to(device) for part in batch))
        finally:
            self.model.train(training)
            for hook in hooks:
                hook.remove()
            for module in self.model.modules():     # FSDP: the next step gathers new weights
                if hasattr(module, "reshard"):
                    module.reshard()
        return {key: torch.stack([block.get(key, torch.zeros((), device=device)).float()
                                  for block in notes.blocks]).tolist()
                for key in ("activation", "added", "logit", "saturated", "dead")}

    def _unusual(self, figures: dict[str, list[float]], lr: float) -> Iterator[str]:
        """A sentence for each kind of oddity, with the blocks that have it for the first time."""
        update = [value * self.peak / max(lr, 1e-12) for value in figures["update"]]
        for key, odd, text in (
            ("added", lambda i, v: v < VANISHING, "adds {} of its input: it hardly takes part"),
            ("update", lambda i, v: 0 < update[i] < SLOW,
             "changes by {} of its weights, far below the usual 1e-3: too low a learning rate?"),
            ("update", lambda i, v: update[i] > FAST,
             "changes by {} of its weights, far above the usual 1e-3: too high a learning rate, or "
             "weights that are still small"),
            ("logit", lambda i, v: v > LARGE_LOGIT and v > 2 * self.logits[i],
             "has attention scores up to {}, and they grow: such runs often diverge"),
            ("saturated", lambda i, v: v > SHARE,
             "attends to a single token for a share of {} of its tokens"),
            ("dead", lambda i, v: v > SHARE, "has a share of {} of its units never above zero"),
        ):
            found = [i for i, value in enumerate(figures[key])
                     if odd(i, value) and (i, text) not in self.said]
            self.said |= {(i, text) for i in found}
            if found:
                worst = (min if key == "added" else max)(figures[key][i] for i in found)
                blocks = f"blocks {', '.join(map(str, found))}: each" if found[1:] else \
                    f"block {found[0]}"
                yield f"{blocks} {text.format(f'{worst:.2g}')}"


class _Notes(TorchFunctionMode):
    """Sees the calls of a forward pass; `block` is a hook that ends a block's notes."""

    def __init__(self):
        super().__init__()
        self.blocks: list[dict[str, torch.Tensor]] = []
        self.now: dict[str, torch.Tensor] = {}

    def block(self, module: nn.Module, inputs: tuple[Any, ...], out: torch.Tensor) -> None:
        came = inputs[0].float()                                    # (B, T, C)
        self.now["activation"] = rms(out.float())
        self.now["added"] = rms(out.float() - came) / rms(came).clamp_min(1e-30)
        self.blocks.append(self.now)
        self.now = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            q, k, *_ = args
            self.attention(q[:1].float(), k[:1].float(), kwargs.get("attn_mask"))
        elif func in ACTIVATIONS:                                   # (B, T, 4C)
            self.now["dead"] = (out.flatten(0, -2).amax(0) <= 0).float().mean()
        return out

    def attention(self, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None) -> None:
        """q, k (1, H, T, D): the largest score, and how many rows have one weight only."""
        scores = q @ k.mT / q.size(-1) ** 0.5                       # (1, H, T, T)
        mask = (torch.ones_like(scores[0, 0], dtype=torch.bool).tril() if mask is None
                else mask[:1])
        scores = scores.masked_fill(~mask, float("-inf"))
        enough = mask.sum(-1).expand(scores.shape[:-1]) >= SEEN     # (1, H, T)
        one = scores.softmax(-1).amax(-1) > 0.99
        self.now["logit"] = scores.amax()
        self.now["saturated"] = (one & enough).sum() / enough.sum().clamp_min(1)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that is split over the ranks; any other as it is."""
    return (tensor.to_local() if is_split(tensor) else tensor).detach()


def rms(tensor: torch.Tensor) -> torch.Tensor:
    """The root of the mean square."""
    return tensor.square().mean().sqrt()
