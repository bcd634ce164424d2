"""The machine: what it is asked for and has not, in a line; precision, peaks, strict arithmetic."""
import gc

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fast.nf4 import NF4Linear
from lora import LoRAConfig, add_lora
from model import GPT, GPTConfig
from run import device as devices
from run.device import peak_flops, pick_device, pick_dtype, settled
from run.parallel import Parallel, lower_stream
from run.presets import PRESETS
from run.processes import Processes, deterministic, processes

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpus(monkeypatch):
    """Say that there are so many GPUs of a capability."""
    def say(count, capability=(9, 0), name="NVIDIA H100 80GB HBM3"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    return say


def test_a_gpu_where_there_is_none_is_refused(gpus):
    gpus(0)
    with pytest.raises(ValueError, match="^device=cuda is not available: PyTorch .* sees no GPU"):
        pick_device("cuda")


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_more_ranks_than_gpus_are_refused(gpus, monkeypatch, name):
    gpus(2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="needs GPU number 2, .* start at most 2 processes"):
        pick_device(name)


def test_ranks_on_gpus_without_nccl_are_refused(gpus, monkeypatch):
    gpus(2)
    for key, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(ValueError, match="has no NCCL, which 2 processes on GPUs need; start one"):
        with processes("cuda"):
            pass


@pytest.mark.parametrize("capability,dtype", [
    ((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16), ((7, 5), torch.float16),     # T4
    ((7, 0), torch.float16), ((6, 1), torch.float32)])      # V100; without tensor cores
def test_a_gpu_has_the_fastest_precision_of_its_kind(gpus, capability, dtype):
    gpus(1, capability)
    assert pick_dtype("auto", GPU) == dtype


def test_bfloat16_before_ampere_is_refused(gpus):
    gpus(1, (7, 5), "Tesla T4")
    with pytest.raises(ValueError, match="^dtype=bfloat16 is not native on Tesla T4 "):
        pick_dtype("bfloat16", GPU)


@pytest.mark.parametrize("name,peak", [
    ("NVIDIA L4", 121), ("NVIDIA L40", 181), ("NVIDIA L40S", 362), ("NVIDIA A10", 125),
    ("NVIDIA A10G", 70), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA RTX A6000", 155),
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 NVL", 835), ("NVIDIA H100 PCIe", 756),
    ("NVIDIA GH200 480GB", 989), ("NVIDIA B200", 2250), ("NVIDIA GB200", 2500),
    ("NVIDIA B300 SXM6 AC", 2250), ("NVIDIA GeForce RTX 5090", 209), ("NVIDIA GB300", None),
    ("NVIDIA H20", None), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GeForce RTX 4090 D", None)])
def test_a_peak_is_that_of_the_card_and_of_no_other(monkeypatch, name, peak):
    monkeypatch.setattr(devices, "device_name", lambda device: name)
    assert peak_flops(GPU) == (peak and peak * 1e12)


@pytest.mark.parametrize("kind,warn_only", [("cuda", False), ("cpu", True)])
def test_deterministic_is_strict_on_a_gpu(kind, warn_only):
    """Warned only, PyTorch keeps attention's usual backward pass, whose bits differ."""
    with deterministic(True, torch.device(kind)):
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled() == warn_only
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_on_a_gpu_what_stays_is_not_looked_at_for_garbage(kind):
    with pytest.raises(ZeroDivisionError), settled(torch.device(kind)):
        assert (gc.get_freeze_count() > 10_000) == (kind == "cuda")
        raise ZeroDivisionError
    assert gc.get_freeze_count() == 0


def test_presets_for_gpus_leave_the_order_of_sums_open():
    loose = {name for name, preset in PRESETS.items()
             if not preset.settings.get("deterministic", True)}
    assert loose == {name for name in PRESETS if name.startswith("gpt2-")}


class NoFloat64(TorchDispatchMode):
    """As Apple's GPUs: no tensor of float64."""
    def __torch_dispatch__(self, function, types, given=(), options=None):
        found = function(*given, **(options or {}))
        if any(isinstance(one, torch.Tensor) and one.dtype == torch.float64
               for one in tree_leaves(found)):
            raise TypeError(f"{function} makes a float64 tensor")
        return found


def test_nf4_needs_no_float64():
    layer = NF4Linear(torch.nn.Linear(64, 8))
    expected = layer.dequantize()
    with NoFloat64():
        assert torch.equal(layer.dequantize(), expected)


def test_ddp_does_not_send_the_codes_of_a_frozen_base(tmp_path):
    """A step broadcasts no buffer; here in a group of one."""
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://"
                                         f"{tmp_path / 'store'}")
    try:
        model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=1, n_embd=64))
        add_lora(model, LoRAConfig(r=2, quantize="nf4"))
        parallel = Parallel(model, Processes(0, 2, torch.device("cpu")), "none", torch.float32)
        assert list(model.buffers()) and not parallel.network.will_sync_module_buffers()
    finally:
        del parallel
        torch.distributed.destroy_process_group()


def test_the_residual_stream_is_lowered_in_training_only():
    """By its start, the embeddings; what blocks add to it is in autocast's dtype already."""
    model, seen = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=1, n_embd=8)), []
    for block in model.transformer.h:
        block.register_forward_hook(lambda module, given, found: seen.extend(
            (given[0].dtype, found.dtype)))
    lower_stream(model, torch.bfloat16)
    for mode, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        model.train(mode)
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.zeros(1, 8, dtype=torch.long))
        assert set(seen) == {dtype}
        seen.clear()
