"""What the machine can do: device, precision, compiler, peak speed.

    device = pick_device("auto"); dtype = pick_dtype("auto", device)
    with autocast(device, dtype): ...
"""
import contextlib
import ctypes
import gc
import os
import re
import shutil
from pathlib import Path
from typing import Iterator

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Dense peaks in FLOP/s from NVIDIA's data sheets, without sparsity, for the model FLOPs utilisation
# (MFU): bf16 with float32 sums, float16 for cards before Ampere. The first entry that occurs in the
# device's name, as whole words, counts; one that is not here has MFU "?".
PEAK_FLOPS = {
    "GB200": 2500e12, "B300": 2250e12, "B200": 2250e12, "GH200": 989e12, "H200 NVL": 835e12,
    "H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12,
    "L40S": 362e12, "L40": 181e12, "L4": 121e12, "A10G": 70e12, "A10": 125e12, "RTX A6000": 155e12,
    "RTX 5090": 209e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "T4": 65e12,
}


def pick_device(name: str = "auto") -> torch.device:
    """The device that `name` says; "auto" is this process's GPU, else Apple's, else the CPU.

    Choosing the CPU also has this process keep freed memory, see `keep_memory`.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else \
               "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (index and not index.isdigit()):
        raise ValueError(f"device={name} is unknown; choose auto, cpu, cuda, cuda:N or mps")
    if kind == "cuda":
        number, here = int(index or os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if not here:
            raise ValueError(f"device={name} is not available: PyTorch {torch.__version__} sees no "
                             f"GPU of NVIDIA's here; use --device=cpu, or install a CUDA build")
        if number >= here:
            raise ValueError(f"device={name} needs GPU number {number}, and the {here} here are "
                             f"numbered from 0; start at most {here} processes "
                             f"(--nproc_per_node={here})")
        torch.cuda.set_device(number)
        return torch.device("cuda", number)
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device=mps is not available here; use --device=cpu")
    if kind == "cpu":
        keep_memory()
    return torch.device(kind)


def keep_memory() -> None:
    """Let freed tensors be allocated again without the system, where the C library is glibc.

    It gives every block above 32 MB back at once, and the next one comes page by page, zeroed: a
    quarter of a training step's time on a CPU. What tensors have freed stays with this process.
    """
    tune = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if tune:
        tune(-4, 0)                                     # M_MMAP_MAX: no blocks outside the heap
        tune(-1, 2**31 - 1)                             # M_TRIM_THRESHOLD: the heap does not shrink


@contextlib.contextmanager
def settled(device: torch.device) -> Iterator[None]:
    """On a GPU, Python's search for garbage passes over what is there now, 290,000 objects in a run
    of the demo: to look at them all stopped the host for 4 s (on a crowded CPU), and so a GPU."""
    if device.type == "cuda":
        gc.collect()
        gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware; elsewhere it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
    if device.type == "cpu":                            # PyTorch before it had that function
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision of matrix products: "auto" is bfloat16 where it is native, float16 on other
    GPUs with tensor cores (V100, T4), else float32."""
    if name == "auto":
        tensor_cores = device.type == "cuda" and \
            torch.cuda.get_device_capability(device) >= (7, 0)
        name = "bfloat16" if native_bf16(device) else "float16" if tensor_cores else "float32"
    if name == "float16" and device.type == "cpu":
        raise ValueError("dtype=float16 is not for training on a CPU; use bfloat16 or float32")
    if name == "bfloat16" and device.type == "cuda" and not native_bf16(device):
        raise ValueError(f"dtype=bfloat16 is not native on {torch.cuda.get_device_name(device)} "
                         f"(before Ampere); use float16 or float32")
    return DTYPES[name]


def autocast(device: torch.device, dtype: torch.dtype):
    """Mixed precision: matrix products in dtype, weights and reductions in float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def has_compiler(device: torch.device) -> bool:
    """Whether torch.compile can work here: it writes C++ for the CPU, Triton for the GPU."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton  # `import torch` does not bring it
        return has_triton()
    return device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is not None


def device_name(device: torch.device) -> str:
    """What a device calls itself; a CPU by its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)" if device.type == "cpu" else "mps"


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak in FLOP/s, None when it is not in the table, as of a slice of a card (MIG) or
    a laptop's."""
    name = device_name(device)
    if re.search(r"\b(MIG|Laptop|4090 D)\b", name):
        return None
    return next((peak for part, peak in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name)),
                None)


def host_memory(root: Path = Path("/")) -> int:
    """Bytes that processes may use here: memory and swap, or what the control group allows of the
    first, as in a container, and all swap."""
    memory, swap = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), 0
    info = root / "proc/meminfo"
    if info.exists():                                   # Linux
        kib = dict(re.findall(r"^(\w+): +(\d+) kB", info.read_text(), re.M))
        memory, swap = int(kib["MemTotal"]) << 10, int(kib["SwapTotal"]) << 10
        own = (root / "proc/self/cgroup").read_text()
        groups = dict(re.findall(r"^\d+:(.*):/?(.*)$", own, re.M))
        for name, limit in (("", "memory.max"), ("memory", "memory.limit_in_bytes")):
            # A container sees its own group at the top.
            for folder in (groups.get(name, ""), ""):
                file = root / "sys/fs/cgroup" / name / folder / limit
                if file.exists() and (text := file.read_text().strip()).isdigit():
                    memory = min(memory, int(text))
    return memory + swap


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that the clock measures work and not its submission."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory(device: torch.device) -> int:
    """The most bytes held so far: of the GPU by this process, else of the process itself."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys
    kib = 1 if sys.platform == "darwin" else 1024                   # macOS counts in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kib
