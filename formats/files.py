"""Files that are written whole or not at all, and JSON: the one place for both.

A reader, or the same command after a kill, finds the file before or the file after, never half of
one. For that, the new content is written beside its place, forced to the disk and renamed:

    write_json(path, {"step": 100})                     # write_text, write_bytes alike
    with atomic_write(path) as temporary:               # whatever else writes a file, by its name
        save_file(tensors, temporary)

A kill leaves a `NAME.PID.tmp`; two processes never share one, and whoever owns the folder may
remove it.
"""
import contextlib
import errno
import json
import os
from pathlib import Path
from typing import Any, Iterator


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Give a path to write to; when the block ends without an error, that file replaces `path`."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:    # the content before the name, should the power fail
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:                    # a full disk's own names no file
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: str | Path, data: bytes) -> None:
    """The bytes as a file."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """The text as a file in UTF-8, its line ends as they are."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, content: Any, indent: int = 2, **options: Any) -> None:
    """The content as a JSON file that people can read; options are those of json.dumps."""
    write_text(path, json.dumps(content, indent=indent, **options) + "\n")


def read_json(path: str | Path, fix: str = "") -> dict[str, Any]:
    """The object in a JSON file. FileNotFoundError, or ValueError if it holds none.

    fix: what to do about it, the end of the message.
    """
    fix = f"; {fix}" if fix else ""
    if not Path(path).is_file():                            # a pipe would be waited for
        raise FileNotFoundError(f"no such file: {path}{fix}")
    try:
        content = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:           # nested too deep is no JSON of ours
        raise ValueError(f"{path} is truncated or not JSON: {error}{fix}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object{fix}")
    return content
