"""Attention by the kernels that are fastest where it runs.

    y = attend(q, k, v, is_causal=True)     # F.scaled_dot_product_attention in all but speed
    with any_shape(): ...                   # where lengths change from call to call, on a GPU

cuDNN's attention, which PyTorch prefers on an H100, makes a plan for each new shape (texts as they
grow, rows padded to the longest) and takes tens to hundreds of milliseconds for it. The other
kernels take any shape at once.

PyTorch's kernel for CPUs asks MKL for its products, which is slow in bfloat16 on processors that
are not Intel's (those were not measured). There
- causal attention of many queries is computed here: scores of some heads and queries at a time, as
  many as a cache holds, by oneDNN, and once more in the backward pass, so that none are kept. That
  is FlashAttention's way (Dao et al. 2022, 2205.14135) but with whole rows, whose softmax PyTorch
  has. Scores are in float32, as in PyTorch's kernel; what is multiplied with v, q and k is rounded
  to bfloat16 first.
- attention of few queries is computed in float32; without gradients, and from 16 of them in a batch
  on, only its scores are.

Shapes: B sequences, H heads, T tokens, D head size; N = B * H.
"""
import contextlib
import math
from typing import Any, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import has_torch_function

from fast.processor import HAS_BFLOAT16, MKL_IS_FOREIGN

FEW_QUERIES, MASKED_QUERIES = 64, 128   # so few are faster in float32
MANY_IN_ALL = 16                        # queries of a head over the batch, without gradients
SCORES_AT_ONCE = 2**20                  # 4 MB
PLAIN = torch._C._nn.scaled_dot_product_attention      # what F's is, unless someone patched it


@contextlib.contextmanager
def any_shape(wanted: bool = True) -> Iterator[None]:
    """Inside, where `wanted`, attention is computed by flash, memory-efficient or plain kernels."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(before and not wanted)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None,
           dropout_p: float = 0.0, is_causal: bool = False, **settings: Any) -> Tensor:
    """F.scaled_dot_product_attention up to rounding: queries (B, H, T, D) -> (B, H, T, D)."""
    slow = q.dtype == torch.bfloat16 and q.device.type == "cpu" and MKL_IS_FOREIGN
    # Who patches PyTorch's function, or watches its calls, is to be asked.
    free = F.scaled_dot_product_attention is PLAIN and not has_torch_function((q, k, v))
    if slow and HAS_BFLOAT16 and free and not dropout_p and not settings:
        if is_causal and q.size(2) > FEW_QUERIES and q.shape == k.shape:
            return causal_attention(q, k, v)
        if not is_causal and q.size(2) <= MASKED_QUERIES and not torch.is_grad_enabled() \
                and q.size(0) * q.size(2) >= MANY_IN_ALL:
            return attention_of_few(q, k, v, attn_mask)
    settings.update(dropout_p=dropout_p, is_causal=is_causal)
    if not slow or q.size(-2) > MASKED_QUERIES:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, **settings)
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.float()
    with torch.autocast("cpu", enabled=False):
        y = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=attn_mask,
                                           **settings)
    return y.to(q.dtype)


def attention_of_few(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v of few queries each of many sequences; a mask as PyTorch has it."""
    with torch.autocast("cpu", enabled=False):
        scores = (q.float() * q.size(-1) ** -0.5) @ k.float().mT            # (B, H, T, past + T)
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape).masked_fill_(~mask, -math.inf)
        scores = scores if mask is None else scores.add_(mask)
        return scores.softmax(-1).bfloat16() @ v


@torch.library.custom_op("oneloop::causal_attention", mutates_args=())
def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, each token over those up to itself: bfloat16 (B, H, T, D)."""
    q, k, v, shape = *map(flat, (q, k, v)), q.shape
    y, q32, k32 = torch.empty_like(q), q.float(), k.float()
    with by_onednn():
        for heads, rows, seen in pieces(*q.shape[:2]):
            p = weights(q32[heads, rows], k32[heads, seen])
            torch.bmm(p.bfloat16(), v[heads, seen], out=y[heads, rows])
    return y.view(shape)


@torch.library.custom_op("oneloop::causal_attention_backward", mutates_args=())
def causal_attention_backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor
                              ) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, of that of what came out: bfloat16 (B, H, T, D) each."""
    dy, q, k, v, shape = *map(flat, (dy, q, k, v)), q.shape
    dy32, q32, k32, v32 = (part.float() for part in (dy, q, k, v))
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k32), torch.zeros_like(v32)
    with by_onednn():
        for heads, rows, seen in pieces(*q.shape[:2]):
            p = weights(q32[heads, rows], k32[heads, seen])
            dv[heads, seen] += torch.bmm(p.bfloat16().mT, dy[heads, rows])
            dp = torch.bmm(dy32[heads, rows], v32[heads, seen].mT)
            ds = torch._softmax_backward_data(dp, p, -1, torch.float32).bfloat16()
            torch.bmm(ds, k[heads, seen], out=dq[heads, rows])
            dk[heads, seen] += torch.bmm(ds.mT, q[heads, rows])
    scale = q.size(2) ** -0.5
    return tuple((part * scale if part is not dv else part).bfloat16().view(shape)
                 for part in (dq, dk, dv))


def flat(x: Tensor) -> Tensor:
    """(B, H, T, D) -> (N, T, D), without gaps."""
    return x.reshape(-1, *x.shape[2:]).contiguous()


def pieces(N: int, T: int) -> Iterator[tuple[slice, slice, slice]]:
    """Which heads, which of their queries, and the keys up to the last of these: as many as have
    SCORES_AT_ONCE scores. A quarter of the queries, so that few scores above the diagonal are made;
    fewer than 64 are slow, and 256 a whole row for the cache."""
    size = min(max(T // 4, 64), 256)
    for start in range(0, T, size):
        rows = slice(start, min(start + size, T))
        heads = max(1, SCORES_AT_ONCE // ((rows.stop - start) * rows.stop))
        for first in range(0, N, heads):
            yield slice(first, first + heads), rows, slice(rows.stop)


def weights(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) of the last t queries of K tokens: float32 (N, t, D), (N, K, D) ->
    (N, t, K)."""
    t, K = q.size(1), k.size(1)
    scores = torch.baddbmm(q.new_empty(()), q, k.mT, beta=0, alpha=q.size(2) ** -0.5)
    scores[:, :, K - t:] += torch.full((t, t), -math.inf).triu(1)           # later tokens
    return scores.softmax(-1)


@contextlib.contextmanager
def by_onednn() -> Iterator[None]:
    """Products are oneDNN's in float32 too. PyTorch takes it where it may round their inputs to
    bfloat16, which here they are already: they hold what bfloat16 held."""
    settings = torch.backends.mkldnn.matmul
    before, settings.fp32_precision = settings.fp32_precision, "bf16"
    try:
        with torch.autocast("cpu", enabled=False):
            yield
    finally:
        settings.fp32_precision = before


causal_attention.register_fake(lambda q, k, v: q.new_empty(q.shape))
causal_attention_backward.register_fake(
    lambda dy, q, k, v: tuple(part.new_empty(part.shape) for part in (q, k, v)))
causal_attention.register_autograd(
    lambda ctx, dy: causal_attention_backward(dy, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
