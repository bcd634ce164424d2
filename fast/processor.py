"""Which of PyTorch's two libraries for CPUs, MKL and oneDNN, is slow on this processor."""
import torch


def processor() -> str:
    """What Linux says of the first core; "" elsewhere."""
    try:
        with open("/proc/cpuinfo") as file:
            return file.read(4096)
    except OSError:
        return ""


def mkl_is_foreign(about: str) -> bool:
    """Whether PyTorch has MKL and oneDNN for a processor that is not Intel's."""
    return (bool(about) and "GenuineIntel" not in about and torch.backends.mkl.is_available()
            and torch.backends.mkldnn.is_available())


MKL_IS_FOREIGN = mkl_is_foreign(processor())    # constants: torch.compile cannot read files
MKL_IS_SLOW = MKL_IS_FOREIGN and "avx512f" in processor()       # in float32, which it has AVX2 for
HAS_BFLOAT16 = "avx512_bf16" in processor()
