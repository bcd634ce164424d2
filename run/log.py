"""What a run says about itself: log.jsonl, run.json, progress bar, TensorBoard, the dry run.

A run is a folder: config.json, run.json (how it was made, and its final figures), log.jsonl (one
object a line: every step has step, loss, lr, grad_norm, tokens, tokens_per_s; an evaluation has
step and what was measured), tokenizer.json, last.pt, best.pt. Only rank 0 writes.
"""
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from fast.cross_entropy import head_memory
from run.device import device_name, peak_flops, peak_memory, synchronize
from run.watch import Spikes
from run.processes import Processes
from optim import learning_rate

REPOSITORY = Path(__file__).parent.parent
NAMES = {"loss": "validation loss", "bits_per_byte": "bits per byte"}
VALIDATION = ("loss", "perplexity", "accuracy")      # called val_... in the log
SPIKE = 6.0                     # standard deviations above the last 100 losses: marked in the log


class RunLog:
    """Figures of a run, to file, screen and TensorBoard; silent except on rank 0.

    Losses and norms come as tensors and stay on the device until `flush`, so that a step does not
    wait for them.
    """

    def __init__(self, out: Path, config: Any, start: int, flops_per_token: float,
                 device: torch.device, world: Processes, recent: list[float]):
        self.active, self.world, self.device = world.rank == 0, world, device
        self.tokens_per_step, self.max_steps = config.batch_tokens, config.max_steps
        peak = peak_flops(device)
        self.mfu_per_token = flops_per_token / (peak * world.size) if peak else None
        self.pending: list[tuple[int, float, torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.last_loss = float("nan")
        self.spikes = Spikes(recent)
        self.bad_steps = 0                          # in a row that were not finite
        self.busy, self.trained_tokens = 0.0, 0     # seconds without evaluations and saves
        self.clock = time.perf_counter()
        self.terminal = sys.stderr.isatty()
        if not self.active:
            return
        self.file = open(repaired_log(out / "log.jsonl", start), "a", encoding="utf-8")
        self.board = _tensorboard(out) if config.report_to == "tensorboard" else None
        self.bar = tqdm(total=self.max_steps, initial=start, unit="step", dynamic_ncols=True,
                        disable=not self.terminal)

    def step(self, step: int, lr: float, loss: torch.Tensor, norm: torch.Tensor,
             skipped: torch.Tensor) -> None:
        """Note a finished step. loss: this rank's share of the step's mean loss."""
        self.pending.append((step, lr, loss, norm, skipped))

    def flush(self, stop: bool = False) -> bool:
        """Fetch the noted figures from the device, reduce them over ranks, log and show them.

        All ranks call it at the same steps. `stop` is agreed on by the way: returns whether any
        rank asked for it.
        """
        losses = self.world.sum(torch.stack([loss for _, _, loss, _, _ in self.pending]
                                            + [torch.tensor(float(stop), device=self.device)]))
        norms, skips = (torch.stack(column).tolist() for column in list(zip(*self.pending))[3:])
        *losses, stop_votes = losses.tolist()                       # waits for the device
        seconds, tokens = self.lap(), len(self.pending) * self.tokens_per_step
        self.trained_tokens += tokens
        speed = tokens / seconds
        for (step, lr, *_), loss, norm, skipped in zip(self.pending, losses, norms, skips):
            finite = math.isfinite(loss) and math.isfinite(norm)
            line = {"step": step, "loss": loss if math.isfinite(loss) else None, "lr": lr,
                    "grad_norm": norm if math.isfinite(norm) else None,
                    "tokens": step * self.tokens_per_step, "tokens_per_s": round(speed, 1)}
            if skipped:
                line["skipped"] = "spike" if finite else "not finite"
            spike = self.spikes.score(loss) if finite else 0.0
            if spike > SPIKE or skipped:
                line["spike"] = round(spike, 2)
                self.say(f"step {step}: loss {loss:.4f}, gradient norm {norm:.4f}"
                         + (f", {spike:.1f} standard deviations above the last {Spikes.WINDOW}"
                            if spike > 0 else "") + (", not applied" if skipped else ""))
            self.bad_steps = 0 if finite else self.bad_steps + 1
            if finite:
                self.last_loss = loss
                self.spikes.add(loss)
            self.write(line)
        if self.active:
            self._show(self.pending[-1][0], losses[-1], self.pending[-1][1], norms[-1], speed)
        self.pending.clear()
        return stop_votes > 0

    def lap(self, training: bool = True) -> float:
        """Seconds since the last lap; those of training are added to `busy`."""
        synchronize(self.device)
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        self.busy += seconds if training else 0
        return seconds

    def write(self, line: dict[str, Any]) -> None:
        """Append an object to log.jsonl and TensorBoard."""
        if not self.active:
            return
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        if self.board:
            for key, value in line.items():
                if isinstance(value, (int, float)) and key != "step":
                    self.board.add_scalar(key, value, line["step"])

    def evaluation(self, step: int, figures: dict[str, Any]) -> None:
        """Log what was measured at a step, and say it."""
        self.write({"step": step, **{f"val_{key}" if key in VALIDATION else key: value
                                     for key, value in figures.items() if key != "tokens"}})
        self.say(f"step {step}: " + ", ".join(
            f"{NAMES.get(key, key)} {value:.4f}" if isinstance(value, float) else f"{key} {value}"
            for key, value in figures.items() if key != "tokens"))

    def sample(self, step: int, text: str) -> None:
        """Log a text of the model, and show it."""
        self.write({"step": step, "sample": text})
        self.say(f"----- sample at step {step} " + "-" * 50 + f"\n{text}\n" + "-" * 75)

    def say(self, text: str) -> None:
        """Print on rank 0, above the bar."""
        if self.active:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        """End the bar and the files."""
        if self.active:
            self.bar.close()
            self.file.close()
            if self.board:
                self.board.close()

    def _show(self, step: int, loss: float, lr: float, norm: float, speed: float) -> None:
        mfu = f"{self.mfu_per_token * speed:.1%}" if self.mfu_per_token else "?"
        self.bar.set_postfix_str(f"loss {loss:.4f}, lr {lr:.1e}, {_short(speed)} tok/s, MFU {mfu}",
                                 refresh=False)
        self.bar.update(step - self.bar.n)
        if not self.terminal:
            left = (self.max_steps - step) * self.tokens_per_step / speed
            self.say(f"step {step}/{self.max_steps}  loss {loss:.4f}  lr {lr:.2e}  "
                     f"norm {norm:.2f}  {_short(speed)} tok/s  MFU {mfu}  {left:.0f} s left")


def repaired_log(path: Path, start: int) -> Path:
    """Drop what a killed run left behind its checkpoint of step `start`: lines, half a line."""
    if path.exists():
        kept = [line for line in read_log(path) if line["step"] <= start]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(temporary, path)
    return path


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log.jsonl. A last one that is not finished is left out, a damaged one too,
    with a warning."""
    lines, damaged = [], []
    *texts, _ = path.read_bytes().split(b"\n")                      # what follows the last \n
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):                        # nested too deep is not ours
            line = None
        if isinstance(line, dict) and type(line.get("step")) is int:
            lines.append(line)
        else:
            damaged.append(number)
    if damaged:
        print(f"warning: {path}: line {damaged[0]} is damaged and left out"
              + (f", and {len(damaged) - 1} more" if len(damaged) > 1 else ""), file=sys.stderr)
    return lines


def finish(out: Path, log: RunLog, figures: dict[str, Any], best_loss: float, step: int,
           entropy: float | None) -> dict[str, Any]:
    """Write the final figures into run.json and say them; return the whole summary."""
    run = json.loads((out / "run.json").read_text()) if log.active else {}
    run["final"] = {"step": step, "tokens": step * log.tokens_per_step, "train_loss": log.last_loss,
                    **{key if key == "fit" else f"val_{key}": value
                       for key, value in figures.items()},
                    "best_val_loss": best_loss, "train_seconds": round(log.busy, 2),
                    "tokens_per_s": round(log.trained_tokens / max(log.busy, 1e-9), 1),
                    "peak_memory_mib": peak_memory(log.device) >> 20}
    if log.active:
        write_json(out / "run.json", run)
    if figures:
        log.say(f"validation loss {figures['loss']:.4f} nats a "
                + (f"text, accuracy {figures['accuracy']:.4f}" if "accuracy" in figures
                   else "token")
                + (f" (unigram entropy of the corpus: {entropy:.4f})" if entropy else "")
                + (f", {figures['bits_per_byte']:.4f} bits per byte"
                   if "bits_per_byte" in figures else ""))
    return {"out": str(out), **run}


def bad_steps(out: Path, count: int, step: int, batches: Any) -> str:
    """What to say when a run stops over losses that are not finite."""
    saved = [path.name for path in sorted(out.glob("last*.pt"))]
    return (f"loss or gradient was not finite in the {count} steps up to {step}; none was applied, "
            f"{', '.join(saved) or 'nothing'} in {out} is of before; step {step} read "
            f"{batches.where(step - 1)}; try a lower learning_rate, dtype=float32, or look at that "
            f"text")


def changes(there: dict[str, Any], here: dict[str, Any], rank: int) -> None:
    """Say which settings a resumed run has other than it was started with."""
    found = [f"{name} {there.get(name)} -> {here[name]}" for name in here
             if there.get(name) != here[name] and name != "out"]
    if found and rank == 0:
        print(f"settings changed since the checkpoint: {', '.join(found)}")


def finished(out: Path, rank: int) -> dict[str, Any]:
    """The summary of a run that has nothing left to do."""
    run = json.loads((out / "run.json").read_text())
    if "final" not in run:              # killed between its last checkpoint and its last word
        lines = read_log(out / "log.jsonl")
        run["final"] = {"step": lines[-1]["step"], **{
            name: next((line[key] for line in reversed(lines) if line.get(key) is not None), None)
            for name, key in (("tokens", "tokens"), ("train_loss", "loss"),
                              ("val_loss", "val_loss"), ("val_bits_per_byte", "bits_per_byte"))}}
        if rank == 0:
            write_json(out / "run.json", run)
    if rank == 0:
        print(f"{out} is finished: " + ", ".join(f"{key} {value}" for key, value
                                                 in run.get("final", {}).items()))
        print("a larger --max_steps trains on; another --out starts anew")
    return {"out": str(out), **run}


def provenance(device: torch.device, world: int, fingerprint: str) -> dict[str, Any]:
    """How a run was made: command, commit, versions, device, data."""
    def git(*words: str) -> str:
        try:
            return subprocess.run(["git", *words], cwd=REPOSITORY, capture_output=True, text=True,
                                  timeout=10).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return ""                                               # no git here, or no repository
    return {"command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "commit": git("rev-parse", "HEAD") or None,
            "dirty": bool(git("status", "--porcelain")),
            "python": platform.python_version(), "torch": torch.__version__,
            "numpy": np.__version__, "device": device_name(device), "ranks": world,
            "data": fingerprint}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all: a run that is killed here still has the file before."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def this_command() -> str:
    """The command line that this process was started with, to be typed again."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    start = f"torchrun --nproc_per_node={world}" if world > 1 else this_python()
    return f"{start} {shlex.join([os.path.relpath(sys.argv[0]), *sys.argv[1:]])}"


def this_python() -> str:
    """How to call this interpreter from here: ".venv/bin/python" or "python"."""
    here = os.path.relpath(sys.executable)
    return here if not here.startswith("..") else "python"


def sketch(values: list[float]) -> str:
    """A line of bars, one a value, as high as the value is large."""
    top = max(values) or 1.0
    return "".join(" ▁▂▃▄▅▆▇█"[round(8 * max(value, 0) / top)] for value in values)


def _short(number: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def _tensorboard(folder: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        raise ModuleNotFoundError('report_to=tensorboard needs the extra "tensorboard": pip '
                                  'install -c constraints.txt -e ".[tensorboard]"') from None
    return SummaryWriter(str(folder / "tensorboard"))


def dry_run(config: Any, model: torch.nn.Module, batches: Any, data: Any, world: Processes,
            dtype: torch.dtype) -> dict[str, Any]:
    """Print what a run would do: its steps, memory, schedule, trained tensors and an example."""
    c, n = config.model, model.num_params()
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    trained = sum(p.numel() for _, p in trainable)
    passes = config.max_steps * batches.rows_per_step / batches.rows_per_epoch
    # Activations a token and layer: 34 C bytes with 2-byte numbers (Korthikanti et al. 2022,
    # 2205.05198, table 2, without the attention matrix, which flash attention does not keep) and 2
    # more that autograd keeps; recomputed, its float32 input.
    size = torch.finfo(dtype).bits // 8
    layers = 18 * size * c.n_embd * (1 if config.recompute_activations else c.n_layer)
    layers += 4 * c.n_embd * c.n_layer if config.recompute_activations else 0
    tokens = batches.micro_batch * c.block_size
    live = tokens * layers
    if not data.classes:
        live += head_memory(tokens, c.n_embd, c.padded_vocab_size, world.device.type)
    state = 4 * n + 12 * trained + (size * n if size < 4 else 0)    # and autocast's copy
    rates = [learning_rate(round(i * (config.max_steps - 1) / 59), config.schedule,
                           config.max_steps, config.warmup_steps, config.learning_rate,
                           config.min_learning_rate, config.optim) for i in range(60)]
    x, y = next(batches.batches(0))[:2]
    lines = [
        f"{config.max_steps} steps of {config.batch_tokens:,} tokens = {world.size} rank(s) x "
        f"{batches.accumulation} micro-batch(es) x {batches.micro_batch} sequences x "
        f"{c.block_size} tokens; {passes:.2f} passes over "
        f"{batches.rows_per_epoch:,} rows of the data",
        f"parameters {n:,}, trained {trained:,}; "
        f"{model.flops_per_token() / 1e9:.3g} GFLOP a token, "
        f"{model.flops_per_token() * config.max_steps * config.batch_tokens:.3g} FLOP in all",
        f"memory a rank, estimated: {state / 2**30:.2f} GiB weights, gradients and AdamW, "
        f"{live / 2**30:.2f} GiB activations ({str(dtype).removeprefix('torch.')})",
        f"learning rate, {config.schedule}, {config.warmup_steps} steps of warmup, "
        f"peak {config.learning_rate:g}, floor {config.min_learning_rate:g}:",
        f"  [{sketch(rates)}]",
        "trained tensors (of blocks, the first stands for all):",
        *(f"  {name:40} {tuple(p.shape)}" for name, p in trainable
          if ".h." not in name or ".h.0." in name),
        f"the first example of step 0, {int((y[0] >= 0).sum())} of {len(y[0])} positions labelled; "
        f"what has no label stands in [brackets]:", marked_example(x[0], y[0], data)]
    if world.rank == 0:
        print("\n".join(lines))
    return {"parameters": n, "trained": trained, "max_steps": config.max_steps}


def marked_example(x: torch.Tensor, y: torch.Tensor, data: Any, width: int = 64) -> str:
    """The first `width` targets of an example as text, unlabelled stretches in brackets. Of a text
    with a class the end, and the class."""
    tokenizer = data.tokenizer
    if tokenizer is None:
        return f"  ids {x[:width].tolist()}"
    if data.classes:
        end = int((y >= 0).nonzero()[0]) + 1            # the first, where several are packed
        text = f"[{tokenizer.decode(x[max(0, end - width):end].tolist())}] {data.names[y[end - 1]]}"
        return "  " + text.replace("\n", "\n  ")
    ids = torch.cat([x[:1], torch.where(y >= 0, y, x.roll(-1))])
    labelled = [False, *(y >= 0).tolist()]              # nothing predicts the first token
    text, start = "", 0
    for end in range(1, min(width, len(ids)) + 1):
        if end == min(width, len(ids)) or labelled[end] != labelled[start]:
            piece = tokenizer.decode(ids[start:end].tolist())
            text += piece if labelled[start] else f"[{piece}]"
            start = end
    return "  " + text.replace("\n", "\n  ")
