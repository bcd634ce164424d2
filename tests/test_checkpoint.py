"""A checkpoint is whole or absent, and a stranger's cannot run code."""
import os
import pickle

import pytest
import torch

import checkpoint


def test_what_is_saved_comes_back_equal(tmp_path):
    state = {"step": 3, "model": {"w": torch.randn(4, 4)}, "best_loss": float("inf")}
    checkpoint.save(tmp_path / "a.pt", state)
    found = checkpoint.load(tmp_path / "a.pt")
    assert torch.equal(found["model"]["w"], state["model"]["w"])
    assert found["step"] == 3 and found["best_loss"] == float("inf")


def test_the_newest_are_kept_in_order(tmp_path):
    for step in range(5):
        checkpoint.save_last(tmp_path, {"step": step}, keep=3)
    names = {path.name: checkpoint.load(path)["step"] for path in tmp_path.iterdir()}
    assert names == {"last.pt": 4, "last.1.pt": 3, "last.2.pt": 2}
    assert checkpoint.load_last(tmp_path)["step"] == 4


@pytest.mark.parametrize("keep", [1, 2])
def test_a_crash_at_any_rename_loses_nothing(tmp_path, monkeypatch, keep):
    for step in range(3):
        checkpoint.save_last(tmp_path, {"step": step}, keep=keep)
    replace, calls = os.replace, []
    for crash in range(keep + 1):
        def dying(source, target):
            if len(calls) == crash:
                raise KeyboardInterrupt
            calls.append(target)
            replace(source, target)
        monkeypatch.setattr(os, "replace", dying)
        calls.clear()
        newest = checkpoint.load_last(tmp_path)["step"]
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save_last(tmp_path, {"step": newest + 1}, keep=keep)
        monkeypatch.setattr(os, "replace", replace)
        # before the new file has its name the old one counts, from then on the new one
        assert checkpoint.load_last(tmp_path)["step"] == newest + (crash > 0)


def test_a_failed_write_leaves_the_checkpoint_before_it(tmp_path, monkeypatch):
    checkpoint.save_last(tmp_path, {"step": 1})
    def full(handle):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        checkpoint.save_last(tmp_path, {"step": 2})
    assert checkpoint.load_last(tmp_path)["step"] == 1


@pytest.mark.parametrize("keep_bytes", [0, 10, 700])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(tmp_path, capsys, keep_bytes):
    for step in range(2):
        checkpoint.save_last(tmp_path, {"step": step, "w": torch.zeros(1000)})
    newest = tmp_path / "last.pt"
    newest.write_bytes(newest.read_bytes()[:keep_bytes])
    assert checkpoint.load_last(tmp_path)["step"] == 0
    assert "last.pt cannot be read" in capsys.readouterr().err


def test_no_readable_checkpoint_is_an_error_and_no_checkpoint_is_a_fresh_start(tmp_path):
    assert checkpoint.load_last(tmp_path) is None
    (tmp_path / "last.pt").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="no checkpoint in .* can be read"):
        checkpoint.load_last(tmp_path)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)
    torch.save({"format_version": 1, "x": Evil()}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Evil()))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(ValueError, match="cannot be read"):
            checkpoint.load(tmp_path / name)
    assert not (tmp_path / "ran").exists()
