"""Token shards: text as memory-mapped token ids, checked once and read in any order.

A data set is a folder, which data/writer.py makes:

    train_0000.npy ... val_0000.npy    one flat array of ids each, uint16 or uint32, whole documents
    tokenizer.json                     the tokenizer that made them (bpe.Tokenizer.load)
    meta.json                          counts, checksums, source, the tokenizer's hash; written
                                       last, so a folder that has it is complete

The `.bin` shards of llm.c and modded-nanogpt are read too: 256 int32 (magic 20240520, version 1,
number of tokens), then uint16 ids of GPT-2's tokenizer, "train" or "val" in the file's name.

    verify(folder, cached=True)     # ValueError names the shard that is damaged, and the place
    tokens = open_split(folder, "train"); len(tokens); tokens.read(start, stop)
"""
import contextlib
import hashlib
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data import prepared
from data.prepared import AGAIN, DATA, FORMAT_VERSION, hash_facts
from formats.files import read_json, write_json

CHUNK = 1 << 22                 # ids that verify holds at once, for each thread
STAMP = ".verified.json"        # which files verify has read, so that it need not do so again
BIN_HEADER = 256 * 4            # bytes
BIN_MAGIC, BIN_VERSION = 20240520, 1
GPT2_VOCAB = 50257              # what a .bin shard is made with


def find(name: str | Path) -> Path:
    """The folder of a data set: a path, or the name of one that was prepared into data/<name>."""
    folder = Path(name) if Path(name).is_dir() else DATA / str(name)
    if (folder / "meta.json").exists() or list(folder.glob("*.bin")):
        return folder
    script = folder.name if (DATA / f"{folder.name}.py").exists() else "NAME"
    raise FileNotFoundError(f"there is no prepared data set in {folder}; "
                            f"make it with: python -m data.{script}")


def read_meta(folder: Path) -> dict[str, Any]:
    """meta.json of a data set; for a folder of .bin shards, what is known of those."""
    path = folder / "meta.json"
    if not path.exists():
        return {"version": FORMAT_VERSION, "source": "llm.c shards", "vocab_size": GPT2_VOCAB,
                "tokenizer_hash": None, "splits": {}}
    meta = prepared.read_meta(folder, "tokens")
    check_meta(meta, path)
    return meta


def check_meta(meta: dict[str, Any], path: Path) -> None:
    """ValueError for facts that are missing or that no ShardWriter writes."""
    def need(right: bool, what: str) -> None:
        if not right:
            raise ValueError(f"{path} is damaged: {what}; {AGAIN}")

    def whole(number: Any, most: int) -> bool:
        return type(number) is int and 1 <= number <= most

    vocab_size, made_with = meta.get("vocab_size"), meta.get("tokenizer_hash", 0)
    entropy, splits = meta.get("unigram_entropy", 0.0), meta.get("splits")
    need(whole(vocab_size, 2**32), f"vocab_size is {vocab_size!r:.50}")
    need(made_with is None or isinstance(made_with, str), "tokenizer_hash is no text")
    need(isinstance(meta.get("source"), str), "source is no text")
    need(isinstance(entropy, float) and math.isfinite(entropy) or entropy == 0,
         f"unigram_entropy is {entropy!r:.50}")
    need(isinstance(splits, dict) and len(splits) > 0, "it names no splits")
    for split, facts in splits.items():
        need(split in ("train", "val"), f"{split!r:.50} is no split")
        files = facts.get("files") if isinstance(facts, dict) else None
        need(isinstance(files, dict) and len(files) > 0, f"split {split!r:.50} has no files")
        for i, (name, file) in enumerate(files.items()):
            need(name == shard_name(split, i), f"shard {i} of {split!r:.50} is {name!r:.50}")
            need(isinstance(file, dict) and whole(file.get("tokens"), 2**62)
                 and isinstance(file.get("sha256"), str), f"{name} has no tokens or no sha256")
        need(facts.get("tokens") == sum(file["tokens"] for file in files.values()),
             f"the shards of {split} have not the {facts.get('tokens')!r:.50} tokens of the split")


def shard_name(split: str, number: int) -> str:
    """train_0000.npy and so on."""
    return f"{split}_{number:04d}.npy"


def fingerprint(folder: Path) -> str:
    """What identifies a data set's content: a hash over tokenizer, shards and their checksums.

    Those of .bin shards stand in no meta.json, so this reads such files, unless `verify` has."""
    meta = read_meta(folder)
    files = [[name, file] for split in meta["splits"].values()
             for name, file in split["files"].items()]
    return hash_facts(meta["tokenizer_hash"], files or sorted(verify(folder, cached=True).items()))


class Tokens:
    """The shards of a split as one long row of ids."""

    def __init__(self, shards: list[np.ndarray]):
        self.names = [getattr(shard, "filename", f"shard {i}") for i, shard in enumerate(shards)]
        self.shards = [np.asarray(shard) for shard in shards]       # a memmap's slices cost more
        self.starts = np.cumsum([0] + [len(shard) for shard in shards])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Ids start..stop-1 (fewer at the end of the split), int64."""
        parts = []
        stop = min(stop, len(self))
        shard = int(self.starts.searchsorted(start, "right")) - 1
        while start < stop:
            first = self.starts[shard]
            part = self.shards[shard][start - first:stop - first]
            parts.append(part)
            start += len(part)
            shard += 1
        if len(parts) == 1:
            return parts[0].astype(np.int64)
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)


def open_split(folder: Path, split: str) -> Tokens:
    """Memory-map the shards of "train" or "val". A missing or truncated one is a named error."""
    files = files_of(folder, read_meta(folder), split)
    if not files:
        raise FileNotFoundError(f"{folder} has no {split} shards")
    return Tokens([open_shard(path, facts) for path, facts in files.items()])


def verify(folder: Path, cached: bool = False) -> dict[str, str]:
    """The checksum of every shard's ids, {file name: SHA-256}; ValueError where one differs from
    meta.json's, or where an id is beyond the vocabulary.

    What was read is noted in a stamp beside the shards. With `cached`, a file whose size, time of
    change, checksum in meta.json and vocabulary are as in the stamp is not read again.
    """
    meta, stamp = read_meta(folder), {}
    with contextlib.suppress(ValueError, OSError):      # a stamp only saves time
        stamp = read_json(folder / STAMP)
    shards, noted, unread = files_of(folder, meta), {}, []
    for path, facts in shards.items():
        open_shard(path, facts)
        stat = path.stat()              # before it is read: a change meanwhile outdates the stamp
        last = stamp.get(path.name)
        sha256 = facts.get("sha256", last.get("sha256") if isinstance(last, dict) else None)
        noted[path.name] = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns,
                            "sha256": sha256, "vocab_size": meta["vocab_size"]}
        if not cached or last != noted[path.name] or not isinstance(sha256, str):
            unread.append(path)
    if unread:
        # hashlib and numpy let go of Python's lock, so shards are read side by side.
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, tqdm(
                desc=f"verifying {folder}", total=sum(noted[path.name]["size"] for path in unread),
                unit="B", unit_scale=True, delay=2, disable=None) as bar:
            for path, sha256 in zip(unread, pool.map(
                    lambda path: _verify(path, shards[path], meta["vocab_size"]), unread)):
                noted[path.name]["sha256"] = sha256
                bar.update(noted[path.name]["size"])
        with contextlib.suppress(OSError):      # cannot be written: it is read again next time
            write_json(folder / STAMP, noted)
    return {name: facts["sha256"] for name, facts in noted.items()}


def _verify(path: Path, facts: dict[str, Any], vocab_size: int) -> str:
    """Read a shard once, a chunk at a time: checksum, and the largest id."""
    ids, digest, beyond = open_shard(path, facts), hashlib.sha256(), None
    for start in range(0, len(ids), CHUNK):
        chunk = ids[start:start + CHUNK]
        digest.update(chunk)
        if beyond is None and chunk.max() >= vocab_size:
            beyond = start + int((chunk >= vocab_size).argmax())
    if facts.get("sha256", digest.hexdigest()) != digest.hexdigest():
        raise ValueError(f"shard {path} differs from its checksum"
                         + ("" if beyond is None else f"; id {ids[beyond]} at position {beyond} is "
                            f"beyond the vocabulary") + f"; {AGAIN}")
    if beyond is not None:
        raise ValueError(f"shard {path} has id {ids[beyond]} at position {beyond}; the vocabulary "
                         f"ends at {vocab_size - 1}")
    return digest.hexdigest()


def files_of(folder: Path, meta: dict[str, Any], split: str = "") -> dict[Path, dict[str, Any]]:
    """The files of a split, or of all, and what is known of each. Without meta.json: llm.c's."""
    if not meta["splits"]:
        return {path: {} for path in sorted(folder.glob("*.bin")) if split in path.name}
    return {folder / name: facts for name, part in meta["splits"].items() if split in ("", name)
            for name, facts in part["files"].items()}


def open_shard(path: Path, facts: dict[str, Any]) -> np.memmap:
    """A shard's ids, after a look at its header and size; no more of it is read."""
    if not path.is_file():
        raise FileNotFoundError(f"shard {path} is missing; {AGAIN}")
    try:
        ids = _map_bin(path) if path.suffix == ".bin" else np.lib.format.open_memmap(path, mode="r")
    except OSError:                     # it cannot be read, which says nothing of what is in it
        raise
    except Exception as error:          # a damaged header can say anything: numpy evaluates it
        raise ValueError(f"shard {path} is truncated or damaged ({error!r:.150}); "
                         f"{AGAIN}") from None
    if ids.ndim != 1 or ids.dtype not in (np.uint16, np.uint32):
        raise ValueError(f"shard {path} holds {ids.dtype} of shape {ids.shape}, not one row of "
                         f"uint16 or uint32; {AGAIN}")
    size, expected = path.stat().st_size, ids.offset + ids.nbytes
    if size != expected:
        raise ValueError(f"shard {path} has {size:,} bytes; its header says {expected:,}, so it is "
                         f"damaged; {AGAIN}")
    if facts.get("tokens", len(ids)) != len(ids):
        raise ValueError(f"shard {path} holds {len(ids):,} ids, meta.json says "
                         f"{facts['tokens']:,}; {AGAIN}")
    if not len(ids):
        raise ValueError(f"shard {path} holds no ids; {AGAIN}")
    return ids


def _map_bin(path: Path) -> np.memmap:
    """The ids of an llm.c shard."""
    header = np.fromfile(path, dtype="<i4", count=BIN_HEADER // 4)
    if len(header) < 256 or header[0] != BIN_MAGIC or header[1] != BIN_VERSION or header[2] < 0:
        raise ValueError(f"it does not start as llm.c's do: magic {BIN_MAGIC}, version "
                         f"{BIN_VERSION}, number of ids")
    return np.memmap(path, "<u2", mode="r", offset=BIN_HEADER, shape=(int(header[2]),))
