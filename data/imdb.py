"""IMDB: 50,000 film reviews, as text to continue, as questions, or as texts of two classes.

    python -m data.imdb                             downloads it once; token shards in data/imdb
    python -m data.imdb --task=sentiment            conversations in data/imdb_sentiment
    python -m data.imdb --task=classes              for a classifier, in data/imdb_classes
    python -m data.imdb --from=PATH                 the unpacked folder aclImdb, or .jsonl files of
                                                    {"text": ..., "label": 0 or 1}

Training and validation are the published halves train and test where the source has them (folders
of the archive, files with "test" in their name); else the hash of a review decides. Line breaks,
<br />, become line ends. Source: ai.stanford.edu/~amaas/data/sentiment (Maas et al. 2011).
"""
import json
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Literal

from data.conversations import Message, write_conversations
from data.corpus import named_tokenizer, write_shards
from data.labels import read_examples, write_examples
from data.prepared import DATA, split_by_hash
from formats.download import download
from run.config import parse, run_command

URL = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
SHA256 = "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe"
QUESTION = "Is this film review positive or negative? Answer with one word."
ANSWERS = ("negative", "positive")
REVIEW = re.compile(r"(?:aclImdb/)?(train|test)/(pos|neg)/\w+\.txt")


@dataclass(frozen=True)
class ImdbConfig:
    from_: str = ""  # folder aclImdb, a .jsonl file or a folder of them; empty: download it once
    task: Literal["text", "sentiment", "classes"] = "text"  # token shards, conversations, or texts
        # with their class
    tokenizer: str = "gpt2"  # of the shards: gpt2, bytes, or a tokenizer's path
    validation: float = 0.05  # share that validates, where the source has no test reviews
    out: str = ""  # folder of the data set; empty: data/imdb, data/imdb_sentiment or
        # data/imdb_classes


Review = tuple[str, str, int]           # "train" or "test", the text, 1 for positive


def texts_of_folder(folder: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of what may be reviews in the unpacked archive."""
    for path in sorted(folder.glob("*/*/*.txt")):
        yield path.relative_to(folder).as_posix(), path.read_text(encoding="utf-8")


def texts_of_archive(path: Path) -> Iterator[tuple[str, str]]:
    """The same, read from the archive as it is; nothing is unpacked onto the disk."""
    with tarfile.open(path) as archive:
        for member in archive:
            if REVIEW.fullmatch(member.name):
                yield member.name, archive.extractfile(member).read().decode()


def reviews_of_file(path: Path) -> Iterator[Review]:
    """The reviews of a .jsonl file; "test" in its name means the test half."""
    half = "test" if "test" in path.stem else "train"
    for line, text, label in read_examples(path):
        if label not in (0, 1):
            raise ValueError(f"{path}:{line} is no review: it needs a text and a label 0 or 1")
        yield half, text, label


def read_reviews(source: str, folder: Path) -> list[Review]:
    """All reviews of a source, or of the download. ValueError where there is none."""
    path = Path(source) if source else download(URL, folder / "aclImdb_v1.tar.gz", SHA256,
                                                "python -m data.imdb --from=FOLDER")
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    files = []
    if path.is_dir():
        texts, files = texts_of_folder(path), sorted(path.glob("*.jsonl"))
    elif path.name.endswith(".tar.gz"):
        texts = texts_of_archive(path)
    else:
        texts, files = [], [path]
    found = [(name[1], text, int(name[2] == "pos")) for full, text in texts
             if (name := REVIEW.fullmatch(full))]
    found = found or [review for file in files for review in reviews_of_file(file)]
    if not found:
        raise ValueError(f"{path} holds no reviews: neither train/pos/*.txt nor *.jsonl")
    return [(half, text.replace("<br />", "\n").strip(), label) for half, text, label in found]


def as_messages(text: str, label: int) -> list[Message]:
    """A review as a question about it and its answer."""
    return [{"role": "user", "content": f"{QUESTION}\n\n{text}", "input": text},
            {"role": "assistant", "content": ANSWERS[label]}]


def prepare(config: ImdbConfig = ImdbConfig()) -> Path:
    """IMDB as the data set that `config.task` names; returns its folder."""
    home, source = DATA / "imdb", config.from_ or URL
    folder = Path(config.out or (home if config.task == "text" else DATA / f"imdb_{config.task}"))
    reviews = read_reviews(config.from_, home)
    train, val = ([(text, label) for half, text, label in reviews if half == name]
                  for name in ("train", "test"))
    if not train or not val:
        train, val = split_by_hash(train + val, config.validation, lambda review: json.dumps(
            as_messages(*review), ensure_ascii=False))
    if config.task == "classes":
        write_examples(folder, train, val, ANSWERS, source)
    elif config.task == "sentiment":
        talks = ([{"messages": as_messages(*review)} for review in part] for part in (train, val))
        write_conversations(folder, next(talks), source, val=next(talks))
    else:
        texts = ([text for text, _ in part] for part in (train, val))
        write_shards(folder, *texts, named_tokenizer(config.tokenizer), source)
    return folder


def main(words: list[str]) -> None:
    prepare(parse(ImdbConfig, words, "python -m data.imdb", about=__doc__))


if __name__ == "__main__":
    run_command(main)
