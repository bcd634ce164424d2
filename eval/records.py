"""JSON records of evaluation files, one a line, each with the place that errors name."""
import json
from pathlib import Path
from typing import Any, Iterator


def read_records(path: str | Path, what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, record) of every line that is not blank; `what` the file holds, for errors."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no {what} file {path}")
    found = False
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            found, place = True, f"{path}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:           # not JSON, or not UTF-8
                raise ValueError(f"{place} is no JSON: {error}") from None
            if not isinstance(record, dict):
                raise ValueError(f"{place} is no JSON object")
            yield place, record
    if not found:
        raise ValueError(f"{path} holds no {what} items")


def text_of(record: dict[str, Any], name: str, place: str) -> str:
    """A text of a record, neither blank nor with half a character."""
    text = record.get(name)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{place} has no text {name!r}")
    check_characters(text, f"{place}: {name}")
    return text


def check_characters(text: str, place: str) -> None:
    """ValueError, with the place, where a text cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError:                                      # JSON can spell "\ud800"
        raise ValueError(f"{place} has half a surrogate pair, which is no character") from None
