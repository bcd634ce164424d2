"""Prepares a data set, killed by SIGKILL in front of every write to the disk, for test_killed.py.

For every n, a process (a fork, so that a kill costs milliseconds) runs `python -m data.NAME` and
dies in front of its n-th call of os.fsync, os.replace or os.unlink, until one needs fewer than n
calls. What it leaves must be no data set or a whole one, and the same command must make of it the
bytes of an undisturbed run.
"""
import contextlib
import importlib
import os
import shutil
import signal
from pathlib import Path

from data import shards
from data.writer import read_progress


def prepare(name: str, words: list[str]) -> None:
    """Run the command line, here."""
    with contextlib.redirect_stdout(open(os.devnull, "w")):
        importlib.import_module(f"data.{name}").main(words)


def prepare_and_kill(name: str, words: list[str], kill_at: int) -> bool:
    """Run the command line in a process of its own; whether it was killed."""
    pid = os.fork()
    if not pid:
        calls = 0

        def deadly(function):
            def call(*arguments, **named):
                nonlocal calls
                calls += 1
                if calls == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **named)
            return call

        os.fsync, os.replace, os.unlink = map(deadly, (os.fsync, os.replace, os.unlink))
        code = 1
        try:
            prepare(name, words)
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL), f"kill at {kill_at}: the command failed"
    return status == signal.SIGKILL


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())
            if path.name not in (shards.STAMP, ".lock")}


def is_data_set(folder: Path) -> bool:
    """Whether a reader takes the folder for a data set; then it has to be a whole one."""
    try:
        shards.find(folder)
    except FileNotFoundError:
        return False
    shards.verify(folder)
    return True


def finished(folder: Path) -> dict[str, int]:
    """The shards that are done, by what changes when they are written again."""
    if not (folder / "progress.json").exists():
        return {}
    meta, _ = read_progress(folder)
    return {path.name: path.stat().st_ino for path in shards.files_of(folder, meta)}


def kill_everywhere(name: str, folder: Path, words: list[str]) -> None:
    """The above; the number of kills goes into the file FOLDER/kills. It forks: to be run in a
    process without threads."""
    whole, out, before = (folder / part for part in ("whole", "out", "before"))
    prepare(name, [*words, f"--out={whole}"])           # forks have its tables of Unicode then
    expected, kills, killed = content(whole), 0, True
    while killed:
        shutil.rmtree(out, ignore_errors=True)
        if before.exists():                             # other data are in the folder
            shutil.copytree(before, out)
        killed = prepare_and_kill(name, [*words, f"--out={out}"], kill_at=kills + 1)
        kills += killed
        assert killed or is_data_set(out)
        is_data_set(out)
        kept = finished(out)
        prepare(name, [*words, f"--out={out}"])
        assert content(out) == expected, f"kill {kills}: {sorted(content(out))}"
        if name == "fineweb":
            assert all((out / shard).stat().st_ino == inode for shard, inode in kept.items())
    if name == "fineweb":                               # killed again and again, it gets there too
        shutil.rmtree(out)
        times = 0
        while prepare_and_kill(name, [*words, f"--out={out}"], kill_at=10):     # a shard a run
            times += 1
            assert times < 20, "it does not get on"
        assert content(out) == expected and times > 2, times
    (folder / "kills").write_text(str(kills))
