"""Files from the internet: fetched once, checked, gone on with where they stopped.

    path = download(url, path, digest, instead="python -m data.NAME --from=FILE")

What has come stands in `path.part` until it is whole and its checksum fits; then it is renamed, so
`path` is never half a file. A cut or silent connection is tried again, and so is the same call: it
asks for the rest only (RFC 9110, section 14), or for everything where a server cannot do that.
"""
import hashlib
import http.client
import os
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

TIMEOUT = 30            # seconds without an answer or a byte until a connection is given up
PAUSES = (1, 2, 4)      # seconds before each new attempt, counted anew when bytes have come
BLOCK = 1 << 20
LIMIT = 1 << 30         # bytes of a file, whose end a server need not tell; the largest has 84 MB
BUSY = (408, 425, 429, 500, 502, 503, 504)      # answers after which to try again


def download(url: str, path: Path, digest: str, instead: str, timeout: float = TIMEOUT,
             pauses: tuple[float, ...] = PAUSES) -> Path:
    """The file at `url`, under `path`; where it is already, it is only checked.

    digest: its SHA-256, or, of 40 digits, the id that git gives it (`git ls-tree HEAD FILE`).
    FileNotFoundError when it cannot be had, with the reason and `instead`: what to do where there
    is no network. ValueError when it is not what was published.
    """
    if path.exists():
        found = checksum(path, digest)
        if found != digest:
            raise ValueError(f"{path} has the checksum {found}, expected {digest}; delete it to "
                             f"have it downloaded again")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    failures = longest = 0
    while not (part.exists() and checksum(part, digest) == digest):  # killed before its name
        try:
            _fetch(url, part, timeout)
            break
        except (OSError, http.client.HTTPException) as error:
            size = part.stat().st_size if part.exists() else 0
            failures = 0 if size > longest else failures
            longest = max(size, longest)
            if failures == len(pauses) or not _passing(error):
                kept = f"; {size:,} bytes are kept, the same command goes on" if size else ""
                raise FileNotFoundError(f"cannot download {url} ({error or type(error).__name__}); "
                                        f"with a copy of the file: {instead}{kept}") from None
            time.sleep(pauses[failures])
            failures += 1
    found = checksum(part, digest)
    if found != digest:
        part.unlink()
        raise ValueError(f"{url} gave a file with the checksum {found}, expected {digest}; it is "
                         f"removed; try again, or with a copy of the file: {instead}")
    os.replace(part, path)
    return path


def checksum(path: Path, like: str) -> str:
    """SHA-256, or git's id where `like` is one: SHA-1 behind a header with the length."""
    git = len(like) == 40
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size) if git else hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _fetch(url: str, part: Path, timeout: float) -> None:
    """Append to `part` what it lacks. OSError or HTTPException when the connection fails."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:                      # nothing there: ours is too long
            part.unlink()
        raise
    place = answer.headers.get("Content-Range", "")
    with answer, open(part, "r+b" if have else "wb") as file:
        if answer.status != 206:
            have = 0                                        # everything comes again
        elif not place.startswith(f"bytes {have}-"):
            part.unlink()
            raise ConnectionError(f"bytes from {have} were asked for, and {place!r:.50} came")
        file.seek(have)
        file.truncate()
        length = answer.headers.get("Content-Length", "")
        total = have + int(length) if length.isdecimal() else None
        with tqdm(desc=part.stem, total=total, initial=have, unit="B", unit_scale=True, delay=2,
                  disable=None) as bar:
            while block := answer.read1(BLOCK):
                if file.tell() + len(block) > LIMIT:
                    raise ValueError(f"{part.stem} from {answer.url} is longer than {LIMIT:,} "
                                     f"bytes, which no file that is fetched here is; "
                                     f"{part} can be deleted")
                file.write(block)
                bar.update(len(block))
        if total is not None and file.tell() < total:
            raise ConnectionError(f"cut after {file.tell():,} of {total:,} bytes")


def _passing(error: Exception) -> bool:
    """Whether a failure may be over in seconds; a missing page or network is not."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code in BUSY + (416,)      # the part is removed: from the start
    return not isinstance(getattr(error, "reason", None), (socket.gaierror, FileNotFoundError))
