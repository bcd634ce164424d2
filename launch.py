"""What stands between a command and the loop: processes, stop signals, the compiler.

    with processes("auto") as world, stop_signals() as stop: ...
    network = compiled(model, "auto", batch, flops, world, dtype)
"""
import gc
import os
import signal
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from device import autocast, has_compiler, pick_device

# Floating-point operations of a run on one device that make up for the minute of torch.compile.
COMPILE_PAYS = {"cuda": 1e17, "cpu": 1e13}


@dataclass(frozen=True)
class Processes:
    """This process among those of the run. One alone needs no process group."""
    rank: int
    size: int
    device: torch.device

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()


@contextmanager
def processes(device_name: str) -> Iterator[Processes]:
    """Join the group that torchrun started; without torchrun, stand alone."""
    device = pick_device(device_name)
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield Processes(0, 1, device)
        return
    on_gpu = device.type == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(minutes=30),
                            device_id=device if on_gpu else None)
    try:
        yield Processes(dist.get_rank(), size, device)
    finally:
        # DistributedDataParallel sits in reference cycles. While one holds the group, gloo's
        # threads outlive the interpreter and abort it: every second run of 4 short ranks.
        gc.collect()
        dist.destroy_process_group()


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """SIGINT and SIGTERM ask the loop to save and stop; a second one interrupts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop                                      # Python delivers signals to the main thread
        return

    def handle(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        print("\nstopping after this step; once more to stop at once", file=sys.stderr)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def compiled(network: nn.Module, mode: str, batch: tuple[torch.Tensor, torch.Tensor], flops: float,
             world: Processes, dtype: torch.dtype) -> nn.Module:
    """The network under torch.compile where that pays; as it is, with a warning, where it fails.

    mode: on, off, or auto, which weighs `flops`, the work of the run on this device. The compiler
    runs on a batch (x, y) whose gradients are thrown away, so that a failure costs no training.
    """
    device = world.device
    pays = has_compiler(device) and flops > COMPILE_PAYS.get(device.type, float("inf"))
    if mode == "off" or (mode == "auto" and not pays):
        return network
    faster, worked = torch.compile(network, dynamic=False), torch.ones((), device=device)
    x, y = batch
    if isinstance(network, DistributedDataParallel):
        network.require_backward_grad_sync = False      # a rank that fails must not leave others
    try:
        with autocast(device, dtype):
            _, nats = faster(x.to(device), y.to(device), reduction="sum")
        nats.backward()
    except Exception as error:                          # whatever the compiler's many parts raise
        print(f"warning: torch.compile failed, going on without it: {type(error).__name__}: "
              f"{str(error)[:200]!r}", file=sys.stderr)
        worked.zero_()
    network.zero_grad(set_to_none=True)
    if world.size > 1:                                  # all ranks do the same
        dist.all_reduce(worked, dist.ReduceOp.MIN)
    return faster if worked else network
