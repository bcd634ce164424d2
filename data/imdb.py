"""IMDB: 50,000 film reviews, as text to continue, as questions, or as texts of two classes.

    python -m data.imdb                             downloads it once; token shards in data/imdb
    python -m data.imdb --task=sentiment            conversations in data/imdb_sentiment
    python -m data.imdb --task=classes              for a classifier, in data/imdb_classes
    python -m data.imdb --from=PATH                 the unpacked folder aclImdb, or .jsonl files of
                                                    {"text": ..., "label": 0 or 1}

Training and validation are the published halves train and test where the source has them (folders
of the archive, files with test, val or dev in their name); else the hash of a review decides. Line
breaks, <br />, become line ends. Source: ai.stanford.edu/~amaas/data/sentiment (Maas et al. 2011).
"""
import json
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Literal, NamedTuple

from data.conversations import Message, write_conversations
from data.corpus import named_tokenizer, write_shards
from data.labels import read_examples, write_examples
from data.prepared import DATA, split_by_hash
from data.texts import find_files, is_held_out
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
    task: Literal["text", "sentiment", "classes"] = "text"  # shards, conversations, or classes
    tokenizer: str = "gpt2"  # of the shards: gpt2, bytes, or a tokenizer's path
    validation: float = 0.05  # share that validates, where the source has no test reviews
    out: str = ""  # folder of the data set; empty: data/imdb, data/imdb_sentiment, ...


class Review(NamedTuple):
    """A film review; label 0 is negative, 1 positive."""
    text: str
    label: int


def load_reviews(path: str | Path) -> list[Review]:
    """The reviews of a .jsonl file of {"text", "label"}. ValueError names the line that is none."""
    reviews = []
    for place, text, label in read_examples(path):
        if label not in (0, 1):
            raise ValueError(f"{place}: label is {label!r}, not 0 or 1")
        reviews.append(Review(with_line_ends(text), label))
    return reviews


def with_line_ends(text: str) -> str:
    """A review with line ends for its "<br />"."""
    return text.replace("<br />", "\n").strip()


def texts_of(path: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of what may be reviews: in the unpacked folder, or in the archive as it is."""
    if path.is_dir():
        for file in sorted(path.glob("*/*/*.txt")):
            yield file.relative_to(path).as_posix(), file.read_text(encoding="utf-8")
    elif path.name.endswith(".tar.gz"):
        with tarfile.open(path) as archive:
            for member in archive:
                if REVIEW.fullmatch(member.name):
                    yield member.name, archive.extractfile(member).read().decode()


def read_reviews(source: str, folder: Path) -> tuple[list[Review], list[Review]]:
    """The halves train and test of a source, or of the download. ValueError where there is none."""
    path = Path(source) if source else download(URL, folder / "aclImdb_v1.tar.gz", SHA256,
                                                "python -m data.imdb --from=FOLDER")
    train, test = [], []
    for full, text in texts_of(path):
        if name := REVIEW.fullmatch(full):
            half = test if name[1] == "test" else train
            half.append(Review(with_line_ends(text), int(name[2] == "pos")))
    if not train and not test:
        for file in find_files(path, (".jsonl",)):
            half = test if is_held_out(file) else train
            half += load_reviews(file)
    return train, test


def as_messages(text: str, label: int) -> list[Message]:
    """A review as a question about it and its answer."""
    return [{"role": "user", "content": f"{QUESTION}\n\n{text}", "input": text},
            {"role": "assistant", "content": ANSWERS[label]}]


def prepare(config: ImdbConfig = ImdbConfig()) -> Path:
    """IMDB as the data set that `config.task` names; returns its folder."""
    home, source = DATA / "imdb", config.from_ or URL
    folder = Path(config.out or (home if config.task == "text" else DATA / f"imdb_{config.task}"))
    train, val = read_reviews(config.from_, home)
    if not train or not val:
        train, val = split_by_hash(train + val, config.validation, lambda review: json.dumps(
            as_messages(*review), ensure_ascii=False))
    if config.task == "classes":
        write_examples(folder, train, val, ANSWERS, source)
    elif config.task == "sentiment":
        train, val = ([{"messages": as_messages(*review)} for review in part]
                      for part in (train, val))
        write_conversations(folder, train, source, val=val)
    else:
        train, val = ([text for text, _ in part] for part in (train, val))
        write_shards(folder, train, val, named_tokenizer(config.tokenizer), source)
    return folder


def main(words: list[str]) -> None:
    prepare(parse(ImdbConfig, words, "python -m data.imdb", about=__doc__))


if __name__ == "__main__":
    run_command(main)
