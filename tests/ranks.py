"""What the ranks of a test do, each in a process of its own (bench.kills.start runs them)."""
import ctypes
import itertools
import json
import multiprocessing
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

from bench.kills import differences, start
from bpe import Tokenizer
from data import shards
from data.prepared import write_dataset
from data.writer import ShardWriter
from experiments import compare
from model import GPT, GPTConfig
from run import checkpoint, parallel
from run import watch as faults
from run.config import build
from train import TrainConfig, train


def exit_codes(function, number, *arguments):
    """Those of function(*arguments) as so many ranks."""
    processes = start(function, number, *arguments)
    for process in processes:
        process.join(timeout=1800)
    return [process.exitcode for process in processes]


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


def commanded(settings, said=""):
    """As on a command line: errors become one line and an exit code."""
    from run.config import run_command
    quiet(said or settings["out"])
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


def dying_once(settings):
    """Rank 1 dies in step 7, where torchrun has not restarted it yet."""
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and rank() == 1:
        dying_at(settings, "computing", 7)
    plain(settings)


def under_torchrun(function, *arguments):
    """What `torchrun --standalone --nproc_per_node=2 --max-restarts=1` does: its agent, whose ranks
    are forks of this process, so that none has to import PyTorch."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    elastic_launch(LaunchConfig(1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
                                run_id="1", max_restarts=1, start_method="fork"),
                   function)(*arguments)


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


def holding(folder):
    """Holds a folder's lock until it is killed."""
    with faults.locked(folder):
        (folder / "held").touch()
        threading.Event().wait()


def comparing(folder, words):
    """`python -m experiments.compare WORDS`, but its runs are forks of this process."""
    quiet(folder)
    context = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda name: context
    compare.main(words)


def verifying(folder, times):
    for _ in range(times):
        shards.verify(folder)


def wait_for(condition, processes=()):
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


NO_DISK = 77            # the exit code where a machine lets nobody mount a file system


def on_a_small_disk(disk, size, function, *arguments):
    """function(*arguments) with a file system of this size at `disk`, which only this process
    sees. What it prints is in a file beside it."""
    quiet(disk)
    libc, own = ctypes.CDLL(None), (("uid_map", os.getuid()), ("gid_map", os.getgid()))
    if libc.unshare(0x10000000 | 0x20000):              # CLONE_NEWUSER | CLONE_NEWNS
        sys.exit(NO_DISK)
    Path("/proc/self/setgroups").write_text("deny")
    for file, number in own:
        Path("/proc/self", file).write_text(f"0 {number} 1")        # root, in here
    if libc.mount(b"tmpfs", os.fsencode(disk), b"tmpfs", 0, f"size={size}".encode()):
        sys.exit(NO_DISK)
    function(*arguments)


def start_on_full_disks(settings, disk):
    """Start a run where no page is left, others where one more is each, and all again with room.
    Of each: its folder, what ended it, and the files that it left; and how it differs from the
    first."""
    found = []
    for pages in range(8):
        out, error = disk / f"run{pages}", None
        fill(disk / "filler", pages)
        try:
            train(build(TrainConfig, {**settings, "out": str(out)}))
        except OSError as reason:
            error = str(reason)
        left = sorted(path.name for path in out.glob("*"))
        (disk / "filler").unlink()
        train(build(TrainConfig, {**settings, "out": str(out)}))
        found.append([str(out), error, left])
    print(json.dumps([found, [differences(disk / "run0", Path(out)) for out, *_ in found]]))


def write_on_full_disks(disk):
    """Write what is no run where there is no room; what each error says."""
    def shards():
        writer = ShardWriter(disk / "data", tokenizer, "made up")
        writer.add("train", [1] * 9000)
        writer.finish()
    tokenizer = Tokenizer([], special_tokens=())
    for pages, write in ((2, lambda: GPT(GPTConfig(8, 16, 2, 2, 8)).save_pretrained(disk / "hf")),
                         (2, shards), (0, lambda: tokenizer.save(disk / "tok.json")),
                         (0, lambda: write_dataset(disk / "chat", "chat", {}, "made up")),
                         (0, lambda: checkpoint.save(disk / "a.pt", {"a": torch.zeros(9999)}))):
        fill(disk / "filler", pages)
        try:
            write()
        except OSError as error:
            print(error)
        (disk / "filler").unlink()


def on_a_disk_that_is_full_for_a_while(settings, disk, first, last):
    """A run whose disk has no byte left from step `first` to step `last`, after an undisturbed
    one: its files, and how the two differ."""
    at, filler, one, two = faults.Watch.at, disk / "filler", disk / "one", disk / "two"

    def filling(self, step, phase):
        at(self, step, phase)
        if (step, phase) == (first, "computing"):
            fill(filler)
        if (step, phase) == (last, "computing"):
            filler.unlink()
    train(build(TrainConfig, {**settings, "out": str(one)}))
    faults.Watch.at = filling
    train(build(TrainConfig, {**settings, "out": str(two)}))
    print(sorted(os.listdir(two)), differences(one, two))
