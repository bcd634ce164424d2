"""What this machine can do, measured: the limits that the benchmarks are shares of.

    peak = matmul_peak(device, torch.bfloat16)      # FLOP/s
"""
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable

import torch

from run.device import device_name, synchronize
from fast.linear import linear

RESULTS = Path(__file__).parent / "results"


def seconds(call: Callable[[], Any], device: torch.device, repeats: int = 5) -> float:
    """Median time of a call, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product, the best of two sizes and of two ways to call it."""
    best = 0.0
    for size in ((8192, 16384) if device.type == "cuda" else (1536, 2304)):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        fastest = min(seconds(lambda: a @ b, device, 9), seconds(lambda: linear(a, b), device, 9))
        best = max(best, 2 * size**3 / fastest)
    return best


def in_process(module: str, words: list[str]) -> dict[str, Any]:
    """The JSON that `python -m bench.MODULE WORDS` prints last: a row measured in a process of its
    own. RuntimeError with its last words where it dies."""
    done = subprocess.run([sys.executable, "-m", f"bench.{module}", *words], text=True,
                          capture_output=True, cwd=Path(__file__).parent.parent)
    if done.returncode:
        died = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300]
        raise RuntimeError(f"bench.{module} {' '.join(words)}: {died}")
    return json.loads(done.stdout.splitlines()[-1])


def processor() -> str:
    """The CPU's model name where the system tells it."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines()
             if line.startswith("model name")] if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def write_results(name: str, device: torch.device, rows: list[dict[str, Any]],
                  **facts: Any) -> Path:
    """bench/results/<name>.json: the rows with date, machine and versions."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({
        "date": datetime.date.today().isoformat(), "device": device_name(device),
        "processor": processor(), "torch": torch.__version__, "python": platform.python_version(),
        **facts, "rows": rows}, indent=1) + "\n")
    return path
