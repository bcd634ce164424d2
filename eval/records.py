"""JSON records of evaluation files, each with the place that errors name."""
from pathlib import Path
from typing import Any, Iterator

from data import texts


def read_records(path: str | Path, what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, record) of every JSON object in a file; `what` the file holds, for errors."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no {what} file {path}")
    place = ""
    for line, record in texts.read_records(Path(path)):
        place = f"{path}, line {line}"
        if not isinstance(record, dict):
            reason = record if isinstance(record, ValueError) else "no JSON object"
            raise ValueError(f"{place} is {reason}")
        yield place, record
    if not place:
        raise ValueError(f"{path} holds no {what} items")


def text_of(record: dict[str, Any], name: str, place: str) -> str:
    """A text of a record that is not blank and can be encoded."""
    text = record.get(name)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{place} has no text {name!r}")
    check_characters(text, f"{place}: {name}")
    return text


def check_characters(text: str, place: str) -> None:
    """ValueError, with the place, where a text cannot be encoded."""
    if texts.lone_surrogate(text):
        raise ValueError(f"{place} has half a surrogate pair, which is no character")
