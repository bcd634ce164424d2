"""Alpaca: 52,002 instructions with answers, the classic first data set for an assistant.

    python -m data.alpaca                           downloads it once and checks it
    python -m data.alpaca --from=alpaca.json        or reads records of its form from a file

Records are {"instruction", "input", "output"}; those with an empty output are dropped and counted.
The download is checked by the id that git gives the file in the authors' repository. CC BY-NC 4.0.
Source: github.com/tatsu-lab/stanford_alpaca (Taori et al. 2023).
"""
import hashlib
import os
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from config import option, parse, run_command
from data import conversations
from data.shards import DATA

COMMIT = "761dc5bfbdeeffa89b8bff5d038781a4055f796a"
URL = f"https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/{COMMIT}/alpaca_data.json"
GIT_BLOB = "3779ddbc040543ab1834ef216c983d6fcc06cc9a"       # git ls-tree HEAD alpaca_data.json
RECORDS = 52_002


@dataclass(frozen=True)
class AlpacaConfig:
    source: str = option("", "a local file; empty: download it once", flag="from")
    on_error: Literal["skip", "refuse"] = option("skip", "what to do with a broken record")
    tokenizer: str = option("", "gpt2 or a tokenizer's path, to count tokens with; the data know "
                                "none, so this is optional")
    validation: float = option(0.05, "share of the records that validates")
    out: str = option("", "folder of the data set; empty: data/alpaca")


def prepare(config: AlpacaConfig = AlpacaConfig()) -> Path:
    folder = Path(config.out or DATA / "alpaca")
    files = conversations.find_files([config.source] if config.source
                                     else [download(folder / "alpaca_data.json")])
    found, dropped = conversations.read(files, "alpaca", config.on_error)
    records = len(found) + sum(dropped.values())
    if records != RECORDS:
        print(f"{files[0]} has {records:,} records, not the {RECORDS:,} of Stanford Alpaca")
    conversations.write_dataset(folder, found, config.source or URL, config.validation, dropped)
    if config.tokenizer:
        conversations.count_tokens(folder, config.tokenizer)
    return folder


def download(path: Path) -> Path:
    """Fetch the file once. ValueError if it is not the one in the authors' repository."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with urllib.request.urlopen(URL, timeout=30) as answer:
            data = answer.read()
    except OSError as error:
        raise FileNotFoundError(f"cannot download {URL} ({error}); get the file elsewhere and use: "
                                f"python -m data.alpaca --from=FILE") from None
    found = git_blob(data)
    if found != GIT_BLOB:
        raise ValueError(f"{URL} gave a file with git id {found}, expected {GIT_BLOB}; try again")
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(data)
    os.replace(temporary, path)
    return path


def git_blob(data: bytes) -> str:
    """The id that git gives a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def main(words: list[str]) -> None:
    prepare(parse(AlpacaConfig, words, "python -m data.alpaca", about=__doc__))


if __name__ == "__main__":
    run_command(main)
