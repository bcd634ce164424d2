"""What the ranks of a test do, each in a process of its own (bench.kills.start runs them)."""
import itertools
import os
import resource
import runpy
import signal
import sys
import threading
import time
from pathlib import Path

import torch

from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from model import GPT
from run import checkpoint, parallel
from run import watch as faults
from run.config import build
from train import TrainConfig, train


def quiet(out):
    """Both streams to a file beside the run, as one text."""
    sys.stdout = sys.stderr = open(Path(out).with_suffix(".txt"), "a", buffering=1)


def rank():
    return int(os.environ.get("RANK", 0))


def plain(settings):
    quiet(settings["out"])
    train(build(TrainConfig, settings))


def recording(settings, path):
    """Keeps the gradients of the first step, and the number of gradient buckets that were reduced
    over the ranks."""
    clip, gradients, reductions = torch.nn.utils.clip_grad_norm_, [], []

    def kept(parameters, max_norm):
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
    torch.nn.utils.clip_grad_norm_, parallel.DistributedDataParallel = kept, CountingDDP
    plain(settings)
    if rank() == 0:
        torch.save({"gradients": gradients, "reductions": len(reductions)}, path)


def commanded(settings):
    """As on a command line: errors become one line and an exit code."""
    from run.config import run_command
    quiet(settings["out"])
    run_command(lambda words: train(build(TrainConfig, settings)))


def with_small_files(settings):
    """No file can have more than 100 kB: the log can be written, a checkpoint cannot."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    commanded(settings)


def as_command(out, *words):
    """What `python train.py WORDS` does, but for the start of an interpreter."""
    from run.config import run_command
    from train import main
    quiet(out)
    sys.argv = ["train.py", *words]
    run_command(main)


def as_script(script, root, said):
    """What `torchrun SCRIPT ROOT` does; what it says is in a file."""
    sys.stdout = sys.stderr = open(said, "a", buffering=1)
    sys.argv = [script, root]
    runpy.run_path(script, run_name="__main__")


def dying_at(settings, name, count):
    """Dies by SIGKILL in front of the count-th call of os.`name`, or at a phase of step `count`."""
    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    if name in faults.PHASES:
        at = faults.Watch.at
        faults.Watch.at = lambda self, step, phase: (
            kill() if (step, phase) == (count, name) else at(self, step, phase))
    else:
        function, calls = getattr(os, name), []

        def counting(*arguments):
            calls.append(arguments)
            return kill() if len(calls) == count else function(*arguments)
        setattr(checkpoint.os, name, counting)
    plain(settings)


def dying_in_step(count, function, *arguments):
    """Does function(*arguments), and dies by SIGKILL in the count-th training step of all runs."""
    clip, steps = torch.nn.utils.clip_grad_norm_, itertools.count(1)

    def deadly(*given):
        if next(steps) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return clip(*given)
    torch.nn.utils.clip_grad_norm_ = deadly
    function(*arguments)


def with_a_bad_loss(settings, steps, bad_rank):
    """On one rank, the loss of the given steps is not a number."""
    forward, at, here = GPT.forward, faults.Watch.at, []

    def noted(self, step, phase):
        here[:] = [step]
        at(self, step, phase)

    def broken(self, *arguments, **named):
        logits, loss = forward(self, *arguments, **named)
        return logits, loss * float("nan") if rank() == bad_rank and self.training and \
            here[0] in steps else loss
    GPT.forward, faults.Watch.at = broken, noted
    commanded(settings)


def hanging(settings, stopped):
    """Rank 1 stands still in step 3: the whole process (as on a dead machine), or its loop."""
    at = faults.Watch.at

    def hang(self, step, phase):
        at(self, step, phase)
        if rank() == 1 and step == 3:
            os.kill(os.getpid(), signal.SIGSTOP) if stopped else threading.Event().wait()
    faults.Watch.at = hang
    commanded(settings)


def dying_rank(settings):
    """Rank 1 dies in step 3."""
    at = faults.Watch.at
    faults.Watch.at = lambda self, step, phase: (
        os.kill(os.getpid(), signal.SIGKILL) if rank() == 1 and step == 3 else
        at(self, step, phase))
    commanded(settings)


def different(settings):
    """Rank 1 was started with another learning rate."""
    commanded({**settings, "learning_rate": 0.005 * (2 - rank())})


def slowly(settings, until):
    """Each step waits a little, so that there is time to kill, until the file `until` is there."""
    at = faults.Watch.at

    def waiting(self, step, phase):
        at(self, step, phase)
        if phase == "computing" and not Path(until).exists():
            time.sleep(0.2)
    faults.Watch.at = waiting
    plain(settings)


def wait_for(condition, processes):
    """Until it is true; a process that ends before, or two minutes, mean that it never will be."""
    deadline = time.monotonic() + 120
    while not condition():
        dead = [process for process in processes if process.poll() is not None]
        assert not dead and time.monotonic() < deadline, [process.communicate() for process in dead]
        time.sleep(0.05)


def with_an_idle_parameter(settings):
    """The network has a parameter that takes no part in the loss."""
    start = GPT.__init__

    def larger(self, config):
        start(self, config)
        self.idle_gain = torch.nn.Parameter(torch.ones(3))
    GPT.__init__ = larger
    commanded(settings)


def fill(filler, pages=0):
    """Write the file until its disk has no byte left, but for so many pages of 4 KiB."""
    with open(filler, "wb", buffering=0) as file:
        for size in (1 << 16, 1 << 10, 1):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError:
                continue
        file.truncate(file.tell() - 4096 * pages)


def start_on_full_disks(settings, folder):
    """Start a run where no page is left, others where one more is each, and all again with room.
    Of each: its folder, what ended it, and the files that it left."""
    found = []
    for pages in range(8):
        out, error = folder / f"run{pages}", None
        fill(folder / "filler", pages)
        try:
            train(build(TrainConfig, {**settings, "out": str(out)}))
        except OSError as reason:
            error = str(reason)
        left = sorted(path.name for path in out.glob("*"))
        (folder / "filler").unlink()
        train(build(TrainConfig, {**settings, "out": str(out)}))
        found.append([str(out), error, left])
    return found


def on_a_full_disk(settings, first, last):
    """The disk of the run has no byte left from step `first` to step `last`."""
    at, filler = faults.Watch.at, Path(settings["out"]).parent / "filler"

    def filling(self, step, phase):
        at(self, step, phase)
        if (step, phase) == (first, "computing"):
            fill(filler)
        if (step, phase) == (last, "computing"):
            filler.unlink()
    faults.Watch.at = filling
    train(build(TrainConfig, settings))
