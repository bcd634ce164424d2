"""What stands between a command and the loop: processes, stop signals, deterministic arithmetic.

    with processes("auto", minutes=30) as world, stop_signals() as stop, \
            deterministic(True, world.device): ...
"""
import gc
import os
import signal
import sys
import threading
import time
import uuid
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Callable, Iterator

import torch
import torch.distributed as dist

from run.config import print_error, warn
from run.device import pick_device


@dataclass(frozen=True)
class Processes:
    """This process among those of the run. One alone needs no process group."""
    rank: int
    size: int
    device: torch.device
    store: Callable[[], dist.Store] | None = None       # a new connection to what all can read

    def wait(self) -> None:
        """Until all processes are here; returns at once where there is one."""
        if self.size > 1:
            dist.barrier()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor added up over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def from_first(self, number: float) -> float:
        """The number that rank 0 has."""
        if self.size == 1:
            return number
        found = torch.tensor(number, dtype=torch.float64, device=self.device)
        dist.broadcast(found, src=0)
        return found.item()


@contextmanager
def processes(device_name: str, minutes: float = 30) -> Iterator[Processes]:
    """Join the group that torchrun started; without torchrun, stand alone.

    minutes: how long a rank waits for the others in a reduction before it gives up.
    """
    device = pick_device(device_name)
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if size == 1:
        yield Processes(0, 1, device)
        return
    on_gpu = device.type == "cuda"
    if on_gpu and not dist.is_nccl_available():
        raise ValueError(f"this PyTorch ({torch.__version__}, {sys.platform}) has no NCCL, which "
                         f"{size} processes on GPUs need; start one, or use --device=cpu")
    store = _meet(rank, size, timedelta(minutes=minutes))
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(minutes=minutes),
                            store=store(), rank=rank, world_size=size,
                            device_id=device if on_gpu else None)
    try:
        yield Processes(rank, size, device, store)
    except BaseException as error:
        if isinstance(error, RuntimeError) and ("gloo" in str(error)
                                                or isinstance(error, dist.DistError)):
            reason = str(error).splitlines()[0][:200]
            error = ConnectionError(f"another rank is gone, its own message says why; torchrun "
                                    f"--max-restarts=N would start all again, from the last "
                                    f"checkpoint ({reason})")
        if on_gpu:          # leaving NCCL's group would wait for ranks that wait for this one
            os._exit(print_error(error))
        _leave()
        raise error
    _leave()


def _leave() -> None:
    # DistributedDataParallel sits in reference cycles. While one holds the group, gloo's threads
    # outlive the interpreter and abort it: every second run of 4 short ranks.
    gc.collect()
    dist.destroy_process_group()


def _meet(rank: int, size: int, patience: timedelta) -> Callable[[], dist.Store]:
    """How to connect to a store that only the ranks of this start write to.

    torchrun keeps one store over all its restarts, in which restarted ranks would find the
    addresses of the dead (pytorch issue 135712). So each rank leaves a new name there, and rank 0
    answers every name that it finds with its own, until all of this start have answered back.
    """
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"       # by torchrun itself

    def connect(host: bool = False) -> dist.TCPStore:
        return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]),
                             is_master=host, timeout=patience, wait_for_workers=False,
                             multi_tenant=True)
    store, me = connect(host=rank == 0 and not hosted), uuid.uuid4().hex
    if rank:
        store.set(f"name/{rank}", me)
        start = store.get(f"answer/{me}").decode()                  # waits for rank 0
        store.set(f"here/{start}/{rank}", "")
    else:
        start, missing, began = me, set(range(1, size)), time.monotonic()
        while missing:
            for other in sorted(missing):
                if store.check([f"name/{other}"]):
                    store.set(f"answer/{store.get(f'name/{other}').decode()}", start)
                if store.check([f"here/{start}/{other}"]):
                    missing.discard(other)
            if time.monotonic() - began > patience.total_seconds():
                raise ValueError(f"of {size} ranks these did not start within {patience}: "
                                 f"{sorted(missing)}; see what they printed")
            time.sleep(0.02)
    # The first connection is kept: in rank 0 it may be the store itself.
    return lambda first=store: dist.PrefixStore(start, connect())


class StopRequest(threading.Event):
    """Set when a signal asked for the run's end; `number` says which."""
    number = 0


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """SIGINT and SIGTERM ask the loop to save and stop. A second SIGINT interrupts at once; not so
    SIGTERM, which SLURM and torchrun send one after the other."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop                                      # Python delivers signals to the main thread
        return

    def handle(number: int, frame: Any) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not stop.is_set():
            stop.number = number
            stop.set()
            warn("\nstopping after this step; Ctrl-C once more to stop at once")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def deterministic(on: bool, device: torch.device) -> Iterator[None]:
    """Arithmetic that gives the same bits each time.

    Without it torch.compile adds up the embedding's gradient in the order in which threads come to
    it, and so does attention's backward pass on a GPU. There an operation that knows no such way is
    a RuntimeError: merely warned, PyTorch keeps attention's usual one. Elsewhere it is a warning.
    """
    before = (torch.are_deterministic_algorithms_enabled(),
              torch.is_deterministic_algorithms_warn_only_enabled(),
              torch.utils.deterministic.fill_uninitialized_memory)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # cuBLAS asks for it
    torch.use_deterministic_algorithms(on or before[0], warn_only=device.type != "cuda")
    torch.utils.deterministic.fill_uninitialized_memory = False     # we read none
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = before[2]
