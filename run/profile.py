"""Where the time of a step goes: --profile=STEPS, from the run's fourth step on.

Writes OUT/trace.json.gz, which https://ui.perfetto.dev draws, and on CUDA OUT/memory.pickle, for
https://docs.pytorch.org/memory_viz; prints a table that adds up to the step. A kernel counts where
it belongs by its name and shapes: products with the vocabulary's rows are the head's. On a GPU
`waiting` is the time in which no kernel runs, on a CPU what is outside PyTorch's operations.
"""
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any, Iterator

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from run.config import warn
from run.log import RunLog

SKIPPED = 3             # steps that compile and warm up
PARTS = {               # the first whose words are in the name of a kernel
    "communication": ("nccl", "gloo", "c10d", "all_reduce", "allgather", "reduce_scatter"),
    "attention": ("attention", "flash", "fmha", "softmax_backward", "_softmax"),
    "optimizer": ("adam", "optimizer", "foreach", "multi_tensor", "newton", "lerp"),
    "products": ("mm", "gemm", "linear", "cutlass", "cublas", "matmul", "conv", "nvjet", "bmm"),
    "data": ("data", "memcpy", "pin_memory"),
}


class Profiler:
    """Profiles some steps of a run on rank 0; with config.profile = 0, none."""

    def __init__(self, out: Path, config: Any, start: int, rows: int, log: RunLog):
        self.out, self.rows, self.log, self.cuda = out, rows, log, log.device.type == "cuda"
        self.steps = config.profile if log.active else 0
        self.first, self.running = start + SKIPPED, None
        if self.steps and self.first + self.steps > config.max_steps:   # a run that goes on
            log.say(f"no profile: it takes {SKIPPED + self.steps} steps, and "
                    f"{config.max_steps - start} are left")

    def batches(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same, with the time that reading them takes noted as data's."""
        while True:
            with record_function("data"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def step(self, step: int) -> None:
        """After each step."""
        if self.steps and step == self.first:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")         # its notes are not ours
            if self.cuda:
                torch.cuda.memory._record_memory_history(max_entries=1_000_000)
            self.running = profile(record_shapes=True, activities=[
                ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * self.cuda])
            self.log.lap()
            self.running.start()
            self.began = time.perf_counter()
        elif self.running and step == self.first + self.steps:
            self.log.lap()                                          # waits for the device
            seconds = time.perf_counter() - self.began
            self.running.stop()
            self.log.say(table(self.running, self.rows, seconds, self.steps, self.cuda))
            try:
                self.running.export_chrome_trace(str(self.out / "trace.json.gz"))
                if self.cuda:
                    torch.cuda.memory._dump_snapshot(str(self.out / "memory.pickle"))
            except OSError as error:                                # a full disk ends no run
                warn(f"warning: no trace in {self.out}: {error}")
            if self.cuda:
                torch.cuda.memory._record_memory_history(enabled=None)
            self.running = None


def table(running: profile, rows: int, seconds: float, steps: int, cuda: bool) -> str:
    """Milliseconds of a step by part; they add up to it. rows: of the head."""
    spent: Counter[str] = Counter()
    for event in running.key_averages(group_by_input_shape=True):
        name, own = event.key.lower(), (event.self_device_time_total if cuda
                                        else event.self_cpu_time_total)
        part = next((part for part, words in PARTS.items() if any(w in name for w in words)),
                    "elementwise")
        if part == "products" and any(rows in shape for shape in event.input_shapes or ()
                                      if isinstance(shape, list)):
            part = "head"
        spent[part] += own / 1e3 / steps
    whole = 1e3 * seconds / steps
    spent["waiting"] = whole - sum(spent.values())
    return "\n".join([f"profile of {steps} steps:  ms a step   share"] + [
        f"  {part:14} {ms:15.2f}  {ms / whole:6.1%}" for part, ms in spent.most_common()
    ] + [f"  {'step':14} {whole:15.2f}  100.0%"])
