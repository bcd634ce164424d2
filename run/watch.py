"""Processes that get in each other's way, or leave each other waiting.

    with locked(out): ...                           two runs in one folder: the second is refused
    check_same_start(world, facts)                  ranks that were started differently: refused
    with Watch(world, minutes=30) as watch:         a rank that hangs: the others say which, and end
        watch.at(step, "computing")

Faults of the disk are checkpoint.py's, losses that are not finite train.py's, damaged data files
data/shards.py's.
"""
import fcntl
import hashlib
import json
import os
import socket
import threading
import time
from collections import deque
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

import torch
import torch.distributed as dist

from run.config import warn
from run.processes import Processes

PHASES = ("starting", "evaluating", "saving", "computing", "reducing")     # at a number of steps
EXIT_HANGS = 3
REPOSITORY = Path(__file__).parent.parent
ROOMS = ("run", "fast", "formats", "data", "eval")         # what training runs, beside the top


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this process. The kernel drops the lock when the process dies, however it
    dies, so a lock is never stale."""
    with open(folder / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(f"{folder} is in use by {file.read().strip() or 'another process'}; "
                             f"wait for its end, or choose another --out") from None
        try:
            file.truncate(0)
            os.write(file.fileno(), (_me() + "\n").encode())        # a buffer would fail twice
        except OSError as error:                        # a full disk, which names no file
            raise OSError(error.errno, error.strerror, file.name) from None
        yield


def code_hash() -> str:
    """A hash over the sources that training runs, 16 hex digits."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in ("*.py", *(f"{room}/*.py" for room in ROOMS))
                       for path in REPOSITORY.glob(pattern)):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def check_same_start(world: Processes, facts: dict[str, Any]) -> None:
    """All ranks must have been started with the same; ValueError names the rank and what differs.

    facts: name -> value that JSON can hold: settings, data fingerprint, code hash, versions.
    """
    if world.size == 1:
        return
    everyone: list[Any] = [None] * world.size
    dist.all_gather_object(everyone, (_me(), facts))
    first = everyone[0][1]
    for rank, (who, other) in enumerate(everyone):
        for name in {**first, **other}:
            if first.get(name) != other.get(name):
                raise ValueError(f"rank {rank} ({who}) has {name}={other.get(name)}, rank 0 has "
                                 f"{name}={first.get(name)}; start all ranks alike")


class Watch:
    """Ends this process when the ranks stand still, and names the one that they wait for.

    A rank that waits for others in a reduction cannot tell which of them is missing. So each has a
    thread that tells a shared store, every `minutes` / 20, that it lives and where its loop is.
    When a rank has been at one place for `minutes`, it prints which rank is behind, or shows no
    sign of life, and exits with EXIT_HANGS; torchrun then ends the others and may restart all.

    On a GPU hosts run ahead, and come to wait for their devices at one place. So `at` leaves a mark
    in the device's queue too, an event, and a rank's place is that of the last one which its device
    has come to. Where the network hangs and not a rank, all are at one place, and all are named.
    """

    def __init__(self, world: Processes, minutes: float):
        self.rank, self.size = world.rank, world.size
        self.limit = 60 * minutes
        self.place, self.since = (0, 0), time.monotonic()           # (step, phase)
        self.event = torch.cuda.Event if world.device.type == "cuda" else None
        self.marks: deque[tuple[Any, tuple[int, int]]] = deque()    # what the device has to come to
        self.reached = self.place
        self.stopped = threading.Event()
        if self.size > 1:
            self.store = world.store()
            self.thread = threading.Thread(target=self._run, daemon=True)
            self._tell(0)
            self.thread.start()

    def at(self, step: int, phase: str) -> None:
        """The loop has come to a place."""
        self.place, self.since = (step, PHASES.index(phase)), time.monotonic()
        if self.event and self.size > 1:
            mark = self.event()
            mark.record()
            self.marks.append((mark, self.place))

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *error: Any) -> None:
        self.stopped.set()
        if self.size > 1:
            self.thread.join()              # it must not talk to a store that is going away

    def _tell(self, beat: int) -> None:
        while self.marks and self.marks[0][0].query():              # which does not wait
            self.reached = self.marks.popleft()[1]
        place = self.reached if self.event else self.place
        self.store.set(f"watch/{self.rank}", json.dumps([beat, place, _me()]))

    def _run(self) -> None:
        beats = [(-1, 0.0)] * self.size     # of each rank: its last beat, and when it changed
        every, beat = min(5.0, self.limit / 20), 0
        keys = [f"watch/{rank}" for rank in range(self.size)]
        while not self.stopped.wait(every):
            beat += 1
            try:
                self._tell(beat)
                told = [json.loads(self.store.get(key)) if self.store.check([key]) else
                        [-1, (0, 0), "never heard of"] for key in keys]     # beat, place, who
            except RuntimeError:            # the store is gone with its process; the reductions
                return                      # that this one waits in fail by themselves
            for rank, (count, _, _) in enumerate(told):
                if count != beats[rank][0]:
                    beats[rank] = (count, time.monotonic())
            if time.monotonic() - self.since > self.limit:
                dead = [rank for rank, (_, when) in enumerate(beats)
                        if time.monotonic() - when > max(4 * every, self.limit / 2)]
                least = min(tuple(place) for _, place, _ in told)
                behind = dead or [rank for rank in range(self.size)
                                  if tuple(told[rank][1]) == least]
                for rank in behind:
                    step, phase = told[rank][1]
                    warn(f"error: rank {rank} ({told[rank][2]}) hangs"
                         f"{' and shows no sign of life' if rank in dead else ''}: last seen at "
                         f"step {step}, {PHASES[phase]}; rank {self.rank} has waited for "
                         f"{self.limit / 60:g} minutes at step {self.place[0]}, "
                         f"{PHASES[self.place[1]]}")
                os._exit(EXIT_HANGS)        # the main thread waits in a reduction: nobody else can


def _me() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"
