"""Attention whose shapes change from call to call: texts as they grow, rows padded to the longest.

cuDNN's attention, which PyTorch prefers on an H100, makes a plan for each new shape, and takes tens
to hundreds of milliseconds for it. The other kernels take any shape at once.
"""
import contextlib
from typing import Iterator

import torch


@contextlib.contextmanager
def any_shape(wanted: bool = True) -> Iterator[None]:
    """Inside, where `wanted`, attention is computed by flash, memory-efficient or plain kernels."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(before and not wanted)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
