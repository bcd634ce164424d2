"""What `make bench` measures, and what docs/measured.md says of it: steps, data, start-up, ranks."""
import json
import math
import re
import subprocess
import sys

import pytest
import torch

from bench import __main__ as whole
from bench import kills, ladder, loading, machine, measured, peers, ranks, step, versus_peers
from bench.ladder import FUSED, HEAD, PADDED, RUNGS, TF32, LadderConfig, WrittenOutAttention
from bench.loading import LoadingConfig
from bench.ranks import RanksConfig
from data.loader import WindowLoader
from data.sets import TokenSet
from fast.linear import FastLinear
from model import GPT, GPTConfig
from run.config import parse
from run.watch import PHASES

CPU = torch.device("cpu")
TINY = GPTConfig(block_size=32, vocab_size=101, n_layer=2, n_head=2, n_embd=16)


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty bench/results."""
    folder = tmp_path / "bench" / "results"
    folder.mkdir(parents=True)
    monkeypatch.setattr(machine, "RESULTS", folder)
    return folder


def rows_of(text):
    """The cells of every line of a table."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
            if line.startswith("| ")]


def rung_row(rung, ms=100.0, **changes):
    return {"rung": rung, "micro_batch": 2, "ms": ms, "first_loss": 4.6, "memory_mib": 300.0,
            "tokens_per_s": 64000 / ms, "work": 1000, "limit": 1e6,
            "limit_of": "matrix products in float32", **changes}


# --------------------------------------------------------------------------------------- ladder

def test_every_rung_takes_the_same_step(monkeypatch):
    """Losses of five steps from the same weights, all rungs in float32 and eager; what differs is
    how it is computed. 1e-5: sums in another order, over 101 rows of the embedding or 128."""
    monkeypatch.setitem(ladder.DTYPES, "bfloat16", torch.float32)
    monkeypatch.setattr(ladder, "has_compiler", lambda device: False)
    ids = torch.randint(101, (3, 33))
    runs = [ladder.contestant(rung, TINY, ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), CPU)
            for rung in RUNGS]
    state = runs[0].model.state_dict()
    with torch.no_grad():
        for run in runs[1:]:
            for name, p in run.model.named_parameters():
                p[:len(state[name])].copy_(state[name])
    for _ in range(5):
        losses = [run.step().item() for run in runs]
        assert losses == pytest.approx([losses[0]] * len(RUNGS), abs=1e-5)
    assert losses[0] < math.log(101) - 0.05                         # it learns


def test_each_rung_adds_its_own_to_those_below():
    """The rungs at which a part changes, from the model and optimizer that they really have."""
    ids = torch.randint(101, (1, 33))
    runs = {rung: ladder.contestant(rung, TINY, ids[:, :-1], ids[:, 1:], CPU) for rung in RUNGS}

    def since(part):
        having = [rung for rung in RUNGS if part(runs[rung])]
        assert having == list(RUNGS[-len(having):])                 # what came stays
        return having[0]
    assert since(lambda run: type(run.model) is GPT) == HEAD
    assert since(lambda run: run.optimizer.defaults["fused"]) == FUSED
    assert since(lambda run: len(run.model.transformer.wte.weight) == 128) == PADDED
    assert since(lambda run: type(run.model.lm_head) is FastLinear) == ladder.ONEDNN
    assert since(lambda run: not any(isinstance(module, WrittenOutAttention)
                                     for module in run.model.modules())) == ladder.FLASH


def test_a_rung_is_measured_in_its_precision(monkeypatch):
    asked = []
    monkeypatch.setattr(ladder, "matmul_peak", lambda device, dtype: asked.append(dtype) or 1.0)
    monkeypatch.setattr(peers, "step_time", lambda step, device, repeats: 0.5)
    rows = [ladder.measure(rung, TINY, 2, "cpu", 1) for rung in ("float32", TF32, "bfloat16")]
    assert [row["limit_of"].split()[-1] for row in rows] == ["float32", "float32", "bfloat16"]
    assert asked == [torch.float32, torch.float32, torch.bfloat16]
    assert [row["tokens_per_s"] for row in rows] == [128.0] * 3     # 2 x 32 in half a second
    assert rows[0]["first_loss"] == pytest.approx(math.log(101), abs=0.3)


def test_the_ladder_is_measured_in_turn(results, monkeypatch, capsys):
    """Two rounds of hand-made rows: medians, shares of the peak of each, factors; a rung that
    fails and one that is not for this machine are named. Table, JSON and page agree."""
    asked, ms = [], {"float32": [190.0, 210.0], "bfloat16": [50.0, 50.0], FUSED: [20.0, 20.0]}
    monkeypatch.setattr(machine, "machine_state", lambda device: 100.0)

    def measure(function, rung, *_):
        asked.append(rung)
        if rung == HEAD:
            raise RuntimeError("out of memory")
        return rung_row(rung, ms[rung].pop(0), limit=1e6 * (1 + len(ms[rung])))

    monkeypatch.setattr(ladder, "in_process", measure)
    ladder.main([f"--rungs=float32,{TF32},bfloat16,{FUSED},{HEAD}", "--rounds=2", "--shape=tiny",
                 "--device=cpu", "--save"])
    said = capsys.readouterr().out
    assert asked == ["float32", "bfloat16", FUSED, HEAD, "float32", "bfloat16", FUSED]
    lines = {cells[0]: cells[1:] for cells in rows_of(said)}
    assert lines["float32"] == ["200.0", "321", "10.0%", "23.7%", "300", "1.00", "1.00"]
    assert lines["bfloat16"] == ["50.0", "1,280", "0.0%", "96.0%", "300", "4.00", "4.00"]
    assert lines[FUSED][-2:] == ["2.50", "10.00"]
    assert "without TF32: cpu has no TF32" in said and f"without {HEAD}: out of memory" in said
    found = json.loads((results / "ladder-cpu-tiny.json").read_text())
    assert found["skipped"].keys() == {TF32, HEAD} and len(found["rows"]) == 3
    assert {cells[0]: cells[1:] for cells in rows_of(measured.page())}["float32"] == lines["float32"]
    assert found["matmul_gflops_before_after"] == [100.0] * 3


@pytest.mark.parametrize("own", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_rung_is_measured_in_a_process_of_its_own(own, capsys, monkeypatch):
    """own: it is; else here, on a machine whose limit is known at once."""
    asked = []
    monkeypatch.setattr(machine, "NOISE", math.inf)     # or a disturbed round is taken again
    if not own:
        monkeypatch.setattr(ladder, "matmul_peak", lambda *_: 1e12)
        monkeypatch.setattr(ladder, "in_process", lambda function, *given: (
            asked.append(given) or function(*given)))
    ladder.main(["--shape=tiny", "--rounds=1", "--repeats=1", "--rungs=float32", "--device=cpu"])
    said = capsys.readouterr().out
    assert "tiny, 2 sequences" in said and rows_of(said)[2][0] == "float32"
    assert len(rows_of(said)) == 3 and "GFLOP/s before and" in said and len(asked) == (not own)


# ---------------------------------------------------------------------------- data and start-up

def test_the_loader_is_charged_for_all_that_it_serves(tmp_path, monkeypatch):
    """100 windows of 8 in batches of 16: 6 batches, 768 tokens, with a clock that says 2 s."""
    folder = loading.generated(tmp_path / "data", 801, vocab_size=50)
    clock, served = iter((5.0, 7.0)), []
    batches = WindowLoader.batches

    def counted(self, step):
        for x, y in batches(self, step):
            served.append(x.numel())
            yield x, y
    monkeypatch.setattr(WindowLoader, "batches", counted)
    monkeypatch.setattr(loading.time, "process_time", lambda: next(clock))
    row = loading.loader_row(folder, 16, 8)
    assert row["tokens"] == sum(served) == 6 * 16 * 8
    assert row["tokens_per_cpu_s"] == 384 and row["of_a_core"] == 2_000_000 / 384


def test_generated_data_is_a_data_set(tmp_path):
    data = TokenSet(loading.generated(tmp_path / "data", 3000, 40, vocab_size=70_000))
    assert (len(data.train), len(data.val), data.vocab_size) == (3000, 40, 70_000)
    assert data.train.read(0, 3000).max() > 2**16 and data.tokenizer is None


def write_texts(path):
    """300 documents in a file; returns their bytes."""
    texts = [f"document {i}: é, " + "some text. " * (i % 7) for i in range(300)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return sum(len(text.encode()) for text in texts)


def test_the_text_is_what_python_carries_again_and_again(tmp_path, monkeypatch):
    """A lone surrogate, which no file can hold, is replaced."""
    monkeypatch.setattr(loading, "documentation", lambda: ["four", "\ud800"])
    monkeypatch.setattr(loading, "sources", lambda: ["pass"])
    loading.write_text(tmp_path / "text.jsonl", 14)
    texts = [json.loads(line)["text"] for line in (tmp_path / "text.jsonl").open()]
    assert texts == ["four", "?", "pass", "four", "?"]


def test_text_to_shards_is_compared_on_the_same_tokens(tmp_path, monkeypatch):
    """Both make as many tokens as the text has bytes, with a tokenizer of bytes; what prepare adds,
    nothing here, is not counted. The ratio is of medians."""
    size = write_texts(tmp_path / "text.jsonl")
    config = LoadingConfig(from_=str(tmp_path / "text.jsonl"), tokenizer="bytes", rounds=3)
    seconds = {"oneloop": [1.9, 2.0, 2.1], "tiktoken": [1.5, 1.6, 1.45]}
    monkeypatch.setattr(machine, "machine_state", lambda device: 100.0)

    def measure(function, who, *given):
        row = function(who, *given)
        assert row["ms"] > 0
        return {**row, "ms": 1000 * seconds[who].pop(0)}
    monkeypatch.setattr(loading, "in_process", measure)
    row, states = loading.compare_text(config, tmp_path)
    assert states == [100.0] * 4
    assert row["tokens"] == row["bytes"] == size and row["documents"] == 300
    assert row["seconds"] == {"oneloop": 2.0, "tiktoken": 1.5} and row["of_tiktoken"] == 0.75
    rows = iter(({"ms": 1.0, "tokens": 7}, {"ms": 1.0, "tokens": 8}))
    monkeypatch.setattr(loading, "in_process", lambda *_: next(rows))
    with pytest.raises(ValueError, match=r"do not make the same tokens .*\[7, 8\]"):
        loading.compare_text(LoadingConfig(from_=config.from_, tokenizer="bytes", rounds=1),
                             tmp_path)


def test_end_of_text_tokens_are_not_counted_as_text(tmp_path):
    write_texts(tmp_path / "text.jsonl")
    tokenizer = loading.Tokenizer.train(["some text, some more text"], 260)
    tokenizer.save(tmp_path / "tok.json")
    ours, theirs = (loading.text_row(who, str(tmp_path / "text.jsonl"), str(tmp_path / "tok.json"),
                                     threads=1)["tokens"] for who in loading.WHO)
    assert tokenizer.eot is not None and ours == theirs > 0


def test_help_of_the_tokenizer_does_not_import_torch():
    """And the way to see it does see what is imported."""
    code = ("import runpy, sys; sys.argv = ['bpe.py', '--help']\n"
            "try: runpy.run_path('bpe.py', run_name='__main__')\n"
            "except SystemExit: print(*{name.split('.')[0] for name in sys.modules})")
    done = subprocess.run([sys.executable, "-c", code], cwd=machine.REPOSITORY, text=True,
                          capture_output=True, check=True)
    modules = done.stdout.splitlines()[-1].split()
    assert "usage" in done.stdout and "torch" not in modules
    assert {"numpy", "tiktoken", "fast"} <= set(modules)


# ---------------------------------------------------------------------------------------- ranks

def test_ranks_and_threads_train_the_same_steps(tmp_path, monkeypatch):
    """The two runs that are compared log the same losses (1e-5: float32 sums over 2 ranks in
    another order), and the ratio is of what they logged."""
    logs, run = [], ranks.run

    def noted(folder, settings, count, threads):
        logs.append((count, threads, run(folder, settings, count, threads)))
        return logs[-1][2]
    monkeypatch.setattr(ranks, "run", noted)
    monkeypatch.setattr(ranks, "LOOKS", 2)
    monkeypatch.setattr(machine, "NOISE", math.inf)     # or a disturbed round is taken again
    config = RanksConfig(shapes=("tiny",), rounds=1, dtype="float32", compile="off")
    row = ranks.compare("tiny", config, tmp_path)
    assert [log[:2] for log in logs] == [(1, 2), (2, 1)]
    one, two = ([line["loss"] for line in lines] for *_, lines in logs)
    assert len(one) == 4 and one == pytest.approx(two, abs=1e-5)
    assert row["of_threads"] == logs[1][2][-1]["tokens_per_s"] / logs[0][2][-1]["tokens_per_s"]


def test_a_run_of_ranks_that_fails_tells_why(tmp_path):
    with pytest.raises(RuntimeError, match="nothing to do"):
        ranks.run(tmp_path, {"device": "cpu"}, 1, 1)


# ------------------------------------------------------------------------------- all, and the page

@pytest.mark.parametrize("save", [True, False])
def test_every_part_of_make_bench_has_a_command_line_that_is_understood(monkeypatch, save):
    """step and versus_peers do not save: they would lose their other rows."""
    configs = {"ladder": LadderConfig, "step": step.StepConfig, "loading": LoadingConfig,
               "ranks": RanksConfig, "versus_peers": versus_peers.PeersConfig}
    saving = {}

    def run(command, cwd):
        name = command[2].removeprefix("bench.")
        saving[name] = parse(configs[name], command[3:], name).save
        return subprocess.CompletedProcess(command, 0)
    monkeypatch.setattr(whole.subprocess, "run", run)
    whole.main([] if save else ["--save=false"])
    assert saving == {name: save and name not in ("step", "versus_peers") for name in configs}


def test_a_part_that_fails_does_not_stop_the_others(monkeypatch, capsys):
    ran = []

    def run(command, cwd):
        ran.append(command[2])
        return subprocess.CompletedProcess(command, int(command[2] == "bench.step"))
    monkeypatch.setattr(whole.subprocess, "run", run)
    with pytest.raises(ValueError, match="^step failed"):
        whole.main([])
    assert ran == [f"bench.{name}" for name in whole.PARTS]


@pytest.mark.parametrize("main, word, message", [
    (ladder.main, "--shape=huge", "--shape: 'huge' is not allowed; give tiny|small|124M"),
    (ladder.main, "--rungs=fp8", "--rungs: 'fp8' is not allowed; give float32|TF32"),
    (ladder.main, "--rounds=0", "rounds=0 must be at least 1"),
    (step.main, "--shapes=huge", "--shapes: 'huge' is not allowed"),
    (ranks.main, "--ranks=1", "ranks=1 must be at least 2"),
    (ranks.main, "--ranks=3", "ranks=3 must be at least 2 and divide the 16"),
])
def test_wrong_settings_of_the_benchmarks_are_named(main, word, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        main([word])


def versus_file(name, date, *found):
    """A result of versus_peers: (what, speed)."""
    machine.publish(lambda found: "", name, True, CPU, [], [], date=date, rounds=3, missing=[],
                    ratios=[{"what": what, "dtype": "float32", "mode": "eager", "memory": 0.75,
                             "best_peer": "nanoGPT, eager", "speed": speed}
                            for what, speed in found])


def test_the_newest_comparison_with_peers_counts(results):
    """Of two files that measured 124M, the later; the other's second shape stays."""
    versus_file("versus-peers-cpu-124M", "2026-02-02", ("124M", 1.5))
    versus_file("versus-peers-cpu", "2026-01-01", ("124M", 0.5), ("small", 0.9))
    assert [cells[::4] for cells in rows_of(measured.summary())[2:]] == [
        ["124M", "1.50"], ["small", "0.90"]]


def test_the_page_says_what_was_measured(results):
    assert rows_of(measured.page())[2:] == []                       # nothing was
    machine.publish(loading.report, "loading", True, CPU, [
        {"micro_batch": 64, "block_size": 1024, "tokens_per_cpu_s": 1e8, "of_a_core": 0.041}], [],
        text={"bytes": 5_000_000, "threads": 2, "of_tiktoken": 0.85,
              "seconds": {"oneloop": 0.5, "tiktoken": 0.425}})
    machine.publish(ranks.report, "ranks-cpu", True, CPU, [
        {"shape": "demo", "ranks": 2, "of_threads": 0.85, "sequences": 16,
         "tokens_per_s": {"ranks": 85.0}}], [], rounds=1)
    counts = {name: 0 for name in (*PHASES, "runs", "kills", "exact", "lost", "in a save")}
    machine.publish(kills.report, "kills", True, CPU, [{"kind": "sft", "ranks": count, **counts}
                                                       for count in (1, 2)], [])
    text = measured.page()
    for part in ("2,000,000 tokens/s take 4.1% of a core (at most 5%: held)", "10.0 MB/s",
                 "has 0.85 of the speed of tiktoken's", "(at least 0.9: NOT held)"):
        assert part in text, part
    rows = rows_of(text)
    assert ["demo", "16", "2", "85", "0.85", "NOT held"] in rows
    assert [cells[:2] for cells in rows if cells[0] == "sft"] == [["sft", "1"], ["sft", "2"]]


def test_what_surviving_costs_is_counted_right():
    """By hand: a start and a kill at second 60; the end at 120. Steps take a second. The first
    part imports for 4 s, begins at 5 and is killed in step 55, of which 50 to 54 have to be taken
    again; 2 s of them wait for a save, so that 55 s hold 55 steps. The second one begins at 66."""
    first = [(0.5, "pid", 7), (4.0, "imported", 0), (5.0, "computing", 0), (30.0, "saving", 25),
             (32.0, "computing", 25), (59.0, "computing", 55)]
    second = [(60.5, "pid", 8), (64.0, "imported", 0), (66.0, "computing", 50),
              (119.0, "computing", 104)]
    row = kills.costs([*first, *second], [0.0, 60.0, 120.0])
    assert row == {"ranks": 2, "kills": 1, "seconds": 120.0, "steps": 104, "imports": 8.0,
                   "start": 3.0, "saves": 2.0, "replay": 5.0, "seconds_a_step": 1.0,
                   "share": round(104 / 115, 3)}


def test_the_checked_in_page_is_what_the_results_give():
    assert measured.PAGE.read_text(encoding="utf-8") == measured.page(), "python -m bench.measured"
