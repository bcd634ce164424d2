"""Texts with a class each: JSON in, samples for a classifier.Classifier out.

    python -m data.labels --from=FILE[,FILE...] --out=FOLDER

In: {"text": ..., "label": ...} a line, or a JSON array of them; labels are words or whole numbers,
and the classes are the sorted labels that occur. Files with "test" in their name validate; without
one the hash of a text decides.

A data set is a folder with train.jsonl, val.jsonl, {"text", "label": number of its class} a line,
and meta.json, written last: {"kind": "classes", "labels": [names], ...}. It knows no tokenizer.

    write_dataset(folder, train, val, labels=("negative", "positive"), source="...")
    samples = load_samples(folder, "train", tokenizer, block_size=1024)     # data.samples.Samples
"""
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, Sequence

import numpy as np

from bpe import Tokenizer
from run.config import parse, run_command
from data.conversations import find_files, read_records
from data.corpus import split_documents
from data.samples import Samples
from data.shards import read_json, write_file, write_json

FORMAT_VERSION = 1
Example = tuple[str, int]               # a text and the number of its class


@dataclass(frozen=True)
class LabelsConfig:
    from_: str = ""  # a .json or .jsonl file, or a folder of them; several by comma
    out: str = ""  # folder of the data set
    validation: float = 0.05  # share that validates, where no file's name has "test"

    def __post_init__(self):
        for name in ("from_", "out"):
            if not getattr(self, name):
                flag = name.rstrip("_")
                raise ValueError(f"{flag} is missing; give --{flag}=PATH")
        if not 0 < self.validation < 1:
            raise ValueError(f"validation={self.validation} is not in (0, 1)")


def read_examples(path: Path) -> list[tuple[str, str | int]]:
    """The texts of a file with their labels; ValueError names the line of one that has none."""
    found = []
    for line, record in read_records(path):
        if isinstance(record, ValueError):
            raise ValueError(f"{path}:{line}: {record}")
        text, label = (record.get(key) for key in ("text", "label")) \
            if isinstance(record, dict) else (None, None)
        if not isinstance(label, (str, int)) or isinstance(label, bool) or label == "":
            raise ValueError(f"{path}:{line} has no label: it needs one, a word or a whole number")
        check_text(text, f"{path}:{line}")
        found.append((text, label))
    return found


def check_text(text: Any, place: str) -> None:
    """ValueError, with the place, for what is no text."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{place} has no text")
    try:
        text.encode()
    except UnicodeEncodeError:                                      # JSON can spell "\ud800"
        raise ValueError(f"{place}: its text has half a surrogate pair, which is no character") \
            from None


def split(examples: Sequence[Example], validation: float) -> tuple[list[Example], list[Example]]:
    """Training and validation, by the hash of a text: equal ones stay together."""
    different = sorted({text for text, _ in examples})
    if len(different) < 2:
        raise ValueError(f"there are {len(different)} different texts; at least 2 are needed, one "
                         f"to train on and one to validate")
    chosen = set(split_documents(different, validation)[1])
    return ([example for example in examples if example[0] not in chosen],
            [example for example in examples if example[0] in chosen])


def write_dataset(folder: str | Path, train: Sequence[Example], val: Sequence[Example],
                  labels: Sequence[str], source: str) -> dict[str, Any]:
    """Write train.jsonl, val.jsonl and, last, meta.json; return the latter."""
    if len(labels) < 2:
        raise ValueError(f"{source} has {len(labels)} different labels; at least 2 are needed")
    folder, splits = Path(folder), {}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta.json").unlink(missing_ok=True)                  # from here on it is incomplete
    for name, part in (("train", train), ("val", val)):
        if not part:
            raise ValueError(f"{source} leaves no text for {name}.jsonl; give it more")
        for number, (text, _) in enumerate(part, 1):
            check_text(text, f"{source}: text {number} of {name}")
        data = "".join(json.dumps({"text": text, "label": label}, ensure_ascii=False) + "\n"
                       for text, label in part).encode()
        write_file(folder / f"{name}.jsonl", lambda file: file.write(data))
        splits[name] = {"records": len(part), "sha256": hashlib.sha256(data).hexdigest(),
                        "counts": np.bincount([label for _, label in part],
                                              minlength=len(labels)).tolist()}
    meta = {"version": FORMAT_VERSION, "kind": "classes", "labels": list(labels), "source": source,
            "splits": splits}
    write_json(folder / "meta.json", meta)
    counts = ", ".join(f"{label} {n:,}" for label, n in zip(labels, splits["val"]["counts"]))
    print(f"{folder}: {len(train):,} texts to train on, {len(val):,} to validate ({counts})")
    return meta


def read_meta(folder: Path) -> dict[str, Any]:
    """meta.json of texts with classes; ValueError if the folder is something else."""
    path = folder / "meta.json"
    if not path.exists():
        raise FileNotFoundError(f"there are no prepared texts with classes in {folder}; make it "
                                f"with: python -m data.labels --from=FILE --out={folder}")
    meta = read_json(path)
    if meta.get("kind") != "classes" or meta.get("version") != FORMAT_VERSION:
        raise ValueError(f"{path} has kind {meta.get('kind')!r} and version "
                         f"{meta.get('version')!r}, not \"classes\" and {FORMAT_VERSION}; prepare "
                         f"the data again")
    return meta


def read_split(folder: Path, name: str) -> list[Example]:
    """The examples of "train" or "val", as prepared: a changed file is refused."""
    facts, path = read_meta(folder)["splits"].get(name), folder / f"{name}.jsonl"
    if facts is None or not path.exists():
        raise FileNotFoundError(f"{folder} has no {name}.jsonl; prepare the data again")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != facts["sha256"]:
        raise ValueError(f"{path} differs from its checksum in meta.json; prepare the data again")
    records = map(json.loads, data.decode().split("\n")[:-1])
    return [(record["text"], record["label"]) for record in records]


def fingerprint(folder: Path, tokenizer: Tokenizer) -> str:
    """What identifies the samples: texts, classes and tokenizer; 16 hex digits."""
    meta = read_meta(folder)
    facts = [{name: facts["sha256"] for name, facts in meta["splits"].items()}, meta["labels"],
             tokenizer.hash]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def class_samples(examples: Iterable[Example], tokenizer: Any, block_size: int) -> Samples:
    """Examples as data.samples.SampleLoader serves them, to train and evaluate a Classifier.

    The class stands where the next token would: it is the one target, at the last token. A text
    that is too long loses its beginning, as the verdict mostly stands at the end.
    """
    texts, labels = zip(*examples)
    ids = tokenizer.encode_batch(list(texts))
    rows = [np.array(row[-block_size:] + [label], np.int32) for row, label in zip(ids, labels)]
    offsets = np.cumsum([0] + [len(row) for row in rows])
    labelled = np.zeros(offsets[-1], dtype=bool)
    labelled[offsets[1:] - 1] = True
    return Samples(np.concatenate(rows), labelled, offsets, block_size, {
        "records": len(rows), "kept": len(rows), "dropped": 0,
        "truncated": sum(len(row) > block_size for row in ids)})


def load_samples(folder: str | Path, name: str, tokenizer: Any, block_size: int) -> Samples:
    """The samples of "train" or "val" for a model of block_size positions."""
    return class_samples(read_split(Path(folder), name), tokenizer, block_size)


def prepare(config: LabelsConfig) -> Path:
    """Files of any two or more labels into a data set."""
    files = find_files(config.from_.split(","))
    found = {path: read_examples(path) for path in files}
    labels = {label for examples in found.values() for _, label in examples}
    if len({type(label) for label in labels}) > 1:
        raise ValueError(f"{config.from_} has words and numbers for labels; use one of them")
    numbers = {label: i for i, label in enumerate(sorted(labels))}
    parts: tuple[list[Example], list[Example]] = [], []             # training, validation
    for path, examples in found.items():
        parts["test" in path.stem].extend((text, numbers[label]) for text, label in examples)
    train, val = parts if all(parts) else split(parts[0] + parts[1], config.validation)
    write_dataset(config.out, train, val, [str(label) for label in numbers], config.from_)
    return Path(config.out)


def main(words: list[str]) -> None:
    prepare(parse(LabelsConfig, words, "python -m data.labels", about=__doc__))


if __name__ == "__main__":
    run_command(main)
