"""Runs train() for a test, under torchrun or alone, and keeps the gradients of its
first step and the number of gradient buckets that were reduced over the ranks.

    torchrun --nproc_per_node=2 tests/worker.py GRADIENTS.pt --key=value ...
"""
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import train
from run import config, parallel

torch.set_num_threads(1)
clip, gradients, reductions = torch.nn.utils.clip_grad_norm_, [], []


def recording(parameters, max_norm):
    if not gradients:
        gradients.extend(p.grad.clone() for p in parameters)
    return clip(parameters, max_norm)


def counting(group, bucket):
    reductions.append(bucket.index())
    return allreduce_hook(group, bucket)


class CountingDDP(parallel.DistributedDataParallel):
    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.register_comm_hook(None, counting)


if __name__ == "__main__":
    torch.nn.utils.clip_grad_norm_ = recording
    parallel.DistributedDataParallel = CountingDDP
    train.train(config.parse(train.TrainConfig, sys.argv[2:], "worker.py"))
    if os.environ.get("RANK", "0") == "0":
        torch.save({"gradients": gradients, "reductions": len(reductions)}, sys.argv[1])
