"""Runs train() for a test, under torchrun or alone, and keeps the gradients of its first step.

    torchrun --nproc_per_node=2 tests/worker.py GRADIENTS.pt --key=value ...
"""
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import config
import train

torch.set_num_threads(1)
clip, gradients = torch.nn.utils.clip_grad_norm_, []


def recording(parameters, max_norm):
    if not gradients:
        gradients.extend(p.grad.clone() for p in parameters)
    return clip(parameters, max_norm)


if __name__ == "__main__":
    torch.nn.utils.clip_grad_norm_ = recording
    train.train(config.parse(train.TrainConfig, sys.argv[2:], "worker.py"))
    if os.environ.get("RANK", "0") == "0":
        torch.save(gradients, sys.argv[1])
