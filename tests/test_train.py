"""The loop: exact under ranks, accumulation, padding, interruption; clear when used wrongly."""
import dataclasses
import itertools
import json
import math
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import ranks
from bench import kills
from data import loader, shards
from model import GPT, IGNORE, SIZES, GPTConfig
from run import checkpoint
from run import log as report
from run import parallel, plan
from run import processes as launch
from run.config import build, parse
from run.load import load_model, load_start
from run.presets import PRESETS
from sample import continue_text
from train import TrainConfig, train

REPOSITORY = Path(__file__).parent.parent
MODEL = dict(block_size=32, n_layer=2, n_head=2, n_embd=32)


def settings(dataset, out, **changes):
    return build(TrainConfig, {**dict(
        data=str(dataset), out=str(out), max_steps=20, batch_tokens=16 * 32, micro_batch=4,
        learning_rate=1e-2, min_learning_rate=1e-3, warmup_steps=2, eval_every=10, save_every=5,
        log_every=3, dtype="float32", device="cpu", compile="off", sample_tokens=0, model=MODEL),
        **changes})


def steps(out):
    """The training lines of a run, without what the clock decides."""
    lines = report.read_log(Path(out) / "log.jsonl")
    return [{key: value for key, value in line.items() if key != "tokens_per_s"}
            for line in lines if "lr" in line]


def weights(out):
    return checkpoint.load(Path(out) / "last.pt")["model"]


def assert_same_run(a, b):
    """Bit for bit: parameters, optimizer state, log lines."""
    one, two = (checkpoint.load(Path(out) / "last.pt") for out in (a, b))
    assert steps(a) == steps(b)
    for name, tensor in one["model"].items():
        assert torch.equal(tensor, two["model"][name]), name
    for i, moments in one["optimizer"]["state"].items():
        for key, value in moments.items():
            assert torch.equal(value, two["optimizer"]["state"][i][key]), (i, key)


# ---- what a step computes

def test_the_logged_loss_is_the_mean_over_all_labels_of_the_step(dataset, tmp_path):
    train(settings(dataset, tmp_path, max_steps=1, learning_rate=0.0, min_learning_rate=0.0,
                   weight_decay=0.0))
    model, tokens = load_model(tmp_path, which="last.pt")[0], shards.open_split(dataset, "train")
    x, y = next(loader.WindowLoader(tokens, 32, 16 * 32, 16).batches(0))
    assert steps(tmp_path)[0]["loss"] == pytest.approx(model(x, y)[1].item(), rel=1e-6)


@pytest.fixture(scope="module")
def one_batch_run(tmp_path_factory, request):
    """The reference of the matrix below: one rank, the whole step as one micro-batch."""
    from data.corpus import CorpusConfig, prepare
    folder = tmp_path_factory.mktemp("reference")
    text = "".join(f"line {i * i % 97} of the text\n" for i in range(300))
    (folder / "text.txt").write_text(text)
    data = prepare(CorpusConfig(from_=str(folder / "text.txt"), tokenizer="bytes",
                                out=str(folder / "data")))
    return data, recorded_run(folder / "run", data, number=1, micro_batch=16)


def recorded_run(out, data, number, micro_batch, compile="off"):
    """A run of so many ranks, which leaves its first gradients in out/gradients."""
    words = dict(data=str(data), out=str(out), max_steps=10, batch_tokens=512, log_every=7,
                 micro_batch=micro_batch, learning_rate=1e-2, min_learning_rate=1e-3,
                 eval_every=5, save_every=0, dtype="float32", device="cpu", compile=compile,
                 sample_tokens=0, model=MODEL)
    out.mkdir(parents=True)
    codes = ranks.exit_codes(ranks.recording, number, words, str(out / "gradients"))
    assert codes == [0] * number, out.with_suffix(".txt").read_text()[-3000:]
    return out


@pytest.mark.parametrize("number,micro_batch", [(1, 8), (1, 4), (2, 8), (2, 2), (4, 2)])
def test_gradients_and_losses_are_the_same_for_any_ranks_and_accumulation(
        one_batch_run, tmp_path, number, micro_batch):
    data, reference = one_batch_run
    out = recorded_run(tmp_path / "run", data, number, micro_batch)
    assert_same_steps(reference, out)
    reductions = torch.load(out / "gradients", weights_only=True)["reductions"]
    assert reductions == (10 if number > 1 else 0)      # one bucket a step, however many passes


@pytest.mark.slow
def test_compiled_ranks_with_accumulation_reduce_once_a_step(one_batch_run, tmp_path):
    data, reference = one_batch_run
    out = recorded_run(tmp_path / "run", data, 2, micro_batch=2, compile="on")
    assert_same_steps(reference, out)
    assert torch.load(out / "gradients", weights_only=True)["reductions"] == 10


def assert_same_steps(reference, out):
    expected, found = (torch.load(path / "gradients", weights_only=True)["gradients"]
                       for path in (reference, out))
    for a, b in zip(expected, found):                   # float32 sums in another order
        assert (a - b).norm() <= 1e-5 * a.norm()
    for a, b in zip(steps(reference), steps(out)):
        # Adam divides by the gradient's size, so rounding grows a little with every step
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5), a["step"]
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3), a["step"]
    assert len(steps(out)) == 10
    a, b = (report.read_log(path / "log.jsonl")[-1] for path in (reference, out))
    assert b["val_loss"] == pytest.approx(a["val_loss"], rel=1e-4)


def test_a_micro_batch_without_labels_changes_nothing(dataset, tmp_path, monkeypatch):
    train(settings(dataset, tmp_path / "plain", max_steps=6))
    serve = loader.WindowLoader.batches

    def with_an_empty_one(self, step):
        for i, (x, y) in enumerate(serve(self, step)):
            if i == 1:
                yield x, torch.full_like(y, IGNORE)
            yield x, y
    monkeypatch.setattr(loader.WindowLoader, "batches", with_an_empty_one)
    train(settings(dataset, tmp_path / "padded", max_steps=6))
    assert_same_run(tmp_path / "plain", tmp_path / "padded")


def test_evaluation_is_the_mean_over_the_split_and_bytes_give_bits(dataset, tmp_path):
    summary = train(settings(dataset, tmp_path, max_steps=4, eval_every=4))
    model, tokens = load_model(tmp_path)[0], shards.open_split(dataset, "val")
    with torch.no_grad():
        nats = sum(model(x, y, reduction="sum")[1].item()
                   for x, y in loader.evaluation_batches(tokens, 32, 1))
    final = summary
    assert final["val_loss"] == pytest.approx(nats / (len(tokens) - 1), rel=1e-5)
    assert final["val_tokens"] == len(tokens) - 1
    assert final["val_bits_per_byte"] == pytest.approx(final["val_loss"] / math.log(2))


def test_clipping_bounds_the_norm_that_adamw_sees(dataset, tmp_path, monkeypatch):
    seen = []
    clip = torch.nn.utils.clip_grad_norm_

    def watch(parameters, max_norm):
        norm = clip(parameters, max_norm)
        seen.append(torch.stack([p.grad.norm() for p in parameters]).norm().item())
        return norm
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watch)
    train(settings(dataset, tmp_path, max_steps=3, grad_clip=0.1))
    assert all(line["grad_norm"] > 0.1 for line in steps(tmp_path))     # logged before clipping
    assert max(seen) <= 0.1001


def test_training_learns_the_text(dataset, tmp_path):
    summary = train(settings(dataset, tmp_path, max_steps=60))
    meta = shards.read_meta(dataset)
    assert summary["val_loss"] < 0.6 * meta["unigram_entropy"]


# ---- interruption

def train_in_two(config, killed_after):
    """A run that dies after so many steps, and goes on."""
    note = report.RunLog.step

    def dying(self, step, *figures):
        if step > killed_after:
            raise MemoryError                           # nothing in the loop may catch it
        note(self, step, *figures)
    with mock.patch.object(report.RunLog, "step", dying), pytest.raises(MemoryError):
        train(config)
    train(config)


@pytest.mark.parametrize("killed_after, compile", [
    (3, "off"), (5, "off"), (9, "off"), pytest.param(9, "on", marks=pytest.mark.slow)])
def test_a_run_that_died_and_goes_on_equals_one_that_did_not(dataset, tmp_path, killed_after,
                                                             compile):
    changes = dict(max_steps=12, compile=compile, model={**MODEL, "dropout": 0.1})
    train(settings(dataset, tmp_path / "whole", **changes))
    train_in_two(settings(dataset, tmp_path / "cut", **changes), killed_after)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("share, times", [(0.9, 2), (1.1, 0)])      # of the run's work
def test_a_run_that_goes_on_is_compiled_if_the_whole_run_is(dataset, tmp_path, monkeypatch, share,
                                                            times):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda network, **options: calls.append(1) or network)
    monkeypatch.setattr(parallel, "has_compiler", lambda device: True)
    config = settings(dataset, tmp_path, max_steps=12, compile="auto")
    tokens = shards.read_meta(dataset)["vocab_size"]
    model = GPT(dataclasses.replace(config.model, vocab_size=tokens))
    work = config.max_steps * config.batch_tokens * model.flops_per_token()
    monkeypatch.setitem(parallel.COMPILE_PAYS, "cpu", share * work)
    train_in_two(config, killed_after=9)                # three steps are left
    assert len(calls) == times


def wait_for_step(process, out, step):
    """Until the log has that step; the deadline only ends a test that is broken."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.is_alive():
        if (out / "log.jsonl").exists() and len(steps(out)) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(out.with_suffix(".txt").read_text())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_says_how_to_go_on_and_the_exit_code_names_it(dataset, tmp_path, number):
    out = tmp_path / "run"
    (process,) = kills.start(
        ranks.as_command, 1, str(out), f"--data={dataset}", f"--out={out}", "--max_steps=100000",
        "--batch_tokens=512", "--micro_batch=4", "--log_every=1", "--dtype=float32",
        "--compile=off", "--device=cpu", "--eval_every=0", "--save_every=0",
        *(f"--model.{key}={value}" for key, value in MODEL.items()))
    wait_for_step(process, out, 3)
    os.kill(process.pid, number)
    process.join(timeout=60)
    shown = out.with_suffix(".txt").read_text()
    assert process.exitcode == 128 + number, shown      # `train.py && next` does not go on
    saved = checkpoint.load(tmp_path / "run" / "last.pt")["step"]
    assert saved == steps(tmp_path / "run")[-1]["step"] >= 3
    assert f"stopped and saved at step {saved}; to go on: " in shown
    assert "train.py --data=" in shown


def test_max_minutes_saves_and_stops(dataset, tmp_path):
    summary = train(settings(dataset, tmp_path, max_steps=10**6, max_minutes=1e-6))
    assert summary["step"] == checkpoint.load(tmp_path / "last.pt")["step"] == 1


def test_a_finished_run_is_left_alone(dataset, tmp_path, capsys):
    first = train(settings(dataset, tmp_path))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    again = train(settings(dataset, tmp_path))
    assert "is finished" in capsys.readouterr().out
    assert again == first
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}


@pytest.mark.parametrize("changes,message", [
    ({"learning_rate": 2e-3}, "holds a finished run with learning_rate=0.01, this one has learning"),
    ({"max_steps": 4}, "max_steps=6, this one has max_steps=4; .* train on with a larger --max_st"),
    ({"optim": {"beta2": 0.99}}, "finished run with optim.beta2=0.95, this one has"),
    ({"eval_tokens": 64}, "finished run with eval_tokens=0, this one has"),
    ({"optim": {"optimizer": "muon"}}, "holds a run with optim.optimizer=adamw, this one has"),
])
def test_a_finished_run_does_not_answer_for_another(dataset, tmp_path, changes, message):
    words = dict(max_steps=6, eval_every=0)
    train(settings(dataset, tmp_path, **words))
    with pytest.raises(ValueError, match=message):
        train(settings(dataset, tmp_path, **{**words, **changes}))


def test_a_finished_run_answers_where_no_figure_would_move_and_says_what_differs(
        dataset, tmp_path, capsys):
    first = train(settings(dataset, tmp_path, max_steps=6))
    assert train(settings(dataset, tmp_path, max_steps=6, log_every=1, save_every=2)) == first
    said = capsys.readouterr().out
    assert "since the checkpoint: save_every 5 -> 2, log_every 3 -> 1" in said
    train(settings(dataset, tmp_path, max_steps=8, learning_rate=2e-3))         # trains on
    assert len(steps(tmp_path)) == 8


def test_a_torn_log_is_repaired_and_no_step_appears_twice(dataset, tmp_path):
    train(settings(dataset, tmp_path, max_steps=5))
    with open(tmp_path / "log.jsonl", "a") as file:     # what a killed run may leave
        file.write('{"step": 6, "loss": 1.0, "lr": 0, "grad_norm": 1}\n{"step": 7, "lo')
    train(settings(dataset, tmp_path, max_steps=8))
    assert [line["step"] for line in steps(tmp_path)] == list(range(1, 9))


def test_spikes_are_skipped_alike_however_often_a_run_looks_at_its_losses(dataset, tmp_path):
    """A run that goes on looks at every step for a while; each is judged by all before it."""
    for every in (1, 50):
        train(settings(dataset, tmp_path / str(every), log_every=every, max_steps=150, save_every=0,
                       eval_every=0, eval_tokens=32, batch_tokens=64, micro_batch=2,
                       skip_spikes=0.01, learning_rate=1e-7, min_learning_rate=1e-7))
    assert sum("skipped" in line for line in steps(tmp_path / "1")) > 5
    assert_same_run(tmp_path / "1", tmp_path / "50")


def test_samples_are_not_counted_as_training(dataset, tmp_path, monkeypatch):
    """By a clock that moves in samples and a little when it is read."""
    now = itertools.count(step=1e-3)
    late = [0.0]
    monkeypatch.setattr(report, "time", SimpleNamespace(perf_counter=lambda: next(now) + late[0]))

    def preview(*_):
        late[0] += 100
        return "a text"
    monkeypatch.setattr("train.preview", preview)
    summary = train(settings(dataset, tmp_path, sample_tokens=8, sample_every=4, eval_every=0,
                             save_every=0))
    assert late[0] >= 500 and summary["train_seconds"] < 100


def test_time_and_speed_of_a_run_in_parts_are_those_of_the_whole(dataset, tmp_path, monkeypatch):
    """By a clock that moves by a second when it is read; each step's line has its speed."""
    now = itertools.count()
    monkeypatch.setattr(report, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    seconds = [train(settings(dataset, tmp_path, max_steps=count))["train_seconds"]
               for count in (5, 12, 20)]
    lines = [line for line in report.read_log(tmp_path / "log.jsonl") if "lr" in line]
    counts = [b["tokens"] - a["tokens"] for a, b in zip([{"tokens": 0}, *lines], lines)]
    whole = sum(count / line["tokens_per_s"] for count, line in zip(counts, lines))
    assert seconds[0] < seconds[1] < seconds[2] == pytest.approx(whole, rel=1e-3)
    final = json.loads((tmp_path / "run.json").read_text())["final"]
    assert final["tokens_per_s"] == pytest.approx(sum(counts) / whole, rel=1e-3)


def test_settings_of_the_optimizer_that_are_changed_take_effect(dataset, tmp_path):
    """AdamW takes lr * weight_decay of a matrix off, whatever else its step does."""
    a, b = tmp_path / "a", tmp_path / "b"
    train(settings(dataset, a, max_steps=2))
    shutil.copytree(a, b)
    before = weights(a)
    train(settings(dataset, a, max_steps=3))
    train(settings(dataset, b, max_steps=3, weight_decay=5.0))      # it was 0.1
    lr = steps(a)[-1]["lr"]
    for name, p in weights(a).items():
        more = lr * 4.9 * before[name] * (p.dim() > 1)
        torch.testing.assert_close(weights(b)[name], p - more, rtol=0, atol=1e-6)   # one rounding


# ---- what it refuses

@pytest.mark.parametrize("changes,message", [
    ({"model": {**MODEL, "n_layer": 3}}, "holds a run with model.n_layer=2, this one has"),
    ({"seed": 5}, "holds a run with seed=0, this one has seed=5; choose another --out"),
    ({"batch_tokens": 1024}, "holds a run with batch_tokens=512"),
])
def test_another_run_in_the_same_folder_is_refused(dataset, tmp_path, changes, message):
    train(settings(dataset, tmp_path, max_steps=2))
    with pytest.raises(ValueError, match=message):
        train(settings(dataset, tmp_path, max_steps=4, **changes))


def test_other_data_in_the_same_folder_is_refused(dataset, tmp_path):
    from bpe import Tokenizer
    from data.corpus import write_shards
    train(settings(dataset, tmp_path / "run", max_steps=2))
    write_shards(tmp_path / "other", ["other text\n" * 300], ["other text\n" * 30],
                 Tokenizer([], special_tokens=()), "other")
    with pytest.raises(ValueError, match=rf"holds a run with data={dataset} \(\w+\), this one has "
                                         rf"data={tmp_path}/other \(\w+\); choose another --out"):
        train(settings(tmp_path / "other", tmp_path / "run", max_steps=4))


@pytest.mark.parametrize("changes,message", [
    (dict(max_steps=0), "give one of them"),
    (dict(warmup_ratio=0.1), "both given; give one"),
    (dict(min_learning_rate=1.0), "is above learning_rate"),
    (dict(batch_tokens=500), "try batch_tokens=384 or 512"),
    (dict(model={**MODEL, "vocab_size": 300}), "model.vocab_size=300, but"),
    (dict(model={**MODEL, "vocab_size": 50257}), "model.vocab_size=50257, but"),    # the default
    (dict(model={**MODEL, "block_size": 10**5}), "longer than the data"),
    (dict(init_from="no/such/folder"), "neither a folder here nor a model"),
])
def test_settings_that_do_not_fit_are_refused_before_anything_is_written(dataset, tmp_path, changes,
                                                                         message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(settings(dataset, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_is_refused(dataset, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PermissionError, match="cannot be written: .*; choose another --out"):
        train(settings(dataset, tmp_path / "file" / "run"))


def test_weights_of_another_tokenizer_are_refused(dataset, tmp_path):
    from data.corpus import CorpusConfig, prepare
    (tmp_path / "t.txt").write_text("one two three\n" * 500)
    other = prepare(CorpusConfig(from_=str(tmp_path / "t.txt"), vocab_size=260,
                                 out=str(tmp_path / "other")))
    train(settings(other, tmp_path / "base", max_steps=1))
    with pytest.raises(ValueError, match="was made with another tokenizer than"):
        train(settings(dataset, tmp_path / "run", init_from=str(tmp_path / "base"), model={}))


def test_shards_of_another_tokenizer_are_refused(dataset, tmp_path):
    from bpe import Tokenizer
    Tokenizer([(97, 98)], special_tokens=()).save(dataset / "tokenizer.json")
    with pytest.raises(ValueError, match="is not the tokenizer that made the shards beside it"):
        train(settings(dataset, tmp_path / "run"))


# ---- the rest of a run

def test_a_run_starts_from_the_weights_of_another(dataset, tmp_path):
    train(settings(dataset, tmp_path / "base", max_steps=3))
    train(settings(dataset, tmp_path / "next", max_steps=1, learning_rate=0.0,
                   min_learning_rate=0.0, init_from=str(tmp_path / "base"), model={}))
    base = checkpoint.load(tmp_path / "base" / "best.pt")["model"]
    for name, tensor in weights(tmp_path / "next").items():
        assert torch.equal(tensor, base[name]), name


def test_a_dry_run_tells_everything_and_writes_nothing(dataset, tmp_path, capsys):
    counts = train(settings(dataset, tmp_path / "run", dry_run=True))
    text = capsys.readouterr().out
    model = GPT(dataclasses.replace(settings(dataset, "x").model, vocab_size=256))
    assert counts["parameters"] == model.num_params()
    for part in ("20 steps of 512 tokens = 1 rank(s) x 4 micro-batch(es) x 4 sequences x 32",
                 "memory a rank, estimated", "transformer.h.0.attn.c_attn.weight", "of the text"):
        assert part in text
    assert not (tmp_path / "run").exists()


def test_hellaswag_is_evaluated_in_the_loop_and_its_file_is_opened_before_the_first_step(
        dataset, tmp_path, capsys):
    item = {"ind": 1, "activity_label": "A", "ctx_a": "line", "ctx_b": "", "ctx": "line 4 of",
            "endings": ["the text", "a text", "xyz", "no"], "label": 0, "split": "val",
            "split_type": "indomain", "source_id": "x"}
    (tmp_path / "items.jsonl").write_text((json.dumps(item) + "\n") * 3)
    train(settings(dataset, tmp_path / "run", max_steps=4, hellaswag_every=2,
                   hellaswag_file=str(tmp_path / "items.jsonl")))
    lines = [line for line in report.read_log(tmp_path / "run" / "log.jsonl") if "acc_norm" in line]
    assert [line["step"] for line in lines] == [2, 4] and lines[0]["n"] == 3
    low, high = lines[1]["acc_interval"]                # on the screen with four digits
    assert f"acc_interval {low:.4f} to {high:.4f}, acc_norm" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="there is no file none.jsonl"):
        train(settings(dataset, tmp_path / "other", hellaswag_every=2, hellaswag_file="none.jsonl"))
    assert not (tmp_path / "other").exists()


def test_a_dry_run_counts_no_padding_as_trained_and_warns_of_many_passes(dataset, tmp_path, capsys):
    counts = train(settings(dataset, tmp_path / "run", dry_run=True, max_steps=4000,
                            model={**MODEL, "vocab_size": 256, "vocab_multiple": 100}))
    assert counts["trained"] == counts["parameters"]
    said = capsys.readouterr()
    assert f"trained {counts['trained']:,};" in said.out
    # 4,991 tokens are 156 windows of 32, of which a step takes 16
    assert "warning: 410 passes over the 156 rows of " in said.err
    train(settings(dataset, tmp_path / "run", dry_run=True))
    assert "passes" not in capsys.readouterr().err


def test_a_setting_that_the_data_leave_unread_is_said(dataset, tmp_path, capsys):
    train(settings(dataset, tmp_path / "run", dry_run=True, packing=True, labels="last"))
    assert (f"warning: {dataset} holds plain text and makes no use of labels=last, packing=True"
            in capsys.readouterr().err.splitlines())


def test_a_setting_that_the_optimizer_or_the_schedule_does_not_read_is_said(dataset, tmp_path,
                                                                            capsys):
    given = {"power": 2.0, "muon_momentum": 0.9, "lora_plus_ratio": 16.0}
    train(settings(dataset, tmp_path / "run", dry_run=True, schedule="wsd", optim=given))
    assert [line for line in capsys.readouterr().err.splitlines() if "changes nothing" in line] == [
        f"warning: optim.{name}={given[name]} changes nothing: only {reader} reads it, and this "
        f"run has adamw, wsd" for name, reader in (
            ("muon_momentum", "muon"), ("power", "polynomial"), ("lora_plus_ratio", "lora"))]
    train(settings(dataset, tmp_path / "run", dry_run=True, schedule="polynomial",
                   optim={"power": 2.0, "muon_momentum": 0.9, "optimizer": "muon"}))
    assert "changes nothing" not in capsys.readouterr().err


def test_a_dry_run_reads_the_hellaswag_file(dataset, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file none.jsonl"):
        train(settings(dataset, tmp_path, hellaswag_every=2, hellaswag_file="none.jsonl",
                       dry_run=True))
    train(settings(dataset, tmp_path, hellaswag_every=2, dry_run=True))         # downloads nothing


def test_a_dry_run_on_gpt2_loads_no_weights(monkeypatch):
    monkeypatch.setitem(SIZES, "gpt2-xl", dict(n_layer=1, n_head=2, n_embd=8))
    monkeypatch.setattr("run.load.Tokenizer.gpt2", lambda: "GPT-2's")
    monkeypatch.setattr(GPT, "from_pretrained", None)
    config = TrainConfig(init_from="gpt2-xl", model=GPTConfig(block_size=64), max_steps=1,
                         dry_run=True)
    model, tokenizer = load_start(config)
    assert tokenizer == "GPT-2's" and (model.config.n_embd, model.config.block_size) == (8, 64)
    with pytest.raises(TypeError):
        load_start(dataclasses.replace(config, dry_run=False))


@pytest.mark.parametrize("name, value, has", [("block_size", 1024, 32), ("n_layer", 12, 2),
                                              ("bias", "true", False)])
def test_a_shape_that_is_given_is_given_also_where_it_is_the_default(dataset, tmp_path, name, value,
                                                                     has):
    train(settings(dataset, tmp_path, max_steps=1, model={**MODEL, "bias": False}))
    words = [f"--init_from={tmp_path}", "--max_steps=1"]
    load_start(parse(TrainConfig, words, "train.py"))
    config = parse(TrainConfig, [*words, f"--model.{name}={value}"], "train.py")
    with pytest.raises(ValueError, match=f"model.{name}={getattr(config.model, name)}, but .* has "
                                         f"{has}; leave it out"):
        load_start(config)


def test_the_time_left_is_not_told_from_the_first_step(dataset, tmp_path, capsys):
    train(settings(dataset, tmp_path, max_steps=3, log_every=1))        # the first one warms up
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")
            and " tok/s " in line]
    assert [" s left" in line for line in told] == [False, True, True]


def test_unlabelled_text_of_the_example_stands_in_brackets():
    from bpe import Tokenizer
    tokenizer = Tokenizer([], special_tokens=())
    ids = torch.tensor(tokenizer.encode("ask:yes!"))
    x, y = ids[:-1], ids[1:].clone()
    y[:3] = IGNORE                                      # "ask:" is the prompt
    data = SimpleNamespace(tokenizer=tokenizer, classes=0)
    assert plan.marked_example(x, y, data).strip() == "[ask:]yes!"


def test_a_failing_compiler_costs_a_warning_and_nothing_else(dataset, tmp_path, monkeypatch,
                                                            capsys):
    train(settings(dataset, tmp_path / "plain", max_steps=4))

    def broken(network, **options):
        def call(*arguments, **named):
            raise RuntimeError("no compiler today")
        return call
    monkeypatch.setattr(torch, "compile", broken)
    train(settings(dataset, tmp_path / "tried", max_steps=4, compile="on"))
    assert "warning: torch.compile failed, going on without it" in capsys.readouterr().err
    assert_same_run(tmp_path / "plain", tmp_path / "tried")


@pytest.mark.slow
def test_a_compiled_run_equals_an_eager_one(dataset, tmp_path):
    if not launch.has_compiler(torch.device("cpu")):
        pytest.skip("no C++ compiler here")
    for mode in ("off", "on"):
        train(settings(dataset, tmp_path / mode, compile=mode))
    for a, b in zip(steps(tmp_path / "off"), steps(tmp_path / "on")):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4), a["step"]   # fused in another order


def test_bf16_training_follows_float32(dataset, tmp_path):
    for dtype in ("float32", "bfloat16"):
        train(settings(dataset, tmp_path / dtype, dtype=dtype))
    for a, b in zip(steps(tmp_path / "float32"), steps(tmp_path / "bfloat16")):
        assert b["loss"] == pytest.approx(a["loss"], rel=0.03)      # bfloat16 has 3 digits


def test_every_preset_is_a_config_and_says_what_to_expect():
    for name, preset in PRESETS.items():
        config = build(TrainConfig, preset.settings)
        assert preset.what and preset.expect, name
        for number in (1, 2, 8):
            loader.divide_step(config.batch_tokens, config.micro_batch, config.model.block_size,
                               number) if name != "shakespeare" else None


def test_the_run_folder_holds_what_it_promises(dataset, tmp_path):
    train(settings(dataset, tmp_path, sample_tokens=8))
    assert {"config.json", "run.json", "log.jsonl", "tokenizer.json", "last.pt", "last.1.pt",
            "best.pt"} <= {path.name for path in tmp_path.iterdir()}
    run = json.loads((tmp_path / "run.json").read_text())
    assert {"command", "commit", "dirty", "torch", "device", "data", "final"} <= run.keys()
    assert build(TrainConfig, json.loads((tmp_path / "config.json").read_text())).max_steps == 20
    lines = report.read_log(tmp_path / "log.jsonl")
    assert {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s"} == lines[0].keys()
    assert any("val_loss" in line for line in lines) and any("sample" in line for line in lines)
    model, tokenizer = load_model(tmp_path)
    assert continue_text(model, tokenizer, "line 4", 10).startswith("line 4")


def test_epochs_become_the_steps_that_serve_each_window_so_often(dataset, tmp_path):
    windows = loader.WindowLoader(shards.open_split(dataset, "train"), 32, 512, 4).rows_per_epoch
    summary = train(settings(dataset, tmp_path, epochs=1.5, max_steps=999))
    assert summary["step"] == math.ceil(1.5 * windows / 16)
