"""A prepared data set: a folder whose meta.json, written last, says what it holds.

    train.jsonl, val.jsonl          conversations (kind "chat", data/conversations.py) or texts
                                    with a class each ("classes", data/labels.py), one a line
    train_0000.npy, ...             or token shards ("tokens", data/shards.py)
    meta.json                       version, kind, source, and the checksum of every file

    train, val = split_by_hash(records, validation=0.05, text=json.dumps)
    meta = write_dataset(folder, "chat", {"train": train, "val": val}, source="...")
"""
import hashlib
import json
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence, TypeVar

from formats.files import read_json, write_bytes, write_json
from run.watch import locked

FORMAT_VERSION = 1
DATA = Path(__file__).parent    # named data sets live beside this file
AGAIN = "delete the folder and prepare the data again"
KINDS = {"tokens": ("token shards", "data.corpus --from=PATH"),     # in words, and what makes it
         "chat": ("conversations", "data.chat prepare FILE..."),
         "classes": ("texts with classes", "data.labels --from=FILE")}
Item = TypeVar("Item")


def read_meta(folder: Path, kind: str) -> dict[str, Any]:
    """meta.json of a data set of this kind; any other folder is an error that says what to do."""
    path, (what, command) = folder / "meta.json", KINDS[kind]
    command = f"python -m {command} --out={folder}"
    if not path.exists():
        raise FileNotFoundError(f"there is no data set of {what} in {folder}; make it with: "
                                f"{command}")
    meta = read_json(path, AGAIN)
    if meta.get("kind", "tokens") != kind:
        raise ValueError(f"{folder} holds {meta.get('kind', 'tokens')!r:.20} data, not {what}; "
                         f"those are made with: {command}")
    if meta.get("version") != FORMAT_VERSION:
        raise ValueError(f"{path} has version {meta.get('version')!r:.50}, this code reads "
                         f"{FORMAT_VERSION}; prepare the data again")
    splits = meta.get("splits")
    if kind != "tokens" and not (isinstance(splits, dict) and all(
            isinstance(facts, dict) and "sha256" in facts for facts in splits.values())):
        raise ValueError(f"{path} is damaged: its splits have no checksums; {AGAIN}")
    return meta


def write_dataset(folder: str | Path, kind: str, splits: dict[str, Sequence[Any]], source: str,
                  **facts: Any) -> dict[str, Any]:
    """Write each split as NAME.jsonl, a record a line, and then meta.json; return the latter."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    meta = {"version": FORMAT_VERSION, "kind": kind, "source": source, **facts, "splits": {}}
    with locked(folder):
        (folder / "meta.json").unlink(missing_ok=True)              # from here on it is incomplete
        for name, records in splits.items():
            data = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()
            write_bytes(folder / f"{name}.jsonl", data)
            meta["splits"][name] = {"records": len(records),
                                    "sha256": hashlib.sha256(data).hexdigest()}
        write_json(folder / "meta.json", meta)
    return meta


def read_split(folder: Path, kind: str, split: str) -> Iterator[dict[str, Any]]:
    """The records of "train" or "val", as prepared: a changed file is refused."""
    facts, path = read_meta(folder, kind)["splits"].get(split), folder / f"{split}.jsonl"
    if facts is None or not path.exists():
        raise FileNotFoundError(f"{folder} has no {split}.jsonl; prepare the data again")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != facts["sha256"]:
        raise ValueError(f"{path} differs from its checksum in meta.json; after a change, prepare "
                         f"it again: python -m {KINDS[kind][1]}")
    return map(json.loads, data.decode().split("\n")[:-1])


def fingerprint(folder: Path, kind: str, *settings: Any) -> str:
    """What identifies samples: the checksums of the splits, and the settings that make samples of
    them (tokenizer, template ...); 16 hex digits."""
    splits = read_meta(folder, kind)["splits"]
    return hash_facts({name: facts["sha256"] for name, facts in splits.items()}, *settings)


def hash_facts(*facts: Any) -> str:
    """16 hex digits that differ where any of the facts does; they are what JSON can hold."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def split_by_hash(items: Sequence[Item], validation: float, text: Callable[[Item], str],
                  size: Callable[[Item], int] = lambda item: 1) -> tuple[list[Item], list[Item]]:
    """Training and validation, which has `validation` of the sizes.

    The hash of an item's text decides where it goes, so equal ones stay together and the order of
    the items does not matter.
    """
    if not 0 < validation < 1:
        raise ValueError(f"validation={validation} is not in (0, 1)")
    keys = [hashlib.sha256(text(item).encode()).digest() for item in items]
    sizes: dict[bytes, int] = {}
    for key, item in zip(keys, items):
        sizes[key] = sizes.get(key, 0) + size(item)
    if len(sizes) < 2:
        raise ValueError(f"there are {len(sizes)} different texts; at least 2 are needed, one to "
                         f"train on and one to validate")
    chosen, reached = set(), 0
    for key in sorted(sizes)[:-1]:
        if reached >= validation * sum(sizes.values()):
            break
        chosen.add(key)
        reached += sizes[key]
    return ([item for item, key in zip(items, keys) if key not in chosen],
            [item for item, key in zip(items, keys) if key in chosen])
