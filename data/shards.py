"""Token shards: text as memory-mapped token ids, written once and read in any order.

A data set is a folder:

    train_0000.npy ... val_0000.npy    one flat array of ids each, uint16 or uint32, whole documents
    tokenizer.json                     the tokenizer that made them (bpe.Tokenizer.load)
    meta.json                          counts, checksums, source, the tokenizer's hash; written
                                       last, so a folder that has it is complete

The `.bin` shards of llm.c and modded-nanogpt are read too: 256 int32 (magic 20240520, version 1,
number of tokens), then uint16 ids of GPT-2's tokenizer, "train" or "val" in the file's name.

    writer = ShardWriter(folder, vocab_size=4096); writer.add("train", ids); writer.finish(...)
    tokens = open_split(folder, "train"); len(tokens); tokens.read(start, stop)
"""
import hashlib
import json
import os
from pathlib import Path
from typing import Any, Iterable

import numpy as np

FORMAT_VERSION = 1
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
    if not (folder / "meta.json").exists():
        return {"version": FORMAT_VERSION, "source": "llm.c shards", "vocab_size": GPT2_VOCAB,
                "tokenizer_hash": None, "splits": {}}
    meta = json.loads((folder / "meta.json").read_text())
    if meta.get("version") != FORMAT_VERSION:
        raise ValueError(f"{folder}/meta.json has version {meta.get('version')}, this code reads "
                         f"{FORMAT_VERSION}; prepare the data again")
    return meta


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
    """Memory-map the shards of "train" or "val". A missing or damaged one is a named error."""
    files = read_meta(folder)["splits"].get(split, {}).get("files")
    if files is None:                                               # no meta.json: llm.c's shards
        bins = [path for path in sorted(folder.glob("*.bin")) if split in path.name]
        if not bins:
            raise FileNotFoundError(f"{folder} has no {split} shards")
        return Tokens([_open_bin(path) for path in bins])
    return Tokens([_open_npy(folder / name, facts["tokens"]) for name, facts in files.items()])


def verify(folder: Path) -> None:
    """Compare every shard with its checksum and its ids with the vocabulary. Reads all of it."""
    meta = read_meta(folder)
    for split in meta["splits"].values():
        for name, facts in split["files"].items():
            ids = _open_npy(folder / name, facts["tokens"])
            if _sha256(ids) != facts["sha256"]:
                raise ValueError(f"{folder / name} differs from its checksum; prepare it again")
            worst = int(ids.argmax()) if len(ids) else 0
            if len(ids) and ids[worst] >= meta["vocab_size"]:
                raise ValueError(f"{folder / name} has id {ids[worst]} at position {worst}; the "
                                 f"vocabulary ends at {meta['vocab_size'] - 1}")


class ShardWriter:
    """Collects documents into shards of at least `shard_tokens` ids; none cuts through a document.

    `tokenizer` is only asked for vocab_size, hash and save(). With `resume`, a folder that the same
    call (equal source, tokenizer and shard size) left half-way keeps its finished shards, and
    `documents` says how many documents to skip.
    """

    def __init__(self, folder: str | Path, tokenizer: Any, source: str,
                 shard_tokens: int = 100_000_000, resume: bool = False):
        self.folder, self.tokenizer, self.shard_tokens = Path(folder), tokenizer, shard_tokens
        self.dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
        self.meta: dict[str, Any] = dict(
            version=FORMAT_VERSION, source=source, vocab_size=tokenizer.vocab_size,
            tokenizer_hash=tokenizer.hash, shard_tokens=shard_tokens, splits={})
        self.documents = 0
        self.pending: dict[str, list[np.ndarray]] = {}
        self.pending_tokens: dict[str, int] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        progress = self.folder / "progress.json"
        if resume and progress.exists():
            saved = json.loads(progress.read_text())
            if {**saved["meta"], "splits": {}} == self.meta:
                self.meta, self.documents = saved["meta"], saved["documents"]
                return
        for old in [self.folder / "meta.json", progress, *self.folder.glob("*.npy")]:
            old.unlink(missing_ok=True)                             # meta.json first: incomplete

    def tokens(self, split: str) -> int:
        """Tokens of a split so far, those of its unfinished shard included."""
        written = self.meta["splits"].get(split, {}).get("tokens", 0)
        return written + self.pending_tokens.get(split, 0)

    def add(self, split: str, ids: Any) -> None:
        """One document's ids. A full shard is written at once."""
        self.pending.setdefault(split, []).append(np.asarray(ids, dtype=self.dtype))
        self.pending_tokens[split] = self.pending_tokens.get(split, 0) + len(ids)
        self.documents += 1
        if self.pending_tokens[split] >= self.shard_tokens:
            self._write(split)

    def flush(self, split: str) -> None:
        """Write what a split has left. One that gets no more documents must not stay pending:
        progress is saved only where every document so far is in a shard."""
        if self.pending_tokens.get(split):
            self._write(split)

    def finish(self) -> dict[str, Any]:
        """Write what is left, the tokenizer and meta.json; return the latter."""
        for split in list(self.pending):
            self.flush(split)
        if not self.meta["splits"]:
            raise ValueError(f"{self.meta['source']} holds no text; nothing was written")
        self.tokenizer.save(self.folder / "tokenizer.json")
        train = [_open_npy(self.folder / name, file["tokens"])
                 for name, file in self.meta["splits"].get("train", {"files": {}})["files"].items()]
        self.meta.update(documents=self.documents, unigram_entropy=unigram_entropy(train))
        _write_json(self.folder / "meta.json", self.meta)
        (self.folder / "progress.json").unlink(missing_ok=True)
        return self.meta

    def _write(self, split: str) -> None:
        ids = np.concatenate(self.pending.pop(split))
        self.pending_tokens[split] = 0
        facts = self.meta["splits"].setdefault(split, {"tokens": 0, "files": {}})
        name = f"{split}_{len(facts['files']):04d}.npy"
        with open(self.folder / (name + ".tmp"), "wb") as file:
            np.save(file, ids)
            file.flush()
            os.fsync(file.fileno())
        os.replace(self.folder / (name + ".tmp"), self.folder / name)
        facts["files"][name] = {"tokens": len(ids), "sha256": _sha256(ids)}
        facts["tokens"] += len(ids)
        if not any(self.pending_tokens.values()):                   # all documents so far are safe
            _write_json(self.folder / "progress.json",
                        {"meta": self.meta, "documents": self.documents})


def unigram_entropy(shards: Iterable[np.ndarray], chunk: int = 10_000_000) -> float:
    """Entropy of the token frequencies in nats: the loss of a model that knows only those."""
    counts = np.zeros(0, np.int64)
    for shard in shards:
        for start in range(0, len(shard), chunk):
            new = np.bincount(shard[start:start + chunk], minlength=len(counts))
            new[:len(counts)] += counts
            counts = new
    p = counts[counts > 0] / max(1, counts.sum())
    return float(-(p * np.log(p)).sum())


def _open_npy(path: Path, tokens: int) -> np.ndarray:
    if not path.exists():
        raise FileNotFoundError(f"shard {path} is missing; prepare the data again")
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"shard {path} is truncated or no .npy file ({error}); "
                         f"prepare the data again") from None
    if ids.dtype not in (np.uint16, np.uint32) or ids.ndim != 1 or len(ids) != tokens:
        raise ValueError(f"shard {path} holds {ids.dtype} {ids.shape}; meta.json says {tokens} "
                         f"uint16 or uint32 ids; prepare the data again")
    return ids


def _open_bin(path: Path) -> np.ndarray:
    header = np.fromfile(path, dtype=np.int32, count=256)
    if len(header) < 256 or header[0] != BIN_MAGIC or header[1] != BIN_VERSION:
        raise ValueError(f"shard {path} does not start as llm.c's do: magic {BIN_MAGIC}, "
                         f"version {BIN_VERSION}")
    size, expected = path.stat().st_size, BIN_HEADER + 2 * int(header[2])
    if size != expected:
        raise ValueError(f"shard {path} has {size:,} bytes; its header says {expected:,}")
    return np.memmap(path, dtype=np.uint16, mode="r", offset=BIN_HEADER)


def _sha256(ids: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(ids).data).hexdigest()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)
