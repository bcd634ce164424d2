"""Files to texts: documents (.txt, .jsonl, .parquet) and records (.json, .jsonl).

    for text in read_documents(find_files("folder")): ...       # .txt: a file is a document,
                                                                # .jsonl: {"text": ...} a line,
                                                                # .json: a list of those or texts
    for place, record in read_records(path): ...                # any JSON object a line or item
"""
import functools
import json
import re
from pathlib import Path
from typing import Any, Iterable, Iterator

from bpe import END_OF_TEXT
from run.config import warn

DOCUMENTS = (".txt", ".jsonl", ".parquet")
RECORDS = (".json", ".jsonl", ".ndjson")
HELD_OUT = re.compile(r"(?<![a-z])(test(s|set|data)?|val(id|idation)?|dev)(?![a-z])")


def find_files(source: str | Path, endings: tuple[str, ...] = DOCUMENTS) -> list[Path]:
    """The files that `source` names: a file, a folder (searched below), several by comma."""
    if not source:
        raise ValueError("no source given; name files or folders, several by comma: --from=PATH")
    files: list[Path] = []
    for name in str(source).split(","):
        path = Path(name)
        if path.is_dir():
            files += sorted(p for p in path.rglob("*")
                            if p.suffix.lower() in endings and p.is_file())
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"there is no file or folder {path}")
    if not files:
        raise FileNotFoundError(f"{source} holds no {', '.join(endings)} file")
    return list(dict.fromkeys(files))                   # a file that is named twice is read once


def is_held_out(path: Path) -> bool:
    """Whether a file validates by its name: my_test.jsonl and val.json do, latest.jsonl does not.
    """
    return bool(HELD_OUT.search(path.stem.lower()))


def read_text(path: Path) -> str:
    """A file in UTF-8, its line ends as \\n, \\r\\n too. ValueError names the first wrong byte."""
    try:
        return path.read_text(encoding="utf-8").removeprefix("\ufeff")      # a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: byte {error.start} is "
                         f"0x{error.object[error.start]:02x}; convert it first") from None


def check_characters(text: str, place: str) -> None:
    """ValueError, with the place, for what JSON can spell and UTF-8 cannot: "\\ud800"."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place} has half a surrogate pair, \\u{ord(text[error.start]):04x}, "
                         f"which is no character; remove it") from None


# ------------------------------------------------------------------------------------- documents

def read_documents(files: Iterable[Path]) -> Iterator[str]:
    """Every document that is not blank, in order. Errors name the file and the line or byte."""
    readers = {".jsonl": _read_json, ".ndjson": _read_json, ".json": _read_json,
               ".parquet": _read_parquet}
    for path in files:
        read = readers.get(path.suffix.lower())
        for text in read(path) if read else [read_text(path)]:
            if text.strip():
                if END_OF_TEXT in text:
                    say_spelled(path)
                yield text


@functools.cache
def say_spelled(path: Path) -> None:
    """Warn, once for a file: many a corpus has its documents parted so."""
    warn(f"warning: {path} spells {END_OF_TEXT}, which is read as any other text and parts no "
         f"documents; write a document a line of a .jsonl file, without it")


def _read_json(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8-sig") as file:                  # without a byte order mark
        try:
            for place, record in (read_records(path) if path.suffix.lower() == ".json" else
                                  _json_lines(path, file)):
                if isinstance(record, ValueError):
                    raise ValueError(f"{place} is {record}")
                text = record.get("text") if isinstance(record, dict) else record
                if not isinstance(text, str):
                    raise ValueError(f'{place} is no {{"text": "..."}} object')
                check_characters(text, place)
                yield text
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 ({error.reason}); convert it first") from None


def _read_parquet(path: Path) -> Iterator[str]:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise ModuleNotFoundError('.parquet files need the extra "datasets": pip install '
                                  '-c constraints.txt -e ".[datasets]"') from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        batches = file.iter_batches(batch_size=1024, columns=["text"])
        if "text" not in names:
            raise ValueError(f"it has no column 'text', only {', '.join(names):.200}")
        if not (pyarrow.types.is_string(kind := file.schema_arrow.field("text").type)
                or pyarrow.types.is_large_string(kind)):
            raise ValueError(f"its column 'text' holds {kind}, not text")
        for batch in batches:
            yield from filter(None, batch.column(0).to_pylist())
    except (ValueError, OSError, pyarrow.ArrowException, MemoryError) as error:
        # The last for sizes that a damaged file claims; the others are how pyarrow says the rest.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is no parquet file that can be read: {reason:.300}") from None


# --------------------------------------------------------------------------------------- records

def read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, record) of a JSON array, a single object, or JSONL. A broken line of JSONL comes as a
    ValueError in place of its record; a broken array cannot be read on and raises it."""
    text = read_text(path)
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:                   # nested too deep is no JSON
        if text.lstrip()[:1] == "[":
            raise ValueError(f"{path} is no JSON: {error}") from None
        yield from _json_lines(path, text.split("\n"))
        return
    if isinstance(whole, list):
        yield from ((f"{path}, record {number}", record) for number, record in enumerate(whole, 1))
    else:
        yield f"{path}, line 1", whole                              # one object, on several lines


def _json_lines(path: Path, lines: Iterable[str]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            place = f"{path}, line {number}"
            try:
                yield place, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield place, ValueError(f"no JSON: {error}")


def read_objects(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, record) of a file of JSON objects. ValueError for anything else, and for nothing."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    place = ""
    for place, record in read_records(Path(path)):
        if not isinstance(record, dict):
            reason = record if isinstance(record, ValueError) else "no JSON object"
            raise ValueError(f"{place} is {reason}")
        yield place, record
    if not place:
        raise ValueError(f"{path} holds no records")


def text_of(record: dict[str, Any], name: str, place: str) -> str:
    """A text of a record that is not blank and can be encoded."""
    text = record.get(name)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{place} has no text {name!r}")
    check_characters(text, f"{place}: {name}")
    return text
