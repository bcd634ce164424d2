"""What the benchmarks measure around a training step: data, start-up, ranks."""
import json
import subprocess
import sys

import pytest
import torch

from bench import loading, ranks, startup
from bench.loading import LoadingConfig
from bench.ranks import RanksConfig
from config import parse
from data.loader import WindowLoader
from data.sets import TokenSet
from model import GPT, GPTConfig


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
    config = LoadingConfig(source=str(tmp_path / "text.jsonl"), tokenizer="bytes", rounds=3)
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
        loading.compare_text(LoadingConfig(source=config.source, tokenizer="bytes", rounds=1),
                             tmp_path)


def test_end_of_text_tokens_are_not_counted_as_text(tmp_path):
    write_texts(tmp_path / "text.jsonl")
    tokenizer = loading.Tokenizer.train(["some text, some more text"], 260)
    tokenizer.save(tmp_path / "tok.json")
    config = LoadingConfig(source=str(tmp_path / "text.jsonl"), threads=1,
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
    assert {"numpy", "tiktoken", "bpe_train"} <= set(modules)
    assert startup.imported(["-c", "import json.decoder"]) >= {"json"}
    assert "torch" not in startup.imported(["bpe.py", "--help"])


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
