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
import hashlib
import json
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable

import numpy as np
from tqdm import tqdm

FORMAT_VERSION = 1
# The header that np.save gives one row of ids: magic, version 1.0, length, a Python literal. Read
# by hand, as numpy's reader evaluates what stands there and believes its sizes.
NPY_HEADER = re.compile(rb"\x93NUMPY\x01\x00(..)\{'descr': '([^']*)', 'fortran_order': False, "
                        rb"'shape': \((\d{1,18}),\), \} *\n", re.DOTALL)
NPY_LONGEST = 256               # bytes of such a header, at most
CHUNK = 1 << 23                 # bytes that verify holds at once, for each thread
AGAIN = "delete the folder and prepare the data again"
STAMP = ".verified.json"        # which files verify has read, so that it need not do so again
BIN_HEADER = 256 * 4            # bytes
BIN_MAGIC, BIN_VERSION = 20240520, 1
GPT2_VOCAB = 50257              # what a .bin shard is made with
DATA = Path(__file__).parent    # named data sets live beside this file


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
    meta = read_json(path)
    if "kind" in meta:                                  # data/conversations.py has its own
        raise ValueError(f"{folder} holds {meta['kind']!r:.20} data, not token shards")
    if meta.get("version") != FORMAT_VERSION:
        raise ValueError(f"{path} has version {meta.get('version')!r:.50}, this code reads "
                         f"{FORMAT_VERSION}; prepare the data again")
    check_meta(meta, path)
    return meta


def check_meta(meta: dict[str, Any], path: Path) -> None:
    """ValueError for facts that are missing or that no ShardWriter writes."""
    def need(right: bool, what: str) -> None:
        if not right:
            raise ValueError(f"{path} is damaged: {what}; {AGAIN}")

    def whole(number: Any, least: int, most: int = 2**62) -> bool:
        return type(number) is int and least <= number <= most

    def text(value: Any) -> bool:
        return isinstance(value, str)

    need(whole(meta.get("vocab_size"), 1, 2**32), f"vocab_size is {meta.get('vocab_size')!r:.50}")
    need(meta.get("tokenizer_hash", 0) is None or text(meta.get("tokenizer_hash")),
         "tokenizer_hash is no text")
    need(text(meta.get("source")), "source is no text")
    entropy = meta.get("unigram_entropy", 0.0)
    need(isinstance(entropy, float) and math.isfinite(entropy) or entropy == 0,
         f"unigram_entropy is {entropy!r:.50}")
    need(isinstance(meta.get("splits"), dict) and len(meta["splits"]) > 0, "it names no splits")
    for split, facts in meta["splits"].items():
        need(split in ("train", "val"), f"{split!r:.50} is no split")
        files = facts.get("files") if isinstance(facts, dict) else None
        need(isinstance(files, dict) and len(files) > 0, f"split {split!r:.50} has no files")
        for i, (name, file) in enumerate(files.items()):
            need(name == shard_name(split, i), f"shard {i} of {split!r:.50} is {name!r:.50}")
            need(isinstance(file, dict) and whole(file.get("tokens"), 1)
                 and text(file.get("sha256")), f"{name} has no tokens or no sha256")
        need(facts.get("tokens") == sum(file["tokens"] for file in files.values()),
             f"the shards of {split} have not the {facts.get('tokens')!r:.50} tokens of the split")


def shard_name(split: str, number: int) -> str:
    """train_0000.npy and so on."""
    return f"{split}_{number:04d}.npy"


def fingerprint(folder: Path) -> str:
    """What identifies a data set's content: a hash over tokenizer, shards and their checksums."""
    meta = read_meta(folder)
    facts = [[name, file] for split in meta["splits"].values()
             for name, file in split["files"].items()]
    facts += [[path.name, path.stat().st_size] for path in sorted(folder.glob("*.bin"))]
    text = json.dumps([meta["tokenizer_hash"], facts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Tokens:
    """The shards of a split as one long row of ids."""

    def __init__(self, shards: list[np.ndarray]):
        self.shards = shards
        self.starts = np.cumsum([0] + [len(shard) for shard in shards])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Ids start..stop-1 (fewer at the end of the split), int64."""
        parts = []
        stop = min(stop, len(self))
        shard = int(np.searchsorted(self.starts, start, side="right")) - 1
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


def verify(folder: Path, cached: bool = False) -> None:
    """Compare every shard with its checksum, its ids with the vocabulary; ValueError if one is off.

    What was read and found right is noted in a stamp beside it. With `cached`, files that are as
    the stamp says (size, time of change, checksum) are not read again, so this costs nothing.
    """
    meta, stamp = read_meta(folder), _read_stamp(folder)
    _check_tokenizer(folder, meta)
    shards = files_of(folder, meta)
    for path, facts in shards.items():
        open_shard(path, facts)
    wanted = {}
    for path, facts in shards.items():
        stat = path.stat()              # before it is read: a change meanwhile outdates the stamp
        wanted[path.name] = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns,
                             "sha256": facts.get("sha256"), "vocab_size": meta["vocab_size"]}
    unread = {path: facts for path, facts in shards.items()
              if not cached or stamp.get(path.name) != wanted[path.name]}
    if not unread:
        return
    # hashlib and numpy let go of Python's lock, so shards are read side by side.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, tqdm(
            desc=f"verifying {folder}", total=sum(wanted[path.name]["size"] for path in unread),
            unit="B", unit_scale=True, delay=2, disable=None) as bar:
        for path, _ in zip(unread, pool.map(lambda item: _verify(*item, meta["vocab_size"]),
                                            unread.items())):
            bar.update(wanted[path.name]["size"])
    try:
        write_json(folder / STAMP, wanted)
    except OSError:                     # a folder that cannot be written: read again next time
        pass


def _verify(path: Path, facts: dict[str, Any], vocab_size: int) -> None:
    """Read a shard once, a chunk at a time: checksum, and the largest id."""
    ids, digest = open_shard(path, facts), hashlib.sha256()
    per_chunk, beyond = CHUNK // ids.itemsize, None
    with open(path, "rb") as file:
        file.seek(ids.offset)
        for start in range(0, len(ids), per_chunk):
            data = file.read(min(per_chunk, len(ids) - start) * ids.itemsize)
            digest.update(data)
            chunk = np.frombuffer(data, ids.dtype)
            if beyond is None and chunk.max() >= vocab_size:
                beyond = start + int((chunk >= vocab_size).argmax())
    if "sha256" in facts and digest.hexdigest() != facts["sha256"]:
        raise ValueError(f"shard {path} differs from its checksum"
                         + ("" if beyond is None else f"; id {ids[beyond]} at position {beyond} is "
                            f"beyond the vocabulary") + f"; {AGAIN}")
    if beyond is not None:
        raise ValueError(f"shard {path} has id {ids[beyond]} at position {beyond}; the vocabulary "
                         f"ends at {vocab_size - 1}")


def files_of(folder: Path, meta: dict[str, Any], split: str = "") -> dict[Path, dict[str, Any]]:
    """The files of a split, or of all, and what is known of each. Without meta.json: llm.c's."""
    if not meta["splits"]:
        return {path: {} for path in sorted(folder.glob("*.bin")) if split in path.name}
    return {folder / name: facts for name, part in meta["splits"].items() if split in ("", name)
            for name, facts in part["files"].items()}


def open_shard(path: Path, facts: dict[str, Any]) -> np.memmap:
    """A shard's ids, after a look at its header and size; no more of it is read."""
    if not path.exists():
        raise FileNotFoundError(f"shard {path} is missing; {AGAIN}")
    dtype, offset, tokens = (_bin_header if path.suffix == ".bin" else _npy_header)(path)
    size, expected = path.stat().st_size, offset + tokens * dtype.itemsize
    if size != expected:
        raise ValueError(f"shard {path} has {size:,} bytes; its header says {expected:,}, so it is "
                         f"{'truncated' if size < expected else 'damaged'}; {AGAIN}")
    if facts.get("tokens", tokens) != tokens:
        raise ValueError(f"shard {path} holds {tokens:,} ids, meta.json says {facts['tokens']:,}; "
                         f"{AGAIN}")
    if not tokens:
        raise ValueError(f"shard {path} holds no ids; {AGAIN}")
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(tokens,))


def _npy_header(path: Path) -> tuple[np.dtype, int, int]:
    """(dtype, bytes before the ids, number of ids)."""
    with open(path, "rb") as file:
        found = NPY_HEADER.match(file.read(NPY_LONGEST))
    if not found or found.end() != 10 + int.from_bytes(found[1], "little"):
        raise ValueError(f"shard {path} does not start as a .npy file of one row of ids does, so "
                         f"it is damaged; {AGAIN}")
    if found[2] not in (b"<u2", b"<u4"):
        raise ValueError(f"shard {path} holds numbers of type {found[2].decode('latin-1')!r:.20}, "
                         f"not uint16 or uint32; {AGAIN}")
    return np.dtype(found[2].decode()), found.end(), int(found[3])


def _bin_header(path: Path) -> tuple[np.dtype, int, int]:
    header = np.fromfile(path, dtype="<i4", count=BIN_HEADER // 4)
    if len(header) < 256 or header[0] != BIN_MAGIC or header[1] != BIN_VERSION or header[2] < 0:
        raise ValueError(f"shard {path} does not start as llm.c's do: magic {BIN_MAGIC}, "
                         f"version {BIN_VERSION}, number of ids")
    return np.dtype("<u2"), BIN_HEADER, int(header[2])


def _check_tokenizer(folder: Path, meta: dict[str, Any]) -> None:
    """The tokenizer beside the shards has to be the one that made them (tok.json has its hash)."""
    path = folder / "tokenizer.json"
    if path.exists() and (found := read_json(path).get("sha256")):
        if meta["tokenizer_hash"] not in (None, found):
            raise ValueError(f"{path} is not the tokenizer that made the shards beside it (its "
                             f"hash is {found!r:.10}, not {meta['tokenizer_hash']!r:.10}); {AGAIN}")


def _read_stamp(folder: Path) -> dict[str, Any]:
    """What verify noted; nothing where there is no stamp, or none that can be read."""
    try:
        return read_json(folder / STAMP)
    except (ValueError, OSError):       # a stamp only saves time
        return {}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError says that it is damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:                   # nested too deep is no JSON
        raise ValueError(f"{path} is damaged: {error}; {AGAIN}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it is no JSON object; {AGAIN}")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """An object as a JSON file, whole or not at all."""
    write_file(path, lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))


def write_file(path: Path, write: Callable[[Any], Any]) -> None:
    """Write a file whole or not at all: beside its place, to the disk, then renamed."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
