"""FineWeb-Edu, 10 billion tokens of educational web pages; or any large text, into token shards.

    python -m data.fineweb                                  from the hub, with the extra "datasets"
    python -m data.fineweb --from=FOLDER                    local .jsonl, .parquet and .txt instead
    python -m data.fineweb --from=a.jsonl,b.parquet --tokenizer=tok.json --out=data/mine

In: documents, streamed. Out: data/fineweb/{val,train}_NNNN.npy and meta.json (data/shards.py), each
document behind an end-of-text token. The documents that come first validate, a shard of them; of
local text at most 5%, so that a small file leaves something to train on. All cores encode.
Stopped at any point, the same command goes on after the last finished shard and ends with the same
bytes; where everything is done, it says so and changes nothing.

Reference: Penedo et al. 2024, "The FineWeb datasets", arXiv 2406.17557.
"""
import os
import sys
from collections import deque
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Iterable, Iterator

import numpy as np
from tqdm import tqdm

from bpe import Tokenizer
from data import shards
from data.corpus import behind_end_of_text, named_tokenizer, print_summary
from data.prepared import DATA
from data.texts import find_files, read_documents
from data.writer import ShardWriter, read_progress
from run.config import parse, run_command

HUB = "HuggingFaceFW/fineweb-edu"
VALIDATION = 0.05       # of local text, at most
TOKEN_BYTES = 8         # more than a token spells on average, with any tokenizer (GPT-2's: 4 to 5)


@dataclass(frozen=True)
class FinewebConfig:
    from_: str = ""  # files or folders of .jsonl, .parquet and .txt, by comma; empty: FineWeb-Edu
        # from the hub
    subset: str = "sample-10BT"  # of FineWeb-Edu on the hub
    tokenizer: str = "gpt2"  # gpt2, bytes, a tokenizer's path, or USER/NAME of the hub
    shard_tokens: int = 100_000_000  # tokens of a shard, rounded up to whole documents
    num_threads: int = 0  # threads that encode; 0: one for each core
    out: str = ""  # folder of the shards; empty: data/fineweb

    def __post_init__(self):
        if self.shard_tokens < 1 or self.num_threads < 0:
            raise ValueError(f"shard_tokens={self.shard_tokens} must be at least 1 and "
                             f"num_threads={self.num_threads} at least 0")
        if self.from_ and self.subset != FinewebConfig.subset:
            raise ValueError(f"subset={self.subset} is of the hub, and from={self.from_} is text "
                             f"that is here; give one of the two")


def prepare(config: FinewebConfig = FinewebConfig()) -> Path:
    """Write the shards, or those that an interrupted call has left to do. Returns their folder."""
    folder = Path(config.out or DATA / "fineweb")
    tokenizer = named_tokenizer(config.tokenizer)
    files = find_files(config.from_) if config.from_ else []
    source = f"{HUB} {config.subset}"
    if files:
        size = sum(path.stat().st_size for path in files)
        source = f"{config.from_} ({len(files)} files, {size:,} bytes)"
    wanted = {"source": source, "tokenizer_hash": tokenizer.hash,
              "shard_tokens": config.shard_tokens}
    if is_complete(folder, wanted):
        shards.verify(folder, cached=True)
        (folder / "progress.json").unlink(missing_ok=True)  # killed between the two last steps
        print(f"{folder} is complete; delete it to prepare it again")
        return folder
    rows = None if files else hub_rows(config.subset)
    total, val_bytes = survey(files, config.shard_tokens) if files else (len(rows), float("inf"))
    writer = ShardWriter(folder, tokenizer, source, config.shard_tokens, resume=True)
    if writer.documents:
        print(f"{folder} has {writer.documents:,} documents from before; going on after them")
    documents = (islice(read_documents(files), writer.documents, None) if files
                 else hub_documents(rows, writer.documents))
    with tqdm(total=total, initial=writer.documents, unit="doc", unit_scale=True,
              dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar:
        write(writer, encode_all(tokenizer, documents, config.num_threads or os.cpu_count() or 1),
              val_bytes, bar)
    print_summary(folder, writer.finish())
    print("train on it: python train.py gpt2-124m" + (f" --data={folder}" if config.out else ""))
    return folder


def is_complete(folder: Path, wanted: dict[str, Any]) -> bool:
    """Whether the folder holds these data already, whole. Other data there are refused."""
    complete = (folder / "meta.json").exists()
    if not complete and not (folder / "progress.json").exists():
        return False
    there = shards.read_meta(folder) if complete else read_progress(folder)[0]
    for key, value in wanted.items():
        if there.get(key) != value:
            raise ValueError(f"{folder} holds data of {key}={there.get(key)}, not {value}; choose "
                             f"another --out, or delete {folder}")
    return complete


def survey(files: list[Path], shard_tokens: int) -> tuple[int | None, float]:
    """Read local documents once, to find faults before hours of work and to measure them.

    Returns their number and the bytes that may validate; (None, no limit) as soon as 5% of the
    text is more than a shard, so huge sources are not read twice.
    """
    number, size, enough = 0, 0, shard_tokens * TOKEN_BYTES / VALIDATION
    for text in read_documents(files):
        number += 1
        size += len(text.encode())
        if size > enough:
            return None, float("inf")
    if number < 2:
        raise ValueError(f"{', '.join(map(str, files))}: {number} documents, and none is cut here "
                         f"to train and to validate; give a document a line (.jsonl), or use "
                         f"python -m data.corpus --from=PATH, which cuts")
    return number, size * VALIDATION


def hub_rows(subset: str) -> Any:
    """The rows of FineWeb-Edu as the `datasets` library keeps them: downloaded once, on disk."""
    try:
        import datasets
    except ModuleNotFoundError:
        raise ModuleNotFoundError('the hub needs the extra "datasets": pip install -c '
                                  'constraints.txt -e ".[datasets]"; local files do without: '
                                  '--from=FILES') from None
    try:
        rows = datasets.load_dataset(HUB, name=subset, split="train", num_proc=os.cpu_count())
    except OSError as error:
        raise ConnectionError(f"cannot load {HUB} {subset} from the hub ({error}); with a copy of "
                              f"it, use --from=FILES") from None
    return rows.select_columns(["text"])


def hub_documents(rows: Any, start: int) -> Iterator[str]:
    """Every row's text. Skipping is by row, so a blank one, if any, stays: as its end-of-text."""
    for batch in rows.skip(start).iter(batch_size=1000):
        yield from (text or "" for text in batch["text"])


def encode_all(tokenizer: Tokenizer, documents: Iterable[str],
               num_threads: int) -> Iterator[tuple[int, np.ndarray]]:
    """(bytes, ids) of each document in order, encoded in threads while the next ones are read."""
    sizes: deque = deque()                              # of those that are read and not yet encoded

    def measured() -> Iterator[str]:
        for text in documents:
            sizes.append(len(text.encode()))
            yield text
    for ids in tokenizer.encode_corpus(measured(), num_threads):
        yield sizes.popleft(), behind_end_of_text(tokenizer, ids)


def write(writer: ShardWriter, encoded: Iterable[tuple[int, np.ndarray]], val_bytes: float,
          bar: tqdm) -> None:
    """Documents into shards: the first and those after it validate, while the limits allow."""
    split, used = "train" if writer.documents else "val", 0     # val is done where any shard is
    for size, ids in encoded:
        full = writer.tokens("val") >= writer.shard_tokens or used + size > val_bytes
        if split == "val" and used and full:
            writer.flush("val")
            split = "train"
        used += size
        writer.add(split, ids)
        bar.update(1)
    if not writer.tokens("train"):
        raise ValueError(f"{writer.meta['source']} fits into the validation shard of "
                         f"{writer.shard_tokens:,} tokens; give a smaller --shard_tokens")


def main(words: list[str]) -> None:
    prepare(parse(FinewebConfig, words, "python -m data.fineweb", about=__doc__))


if __name__ == "__main__":
    run_command(main)
