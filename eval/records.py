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
            if line.strip():
                yield f"{path}, line {number}", parse_record(line, f"{path}, line {number}")
                found = True
    if not found:
        raise ValueError(f"{path} holds no {what} items")


def parse_record(line: bytes, place: str) -> dict[str, Any]:
    """A line as a JSON object; ValueError, with the place, where it is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:                   # not JSON, or not UTF-8
        raise ValueError(f"{place} is no JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{place} is no JSON object")
    return record


def text_of(record: dict[str, Any], name: str, place: str) -> str:
    """A text of a record that is not blank and can be encoded."""
    text = record.get(name)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{place} has no text {name!r}")
    try:
        text.encode()
    except UnicodeEncodeError:                                      # JSON can spell "\ud800"
        raise ValueError(f"{place}: {name} has half a surrogate pair, which is no character") \
            from None
    return text
