"""Documents from files: .txt (a file is a document), .jsonl ({"text": ...} a line), .parquet.

    for text in read_documents(find_files("folder")): ...
"""
import json
from pathlib import Path
from typing import Iterable, Iterator

ENDINGS = (".txt", ".jsonl", ".parquet")


def find_files(source: str | Path) -> list[Path]:
    """The text files that `source` names: a file, a folder (searched below), several by comma."""
    files: list[Path] = []
    for name in str(source).split(","):
        path = Path(name)
        if path.is_dir():
            files += sorted(p for p in path.rglob("*") if p.suffix in ENDINGS)
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"there is no file or folder {path}")
    if not files:
        raise FileNotFoundError(f"{source} holds no {', '.join(ENDINGS)} file")
    return files


def read_documents(files: Iterable[Path]) -> Iterator[str]:
    """Every document that is not blank, in order. Errors name the file and the line or byte."""
    for path in files:
        read = {".jsonl": _read_jsonl, ".parquet": _read_parquet}.get(path.suffix, _read_text)
        for text in read(path):
            if text.strip():
                yield text


def _read_text(path: Path) -> Iterator[str]:
    try:
        yield path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: byte {error.start} is "
                         f"0x{error.object[error.start]:02x}; convert it first") from None


def _read_jsonl(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _text_of(line, f"{path}, line {number}")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 ({error.reason}); convert it first") from None


def _text_of(line: str, place: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:                   # nested too deep is no JSON
        raise ValueError(f"{place} is no JSON: {error}") from None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise ValueError(f'{place} is no {{"text": "..."}} object')
    try:
        text.encode()
    except UnicodeEncodeError as error:                             # JSON can spell "\ud800"
        raise ValueError(f"{place} has half a surrogate pair, \\u{ord(text[error.start]):04x}, "
                         f"which is no character; remove it") from None
    return text


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
