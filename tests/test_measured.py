"""What `make bench` measures, and what README.md says of it: steps, data, start-up, ranks."""
import json
import math
import subprocess
import sys

import pytest
import torch

from bench import __main__ as whole
from bench import ladder, loading, machine, ranks, readme, startup
from bench.ladder import FUSED, HEAD, PADDED, RUNGS, TF32, LadderConfig, WrittenOutAttention
from bench.loading import LoadingConfig
from bench.ranks import RanksConfig
from run.config import parse
from data.loader import WindowLoader
from data.sets import TokenSet
from fast.linear import FastLinear
from model import GPT, GPTConfig

CPU = torch.device("cpu")
TINY = GPTConfig(block_size=32, vocab_size=101, n_layer=2, n_head=2, n_embd=16)


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty bench/results."""
    folder = tmp_path / "bench" / "results"
    folder.mkdir(parents=True)
    for module in (machine, ladder, readme):
        monkeypatch.setattr(module, "RESULTS", folder)
    return folder


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
    monkeypatch.setattr(ladder, "step_time", lambda step, device, repeats: 0.5)
    rows = [ladder.measure(rung, TINY, 2, CPU, 1) for rung in ("float32", TF32, "bfloat16")]
    assert [row["limit_of"].split()[-1] for row in rows] == ["float32", "float32", "bfloat16"]
    assert asked == [torch.float32, torch.float32, torch.bfloat16]
    assert [row["tokens_per_s"] for row in rows] == [128.0] * 3     # 2 x 32 in half a second
    assert rows[0]["first_loss"] == pytest.approx(math.log(101), abs=0.3)


def test_the_ladder_is_measured_in_turn_and_drawn(results, monkeypatch, capsys):
    """Two rounds of hand-made rows: medians, shares of the best peak of both, factors; a rung that
    fails and one that is not for this machine are named. Table, JSON, picture and README agree."""
    pytest.importorskip("matplotlib")
    asked, ms = [], {"float32": [100.0, 300.0], "bfloat16": [50.0, 50.0], FUSED: [20.0, 20.0]}

    def measured(module, words):
        given = dict(word[2:].split("=", 1) for word in words)
        asked.append(given["rungs"])
        if given["rungs"] == HEAD:
            raise RuntimeError("out of memory")
        times = ms[given["rungs"]]
        return rung_row(given["rungs"], times.pop(0), limit=1e6 * (1 + len(times)))

    monkeypatch.setattr(ladder, "in_process", measured)
    ladder.main([f"--rungs=float32,{TF32},bfloat16,{FUSED},{HEAD}", "--rounds=2", "--shape=tiny",
                 "--device=cpu", "--save"])
    said = capsys.readouterr().out
    assert asked == ["float32", "bfloat16", FUSED, HEAD, "float32", "bfloat16", FUSED]
    lines = {line[:20].strip(): line[20:].split() for line in said.splitlines()}
    assert lines["float32"] == ["200.0", "427", "100.0%", "21.3%", "300", "1.00", "1.00"]
    assert lines["bfloat16"] == ["50.0", "1,280", "0.0%", "64.0%", "300", "4.00", "4.00"]
    assert lines[FUSED][-2:] == ["2.50", "10.00"]
    assert "without TF32: cpu has no TF32" in said and f"without {HEAD}: out of memory" in said
    found = json.loads((results / "ladder-cpu-tiny.json").read_text())
    assert found["skipped"].keys() == {TF32, HEAD} and len(found["rows"]) == 3
    assert (results / "ladder-cpu-tiny.png").read_bytes().startswith(b"\x89PNG")
    assert "| bfloat16 | 50 | 1,280 | 64% | 300 | 4.00 |" in readme.ladder_table()
    assert "(bench/results/ladder-cpu-tiny.png)" in readme.ladder_table()


def test_a_rung_is_measured_in_a_process_of_its_own(capsys):
    ladder.main(["--shape=tiny", "--rounds=1", "--repeats=1", "--rungs=float32", "--device=cpu"])
    title, head, row, peak = capsys.readouterr().out.splitlines()
    assert title == "tiny, 2 sequences of 64 tokens" and row.split()[0] == "float32"
    with pytest.raises(RuntimeError, match="rungs=no is unknown"):
        machine.in_process("ladder", ["--rungs=no"])


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
    with pytest.raises(ValueError, match="fill no batch of 200 x 8"):
        loading.loader_row(folder, 200, 8)


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
    loading.write_text(tmp_path / "text.jsonl", 14e-6)
    texts = [json.loads(line)["text"] for line in (tmp_path / "text.jsonl").open()]
    assert texts == ["four", "?", "pass", "four", "?"]


def test_text_to_shards_is_compared_on_the_same_tokens(tmp_path, monkeypatch):
    """Both make as many tokens as the text has bytes, with a tokenizer of bytes; what prepare adds,
    nothing here, is not counted. The ratio is of medians."""
    size = write_texts(tmp_path / "text.jsonl")
    config = LoadingConfig(from_=str(tmp_path / "text.jsonl"), tokenizer="bytes", rounds=3)
    seconds = {"oneloop": [1.0, 2.0, 6.0], "tiktoken": [1.5, 1.8, 0.1]}

    def measured(module, words):
        given = parse(LoadingConfig, words, "bench." + module)
        row = loading.measure_text(given.who, given)
        assert row["seconds"] > 0
        return {**row, "seconds": seconds[given.who].pop(0)}
    monkeypatch.setattr(loading, "in_process", measured)
    row = loading.compare_text(config, tmp_path)
    assert row["tokens"] == row["bytes"] == size and row["documents"] == 300
    assert row["seconds"] == {"oneloop": 2.0, "tiktoken": 1.5} and row["of_tiktoken"] == 0.75
    rows = iter(({"seconds": 1.0, "tokens": 7}, {"seconds": 1.0, "tokens": 8}))
    monkeypatch.setattr(loading, "in_process", lambda *_: next(rows))
    with pytest.raises(ValueError, match=r"do not make the same tokens .*\[7, 8\]"):
        loading.compare_text(LoadingConfig(from_=config.from_, tokenizer="bytes", rounds=1),
                             tmp_path)


def test_end_of_text_tokens_are_not_counted_as_text(tmp_path):
    write_texts(tmp_path / "text.jsonl")
    tokenizer = loading.Tokenizer.train(["some text, some more text"], 260)
    tokenizer.save(tmp_path / "tok.json")
    config = LoadingConfig(from_=str(tmp_path / "text.jsonl"), threads=1,
                           tokenizer=str(tmp_path / "tok.json"))
    ours, theirs = (loading.measure_text(who, config)["tokens"] for who in loading.WHO)
    assert tokenizer.eot is not None and ours == theirs > 0


def test_help_of_the_tokenizer_does_not_import_torch():
    """And the way to see it does see what is imported."""
    code = ("import runpy, sys; sys.argv = ['bpe.py', '--help']\n"
            "try: runpy.run_path('bpe.py', run_name='__main__')\n"
            "except SystemExit: print(*{name.split('.')[0] for name in sys.modules})")
    done = subprocess.run([sys.executable, "-c", code], cwd=startup.REPOSITORY, text=True,
                          capture_output=True, check=True)
    modules = done.stdout.splitlines()[-1].split()
    assert "usage" in done.stdout and "torch" not in modules
    assert {"numpy", "tiktoken", "fast.bpe"} <= set(modules)
    assert startup.imported(["-c", "import json.decoder"]) >= {"json"}
    assert "torch" not in startup.imported(["bpe.py", "--help"])


def test_commands_begin_without_the_compiler():
    """It takes as long to import as all of PyTorch."""
    code = "import sys, lora, sample, train; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=startup.REPOSITORY, text=True,
                          capture_output=True, check=True)
    assert done.stdout == "False\n"


def test_start_up_is_the_median_of_rounds_after_one(monkeypatch):
    """Canned times: the first round is 100 times as long; train.py takes 0.3, 0.5 and 0.4 s more
    than torch did in the same round."""
    times = {"train.py": iter([200.0, 2.3, 4.5, 3.4])}
    torch_alone, others = iter([100.0, 2.0, 4.0, 3.0]), []

    def run(arguments):
        if arguments[-1] == "import torch":
            return next(torch_alone), ""
        others.append(arguments)
        return next(times["train.py"]) if arguments[0] == "train.py" else 0.1, ""
    monkeypatch.setattr(startup, "run", run)
    monkeypatch.setattr(startup, "imported", lambda arguments: {"json", "torch"})
    row = startup.measure(3)
    assert row["seconds"]["import torch"] == 3.0 and row["seconds"]["train.py --help"] == 3.4
    assert row["train_beyond_torch"] == pytest.approx(0.4) and row["bpe_imports_torch"]


# ---------------------------------------------------------------------------------------- ranks

def test_ranks_and_threads_train_the_same_steps(tmp_path, monkeypatch):
    """The two runs that are compared log the same losses (1e-5: float32 sums over 2 ranks in
    another order), and the ratio is of what they logged."""
    logs, run = [], ranks.run

    def noted(folder, settings, count, threads, notes=""):
        logs.append((count, threads, run(folder, settings, count, threads, notes)))
        return logs[-1][2]
    monkeypatch.setattr(ranks, "run", noted)
    config = RanksConfig(shapes=("tiny",), rounds=1, looks=2, dtype="float32", compile="off")
    row = ranks.compare_speed("tiny", config, tmp_path)
    assert [log[:2] for log in logs] == [(1, 2), (2, 1)]
    one, two = ([line["loss"] for line in lines] for *_, lines in logs)
    assert len(one) == 4 and one == pytest.approx(two, abs=1e-5)
    assert row["of_threads"] == logs[1][2][-1]["tokens_per_s"] / logs[0][2][-1]["tokens_per_s"]


def test_accumulation_reduces_once_a_step_and_takes_the_memory_of_a_micro_batch(
        tmp_path, monkeypatch):
    """One bucket holds all gradients, float32. Memory of 2 and 4 micro-batches is that of one, but
    for less than a third of what a fourfold micro-batch takes more; some is noise of the heap."""
    shape = GPTConfig(256, 2000, n_layer=2, n_head=2, n_embd=64)
    monkeypatch.setitem(ranks.SHAPES, "test", (shape, 16, 2))
    config = RanksConfig(dtype="float32", compile="off")
    rows = ranks.compare_accumulation("test", config, tmp_path)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in GPT(shape).parameters())
    assert [(row["micro_batch"], row["accumulation"]) for row in rows] == [
        (4, 1), (4, 2), (4, 4), (16, 1)]
    assert [row["reductions_per_step"] for row in rows] == [1, 1, 1, 1]
    assert {row["reduced_bytes_per_step"] for row in rows} == {4 * parameters}
    one, two, four, larger = (row["memory_mib"] for row in rows)
    assert max(two, four) - one < (larger - one) / 3, rows


def test_a_run_of_ranks_that_fails_tells_why(tmp_path):
    config = RanksConfig(dtype="float32", compile="off")
    settings = {**ranks.settings_of("tiny", tmp_path, config), "micro_batch": 3}
    with pytest.raises(RuntimeError, match="no multiple of micro_batch"):
        ranks.run(tmp_path, settings, 1, 1)


# ------------------------------------------------------------------------------ all, and README

def test_every_part_of_make_bench_has_a_command_line_that_is_understood(monkeypatch):
    from bench import step
    configs = {"ladder": LadderConfig, "step": step.StepConfig, "loading": LoadingConfig,
               "startup": startup.StartupConfig, "ranks": RanksConfig}
    assert configs.keys() == whole.PARTS.keys()
    saving = {name: parse(configs[name], words, name).save
              for name, words in whole.commands(whole.AllConfig()).items()}
    assert saving == {name: name != "step" for name in configs}     # it would lose its other rows
    dry = whole.commands(whole.AllConfig(save=False, only=("ranks", "loading")))
    assert dry.keys() == {"ranks", "loading"}
    assert not any(parse(configs[name], words, name).save for name, words in dry.items())


def test_a_part_that_fails_does_not_stop_the_others(monkeypatch, capsys):
    ran = []

    def run(command, cwd):
        ran.append(command[2])
        return subprocess.CompletedProcess(command, int(command[2] == "bench.step"))
    monkeypatch.setattr(whole.subprocess, "run", run)
    with pytest.raises(ValueError, match="^step failed"):
        whole.main([])
    assert ran == [f"bench.{name}" for name in whole.PARTS]


def test_wrong_settings_of_the_benchmarks_are_named():
    for config, settings, message in (
            (LadderConfig, {"shape": "huge"}, "shape=huge is unknown"),
            (LadderConfig, {"rungs": ("fp8",)}, "rungs=fp8 is unknown"),
            (LoadingConfig, {"rounds": 0}, "rounds=0 must be above 0"),
            (RanksConfig, {"ranks": 1}, "ranks=1 must be at least 2"),
            (RanksConfig, {"ranks": 3}, "ranks=3 do not divide the 16"),
            (whole.AllConfig, {"only": ("bpe",)}, "only=bpe is unknown")):
        with pytest.raises(ValueError, match=message):
            config(**settings)


def test_the_newest_comparison_with_peers_counts(results):
    """Of two files that measured 124M, the later; the other's second shape stays."""
    def rows(what, ours, theirs):
        return [{"what": what, "who": who, "dtype": "float32", "mode": "eager", "share": 0.5,
                 "tokens_per_s": speed} for who, speed in (("oneloop", ours), ("nanoGPT", theirs))]

    def file(name, date, found):
        ratios = [{"what": what, "dtype": "float32", "mode": "eager", "best_peer": "nanoGPT, eager",
                   "speed": ours / theirs, "memory": 0.75} for what, ours, theirs in found]
        (results / name).write_text(json.dumps({
            "date": date, "processor": "A", "device": "cpu (2 threads)", "torch": "2.13",
            "ratios": ratios, "rows": sum((rows(*one) for one in found), [])}))
    file("versus-peers-cpu-124M.json", "2026-02-02", [("124M", 300.0, 200.0)])
    file("versus-peers-cpu.json", "2026-01-01", [("124M", 100.0, 200.0), ("small", 90.0, 100.0)])
    found = [line for line in readme.versus_table().splitlines() if "float32" in line]
    assert found == [
        "| 124M | float32 | 300 (eager) | 50% | 200 (nanoGPT, eager) | 1.50 | 0.75 |",
        "| small | float32 | 90 (eager) | 50% | 100 (nanoGPT, eager) | 0.90 | 0.75 |"]


def test_readme_says_what_was_measured_around_the_step(results):
    assert readme.around_the_step() == "" == readme.versus_table() == readme.ladder_table()
    machine.write_results("loading", CPU, [
        {"micro_batch": 32, "block_size": 1024, "of_a_core": 0.03},
        {"micro_batch": 64, "block_size": 1024, "of_a_core": 0.041}],
        text={"bytes": 5_000_000, "threads": 2, "of_tiktoken": 1.1,
              "seconds": {"oneloop": 0.5, "tiktoken": 0.55}})
    machine.write_results("startup", CPU, [{
        "train_beyond_torch": 0.31, "bpe_imports_torch": False,
        "seconds": {"import torch": 1.5, "bpe.py --help": 0.2}}])
    row = {"micro_batch": 2, "reduced_bytes_per_step": 120.4e6, "memory_mib": 700.0}
    machine.write_results("ranks-cpu", CPU, [{"shape": "demo", "ranks": 2, "of_threads": 1.05}],
                          accumulation=[{**row, "accumulation": 1}, {**row, "accumulation": 2},
                                        {**row, "accumulation": 1, "micro_batch": 8,
                                         "memory_mib": 1900.0}])
    text = readme.around_the_step()
    for part in ("4.1% of a core (64 x 1024", "10.0 MB/s with 2 threads, 1.10 of the speed",
                 "0.31 s more than `import torch` (1.50 s)", "0.20 s, without importing torch",
                 "demo: 2 gloo ranks with a thread each have 1.05",
                 "in 1, 2 micro-batches of 2 sequences reduces 120, 120 MB of gradients and",
                 "takes 700, 700 MiB; one of 8 sequences 1,900 MiB"):
        assert part in text, part
