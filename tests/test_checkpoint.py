"""A checkpoint is whole or absent, and a stranger's cannot run code."""
import copy
import dataclasses
import math
import os
import pickle

import pytest
import torch

from model import GPT, GPTConfig
from optim import OptimConfig, make_optimizer
from run import checkpoint
from run.load import load_model

TINY = GPTConfig(block_size=8, vocab_size=300, n_layer=2, n_head=2, n_embd=8)


def state_of(step=3, **changes):
    """What a run saves."""
    return {"step": step, "model": GPT(TINY).state_dict(), "best_loss": math.inf, "base": "",
            "config": {"model": dataclasses.asdict(TINY), "lora": None, "init_from": "scratch"},
            "optimizer": {"state": {}, "param_groups": []}, "scaler": {}, "stale": 0, "recent": [],
            "data": "0" * 16, **changes}


def test_what_is_saved_comes_back_equal(tmp_path):
    state = state_of(3)
    checkpoint.save(tmp_path / "a.pt", state)
    found = checkpoint.load(tmp_path / "a.pt")
    assert all(torch.equal(found["model"][name], state["model"][name]) for name in state["model"])
    assert found["step"] == 3 and found["best_loss"] == float("inf")


def test_the_newest_are_kept_in_order(tmp_path):
    for step in range(5):
        checkpoint.save_last(tmp_path, state_of(step), keep=3)
    names = {path.name: checkpoint.load(path)["step"] for path in tmp_path.iterdir()}
    assert names == {"last.pt": 4, "last.1.pt": 3, "last.2.pt": 2}
    assert checkpoint.load_last(tmp_path)["step"] == 4


@pytest.mark.parametrize("keep", [1, 2])
def test_a_crash_at_any_rename_loses_nothing(tmp_path, monkeypatch, keep):
    for step in range(3):
        checkpoint.save_last(tmp_path, state_of(step), keep=keep)
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
            checkpoint.save_last(tmp_path, state_of(newest + 1), keep=keep)
        monkeypatch.setattr(os, "replace", replace)
        # before the new file has its name the old one counts, from then on the new one
        assert checkpoint.load_last(tmp_path)["step"] == newest + (crash > 0)


def test_a_failed_write_leaves_the_checkpoint_before_it(tmp_path, monkeypatch):
    checkpoint.save_last(tmp_path, state_of(1))
    def full(handle):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        checkpoint.save_last(tmp_path, state_of(2))
    assert checkpoint.load_last(tmp_path)["step"] == 1


@pytest.mark.parametrize("keep_bytes", [0, 10, 700])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(tmp_path, capsys, keep_bytes):
    for step in range(2):
        checkpoint.save_last(tmp_path, state_of(step))
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
        with pytest.raises(ValueError, match="cannot be read") as refusal:
            checkpoint.load(tmp_path / name)
        assert "weights_only" not in str(refusal.value)     # PyTorch's advice how to let it run
        assert name == "b.pt" or "such a file can run code" in str(refusal.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_a_save_that_was_killed_before_its_renames_is_settled(tmp_path, keep):
    for step in range(4):
        checkpoint.save_last(tmp_path, state_of(step), keep=keep)
    checkpoint.save(tmp_path / "last.new.pt", state_of(4))
    checkpoint.complete_renames(tmp_path, keep)
    found = [checkpoint.load(path)["step"] for path in checkpoint._last_files(tmp_path, keep)]
    assert found == [4, 3, 2][:keep] and not (tmp_path / "last.new.pt").exists()
    checkpoint.complete_renames(tmp_path, keep)         # nothing is left to do
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 4


@pytest.mark.parametrize("block,blocks", [(2**26, 1), (2**12, 2)])      # a tensor of 9,600 bytes
def test_a_state_is_copied_before_it_changes_and_names_of_one_tensor_stay_so(tmp_path, monkeypatch,
                                                                             block, blocks):
    monkeypatch.setattr(checkpoint, "BLOCK", block)
    state = state_of(1, best_loss=1.0)
    weight = state["model"]["lm_head.weight"]           # (300, 8), and wte's
    state["optimizer"]["moments"] = [torch.zeros(3)]
    weight[0, 0] = 1.0
    saver = checkpoint.Saver(tmp_path, keep=2)
    saver.save(state, best=True)
    weight += 1                                         # training goes on
    saver.save({**state, "step": 2})
    saver.close()
    steps = [checkpoint.load(tmp_path / name) for name in ("last.1.pt", "last.pt", "best.pt")]
    assert [found["step"] for found in steps] == [1, 2, 1]
    assert [found["model"]["transformer.wte.weight"][0, 0].item() for found in steps] == [
        1.0, 2.0, 1.0]
    assert "optimizer" not in steps[2]
    assert all(torch.equal(steps[1]["model"][key], tensor)
               for key, tensor in state["model"].items())
    assert len(saver.blocks) == blocks                  # of the first save; the second used them
    numbers = sum(p.numel() for p in GPT(TINY).parameters())
    assert (tmp_path / "best.pt").stat().st_size < 4 * numbers + 12_000      # wte is in it once


def test_milestones_stay_as_many_as_asked(tmp_path):
    saver = checkpoint.Saver(tmp_path, keep=1, limit=2)
    for step in range(1, 6):
        saver.save(state_of(step), milestone=True)
    saver.close()
    assert [path.name for path in checkpoint.milestones(tmp_path)] == ["step_0000004.pt",
                                                                       "step_0000005.pt"]


def test_failures_are_counted_in_a_row_and_the_last_one_is_never_silent(tmp_path, monkeypatch,
                                                                        capsys):
    save, fails = checkpoint.save_last, []

    def failing(*arguments, **named):
        if fails:
            raise OSError(fails.pop())
        return save(*arguments, **named)
    monkeypatch.setattr(checkpoint, "save_last", failing)
    saver = checkpoint.Saver(tmp_path, max_failed=2)
    for fails[:] in (["full"], ["full"], [], ["full"], ["full"]):       # never three in a row
        saver.save(state_of(1))
        saver.wait()
    assert capsys.readouterr().err.count("WARNING: NO CHECKPOINT WAS SAVED") == 4
    with pytest.raises(OSError, match="the last checkpoint in .* could not be written"):
        saver.close()
    fails[:] = ["full"]
    saver.save(state_of(2))
    with pytest.raises(OSError, match="3 checkpoints in a row .* max_failed_saves=2: full"):
        saver.wait()


def test_a_flipped_bit_is_found(tmp_path):
    checkpoint.save_last(tmp_path, state_of(1))
    checkpoint.save_last(tmp_path, state_of(2))
    raw = bytearray((tmp_path / "last.pt").read_bytes())
    raw[len(raw) // 2] ^= 1
    (tmp_path / "last.pt").write_bytes(raw)
    assert checkpoint.load_last(tmp_path)["step"] == 1


def test_a_part_that_is_listed_as_a_folder_is_refused(tmp_path):
    """PyTorch reads nothing of it, and gives whatever was in memory as weights."""
    checkpoint.save(tmp_path / "a.pt", state_of())
    raw = bytearray((tmp_path / "a.pt").read_bytes())
    entry = raw.rindex(b"PK\x01\x02", 0, raw.rindex(b"data/0"))       # of the list at the end
    raw[entry + 38] = 0x10                              # its attributes: a folder
    (tmp_path / "a.pt").write_bytes(raw)
    with pytest.raises(ValueError, match="cannot be read: its list of parts is damaged"):
        checkpoint.load(tmp_path / "a.pt")


HUGE = {"n_layer": 10**7, "n_embd": 10**6, "vocab_size": 10**9, "block_size": 10**9,
        "vocab_multiple": 10**9}


@pytest.mark.parametrize("change", [
    lambda s: s.pop("config"), lambda s: s.pop("optimizer"), lambda s: s.update(step=True),
    lambda s: s.update(best_loss=math.nan), lambda s: s.update(recent=["a"]),
    lambda s: s["model"].update(x=1), lambda s: s["config"].update(lora={"r": "a"}),
    lambda s: s["config"].update(lora=[]), lambda s: s["config"].update(model={"n_head": "2"}),
    lambda s: s["config"].pop("model"), lambda s: s["config"].update(model=None),
    lambda s: s["model"].update({"lm_head.weight": torch.full((300, 8), math.nan)}),
    lambda s: s["config"].update(init_from=3), lambda s: s["config"].update({1: 2}),
    lambda s: s["model"].update(x=torch.zeros(1).expand(10**9)),
    lambda s: s["model"].update(x=torch.zeros(1, device="meta")),
    *(lambda s, name=name, size=size: s["config"]["model"].update({name: size})
      for name, size in HUGE.items())])
def test_what_no_run_saves_is_refused_before_anything_is_made_of_it(tmp_path, change):
    state = state_of()
    change(state)
    checkpoint.save(tmp_path / "best.pt", state)
    (tmp_path / "run.json").write_text("{}")
    for read in (checkpoint.load_last, load_model):
        (tmp_path / "last.pt").write_bytes((tmp_path / "best.pt").read_bytes())
        with pytest.raises(ValueError, match="cannot be read|no checkpoint in .* can be read") as e:
            read(tmp_path)
        assert len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize("change", [{"model": None}, {"init_from": None}])
def test_an_adapter_without_its_base_is_refused(tmp_path, change):
    state = state_of()
    state["config"].update(lora={"r": 2}, **change)
    checkpoint.save(tmp_path / "best.pt", state)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="the settings in .* lack the model's, or its base"):
        load_model(tmp_path)


def test_weights_of_another_shape_than_the_settings_say_are_named(tmp_path):
    state = state_of()
    state["model"]["transformer.ln_f.bias"] = torch.zeros(7)
    checkpoint.save(tmp_path / "best.pt", state)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"ln_f.bias: the checkpoint has \(7,\) .* has \(8,\)"):
        load_model(tmp_path)


@pytest.mark.parametrize("change", [
    lambda s: s.pop("param_groups"), lambda s: s["param_groups"].pop(),
    lambda s: s["param_groups"][0].pop("betas"), lambda s: s["state"].update({99: {}}),
    lambda s: s["state"][0].pop("exp_avg"), lambda s: s["state"].update({0: 1}),
    lambda s: s["state"][0].update(exp_avg=torch.zeros(3))])
def test_a_state_of_another_optimizer_is_refused(change):
    model = GPT(TINY)
    optimizer = make_optimizer(model, OptimConfig(), 1e-3, 0.1)
    model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))[1].backward()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    checkpoint.check_moments(optimizer, saved)
    change(saved)
    with pytest.raises(ValueError, match="optimizer's state in the checkpoint is not that of"):
        checkpoint.check_moments(optimizer, saved)
