"""What a run says about itself: log.jsonl, run.json, progress bar, TensorBoard.

A run is a folder: config.json, run.json (how it was made, and its final figures), log.jsonl (one
object a line: every step has step, loss, lr, grad_norm, tokens, tokens_per_s; an evaluation has
step and what was measured), tokenizer.json, last.pt, best.pt. Only rank 0 writes. Tokens are those
that the model has read, prompts too but no padding; by them go tok/s and MFU.
"""
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from formats.files import write_text
from run.config import warn
from run.device import device_name, peak_flops, synchronize
from run.processes import Processes

REPOSITORY = Path(__file__).parent.parent
NAMES = {"loss": "validation loss", "bits_per_byte": "bits per byte"}
VALIDATION = ("loss", "perplexity", "accuracy")      # called val_... in the log
LOOK = 10.0                     # seconds between looks at the device, at most, or one step
SPIKE = 6.0                     # standard deviations above the last 100 losses: marked in the log


class Spikes:
    """How far a loss lies above the finite ones before it, in standard deviations."""
    WINDOW = 100

    def __init__(self, recent: list[float]):
        self.recent = list(recent)      # saved with the run, so that a resumed one judges alike

    def add(self, loss: float) -> None:
        """A loss that counts as usual from now on."""
        self.recent = [*self.recent, loss][-self.WINDOW:]

    def score(self, loss: float) -> float:
        """0 until the window is full: the first losses fall too fast to be compared."""
        if len(self.recent) < self.WINDOW:
            return 0.0
        mean = sum(self.recent) / self.WINDOW
        variance = sum((value - mean) ** 2 for value in self.recent) / self.WINDOW
        return (loss - mean) / max(variance ** 0.5, 1e-12)


class RunLog:
    """Figures of a run, to file, screen and TensorBoard; silent except on rank 0.

    Losses and norms come as tensors and stay on the device until `flush`, so that a step does not
    wait for them.
    """

    def __init__(self, out: Path, config: Any, start: int, flops_per_token: float,
                 batches: Any, world: Processes, recent: list[float]):
        self.active, self.out, self.world, self.device = world.rank == 0, out, world, world.device
        self.batch_tokens, self.max_steps = config.batch_tokens, config.max_steps
        self.batches, self.tokens = batches, batches.tokens_before(start)
        peak = peak_flops(self.device)
        self.mfu_per_token = flops_per_token / (peak * world.size) if peak else None
        # Steps between looks: one for two steps, then log_every, fewer where steps are long. A
        # signal is heard of then, and torchrun ends a rank 30 s after its own.
        self.every, self.log_every, self.start = 1, config.log_every, start
        self.each_step = config.skip_spikes > 0     # is judged by all before it, whenever they came
        self.pending: list[tuple[Any, ...]] = []
        self.last_loss = float("nan")
        self.spikes = Spikes(recent)
        self.bad_steps = 0                          # in a row that were not finite
        lines = repaired_log(out / "log.jsonl", start) if self.active else []
        # Seconds without evaluations and saves, of the whole run, as far as there is a log of it.
        self.busy = world.from_first(max(seconds_at(lines), default=0.0))
        self.unseen = 0 if self.busy else self.tokens       # tokens whose time is not known
        self.unlogged = 0.0                         # those since the last flush
        self.clock = time.perf_counter()
        self.terminal = sys.stderr.isatty()
        if not self.active:
            return
        self.path = out / "log.jsonl"
        self.file, self.unwritten, self.synced = open(self.path, "ab", buffering=0), b"", True
        self.board = (summary_writer()(str(out / "tensorboard"))
                      if config.report_to == "tensorboard" else None)
        self.bar = tqdm(total=self.max_steps, initial=start, unit="step", dynamic_ncols=True,
                        disable=not self.terminal)

    def begin(self, parameters: int, dtype: torch.dtype, compiled: bool) -> None:
        """Say what is about to be trained."""
        tokens = f"{self.batches.tokens_per_step:,.0f} tokens a step"
        if self.batches.tokens_per_step != self.batch_tokens:
            tokens += f" ({self.batch_tokens:,} with padding)"
        self.say(f"{self.out}: {'from' if self.start == 0 else 'going on at'} step {self.start} of "
                 f"{self.max_steps}, {parameters:,} parameters, {tokens}, "
                 f"{self.world.size} x {device_name(self.device)}, "
                 f"{str(dtype).removeprefix('torch.')}{', compiled' if compiled else ''}")

    def step(self, step: int, lr: float, loss: torch.Tensor, norm: torch.Tensor,
             skipped: torch.Tensor) -> None:
        """Note a finished step. loss: this rank's share of the step's mean loss."""
        self.pending.append((step, lr, self.batches.tokens_at(step - 1), loss, norm, skipped))

    def flush(self, *votes: bool) -> list[bool]:
        """Fetch the noted figures from the device, reduce them over ranks, log and show them.

        All ranks call it at the same steps. `votes` are agreed on by the way: of each, whether any
        rank has it.
        """
        self.lap()
        seconds, self.unlogged = self.unlogged, 0.0
        self.busy += seconds
        *agreed, each = self.world.sum(torch.tensor(
            [*votes, seconds / len(self.pending)], device=self.device)).tolist()
        losses = self.world.sum(torch.stack([row[3] for row in self.pending])).tolist()
        norms, skips = (torch.stack(column).tolist() for column in list(zip(*self.pending))[4:])
        step = self.pending[-1][0]
        if step > self.start + 1 and not self.each_step:            # the first one warms up
            self.every = max(1, min(self.log_every, int(LOOK * self.world.size / max(each, 1e-9))))
        speed = sum(row[2] for row in self.pending) / seconds
        for (step, lr, tokens, *_), loss, norm, skipped in zip(self.pending, losses, norms, skips):
            self.tokens += tokens
            finite = math.isfinite(loss) and math.isfinite(norm)
            line = {"step": step, "loss": loss if math.isfinite(loss) else None, "lr": lr,
                    "grad_norm": norm if math.isfinite(norm) else None,
                    "tokens": self.tokens, "tokens_per_s": round(speed, 1)}
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
        if self.active and (step > self.start + 2 and not self.each_step
                            or step % self.log_every == 0 or step == self.max_steps):
            left = (self.max_steps - step) * seconds / len(self.pending)
            self._show(step, loss, lr, norm, speed, left)           # of the last one
        self.pending.clear()
        return [count > 0 for count in agreed]

    def lap(self, training: bool = True) -> None:
        """Count the seconds since the last lap as training, or leave them out."""
        synchronize(self.device)
        now = time.perf_counter()
        self.unlogged += now - self.clock if training else 0
        self.clock = now

    def write(self, line: dict[str, Any]) -> None:
        """Append an object to log.jsonl and TensorBoard."""
        if not self.active:
            return
        self._append((json.dumps(line) + "\n").encode())
        try:
            for key, value in line.items() if self.board else ():
                several = {f"{key}/{i}": v for i, v in enumerate(value)} \
                    if isinstance(value, list) else {key: value}
                for name, number in several.items():
                    if isinstance(number, (int, float)) and key != "step":
                        self.board.add_scalar(name, number, line["step"])
        except OSError as error:
            self.board = None
            warn(f"WARNING: {self.out}/tensorboard cannot be written: {error}; it ends here, "
                 f"{self.path} goes on")

    def _append(self, data: bytes = b"") -> None:
        """Write to log.jsonl; on a full disk keep the lines until there is room."""
        waiting, self.unwritten = bool(self.unwritten), self.unwritten + data
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten):]
        except OSError as error:
            if not waiting:
                warn(f"WARNING: {self.path} cannot be written: {error}; its lines are kept and "
                     f"written when there is room")

    def sync(self) -> None:
        """Have the disk hold what is logged so far: a checkpoint must not be ahead of its log."""
        if self.active:
            self._append()
            synced, self.synced = self.synced, True
            try:
                os.fsync(self.file.fileno())
            except OSError as error:
                self.synced = False
                if synced:
                    warn(f"WARNING: {self.path} cannot be forced to the disk: {error}; should the "
                         f"machine fail now, its last lines may be missing")

    def evaluation(self, step: int, figures: dict[str, Any]) -> None:
        """Log what was measured at a step, and say it."""
        self.write({"step": step, **{f"val_{key}" if key.split("/")[0] in VALIDATION else key: value
                                     for key, value in figures.items() if key != "tokens"}})
        self.say(f"step {step}: " + ", ".join(
            f"{NAMES.get(key, key)} {in_digits(value)}" for key, value in figures.items()
            if key != "tokens"))

    def sample(self, step: int, text: str) -> None:
        """Log a text of the model, and show it."""
        self.write({"step": step, "sample": text})
        self.say(f"----- sample at step {step} " + "-" * 50 + f"\n{printable(text)}\n" + "-" * 75)

    def say(self, text: str) -> None:
        """Print on rank 0, above the bar."""
        if self.active:
            try:
                tqdm.write(text, file=sys.stdout)
                sys.stdout.flush()
            except OSError as error:        # `train.py | head`, or a full disk: the run goes on
                sys.stdout = open(os.devnull, "w")
                warn(f"warning: the screen cannot be written ({error}); {self.path} goes on")

    def close(self) -> None:
        """End the bar and the files."""
        if self.active:
            self.bar.close()
            self._append()
            if self.unwritten:
                raise OSError(f"{self.path} lacks its last lines: the disk has no room for them")
            self.file.close()
            if self.board:
                self.board.close()

    def _show(self, step: int, loss: float, lr: float, norm: float, speed: float, left: float
              ) -> None:
        mfu = f"{self.mfu_per_token * speed:.1%}" if self.mfu_per_token else "?"
        self.bar.set_postfix_str(f"loss {loss:.4f}, lr {lr:.1e}, {short(speed)} tok/s, MFU {mfu}",
                                 refresh=False)
        self.bar.update(step - self.bar.n)
        if not self.terminal:
            self.say(f"step {step}/{self.max_steps}  loss {loss:.4f}  lr {lr:.2e}  "
                     f"norm {norm:.2f}  {short(speed)} tok/s  MFU {mfu}"
                     + (f"  {left:.0f} s left" if step > self.start + 1 else ""))   # warmed up


def in_digits(value: Any) -> str:
    """A figure for the screen: floats, an interval's too, with four digits behind the point."""
    if isinstance(value, (tuple, list)):
        return " to ".join(map(in_digits, value))
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def printable(text: str) -> str:
    """A text with its control characters spelled, so that none of them acts on a terminal: the
    escape that begins a colour comes as "\\x1b". Line ends and tabs stay."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def repaired_log(path: Path, start: int) -> list[dict[str, Any]]:
    """Drop what a killed run left behind its checkpoint of step `start`: lines, half a line.
    Returns the lines that stay."""
    lines = [line for line in read_log(path) if line["step"] <= start] if path.exists() else []
    if path.exists():
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    return lines


def seconds_at(lines: list[dict[str, Any]]) -> list[float]:
    """Seconds of training at each line of a log, since the run began: what it had read by then, at
    the speed of each step."""
    found, tokens = [0.0], 0
    for line in lines:
        now, speed = (as_number(line.get(key)) for key in ("tokens", "tokens_per_s"))
        if math.isfinite(now):
            found.append(found[-1] + (max(0, now - tokens) / speed if speed > 0 else 0))
            tokens = now
        else:
            found.append(found[-1])
    return found[1:]


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log.jsonl. A last one that is not finished is left out, a damaged one too,
    with a warning."""
    lines, damaged = [], []
    *texts, _ = path.read_bytes().split(b"\n")                      # what follows the last \n
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text, parse_int=_whole)
        except (ValueError, RecursionError):                        # nested too deep is not ours
            line = None
        if isinstance(line, dict) and type(line.get("step")) is int:
            lines.append(line)
        else:
            damaged.append(number)
    if damaged:
        warn(f"warning: {path}: line {damaged[0]} is damaged and left out"
             + (f", and {len(damaged) - 1} more" if len(damaged) > 1 else ""))
    return lines


def as_number(value: Any) -> float:
    """A number of JSON; NaN of anything else, and of what no float holds."""
    known = isinstance(value, float) or isinstance(value, int) and abs(value) < 2**1000
    return value if known else math.nan


def _whole(digits: str) -> int:
    if len(digits) > 19:
        raise ValueError(f"{digits:.20}... is no number of a run")  # nor one that a float can be
    return int(digits)


def in_words(figures: dict[str, Any], entropy: float | None) -> str:
    """The last evaluation, for the screen."""
    return (f"validation loss {figures['loss']:.4f} nats a "
            + (f"text, accuracy {figures['accuracy']:.4f}" if "accuracy" in figures else "token")
            + (f" (unigram entropy of the corpus: {entropy:.4f})" if entropy else "")
            + (f", {figures['bits_per_byte']:.4f} bits per byte"
               if "bits_per_byte" in figures else ""))


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


def this_command() -> str:
    """The command line that this process was started with, to be typed again."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    start = f"torchrun --nproc_per_node={world}" if world > 1 else this_python()
    return f"{start} {shlex.join([os.path.relpath(sys.argv[0]), *sys.argv[1:]])}"


def this_python() -> str:
    """How to call this interpreter from here: ".venv/bin/python" or "python"."""
    here = os.path.relpath(sys.executable)
    return here if not here.startswith("..") else "python"


def short(number: float) -> str:
    """1500000 as "1.5M", in three digits."""
    number = float(f"{number:.3g}")                                 # 999,600 is 1M, not 1e+03k
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:g}{letter}"
    return f"{number:g}"


def summary_writer() -> type:
    """TensorBoard's, or an error that names the extra."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        raise ModuleNotFoundError('report_to=tensorboard needs the extra "tensorboard": pip '
                                  'install -c constraints.txt -e ".[tensorboard]"') from None
    return SummaryWriter
