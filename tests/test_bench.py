"""The comparison with peers: all contestants take the same step, and the table is formed right."""
import math
import os
from pathlib import Path

import pytest
import torch

from bench import machine, peers, saves, versus_peers
from bench.peers import KEPT, LOOSE, OURS, STEPS
from bench.versus_peers import PeersConfig
from model import GPTConfig

CPU = torch.device("cpu")
TINY = GPTConfig(block_size=32, vocab_size=101, n_layer=2, n_head=2, n_embd=16)
CHECKOUTS = {"nanoGPT": "nanoGPT", "build-nanogpt": "build-nanogpt"}


def checkout(who):
    """ONELOOP_PEERS is a folder that holds checkouts of the peers; without one they are skipped."""
    if who not in CHECKOUTS:
        if who == "transformers":
            pytest.importorskip("transformers")
        return ""
    path = Path(os.environ.get("ONELOOP_PEERS", "peers")) / CHECKOUTS[who]
    if not path.is_dir():
        pytest.skip(f"no checkout of {who} in ONELOOP_PEERS")
    return str(path)


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def tokens(config, micro_batch=2):
    ids = torch.randint(config.vocab_size, (micro_batch, config.block_size + 1))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def settings_of(contestant):
    """Name of a parameter -> what AdamW does with it."""
    names = {id(p): name for name, p in contestant.model.named_parameters()}
    return {names[id(p)]: tuple(group[key] for key in ("lr", "weight_decay", "betas", "eps"))
            for group in contestant.optimizer.param_groups for p in group["params"]}


def row(what="small", who=OURS, dtype="float32", mode="eager", tokens_per_s=100.0, **changes):
    return {"what": what, "who": who, "dtype": dtype, "mode": mode, "micro_batch": 2, "ms": 10.0,
            "tokens_per_s": tokens_per_s, "memory_mib": 50.0, "work": 3, "limit": 1000.0,
            "limit_of": f"matrix products in {dtype}", **changes}


@pytest.mark.parametrize("who", [LOOSE, "build-nanogpt", "transformers", "nanoGPT"])
def test_contestants_take_the_same_step(who, monkeypatch):
    """From the same weights the same losses and gradient norms, step after step, clipped alike and
    with the same AdamW for each parameter.

    1e-5: float32 sums in another order. nanoGPT's GELU is exact, GPT-2's the tanh approximation;
    they differ by less than 5e-4, and the losses by less.
    """
    clipped, clip = [], torch.nn.utils.clip_grad_norm_

    def recorded(parameters, most):
        norm = clip(parameters, most)
        clipped.append((norm.item(), most))
        return norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", recorded)
    x, y = tokens(TINY)
    ours = STEPS[OURS](TINY, x, y, CPU, torch.float32, "eager", "")
    theirs = STEPS[who](TINY, x, y, CPU, torch.float32, "eager", checkout(who))
    state = ours.model.state_dict()
    with torch.no_grad():
        for name, p in theirs.model.named_parameters():
            value = state[name]
            conv = who == "transformers" and name.split(".")[-2] in ("c_attn", "c_proj", "c_fc")
            p.copy_(value.t() if conv and value.dim() == 2 else value)
    tolerance = 1e-3 if who == "nanoGPT" else 1e-5
    for _ in range(4):
        assert theirs.step().item() == pytest.approx(ours.step().item(), abs=tolerance)
    assert [most for _, most in clipped] == 8 * [1.0]
    norms = [norm for norm, _ in clipped]
    assert norms[::2] == pytest.approx(norms[1::2], abs=tolerance)
    assert settings_of(theirs) == settings_of(ours)


def test_a_step_is_measured_with_its_loss_and_parameters(monkeypatch):
    monkeypatch.setattr(peers, "matmul_peak", lambda *_: 1.0)           # seconds
    config = GPTConfig(block_size=8, vocab_size=50, n_layer=1, n_head=1, n_embd=8)
    found = peers.measure_step(OURS, config, 3, "float32", "eager", CPU, repeats=1)
    assert found["first_loss"] == pytest.approx(math.log(50), abs=0.3)      # of untrained weights
    assert found["parameters"] == 50 * 8 + 8 * 8 + 12 * 8 * 8 + 13 * 8 + 2 * 8
    assert found["tokens_per_s"] * found["ms"] == pytest.approx(1000 * 3 * 8)
    assert found["work"] == 6 * (found["parameters"] - 8 * 8) + 12 * 8 * 8  # PaLM's formula


@pytest.mark.parametrize("who", [OURS, "nanoGPT", "transformers"])
def test_generation_counts_the_weights_that_a_token_reads(who, monkeypatch):
    monkeypatch.setattr(peers, "memory_bandwidth", lambda *_: 1.0)      # seconds
    config = GPTConfig(block_size=40, vocab_size=101, n_layer=1, n_head=2, n_embd=16)
    found = peers.measure_generation(who, config, 1, "bfloat16", "eager", CPU, 1, checkout(who), 20)
    weights = 101 * 16 + 12 * 16 * 16 + 13 * 16 + 2 * 16        # without positions
    assert found["work"] == 2 * weights
    assert found["tokens_per_s"] * found["ms"] == pytest.approx(1000 * 20)


def test_rounds_take_turns_and_one_that_fails_is_left_out(monkeypatch):
    asked = []

    def measured(function, what, who, dtype, mode, *given):
        asked.append((who, given))
        if who == LOOSE:
            raise RuntimeError("broken")
        return row(who=who, tokens_per_s=10.0 * len(asked))

    monkeypatch.setattr(versus_peers, "in_process", measured)
    monkeypatch.setattr(versus_peers, "has_compiler", lambda device: True)
    monkeypatch.setattr(machine, "machine_state", lambda device: 100.0)
    config = PeersConfig(who=(OURS, LOOSE, "nanoGPT"), dtypes=("float32",), modes=("compiled",),
                         micro_batch=4, repeats=5)
    turns = versus_peers.measure_shape(config, "small", CPU)
    given = ("cpu", 5, 4, "")
    assert asked == [(OURS, given), (LOOSE, given), (OURS, given), (OURS, given)]   # no checkout
    assert turns.missing == {(LOOSE, "float32", "compiled"): "broken"} and len(turns.states) == 4
    (rounds,) = turns.rows.values()
    found = machine.median_step(rounds)
    assert found["tokens_per_s"] == 30.0
    assert found["tokens_per_s_rounds"] == [10.0, 30.0, 40.0]


def rounds_of(monkeypatch, rounds, times, speeds):
    """The times that are kept of rounds of one key, and how often it was measured."""
    times, speeds, asked = iter(times), iter(speeds), []
    monkeypatch.setattr(machine, "machine_state", lambda device: next(speeds))
    turns = machine.take_turns(["step"], lambda key: asked.append(key) or {"ms": next(times)},
                               rounds)
    return [row["ms"] for row in turns.rows["step"]], len(asked)


def test_disturbed_rounds_are_left_out_and_taken_again(monkeypatch, capsys):
    """The machine slows from 100 to 80 in the second round; the fourth takes 20% longer."""
    steady = [100.0] * 9
    assert rounds_of(monkeypatch, 3, [10, 10, 10], steady) == ([10, 10, 10], 3)
    assert capsys.readouterr().err.count("disturbed") == 0
    assert rounds_of(monkeypatch, 2, [10, 99, 11], [100, 100, 80, 80]) == ([10, 11], 3)
    assert "round 2 was disturbed and is left out: a product ran at 100 GFLOP/s before it and 80 " \
           "after" in capsys.readouterr().err
    assert rounds_of(monkeypatch, 4, [10, 10.5, 9.5, 12, 10], steady) == ([10, 10.5, 9.5, 10], 5)
    assert "round 4 was disturbed and is left out: step took +20% of its median" in \
           capsys.readouterr().err
    # Never quiet: twice as many rounds, then all are kept, and it is said.
    assert rounds_of(monkeypatch, 1, [10, 10], [100, 80, 100]) == ([10, 10], 2)
    assert "NO ROUND WAS QUIET" in capsys.readouterr().err


def test_peers_are_measured_as_they_are_and_with_memory_kept(monkeypatch):
    kept, asked = [], []
    monkeypatch.setattr(versus_peers, "pick_device", lambda kind: kept.append(1) or CPU)
    monkeypatch.setattr(versus_peers, "measure_step", lambda who, *_: asked.append(who) or {})
    for who in ("transformers", "transformers" + KEPT, OURS):
        row = versus_peers.measure("tiny", who, "float32", "eager", "cpu", 1)
        assert row["who"] == who
    assert asked == ["transformers", "transformers", OURS] and len(kept) == 2
    monkeypatch.setattr(versus_peers.importlib.util, "find_spec", lambda name: True)
    plans = [versus_peers.plan(PeersConfig(dtypes=("float32",), modes=("eager",)), "generate",
                               torch.device(kind)) for kind in ("cpu", "cuda")]
    assert [[who for who, *_ in plan] for plan in plans] == [
        [OURS, "transformers", "transformers" + KEPT], [OURS, "transformers"]]


def test_the_table_of_hand_made_numbers():
    """Ours 100 and 150 tokens/s, peers 120 and 80: 150 / 120. Memory 60 over the least, 40. Not
    deterministic is no mode of ours, and no peer."""
    rounds = [row(tokens_per_s=speed) for speed in (90.0, 100.0, 130.0)]
    ours = machine.median_step(rounds)
    assert ours["tokens_per_s"] == 100.0 and ours["tokens_per_s_rounds"] == [90.0, 100.0, 130.0]
    rows = [ours, *(machine.median_step([one]) for one in (
        row(mode="compiled", tokens_per_s=150.0, memory_mib=60.0, limit=2000.0),
        row(who=LOOSE, mode="compiled", tokens_per_s=500.0, memory_mib=1.0),
        row(who="nanoGPT", tokens_per_s=80.0, memory_mib=40.0),
        row(who="transformers", mode="compiled", tokens_per_s=120.0),
        row(who="nanoGPT" + KEPT, tokens_per_s=200.0, memory_mib=20.0),
        row(dtype="bfloat16", tokens_per_s=300.0, limit=5000.0)))]
    assert versus_peers.ratios(rows) == [{
        "what": "small", "dtype": "float32", "mode": "compiled", "speed": 1.25, "memory": 1.5,
        "best_peer": "transformers, compiled", "speed_kept": 0.75}]     # bfloat16 has no peer
    assert [row["share"] for row in rows] == [0.3, 0.225, 1.5, 0.24, 0.36, 0.6, 0.18]
    limits = [row(tokens_per_s=speed, limit=limit) for speed, limit in ((90.0, 900.0),
                                                                        (50.0, 600.0))]
    assert machine.median_step(limits)["share"] == 0.275    # (0.3 + 0.25) / 2: each of its own
    found = machine.publish(versus_peers.report, "", False, CPU, rows, [], rounds=3,
                            ratios=versus_peers.ratios(rows), missing=["124M: slow"])
    lines = versus_peers.report(found).splitlines()
    assert cells(lines[4]) == ["small", "float32", OURS, "eager", "2", "10.0", "100.0", "40.0%",
                               "30.0%", "1.25", "0.83", "0.50", "50"]
    assert cells(lines[2])[9:12] == ["/ nanoGPT", "/ transformers", "/ nanoGPT (memory kept)"]
    assert "- limit of matrix products in float32: 0.0 to 0.0 GFLOP/s" in lines
    assert lines[-2:] == ["- small, float32: ours (compiled) has 1.25 of the tokens/s of the best "
                          "peer (transformers, compiled), 0.75 where that keeps freed memory, and "
                          "1.50 of the least memory",
                          "- missing: 124M: slow"]


@pytest.mark.parametrize("own", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_command_measures_in_processes_and_prints_the_table(own, capsys, monkeypatch):
    """own: it does; else here, on a machine whose limit is known at once."""
    asked = []
    monkeypatch.setattr(machine, "NOISE", math.inf)     # or a disturbed round is taken again
    if not own:
        monkeypatch.setattr(peers, "matmul_peak", lambda *_: 1e12)
        monkeypatch.setattr(versus_peers, "in_process", lambda function, *given: (
            asked.append(given) or function(*given)))
    versus_peers.main(["--only=tiny", f"--who={OURS}", "--modes=eager", "--dtypes=float32",
                       "--rounds=1", "--repeats=1", "--device=cpu"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(lines) == 3 and cells(lines[2])[:4] == ["tiny", "float32", OURS, "eager"]
    assert len(asked) == (not own)


def test_a_measurement_that_fails_tells_why():
    with pytest.raises(RuntimeError, match="FileNotFoundError: .*no/such/file"):
        machine.in_process(open, "no/such/file")


def test_a_process_measures_its_own_memory():
    assert machine.in_process(os.getpid) != os.getpid()


def test_wrong_settings_are_named(tmp_path):
    with pytest.raises(ValueError, match="--who: 'minGPT' is not allowed; give oneloop.*nanoGPT"):
        versus_peers.main(["--who=minGPT"])
    with pytest.raises(ValueError, match="rounds=0 must be at least 1"):
        versus_peers.main(["--rounds=0", "--only=tiny"])
    with pytest.raises(FileNotFoundError, match="train_gpt2.py"):
        PeersConfig(build_nanogpt=str(tmp_path))


def test_saves_counts_the_bytes_of_weights_and_moments(tmp_path):
    """Three tensors for each parameter, float32, and a step number for each of their tensors; tied
    weights once. The files are the whole state."""
    config = saves.SavesConfig(shape="tiny", repeats=1, compile="off", dtype="float32")
    found = saves.measure(config, CPU, tmp_path)
    parameters = 256 * 32 + 64 * 32 + 2 * (12 * 32 * 32 + 13 * 32) + 2 * 32
    tensors = 2 + 2 * 12 + 2
    assert found["bytes"] == 4 * (3 * parameters + tensors)
    for name in ("last.pt", "last.1.pt", "foreground.pt"):
        assert found["bytes"] < (tmp_path / name).stat().st_size < 2 * found["bytes"]
    seconds, ratios = found["seconds"], found["ratios"]
    assert ratios["copy / foreground"] * seconds["foreground"] == pytest.approx(seconds["copy"])
