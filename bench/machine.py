"""What all benchmarks share: the machine's limits, measuring in turn, tables, JSON.

    peak = matmul_peak(device, torch.bfloat16)                          # FLOP/s
    turns = take_turns(("ours", "peer"), measure, rounds=3, device=device)
    row = median_row(turns.rows["ours"], "ms")
    publish(report, "ladder-cpu", True, device, [row], turns.states)

A benchmark's `report` makes markdown of a result, new or read from its file, so the screen and
docs/measured.md say the same.
"""
import datetime
import math
import multiprocessing
import platform
import re
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterable

import torch

from fast.linear import linear
from formats.files import write_json
from run.device import device_name, synchronize

REPOSITORY = Path(__file__).parent.parent
RESULTS = REPOSITORY / "bench" / "results"
CPU = torch.device("cpu")
Row = dict[str, Any]
NOISE = 0.1                 # a round is not counted where time or machine are off by more


# ------------------------------------------------------------------------------ time and limits

def lasting(call: Callable[[], Any], device: torch.device = CPU) -> float:
    """Seconds of one call."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def seconds(call: Callable[[], Any], device: torch.device = CPU, repeats: int = 5) -> float:
    """Median time of a call, after one that warms up."""
    return statistics.median([lasting(call, device) for _ in range(repeats + 1)][1:])


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product, the best of two sizes and of two ways to call it."""
    best = 0.0
    for size in ((8192, 16384) if device.type == "cuda" else (1536, 2304)):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        fastest = min(seconds(lambda: a @ b, device, 9), seconds(lambda: linear(a, b), device, 9))
        best = max(best, 2 * size**3 / fastest)
    return best


def memory_bandwidth(device: torch.device, mib: int = 1024) -> float:
    """Bytes/s that large tensors are read with: the best of a sum and of a matrix-vector product,
    or read and written with by a copy."""
    side = math.isqrt(mib * 2**20 // 4)
    a = torch.ones(side, side, device=device)
    b, row = torch.empty_like(a), torch.ones(side, device=device)
    size = a.numel() * a.element_size()
    return max(size / seconds(lambda: a.sum(), device), size / seconds(lambda: a @ row, device),
               2 * size / seconds(lambda: b.copy_(a), device))


def machine_state(device: torch.device) -> float:
    """GFLOP/s of one float32 product, always the same: how fast the machine is just now."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.ones(size, size, device=device)
    return round(2e-9 * size**3 / seconds(lambda: a @ a, device, 9), 1)


# ---------------------------------------------------------------------------------------- turns

@dataclass
class Turns:
    """What take_turns measured: each key's rows in the order of the rounds, why a key has none or
    fewer, and the machine's state before the first round and after each."""
    rows: dict[Any, list[Row]] = field(default_factory=dict)
    missing: dict[Any, str] = field(default_factory=dict)
    states: list[float] = field(default_factory=list)


def take_turns(keys: Iterable[Any], measure: Callable[[Any], Row], rounds: int,
               device: torch.device = CPU, strict: bool = True) -> Turns:
    """Call measure(key) for each key, all keys once a round, so that a change of the machine's
    speed meets all. Not strict: a key that ends in a RuntimeError is left out from then on.

    A round that others on the machine disturbed (`disturbed`) is said, left out and taken again, in
    2 * rounds at most; where none was quiet, all are kept, which is said too.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds} must be at least 1")
    turns, taken = Turns(states=[machine_state(device)]), []
    quiet: list[dict[Any, Row]] = []
    while len(quiet) < rounds and len(taken) < 2 * rounds:
        taken.append(_take_round(keys, measure, len(taken) + 1, turns.missing, strict))
        turns.states.append(machine_state(device))
        why = disturbed(taken, turns.states)
        quiet = [found for found, reason in zip(taken, why) if not reason]
    for number, reason in enumerate(why, 1):
        if reason:
            print(f"round {number} was disturbed{' and is left out' if quiet else ''}: {reason}",
                  file=sys.stderr, flush=True)
    if not quiet:
        print("NO ROUND WAS QUIET, so all are kept: measure again on a quiet machine",
              file=sys.stderr, flush=True)
    for found in quiet or taken:
        for key, row in found.items():
            turns.rows.setdefault(key, []).append(row)
    return turns


def _take_round(keys: Iterable[Any], measure: Callable[[Any], Row], number: int,
                missing: dict[Any, str], strict: bool) -> dict[Any, Row]:
    """The rows of a round; a key without one is in `missing` from then on."""
    found = {}
    for key in keys:
        if key in missing:
            continue
        said = f"round {number}: {key if isinstance(key, str) else ' '.join(key)}"
        try:
            row = found[key] = measure(key)
        except RuntimeError as error:
            if strict:
                raise
            missing[key] = str(error)
            print(f"{said}: {error}", file=sys.stderr, flush=True)
            continue
        said += f": {row['ms']:,.1f} ms" if "ms" in row else ""
        print(said, file=sys.stderr, flush=True)
    return found


def disturbed(taken: list[dict[Any, Row]], states: list[float]) -> list[str]:
    """Why each round is not to be counted, "" where it is: the machine's state before and after it,
    or one of its times and the median of all rounds', are more than NOISE apart."""
    why = []
    for found, before, after in zip(taken, states, states[1:]):
        off = {key: row["ms"] / statistics.median(one[key]["ms"] for one in taken if key in one) - 1
               for key, row in found.items() if "ms" in row}
        key = max(off, key=lambda key: abs(off[key]), default=None)
        if max(before, after) > (1 + NOISE) * min(before, after):
            why.append(f"a product ran at {before:,} GFLOP/s before it and {after:,} after")
        elif key is not None and abs(off[key]) > NOISE:
            why.append(f"{key if isinstance(key, str) else ' '.join(key)} took {off[key]:+.0%} of "
                       f"its median")
        else:
            why.append("")
    return why


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What function(*arguments) returns in a new process, so that its memory is its own.
    RuntimeError, of one line, where it fails."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except Exception as error:
            raise RuntimeError(f"{type(error).__name__}: {str(error)[:300]}") from error


def median_row(rows: list[Row], *keys: str) -> Row:
    """One row of several rounds': medians of the named figures, to a tenth."""
    return {**rows[0], **{key: round(statistics.median(row[key] for row in rows), 1)
                          for key in keys}}


def median_step(rounds: list[Row]) -> Row:
    """One row of several rounds' of a training step, or of a generation. Each has its share of the
    limit that its own process measured, for the machine's speed changes."""
    row = median_row(rounds, "ms", "tokens_per_s", "memory_mib")
    shares = [one["tokens_per_s"] * one["work"] / one["limit"] for one in rounds]
    return {**row, "limit": statistics.median(one["limit"] for one in rounds),
            "share": round(statistics.median(shares), 3),
            "tokens_per_s_rounds": [round(one["tokens_per_s"], 1) for one in rounds]}


def with_spread(rows: list[Row]) -> list[Row]:
    """Rows with the range of their rounds' speeds over the median."""
    return [{**row, "spread": (max(row["tokens_per_s_rounds"]) - min(row["tokens_per_s_rounds"]))
             / row["tokens_per_s"]} for row in rows]


# --------------------------------------------------------------------------------------- output

def processor() -> str:
    """The CPU's model name where the system tells it."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)", info.read_text(), re.M) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def publish(report: Callable[[dict[str, Any]], str], name: str, save: bool, device: torch.device,
            rows: list[Row], states: list[float], **facts: Any) -> dict[str, Any]:
    """Print the report of a result: rows with date, machine, its states and versions. Where it is
    to be saved, write bench/results/NAME.json. Returns the result."""
    found = {"date": datetime.date.today().isoformat(), "device": device_name(device),
             "processor": processor(), "torch": torch.__version__,
             "python": platform.python_version(), "matmul_gflops_before_after": states, **facts,
             "rows": rows}
    print(report(found))
    if save:
        RESULTS.mkdir(exist_ok=True)
        write_json(RESULTS / f"{name}.json", found, indent=1)
        print(f"written: {name}.json; python -m bench.measured makes docs/measured.md of all")
    return found


def table(columns: str, rows: Iterable[Row]) -> str:
    """A markdown table with columns of even width. columns: "title=key:format" with " | " between;
    the title may be missing where it is the key, the format where the value is text. A key that a
    row has not leaves its cell empty."""
    parts = [re.fullmatch(r"(?:(.+)=)?([^:]+)(?::(.+))?", part).groups("")
             for part in columns.split(" | ")]
    lines = [[title or key for title, key, _ in parts],
             *([format(row[key], form) if key in row else "" for _, key, form in parts]
               for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def held(whether: bool) -> str:
    """How a limit that was set before is said to be kept."""
    return "held" if whether else "NOT held"


def where(found: dict[str, Any]) -> str:
    """Date, machine and versions of a result, in a line."""
    parts = [found["date"], found["processor"], found["device"]]
    if "torch" in found:
        parts.append(f"PyTorch {found['torch']}")
    if states := found.get("matmul_gflops_before_after"):
        quiet = max(states) <= (1 + NOISE) * min(states)
        parts.append(f"a product ran at {states[0]:,} GFLOP/s before and {states[-1]:,} after"
                     + f" (NOT QUIET: {min(states):,} to {max(states):,} between)" * (not quiet))
    return ", ".join(parts)
