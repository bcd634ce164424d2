"""Writing token shards (data/shards.py): documents in, a data set out, whole or not at all.

    writer = ShardWriter(folder, tokenizer, source)
    writer.add("train", ids); writer.add("val", ids); meta = writer.finish()

Killed at any moment, it leaves no meta.json, so nobody takes the folder for a data set; the same
calls make it anew, or with `resume` complete it, to the same bytes.
"""
import contextlib
import hashlib
from pathlib import Path
from typing import Any, Iterable

import numpy as np

from data.prepared import AGAIN, FORMAT_VERSION
from data.shards import STAMP, check_meta, files_of, open_shard, shard_name
from formats.files import atomic_write, read_json, write_json
from run.watch import locked


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
        self.held = contextlib.ExitStack()              # let go at the end, or with this object
        self.held.enter_context(locked(self.folder))
        progress = self.folder / "progress.json"
        if resume and progress.exists():
            saved, documents = read_progress(self.folder)
            if {**saved, "splits": {}} == self.meta:
                for path, facts in files_of(self.folder, saved).items():
                    open_shard(path, facts)
                self.meta, self.documents = saved, documents
                _remove(*self.folder.glob("*.tmp"))
                return
        # meta.json goes first: from then on the folder is no data set.
        _remove(self.folder / "meta.json", progress, self.folder / STAMP,
                *self.folder.glob("*.npy"), *self.folder.glob("*.tmp"))

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
            self.flush(split)

    def flush(self, split: str) -> None:
        """Write what a split has left. One that gets no more documents must not stay pending:
        progress is saved only where every document so far is in a shard."""
        if not self.pending_tokens.get(split):
            return
        ids = np.concatenate(self.pending.pop(split))
        self.pending_tokens[split] = 0
        facts = self.meta["splits"].setdefault(split, {"tokens": 0, "files": {}})
        name = shard_name(split, len(facts["files"]))
        with atomic_write(self.folder / name) as temporary, open(temporary, "wb") as file:
            np.save(file, ids)
        facts["files"][name] = {"tokens": len(ids), "sha256": hashlib.sha256(ids).hexdigest()}
        facts["tokens"] += len(ids)
        if not any(self.pending_tokens.values()):                   # all documents so far are safe
            write_json(self.folder / "progress.json",
                       {"meta": self.meta, "documents": self.documents})

    def finish(self) -> dict[str, Any]:
        """Write what is left, the tokenizer and meta.json; return the latter."""
        for split in list(self.pending):
            self.flush(split)
        if not self.meta["splits"]:
            raise ValueError(f"{self.meta['source']} holds no text; nothing was written")
        self.tokenizer.save(self.folder / "tokenizer.json")
        train = files_of(self.folder, self.meta, "train")
        self.meta.update(documents=self.documents, unigram_entropy=unigram_entropy(
            open_shard(path, facts) for path, facts in train.items()))
        write_json(self.folder / "meta.json", self.meta)
        (self.folder / "progress.json").unlink(missing_ok=True)
        self.held.close()
        return self.meta


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


def _remove(*files: Path) -> None:
    for file in files:
        file.unlink(missing_ok=True)


def read_progress(folder: Path) -> tuple[dict[str, Any], int]:
    """What an interrupted ShardWriter has noted: meta.json so far, and documents that are done."""
    path = folder / "progress.json"
    saved = read_json(path, AGAIN)
    meta, documents = saved.get("meta"), saved.get("documents")
    if not isinstance(meta, dict) or type(documents) is not int or documents < 0:
        raise ValueError(f"{path} is damaged; {AGAIN}")
    check_meta(meta, path)
    return meta, documents
