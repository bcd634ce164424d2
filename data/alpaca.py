"""Alpaca: 52,002 instructions with answers, the classic first data set for an assistant.

    python -m data.alpaca                           downloads it once and checks it
    python -m data.alpaca --from=alpaca.json        or reads records of its form from a file

Records are {"instruction", "input", "output"}; those with an empty output are dropped and counted.
The download is checked by the id that git gives the file in the authors' repository. CC BY-NC 4.0.
Source: github.com/tatsu-lab/stanford_alpaca (Taori et al. 2023).
"""
from dataclasses import dataclass
from pathlib import Path

from data import conversations
from data.prepared import DATA
from data.texts import RECORDS, find_files
from formats.download import download
from run.config import parse, run_command

COMMIT = "761dc5bfbdeeffa89b8bff5d038781a4055f796a"
URL = f"https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/{COMMIT}/alpaca_data.json"
GIT_BLOB = "3779ddbc040543ab1834ef216c983d6fcc06cc9a"       # git ls-tree HEAD alpaca_data.json


@dataclass(frozen=True)
class AlpacaConfig:
    from_: str = ""  # a local file; empty: download it once
    tokenizer: str = ""  # gpt2 or a tokenizer's path, to count tokens with; may be empty
    validation: float = 0.05  # share of the records that validates
    out: str = ""  # folder of the data set; empty: data/alpaca


def prepare(config: AlpacaConfig = AlpacaConfig()) -> Path:
    """Alpaca as a set of conversations; returns its folder."""
    folder = Path(config.out or DATA / "alpaca")
    files = find_files(config.from_, RECORDS) if config.from_ else [download(
        URL, folder / "alpaca_data.json", GIT_BLOB, "python -m data.alpaca --from=FILE")]
    found, dropped = conversations.read(files)
    conversations.write_conversations(folder, found, config.from_ or URL, config.validation,
                                      dropped, tokenizer=config.tokenizer)
    return folder


def main(words: list[str]) -> None:
    prepare(parse(AlpacaConfig, words, "python -m data.alpaca", about=__doc__))


if __name__ == "__main__":
    run_command(main)
