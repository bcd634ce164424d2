"""Checkpoints that are whole or absent, written while training goes on.

`save` writes a temporary file in the same folder, flushes it to the disk (fsync), renames it and
flushes the folder: a crash at any moment leaves the old file or the new one, never half of either.
`save_last` keeps the ones before it too (last.pt, last.1.pt, ...); `load_last` takes the newest
that can be read. Files are read with weights_only=True, so a stranger's cannot run code.

    saver = Saver(out, keep=2)
    saver.save(state)           # returns as soon as the state is copied to host memory
    saver.close()               # waits for the file, raises if the last one could not be written
"""
import dataclasses
import math
import os
import pickle
import threading
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch.utils._pytree import tree_map_only

import lora
from formats.files import atomic_write
from formats.gpt2 import count_weights
from model import GPTConfig
from run.config import build, warn

FORMAT_VERSION = 1
BLOCK, ALIGNED = 2**26, 64              # bytes: of host memory at once, and where tensors begin
BEST = {"step": int, "model": dict, "config": dict, "base": str, "best_loss": float}    # best.pt's
REST = {"optimizer": dict, "scaler": dict, "stale": int, "recent": list, "data": str}   # last.pt's
SETTINGS = {"model": dict, "lora": dict, "init_from": str, "data": str, "template": str,
            "pooling": str}             # of train.py, those that a reader of a run asks for


def save(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values atomically. OSError when the disk refuses."""
    try:
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            torch.save({"format_version": FORMAT_VERSION, **state}, file)
    except (OSError, RuntimeError) as error:    # PyTorch's writer hides the disk's error in its own
        reason = error if isinstance(error, OSError) else error.__context__ or error
        raise OSError(f"{path} could not be written: {getattr(reason, 'strerror', 0) or reason}"
                      ) from error
    _sync_folder(path.parent)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint; ValueError says if it is damaged, of another version, or none of a run."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        _check_parts(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        check_state(state, path.stat().st_size)
    except Exception as error:      # whatever a damaged file makes the reader raise
        if isinstance(error, pickle.UnpicklingError):   # whose own words say how to let it run
            reason = "it holds more than tensors and plain values, and such a file can run code"
        else:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"checkpoint {path} cannot be read: {reason}") from error
    return state


def check_state(state: Any, size: int) -> None:
    """ValueError for what no run saves into a file of this size. What a stranger's file claims is
    compared with the tensors that are there before anything of a claimed size is made."""
    if not isinstance(state, dict) or state.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"it is not of format {FORMAT_VERSION}")
    for name, kind in {**BEST, **(REST if REST.keys() & state else {})}.items():
        if not isinstance(state.get(name), kind) or isinstance(state[name], bool):
            raise ValueError(f"its {name} is {state.get(name)!r:.80}, no {kind.__name__}")
    tensors, config = state["model"], state["config"]
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided \
                or tensor.device.type != "cpu" or not isinstance(name, str):
            raise ValueError(f"its weight {name!r:.80} is no tensor of numbers")
    if sum(tensor.nbytes for tensor in tensors.values()) > 2 * size:    # a tied one counts twice
        raise ValueError("its tensors are larger than the file")
    if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ValueError(f"its weight {bad[0]:.80} is not finite")
    check_settings(config)
    if config.get("model") is None and not config.get("lora"):
        raise ValueError("its settings do not say what model it is")
    shape = build(GPTConfig, config.get("model") or {})
    sizes = {**dataclasses.asdict(shape), "vocab_size": shape.padded_vocab_size}
    if config.get("lora"):              # whose shapes are compared where its base is known
        build(lora.LoRAConfig, config["lora"])
    elif shape.n_layer > len(tensors) or count_weights(sizes) > 4 * sum(
            tensor.numel() for tensor in tensors.values()):
        raise ValueError(f"its settings ask for {shape}, which is more than its tensors hold")
    elif "head.weight" in tensors and tensors["head.weight"].dim() != 2:
        raise ValueError("its head.weight is no matrix")
    losses = [state["best_loss"], *state.get("recent", ())]
    if state["step"] < 0 or type(state.get("threads", 1)) is not int or not all(
            isinstance(loss, float) and loss == loss for loss in losses):
        raise ValueError("its step, threads or losses are no numbers of a run")


def check_moments(optimizer: torch.optim.Optimizer, saved: dict[str, Any],
                  run: str | Path = "the run's folder") -> None:
    """ValueError where a saved state is not of this optimizer and its parameters. PyTorch's own
    check compares numbers of parameters only, and its fused kernels trust the shapes."""
    groups, moments, parameters = saved.get("param_groups"), saved.get("state"), {}
    right = isinstance(moments, dict) and isinstance(groups, list) \
        and len(groups) == len(optimizer.param_groups)
    for ours, theirs in zip(optimizer.param_groups, groups if right else ()):
        right &= isinstance(theirs, dict) and ours.keys() == theirs.keys() \
            and len(theirs["params"]) == len(ours["params"]) \
            and ours.get("rule") == theirs.get("rule")
        if right:
            parameters.update(zip(theirs["params"], ((ours, p) for p in ours["params"])))
    for i, entry in moments.items() if right else ():
        group, p = parameters.get(i, ({}, None))
        right &= p is not None and isinstance(entry, dict) and (
            "rule" in group or entry.keys() == {"step", "exp_avg", "exp_avg_sq"}) and all(
            getattr(value, "shape", ()) in ((), p.shape) for value in entry.values()
            if group.get("rule", "adamw") == "adamw")
    if not right:
        raise ValueError(f"the optimizer's state in the checkpoint is not that of this run; move "
                         f"{run} away to start anew")


def check_settings(settings: dict[str, Any]) -> None:
    """ValueError for what are no settings of a run: other types, or more than plain values."""
    def check(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                if not isinstance(key, str):
                    raise ValueError(f"its setting {key!r:.80} is no name")
                check(f"{name}.{key}", item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                check(name, item)
        elif not (value is None or isinstance(value, (str, bool, float))
                  or isinstance(value, int) and abs(value) < 2**63):
            raise ValueError(f"its setting {name:.80} is {value!r:.80}")

    check("config", settings)
    for name, kind in SETTINGS.items():
        if not isinstance(settings.get(name), (kind, type(None))):
            raise ValueError(f"its setting {name} is {settings[name]!r:.80}, no {kind.__name__}")


def trainable_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that a run changes, by the names of state_dict: all of a plain model's.

    Of a model with an adapter: the adapter, trained biases and modules and, where the base was
    quantised without what the adapter started with, the codes: a decomposition may differ on
    another machine.
    """
    if not hasattr(model, "adapters"):
        return model.state_dict()
    if len(model.adapters.configs) > 1:
        raise ValueError(f"a run trains one adapter; this model has "
                         f"{', '.join(model.adapters.configs)}")
    split = tuple(f"{name}.base_layer." for name, layer in lora.adapted_layers(model).items()
                  if getattr(layer.base_layer, "low_A", None) is not None)
    return {key: tensor.detach() for key, tensor in model.state_dict().items()
            if ".lora_adapters." in key or key.startswith(split)
            or key.replace(".base_layer.", ".") in model.adapters.original}


def load_trainable_state(model: nn.Module, state: dict[str, torch.Tensor],
                         run: str | Path = "the run") -> None:
    """Put a `trainable_state` back into such a model, which may have the same adapter. ValueError
    where it is that of another; `run` is its name there."""
    ours = trainable_state(model)
    for key in (*ours, *state):
        here, there = (f"{tuple(tensors[key].shape)} {tensors[key].dtype}" if key in tensors
                       else "no tensor" for tensors in (ours, state))
        if here != there:
            raise ValueError(f"{key:.200}: the checkpoint has {there}, this model has {here}; "
                             f"{run} has other model or lora settings")
    for key, tensor in ours.items():
        tensor.copy_(state[key])


def _check_parts(path: Path) -> None:
    """torch.save writes a zip file with a checksum of each part; torch.load does not compare them,
    so a flipped bit would become another weight. Reads the file once, at some 2 GB/s."""
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts) or \
                sum(part.file_size for part in parts) > path.stat().st_size:
            raise ValueError("its parts are larger than the file")
        if any(part.external_attr for part in parts):   # of a "folder" PyTorch fills no tensor,
            raise ValueError("its list of parts is damaged")        # and gives what was in memory
        if damaged := archive.testzip():
            raise ValueError(f"its part {damaged!r:.80} differs from its checksum")


def save_last(folder: Path, state: dict[str, Any], keep: int = 2, milestone: bool = False) -> Path:
    """Save as last.pt; what was last.pt becomes last.1.pt, and so on for `keep` files in all.

    A milestone is a second name of the same file, step_0001000.pt, that stays: it costs no time,
    and space only when last.pt has moved on. It comes first: a run that is killed between the two
    goes on from before, and makes it again.
    """
    new = folder / "last.new.pt"
    if milestone:
        name = folder / f"step_{state['step']:07d}.pt"
        save(name, state)
        new.unlink(missing_ok=True)
        try:
            os.link(name, new)
        except OSError:             # a file system without second names
            save(new, state)
    else:
        save(new, state)            # before anything is renamed: a full disk costs nothing
    return complete_renames(folder, keep)


def complete_renames(folder: Path, keep: int = 2) -> Path:
    """Give the files their names, as a save does at its end; a killed one may not have come to it.
    """
    new, names = folder / "last.new.pt", _last_files(folder, keep)
    if new.exists():
        for older, newer in zip(names[:0:-1], names[-2::-1]):
            if newer.exists():
                os.replace(newer, older)
        os.replace(new, names[0])
        _sync_folder(folder)
    return names[0]


def load_last(folder: str | Path) -> dict[str, Any] | None:
    """The newest readable checkpoint of a run, None if it has none; damaged ones are reported.

    Where only milestones are left, a ValueError names the newest: to go on from so far back, or to
    start anew and lose the log, is for the user to say.
    """
    folder = Path(folder)
    found = [folder / "last.new.pt", *_last_files(folder, 100)]
    found = [path for path in found if path.exists()]
    for path in found:
        try:
            return load(path)
        except ValueError as error:
            warn(f"warning: {error}; trying the one before it")
    if kept := milestones(folder):
        raise ValueError(f"no last.pt in {folder} can be read, and {kept[-1].name} is there: to go "
                         f"on from it, cp {kept[-1]} {folder / 'last.pt'}; to start anew, move "
                         f"{folder} away")
    if found:
        raise ValueError(f"no checkpoint in {folder} can be read; move it away to start anew")
    return None


def milestones(folder: str | Path) -> list[Path]:
    """The checkpoints that were kept for good, oldest first: step_0001000.pt, ..."""
    return sorted(Path(folder).glob("step_*.pt"))


class Saver:
    """Writes a run's checkpoints in a thread. Training waits for the copy to host memory only, and
    for the file before it where that is not finished yet: there is memory for one copy.

    keep: how many last*.pt. limit: how many milestones, 0 for all. max_failed: so many files in a
    row may fail, each with a warning; the next failure is an OSError. best_loss: of the best.pt
    that is on the disk; it moves when a better one has been written, not before.
    """

    def __init__(self, folder: Path, keep: int = 2, limit: int = 0, max_failed: int = 3,
                 best_loss: float = math.inf):
        self.folder, self.keep, self.limit, self.max_failed = folder, keep, limit, max_failed
        self.best_loss = best_loss
        self.blocks: list[np.ndarray] = []              # host memory, used again at each save
        self.thread: threading.Thread | None = None
        self.error: OSError | None = None
        self.failed = 0                                 # files in a row

    def save(self, state: dict[str, Any], last: bool = True, best: bool = False,
             milestone: bool = False) -> None:
        """Copy the state, then write it as last.pt (a milestone too) or best.pt or both.

        Of a state that is to be best.pt, state["best_loss"] is the loss.
        """
        self.wait()
        if not last:
            state = {key: state[key] for key in BEST}
        self.block, self.used = 0, 0                    # bytes of which block are taken
        copies: dict[tuple, torch.Tensor] = {}          # two names of a tensor: two of one copy

        def copied(value: torch.Tensor) -> torch.Tensor:
            key = (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
            if key not in copies or value.numel() == 0:
                copies[key] = self._room(value).copy_(value.detach(), non_blocking=True)
            return copies[key]
        state = tree_map_only(torch.Tensor, copied, state)
        if torch.cuda.is_available():
            torch.cuda.synchronize()                    # the copies to pinned memory
        self.thread = threading.Thread(target=self._write, args=(state, last, best, milestone),
                                       daemon=True)     # an interrupted program need not wait
        self.thread.start()

    def wait(self) -> None:
        """Until the file being written is there; count and report it if it failed."""
        if self.thread is None:
            return
        self.thread.join()
        self.thread, error, self.error = None, self.error, None
        if error is None:
            self.failed = 0
            return
        self.failed += 1
        warn(f"WARNING: NO CHECKPOINT WAS SAVED ({self.failed} in a row): {error}; the one before "
             f"it is intact; make room")
        if self.failed > self.max_failed:
            raise OSError(f"{self.failed} checkpoints in a row could not be written, "
                          f"max_failed_saves={self.max_failed}: {error}")

    def check(self) -> None:
        """Report a failed file as soon as it is known, without waiting for one."""
        if self.thread and not self.thread.is_alive():
            self.wait()

    def close(self) -> None:
        """Wait for the last file; OSError if it is not there."""
        self.wait()
        if self.failed:
            raise OSError(f"the last checkpoint in {self.folder} could not be written; make room "
                          f"and run the same command again")

    def _write(self, state: dict[str, Any], last: bool, best: bool, milestone: bool) -> None:
        try:
            if best:                # before last.pt, after which nobody would make it again
                save(self.folder / "best.pt", {key: state[key] for key in BEST})
                self.best_loss = state["best_loss"]
            if last:
                save_last(self.folder, state, self.keep, milestone)
            if milestone and self.limit:
                for old in milestones(self.folder)[:-self.limit]:
                    old.unlink()
        except OSError as error:
            self.error = error

    def _room(self, value: torch.Tensor) -> torch.Tensor:
        """An empty tensor like `value` in a block. From a GPU's blocks are pinned: it writes there
        at full speed. PyTorch pins powers of two, so a small tensor with a block of its own costs a
        call, and up to twice its memory. To torch.save each is a tensor of its own."""
        size = -(-value.nbytes // ALIGNED) * ALIGNED
        while self.block == len(self.blocks) or self.used + size > len(self.blocks[self.block]):
            if self.block == len(self.blocks):
                bytes_ = 1 << (max(size, BLOCK) - 1).bit_length()
                self.blocks.append(torch.empty(bytes_, dtype=torch.uint8,
                                               pin_memory=value.is_cuda).numpy())
            else:
                self.block, self.used = self.block + 1, 0
        start, self.used = self.used, self.used + size
        return torch.from_numpy(self.blocks[self.block][start:start + value.nbytes]) \
            .view(value.dtype).view(value.shape)


def _last_files(folder: Path, count: int) -> list[Path]:
    return [folder / ("last.pt" if i == 0 else f"last.{i}.pt") for i in range(count)]


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
