"""How tokens are scored, and how sure a share of right answers is: what the evaluations share."""
import contextlib
import math
import random
from typing import Any, Iterator

import torch
import torch.nn as nn

from fast.attention import any_shape
from run.device import autocast


@contextlib.contextmanager
def evaluating(model: nn.Module, dtype: torch.dtype = torch.float32,
               one_shape: bool = False) -> Iterator[torch.device]:
    """The model's device; inside, dropout is off, no gradient is kept, products are in dtype.
    one_shape: whether the batches are so alike that attention may be prepared for their shape."""
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    try:
        with torch.no_grad(), autocast(device, dtype), any_shape(not one_shape):
            yield device
    finally:
        model.train(was_training)


def spread(items: list[Any], limit: int) -> list[Any]:
    """So many items (0: all), one drawn from each of as many equal parts: files are in order. The
    first 3,243 of HellaSwag's are all of films, the first half of IMDB's all negative, and where
    labels take turns every second one would be."""
    n, draw = len(items), random.Random(0).randrange
    return [items[draw(i * n // limit, (i + 1) * n // limit)] for i in range(limit)] \
        if 0 < limit < n else items


def accuracy(right: int, n: int, name: str = "acc") -> dict[str, Any]:
    """{acc, correct, acc_interval}; of the name "acc_norm": acc_norm, correct_norm, ..."""
    return {name: right / n, name.replace("acc", "correct"): right,
            f"{name}_interval": wilson_interval(right, n)}


def wilson_interval(k: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95% interval of a share k / n (Wilson 1927), which stays within 0 and 1."""
    middle, spread = k + z * z / 2, z * math.sqrt(k * (n - k) / n + z * z / 4)
    return (middle - spread) / (n + z * z), (middle + spread) / (n + z * z)
