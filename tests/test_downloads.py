"""Downloads, against a server on this machine: whole and right, or absent with a reason."""
import hashlib
import http.server
import random
import re
import threading

import pytest

from formats.download import download

CONTENT = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
INSTEAD = "python -m data.x --from=FILE"


class Server(http.server.ThreadingHTTPServer):
    """Serves CONTENT. `faults` are what the next answers do, `asked` is what was asked for."""
    ranges, content, daemon_threads = True, CONTENT, True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.asked = [], []
        self.released = threading.Event()       # lets a silent answer end

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/file.bin"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.asked.append(asked)
        fault = server.faults.pop(0) if server.faults else None
        if isinstance(fault, int):
            return self.send_error(fault)
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and server.ranges else 0
        if start >= len(server.content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            at = start + 7 if fault == "elsewhere" else start
            self.send_header("Content-Range", f"bytes {at}-{len(CONTENT) - 1}/{len(CONTENT)}")
        if fault != "no length":
            self.send_header("Content-Length", str(len(server.content) - start))
        self.end_headers()
        rest = server.content[start:]
        self.wfile.write(rest[:len(rest) // 2] if fault in ("cut", "silent") else rest)
        if fault == "silent":
            self.wfile.flush()
            server.released.wait()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


def fetch(server, tmp_path, **settings):
    return download(server.url, tmp_path / "new" / "file.bin", SHA256, INSTEAD,
                    **{"pauses": (0, 0, 0), "timeout": 30, **settings})


def names(tmp_path):
    return [path.name for path in (tmp_path / "new").iterdir()]


@pytest.mark.parametrize("faults,asked", [
    ([], [None]),
    (["no length"], [None]),
    (["cut"], [None, "bytes=150000-"]),
    (["cut", "cut", "cut"], [None, "bytes=150000-", "bytes=225000-", "bytes=262500-"]),
    ([503, 429, "cut", 500], [None, None, None, "bytes=150000-", "bytes=150000-"]),
    (["cut", "elsewhere"], [None, "bytes=150000-", None]),  # not the bytes that were asked for
])
def test_a_download_is_whole_whatever_happens_to_the_connection(server, tmp_path, faults, asked):
    server.faults = list(faults)
    path = fetch(server, tmp_path)
    assert path.read_bytes() == CONTENT and names(tmp_path) == ["file.bin"]
    assert fetch(server, tmp_path) == path
    assert server.asked == asked                                    # and nothing the second time


def test_a_silent_connection_is_given_up_and_gone_on_with(server, tmp_path):
    server.faults = ["silent"]
    assert fetch(server, tmp_path, timeout=0.2).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=150000-"]


def test_a_later_call_goes_on_where_the_first_gave_up(server, tmp_path):
    server.faults = ["cut", 503, 503, 503]
    with pytest.raises(FileNotFoundError, match="503.*with a copy of the file: python -m data.x "
                                                "--from=FILE; 150,000 bytes are kept"):
        fetch(server, tmp_path)
    assert names(tmp_path) == ["file.bin.part"]
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.asked[-1] == "bytes=150000-" and names(tmp_path) == ["file.bin"]


def test_a_server_without_ranges_sends_everything_again(server, tmp_path):
    server.ranges, server.faults = False, ["cut"]
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    server.faults = ["cut"] * 9
    (tmp_path / "new" / "file.bin").unlink()
    with pytest.raises(FileNotFoundError, match="cut after 150,000 of 300,000 bytes"):
        fetch(server, tmp_path)                 # and not for ever
    assert len(server.asked) == 2 + 4


@pytest.mark.parametrize("part,asked", [
    (CONTENT[:1000], ["bytes=1000-"]),
    (CONTENT, []),                              # killed in front of the renaming
    (CONTENT + b"more", ["bytes=300004-", None]),
])
def test_what_a_killed_download_left_is_used(server, tmp_path, part, asked):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "file.bin.part").write_bytes(part)
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.asked == asked and names(tmp_path) == ["file.bin"]


def test_wrong_content_is_removed(server, tmp_path):
    server.content = b"<html>please log in</html>"
    with pytest.raises(ValueError, match="checksum .* removed; .* python -m data.x --from=FILE"):
        fetch(server, tmp_path)
    assert names(tmp_path) == []
    server.content = CONTENT
    (tmp_path / "new" / "file.bin.part").write_bytes(b"x" * 10)     # of something else
    with pytest.raises(ValueError, match="checksum"):
        fetch(server, tmp_path)
    assert fetch(server, tmp_path).read_bytes() == CONTENT


def test_a_changed_file_is_named_and_left_to_its_owner(server, tmp_path):
    path = fetch(server, tmp_path)
    path.write_bytes(b"my own")
    with pytest.raises(ValueError, match=r"file.bin has the checksum .* delete it"):
        fetch(server, tmp_path)
    assert path.read_bytes() == b"my own"


def test_what_cannot_be_had_is_said_at_once(server, tmp_path):
    server.faults = [404]
    with pytest.raises(FileNotFoundError) as error:
        fetch(server, tmp_path, pauses=(1000,))
    assert "404" in str(error.value) and INSTEAD in str(error.value)
    assert "\n" not in str(error.value) and len(server.asked) == 1
    for url in ("http://nowhere.invalid/x", (tmp_path / "none").as_uri()):
        with pytest.raises(FileNotFoundError, match=f"cannot download {url} .*{INSTEAD}"):
            download(url, tmp_path / "x", SHA256, INSTEAD, pauses=(1000,))
    with pytest.raises(FileNotFoundError, match="cannot download"):     # refused, after 2 attempts
        download("http://127.0.0.1:9/x", tmp_path / "x", SHA256, INSTEAD, pauses=(0,))


def test_a_file_can_be_checked_by_the_id_that_git_gives_it(tmp_path):
    (tmp_path / "in").write_bytes(b"hello\n")
    hello = "ce013625030ba8dba906f756967f9e9ca394464a"      # echo hello | git hash-object --stdin
    path = download((tmp_path / "in").as_uri(), tmp_path / "out", hello, INSTEAD)
    assert path.read_bytes() == b"hello\n"
    with pytest.raises(ValueError, match="expected ce013625"):
        path.write_bytes(b"hallo\n")
        download("file:///none", path, hello, INSTEAD)


@pytest.mark.parametrize("faults", [["no length"], []])
def test_a_file_without_an_end_stops_at_the_limit(server, tmp_path, monkeypatch, faults):
    monkeypatch.setattr("formats.download.LIMIT", 100_000)
    server.faults = faults
    with pytest.raises(ValueError, match="is longer than 100,000 bytes"):
        download(server.url, tmp_path / "file.bin", SHA256, INSTEAD)
    assert (tmp_path / "file.bin.part").stat().st_size <= 100_000
    assert not (tmp_path / "file.bin").exists()
