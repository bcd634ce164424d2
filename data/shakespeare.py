"""Tiny shakespeare: 1.1 MB of plays, the classic first data set for a language model.

    python -m data.shakespeare                      downloads it once, with a checksum
    python -m data.shakespeare --from=input.txt     or reads a copy
    python -m data.shakespeare --tokenizer=gpt2     by default the tokens are the bytes

The first 90% train and the rest validates, as in char-rnn and nanoGPT, so that losses can be
compared; the text is pure ASCII, so a byte is a character. Source: github.com/karpathy/char-rnn.
"""
from dataclasses import dataclass
from pathlib import Path

from data.corpus import named_tokenizer, write_shards
from data.prepared import DATA
from formats.download import checksum, download
from run.config import parse, run_command

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@dataclass(frozen=True)
class ShakespeareConfig:
    from_: str = ""  # a local copy; empty: download it once
    tokenizer: str = "bytes"  # bytes, gpt2, or a tokenizer's path
    out: str = ""  # folder of the shards; empty: data/shakespeare


def prepare(config: ShakespeareConfig = ShakespeareConfig()) -> Path:
    """Tiny shakespeare as token shards, 90% to train on; returns their folder."""
    folder = Path(config.out or DATA / "shakespeare")
    path = Path(config.from_) if config.from_ else download(
        URL, folder / "input.txt", SHA256, "python -m data.shakespeare --from=FILE")
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if checksum(path, SHA256) != SHA256:
        raise ValueError(f"{path} is not tiny shakespeare (its SHA-256 differs); "
                         f"for another text use: python -m data.corpus --from={path}")
    text = path.read_bytes().decode("ascii")
    cut = int(0.9 * len(text))
    write_shards(folder, [text[:cut]], [text[cut:]], named_tokenizer(config.tokenizer), URL)
    return folder


def main(words: list[str]) -> None:
    prepare(parse(ShakespeareConfig, words, "python -m data.shakespeare", about=__doc__))


if __name__ == "__main__":
    run_command(main)
