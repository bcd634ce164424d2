"""Texts with a class each: JSON in, samples for a run.classifier.Classifier out.

    python -m data.labels --from=FILE[,FILE...] --out=FOLDER

In: {"text": ..., "label": ...} a line, or a JSON array of them; labels are words or whole numbers,
and the classes are the sorted labels that occur. Files with test, val or dev in their name
validate; without one the hash of a text decides. Out: a data set (data/prepared.py) of {"text",
"label": number of its class} with {"labels": [names]} in meta.json. It knows no tokenizer.

    write_examples(folder, train, val, labels=("negative", "positive"), source="...")
    samples = load_samples(folder, "train", tokenizer, block_size=1024)     # data.samples.Samples
"""
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, Iterator, Sequence

import numpy as np

from bpe import Tokenizer
from data.prepared import DATA, read_split, split_by_hash, write_dataset
from data.samples import Samples
from data.texts import RECORDS, find_files, is_held_out, read_objects, text_of
from run.config import parse, run_command

Example = tuple[str, int]               # a text and the number of its class


@dataclass(frozen=True)
class LabelsConfig:
    from_: str = ""  # a .json or .jsonl file, or a folder of them; several by comma
    out: str = ""  # folder of the data set; empty: data/labels
    validation: float = 0.05  # share that validates, where no file's name has test, val or dev


def read_examples(path: str | Path) -> Iterator[tuple[str, str, str | int]]:
    """(place, text, label) of a file's records; ValueError names the place of one without."""
    for place, record in read_objects(path):
        label = record.get("label")
        if not isinstance(label, (str, int)) or isinstance(label, bool) or label == "":
            raise ValueError(f"{place} has no label: it needs one, a word or a whole number")
        yield place, text_of(record, "text", place), label


def write_examples(folder: str | Path, train: Sequence[Example], val: Sequence[Example],
                   labels: Sequence[str], source: str) -> dict[str, Any]:
    """Write a data set and return its meta.json."""
    if len(labels) < 2:
        raise ValueError(f"{source} has {len(labels)} different labels; at least 2 are needed")
    splits = {}
    for name, part in (("train", train), ("val", val)):
        if not part:
            raise ValueError(f"{source} leaves no text for {name}.jsonl; give it more")
        splits[name] = [{"text": text, "label": label} for text, label in part]
    meta = write_dataset(folder, "classes", splits, source, labels=list(labels))
    print(f"{folder}: {len(train):,} texts to train on, {len(val):,} to validate, {len(labels)} "
          f"classes")
    return meta


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


def load_samples(folder: str | Path, name: str, tokenizer: Tokenizer, block_size: int) -> Samples:
    """The samples of "train" or "val" for a model of block_size positions."""
    examples = [(record["text"], record["label"])
                for record in read_split(Path(folder), "classes", name)]
    return class_samples(examples, tokenizer, block_size)


def prepare(config: LabelsConfig) -> Path:
    """Files of any two or more labels into a data set."""
    found = {path: [(text, label) for _, text, label in read_examples(path)]
             for path in find_files(config.from_, RECORDS)}
    labels = {label for examples in found.values() for _, label in examples}
    if len({type(label) for label in labels}) > 1:
        raise ValueError(f"{config.from_} has words and numbers for labels; use one of them")
    numbers = {label: i for i, label in enumerate(sorted(labels))}
    parts: tuple[list[Example], list[Example]] = [], []             # training, validation
    for path, examples in found.items():
        parts[is_held_out(path)].extend((text, numbers[label]) for text, label in examples)
    train, val = parts if all(parts) else split_by_hash(
        parts[0] + parts[1], config.validation, lambda example: example[0],
        lambda example: len(example[0]))
    folder = Path(config.out or DATA / "labels")
    write_examples(folder, train, val, [str(label) for label in numbers], config.from_)
    return folder


def main(words: list[str]) -> None:
    prepare(parse(LabelsConfig, words, "python -m data.labels", about=__doc__))


if __name__ == "__main__":
    run_command(main)
