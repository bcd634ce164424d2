"""A file is written whole or not at all, and what is not JSON is named."""
import pytest

from formats.files import atomic_write, read_json, write_bytes, write_json, write_text


def test_what_is_written_is_read_and_nothing_else_is_left(tmp_path):
    write_json(tmp_path / "a.json", {"é": [1, 2]}, ensure_ascii=False)
    assert read_json(tmp_path / "a.json") == {"é": [1, 2]}
    write_text(tmp_path / "a.txt", "é\r\n中\n")
    write_bytes(tmp_path / "a.txt", (tmp_path / "a.txt").read_bytes() * 2)
    assert (tmp_path / "a.txt").read_bytes() == "é\r\n中\n".encode() * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.txt"]


@pytest.mark.parametrize("error", [OSError(28, "disk full"), OSError("3 requested and 0 written")])
def test_a_write_that_fails_leaves_the_file_before_and_names_it(tmp_path, error):
    """Neither a write to a full disk nor numpy's says which file it was."""
    write_text(tmp_path / "a.txt", "before")
    with pytest.raises(OSError, match=f"({error.strerror}|{error}): '.*/a.txt'$"), \
            atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise error
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "before")]


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff", b"[" * 100_000])
def test_what_is_no_json_is_named(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match="a.json is truncated or not JSON: .*; write it again"):
        read_json(tmp_path / "a.json", "write it again")
    with pytest.raises(FileNotFoundError, match="no such file: .*b.json$"):
        read_json(tmp_path / "b.json")
