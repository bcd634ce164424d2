"""Files to texts: documents (.txt, .jsonl, .parquet) and records (.json, .jsonl).

    for text in read_documents(find_files("folder")): ...       # .txt: a file is a document,
                                                                # .jsonl: {"text": ...} a line
    for line, record in read_records(path): ...                 # any JSON object a line or item
"""
import json
import re
from pathlib import Path
from typing import Any, Iterable, Iterator

DOCUMENTS = (".txt", ".jsonl", ".parquet")
RECORDS = (".json", ".jsonl")
SPACE = re.compile(r"[ \t\r\n]*")         # between the records of an array


def find_files(source: str | Path, endings: tuple[str, ...] = DOCUMENTS) -> list[Path]:
    """The files that `source` names: a file, a folder (searched below), several by comma."""
    files: list[Path] = []
    for name in str(source).split(","):
        path = Path(name)
        if path.is_dir():
            files += sorted(p for p in path.rglob("*") if p.suffix in endings)
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"there is no file or folder {path}")
    if not files:
        raise FileNotFoundError(f"{source} holds no {', '.join(endings)} file")
    return files


def read_text(path: Path) -> str:
    """A file in UTF-8. ValueError names the first wrong byte."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: byte {error.start} is "
                         f"0x{error.object[error.start]:02x}; convert it first") from None


def lone_surrogate(text: str) -> str:
    """What JSON can spell and UTF-8 cannot, half a surrogate pair: "\\ud800"; "" without any."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"\\u{ord(text[error.start]):04x}"
    return ""


# ------------------------------------------------------------------------------------- documents

def read_documents(files: Iterable[Path]) -> Iterator[str]:
    """Every document that is not blank, in order. Errors name the file and the line or byte."""
    for path in files:
        read = {".jsonl": _read_jsonl, ".parquet": _read_parquet}.get(path.suffix)
        for text in read(path) if read else [read_text(path)]:
            if text.strip():
                yield text


def _read_jsonl(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8") as file:
        try:
            for number, record in _json_lines(file):
                place = f"{path}, line {number}"
                if isinstance(record, ValueError):
                    raise ValueError(f"{place} is {record}")
                text = record.get("text") if isinstance(record, dict) else None
                if not isinstance(text, str):
                    raise ValueError(f'{place} is no {{"text": "..."}} object')
                if wrong := lone_surrogate(text):
                    raise ValueError(f"{place} has half a surrogate pair, {wrong}, which is no "
                                     f"character; remove it")
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

def read_records(path: Path) -> Iterator[tuple[int, Any]]:
    """(line, record) of a JSON array, a single object, or JSONL. A broken line of JSONL comes as a
    ValueError in place of its record; a broken array cannot be read on and raises it."""
    text = read_text(path).removeprefix("\ufeff")                    # a byte order mark
    if text.lstrip()[:1] == "[":
        yield from _read_array(path, text)
        return
    try:
        yield 1, json.loads(text)                                   # one object, on several lines
        return
    except (ValueError, RecursionError):
        pass                                                        # a line each, then
    yield from _json_lines(text.split("\n"))


def _json_lines(lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:           # nested too deep is no JSON
                yield number, ValueError(f"no JSON: {error}")


def _read_array(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    decoder, line, counted = json.JSONDecoder(), 1, 0
    at = SPACE.match(text, text.index("[") + 1).end()
    while text[at:at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            record, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: after line {line} is no JSON: {error}") from None
        yield line, record
        at = SPACE.match(text, at).end()
        if text[at:at + 1] == ",":
            at = SPACE.match(text, at + 1).end()
        elif text[at:at + 1] != "]":
            raise ValueError(f"{path}: the array breaks off after the record in line {line}")
