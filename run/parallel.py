"""One network on several ranks: a copy on each (DDP), or a part on each (FSDP2).

    parallel = Parallel(model, world, shard="none", dtype=torch.bfloat16)
    optimizer = make_optimizer(model, ...)          # after it: FSDP has replaced the parameters
    parallel.load(optimizer, state)                 # of a checkpoint, whichever way wrote it
    parallel.sync(last_micro_batch)                 # before each forward pass
    parallel.network(x, y, reduction="sum")
    whole = parallel.whole()                        # the plain module, to evaluate and sample
    state = parallel.state(optimizer)               # all ranks call it; the same format for both

References: Li et al. 2020 (2006.15704) for DDP, Zhao et al. 2023 (2304.11277) for FSDP; both are
PyTorch's own.
"""
import copy
import inspect
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from run.checkpoint import check_moments, load_trainable_state, trainable_state
from run.config import warn
from run.device import autocast, has_compiler
from run.processes import Processes

# Floating-point operations of a run on one device that make up for the minute of torch.compile.
COMPILE_PAYS = {"cuda": 1e17, "cpu": 1e13}


class Parallel:
    """Holds the module as it is trained (`network`) and gives it back whole.

    shard: "none" copies weights, gradients and optimizer state to every rank (DDP). "fsdp" splits
    all three, and gathers a block's weights when it computes. "zero2" splits gradients and
    optimizer state only: weights stay gathered from a micro-batch's forward pass to its end.
    """

    def __init__(self, model: nn.Module, world: Processes, shard: str, dtype: torch.dtype):
        if shard != "none" and world.size == 1:
            raise ValueError(f"shard={shard} needs several ranks; start them with torchrun, or "
                             f"leave it out")
        self.model, self.shard, self.rank = model, shard, world.rank
        self.network = model
        if shard == "none" and dtype == torch.bfloat16 and world.device.type == "cuda":
            lower_stream(model, dtype)
        if shard != "none":
            # Here, not above: it takes as long as half of PyTorch, and every command would wait.
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
            self.hollow = _hollow(copy.deepcopy(model))                 # what whole() fills
            mesh = init_device_mesh(world.device.type, (world.size,))
            # Gathered in the dtype of the products, reduced in float32. Embeddings are gathered in
            # it too, so the residual stream is in that dtype.
            options = dict(mesh=mesh, reshard_after_forward=shard == "fsdp",
                           mp_policy=MixedPrecisionPolicy(
                               param_dtype=None if dtype == torch.float32 else dtype,
                               reduce_dtype=torch.float32, cast_forward_inputs=False))
            for block in model.transformer.h:
                fully_shard(block, **options)
            fully_shard(model, **options)
        elif world.size > 1:
            # The only buffers, NF4's codes, never change. PyTorch 2.13 has a new name for it.
            known = inspect.signature(DistributedDataParallel).parameters
            name = "forward_sync_buffers" if "forward_sync_buffers" in known else \
                "broadcast_buffers"
            self.network = DistributedDataParallel(model, gradient_as_bucket_view=True,
                                                   **{name: False})
            # Those that have had no gradient yet; each leaves with its first one.
            self.idle = {name: p for name, p in model.named_parameters() if p.requires_grad}
            self.hooks = [p.register_post_accumulate_grad_hook(lambda _, name=name:
                                                               self.idle.pop(name, None))
                          for name, p in self.idle.items()]
            self.synced = False

    def sync(self, last: bool) -> None:
        """Gradients are reduced over the ranks with the last micro-batch only."""
        if self.shard != "none":
            self.model.set_requires_gradient_sync(last)
        elif self.network is not self.model:
            if self.hooks and self.synced:
                self._check_all_had_gradients()
            self.network.require_backward_grad_sync, self.synced = last, True

    def _check_all_had_gradients(self) -> None:
        """ValueError for parameters without one after the first backward pass. DDP would wait for
        them, and then gives them by numbers."""
        if self.idle:
            raise ValueError(f"{', '.join(self.idle):.300} take no part in the loss, and ranks "
                             f"would wait for their gradients; use them in the forward pass, take "
                             f"them out, or set requires_grad=False")
        while self.hooks:
            self.hooks.pop().remove()

    def whole(self) -> nn.Module:
        """The module with all its weights, outside DDP, FSDP and compiler. All ranks call it.

        Under FSDP it is a copy, which takes its memory until it is let go.
        """
        if self.shard == "none":
            return self.model
        plain = copy.deepcopy(self.hollow)
        gathered: dict[int, nn.Parameter] = {}          # a tied tensor is gathered once
        for name, p in self.model.named_parameters(remove_duplicate=False):
            if id(p) not in gathered:
                gathered[id(p)] = nn.Parameter(full(p.detach()), p.requires_grad)
            module, _, key = name.rpartition(".")
            setattr(plain.get_submodule(module), key, gathered[id(p)])
        return plain

    def same_when_evaluated(self, network: nn.Module, batches: Any) -> bool:
        """Whether evaluation is to be compiled as the network is: on a GPU, for windows of a shape.
        The copy that FSDP evaluates would be compiled each time."""
        return (next(self.model.parameters()).is_cuda and network is not self.network
                and batches.one_shape and self.shard == "none")

    def state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Weights (of an adapter's run those that it trains) and optimizer state, whole, in the
        format of one rank. All ranks call it, rank 0 has the result; what is split passes through
        its device a tensor at a time."""
        gathered: dict[int, torch.Tensor] = {}

        def taken(value: Any) -> Any:
            if not is_split(value):
                return value
            key = value.to_local().data_ptr()           # of two names of one tensor, the same
            if key not in gathered or not key:
                tensor = value.full_tensor()
                gathered[key] = tensor.cpu() if self.rank == 0 else tensor.new_empty(0)
            return gathered[key]
        return tree_map(taken, {"model": trainable_state(self.model),
                                "optimizer": optimizer.state_dict()})

    def check_finite(self, world: Processes) -> None:
        """FloatingPointError where a trained weight is not finite. All ranks call it."""
        named = [(name, p.to_local() if is_split(p) else p)
                 for name, p in self.model.named_parameters() if p.requires_grad]
        damaged = torch.stack([~p.detach().isfinite().all() for _, p in named])
        if world.sum(damaged.any().float()).item():
            name = next((name for (name, _), bad in zip(named, damaged.tolist()) if bad),
                        "on another rank")
            raise FloatingPointError(
                f"a weight is not finite ({name}), so no checkpoint was written; those that are "
                f"there are of before; try a lower learning_rate, or dtype=float32")

    def load(self, optimizer: torch.optim.Optimizer, state: dict[str, Any],
             run: str | Path = "the run's folder") -> None:
        """The inverse of `state`, which is that of a `run`; each rank keeps its part."""
        weights, moments = state["model"], state["optimizer"]
        check_moments(optimizer, moments, run)
        if self.shard != "none":
            ours = self.model.state_dict()
            weights = {name: _split(tensor, ours[name]) for name, tensor in weights.items()}
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            moments = {**moments, "state": {
                i: {key: _split(value, parameters[i]) for key, value in entry.items()}
                for i, entry in moments["state"].items()}}
        load_trainable_state(self.model, weights, run)
        settings = [{**group, "params": None} for group in optimizer.param_groups]
        optimizer.load_state_dict(moments)
        for group, own in zip(optimizer.param_groups, settings):    # what is asked for now
            group.update(own, params=group["params"])


def lower_stream(model: nn.Module, dtype: torch.dtype) -> None:
    """Train with the residual stream in dtype, as under FSDP: by its start, the embeddings, which
    autocast leaves in float32. A GPU moves a quarter less in a step, and no difference in loss was
    found (docs/LOG.md). Evaluation keeps float32."""
    for embedding in (model.transformer.wte, model.transformer.wpe):
        embedding.register_forward_hook(
            lambda module, given, found: found.to(dtype) if module.training else found)


def compiled(parallel: Parallel, mode: str, batches: Any, flops: float, world: Processes,
             dtype: torch.dtype) -> nn.Module:
    """The network under torch.compile where that pays; as it is, with a warning, where it fails.

    mode: on, off, or auto, which weighs `flops`, the work of the run on this device. The compiler
    runs on the first of `batches`, a loader; its gradients are thrown away, so that a failure costs
    no training.
    """
    device, network = world.device, parallel.network
    pays = has_compiler(device) and flops > COMPILE_PAYS.get(device.type, float("inf"))
    if mode == "off" or (mode == "auto" and not pays):
        return network
    faster = torch.compile(network, dynamic=not batches.one_shape)
    worked = torch.ones((), device=device)
    # DDP: not reduced, a rank that fails must not leave others waiting. FSDP would keep what it
    # does not reduce.
    parallel.sync(parallel.shard != "none")
    try:
        with autocast(device, dtype):
            _, nats = faster(*(part.to(device) for part in next(batches.batches(0))),
                             reduction="sum")
        nats.backward()
    except Exception as error:                          # whatever the compiler's many parts raise
        warn(f"warning: torch.compile failed, going on without it: {type(error).__name__}: "
             f"{str(error)[:200]!r}")
        worked.zero_()
    network.zero_grad(set_to_none=True)
    if world.size > 1:                                  # all ranks do the same
        dist.all_reduce(worked, dist.ReduceOp.MIN)
    return faster if worked else network


def _hollow(model: nn.Module) -> nn.Module:
    """The module with its parameters on the meta device, which holds no numbers."""
    for module in model.modules():
        for key, p in list(module.named_parameters(recurse=False)):
            setattr(module, key, nn.Parameter(p.to("meta"), p.requires_grad))
    return model


def full(tensor: Any) -> Any:
    """A tensor that is split over the ranks, put together; anything else as it is."""
    return tensor.full_tensor() if is_split(tensor) else tensor


def is_split(value: Any) -> bool:
    """Whether it is a DTensor, of which a rank holds a part."""
    return hasattr(value, "full_tensor")


def _split(tensor: Any, like: torch.Tensor) -> Any:
    """A whole tensor, split over the ranks as `like` is; counters stay as they are."""
    if not is_split(like) or not isinstance(tensor, torch.Tensor) or not tensor.dim():
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
