"""Where the time of a step goes: --profile=STEPS, from the run's fourth step on.

Writes OUT/trace.json.gz, which https://ui.perfetto.dev draws, and on CUDA OUT/memory.pickle, for
https://docs.pytorch.org/memory_viz; prints a table that adds up to the step. A kernel counts where
it belongs by its name and shapes: products with the vocabulary's rows are the head's, unless there
are as many of something else. On a GPU `waiting` is the time in which no kernel runs, on a CPU what
is outside PyTorch's operations. What the profiler itself does before and after is not training.
"""
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any, Iterator

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from fast.cross_entropy import COLUMNS
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

    def __init__(self, out: Path, config: Any, start: int, log: RunLog):
        self.out, self.log, self.cuda = out, log, log.device.type == "cuda"
        rows, C = config.model.padded_vocab_size, config.model.n_embd
        self.rows = {rows, rows + -rows % COLUMNS.get(log.device.type, 1)}
        self.others = {C, 3 * C, 4 * C, C // config.model.n_head}       # sizes of other products
        self.steps = config.profile if log.active else 0
        self.first, self.running = start + SKIPPED, None
        self.beside = [f"{name}={every}" for name in (
            "eval_every", "hellaswag_every", "sample_every", "save_every", "watch_every")
            if (every := getattr(config, name)) and
            (self.first + self.steps - 1) // every > (self.first - 1) // every]
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
            if self.running:
                self.others |= {batch[0].size(1), batch[0].numel()}
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
            self.log.lap(training=False)
            self.began = time.perf_counter()
        elif self.running and step == self.first + self.steps:
            self.log.lap()                                          # waits for the device
            seconds = time.perf_counter() - self.began
            self.running.stop()
            apart = not self.rows & self.others
            self.log.say(table(self.running, self.rows if apart else set(), seconds, self.steps,
                               self.cuda))
            if not apart:
                self.log.say(f"  the head's products are among the others: its {min(self.rows):,} "
                             f"rows are also the channels, the context or the tokens of a batch")
            if self.beside:
                self.log.say(f"  with what {', '.join(self.beside)} do in these steps; larger "
                             f"ones leave the steps alone")
            try:
                self.running.export_chrome_trace(str(self.out / "trace.json.gz"))
                if self.cuda:
                    torch.cuda.memory._dump_snapshot(str(self.out / "memory.pickle"))
            except OSError as error:                                # a full disk ends no run
                warn(f"warning: no trace in {self.out}: {error}")
            if self.cuda:
                torch.cuda.memory._record_memory_history(enabled=None)
            self.running = None
            self.log.lap(training=False)


def table(running: profile, rows: set[int], seconds: float, steps: int, cuda: bool) -> str:
    """Milliseconds of a step by part; they add up to it. rows: of the head, as it is multiplied."""
    spent: Counter[str] = Counter()
    for event in running.events():
        name, own = event.name.lower(), (event.self_device_time_total if cuda
                                         else event.self_cpu_time_total)
        part = next((part for part, words in PARTS.items() if any(w in name for w in words)),
                    "elementwise")
        caller = event.cpu_parent                                   # fast/attention.py multiplies
        while caller and part != "attention":
            part = "attention" if "causal_attention" in caller.name else part
            caller = caller.cpu_parent
        if part == "products" and any(rows & {*shape} for shape in event.input_shapes or ()
                                      if isinstance(shape, list)):
            part = "head"
        spent[part] += own / 1e3 / steps
    whole = 1e3 * seconds / steps
    spent["waiting"] = whole - sum(spent.values())
    return "\n".join([f"profile of {steps} steps:  ms a step   share"] + [
        f"  {part:14} {ms:15.2f}  {ms / whole:6.1%}" for part, ms in spent.most_common()
    ] + [f"  {'step':14} {whole:15.2f}  100.0%"])
