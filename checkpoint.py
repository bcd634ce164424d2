"""Checkpoints that are whole or absent.

`save` writes a temporary file in the same folder, flushes it to the disk (fsync), renames it and
flushes the folder: a crash at any moment leaves the old file or the new one, never half of either.
`save_last` keeps the ones before it too (last.pt, last.1.pt, ...); `load_last` takes the newest
that can be read. Files are read with weights_only=True, so a stranger's cannot run code.
"""
import os
import sys
from pathlib import Path
from typing import Any

import torch

FORMAT_VERSION = 1


def save(path: str | Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values atomically. OSError when the disk refuses."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save({"format_version": FORMAT_VERSION, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def load(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint; ValueError says if it is damaged or of another version."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:      # whatever a damaged file makes the reader raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"checkpoint {path} cannot be read: {reason}") from error
    if not isinstance(state, dict) or state.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"checkpoint {path} is not of format {FORMAT_VERSION}")
    return state


def save_last(folder: str | Path, state: dict[str, Any], keep: int = 2) -> Path:
    """Save as last.pt; what was last.pt becomes last.1.pt, and so on for `keep` files in all."""
    folder = Path(folder)
    new = folder / "last.new.pt"
    save(new, state)                # before anything is renamed: a full disk costs nothing
    names = _last_files(folder, keep)
    for older, newer in zip(names[:0:-1], names[-2::-1]):
        if newer.exists():
            os.replace(newer, older)
    os.replace(new, names[0])
    _sync_folder(folder)
    return names[0]


def load_last(folder: str | Path, map_location: Any = "cpu") -> dict[str, Any] | None:
    """The newest readable checkpoint of a run, None if it has none; damaged ones are reported."""
    folder = Path(folder)
    found = [folder / "last.new.pt", *_last_files(folder, 100)]
    found = [path for path in found if path.exists()]
    for path in found:
        try:
            return load(path, map_location)
        except ValueError as error:
            print(f"warning: {error}; trying the one before it", file=sys.stderr)
    if found:
        raise ValueError(f"no checkpoint in {folder} can be read; move it away to start anew")
    return None


def _last_files(folder: Path, count: int) -> list[Path]:
    return [folder / ("last.pt" if i == 0 else f"last.{i}.pt") for i in range(count)]


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
