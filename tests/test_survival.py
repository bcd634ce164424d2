"""Nothing wrong in silence: the best model, numbers that are not finite, signals, the screen."""
import contextlib
import io
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bpe
import sample
import train as train_module
from bpe import Tokenizer
from data import chat, shards
from data.prepared import write_dataset
from data.sets import TokenSet
from data.texts import find_files, read_documents
from data.writer import ShardWriter
from eval.hellaswag import load_items
from experiments.plots import picture
from formats.gpt2 import load_tensors
from model import GPT
from run import checkpoint, load, log, processes, resume
from run.config import build, run_command
from run.device import host_memory
from run.load import load_model
from train import TrainConfig, train

REPOSITORY = Path(__file__).parent.parent
MODEL = dict(block_size=32, n_layer=2, n_head=2, n_embd=32)


@pytest.fixture
def settings(dataset, tmp_path):
    return dict(data=str(dataset), out=str(tmp_path / "run"), max_steps=8, batch_tokens=16 * 32,
                micro_batch=16, learning_rate=1e-2, min_learning_rate=1e-3, eval_every=2,
                save_every=0, log_every=2, dtype="float32", device="cpu", compile="off",
                sample_tokens=0, model=MODEL)


def run(settings, **changes):
    return train(build(TrainConfig, {**settings, **changes}))


def evaluations(monkeypatch, losses):
    """Let the evaluations of a run find these losses."""
    found = iter(losses)
    monkeypatch.setattr(train_module, "evaluate_data",
                        lambda *arguments: {"loss": next(found), "tokens": 1})


def best(settings):
    return checkpoint.load(Path(settings["out"]) / "best.pt")


# ---- the best model

def test_losses_of_other_validation_tokens_are_not_better_or_worse(settings, monkeypatch, capsys):
    """1.0 of a part; of the whole split 3.0, 2.0, 2.5: best.pt is that of 2.0."""
    evaluations(monkeypatch, [1.5, 1.0, 3.0, 2.0, 2.5])
    run(settings, max_steps=4, eval_tokens=32, schedule="constant")
    summary = run(settings, max_steps=10, patience=2, schedule="constant")
    assert summary["step"] == 10 and summary["best_val_loss"] == best(settings)["best_loss"] == 2.0
    assert best(settings)["step"] == 8 and "from here on" in capsys.readouterr().out


def test_what_a_run_would_not_do_as_it_is_asked_is_said(settings, tmp_path, capsys):
    run(settings, max_steps=1, warmup_steps=2)
    assert "warmup_steps=2 are more than the 1 steps" in capsys.readouterr().err
    run(settings, max_steps=2, warmup_steps=2, out=str(tmp_path / "adapter"), lora={"r": 2},
        init_from=settings["out"], optim={"optimizer": "muon"})
    said = capsys.readouterr().err
    assert "A and B of its adapter are trained by adamw" in said and "warmup" not in said


def test_a_best_model_that_could_not_be_saved_is_not_taken_for_saved(settings, monkeypatch):
    """Losses 3.0, 2.0 with a failing save, 2.5: best.pt is that of 2.5, and run.json says so."""
    evaluations(monkeypatch, [3.0, 2.0, 2.5, 4.0])
    save, fails = checkpoint.save, [False, True]

    def failing(path, state):
        if Path(path).name == "best.pt" and fails and fails.pop(0):
            raise OSError(28, "No space left on device")
        save(path, state)
    monkeypatch.setattr(checkpoint, "save", failing)
    summary = run(settings)
    assert (best(settings)["step"], best(settings)["best_loss"]) == (6, 2.5)
    assert summary["best_val_loss"] == 2.5
    final = json.loads((Path(settings["out"]) / "run.json").read_text())["final"]
    assert final["best_val_loss"] == 2.5
    assert checkpoint.load_last(settings["out"])["best_loss"] == 2.5


@pytest.mark.parametrize("losses,step", [([3.0, math.nan, 3.9, 3.8], 2),
                                         ([3.0, math.nan, 2.0, 2.5], 6),
                                         ([math.nan, 3.0, 3.5, 3.6], 4)])
def test_a_loss_that_is_no_number_is_never_the_best(settings, monkeypatch, losses, step):
    evaluations(monkeypatch, losses)
    run(settings)
    assert best(settings)["step"] == step


# ---- numbers that are not finite

@pytest.mark.parametrize("value", ["nan", "inf", "1e400", "-inf"])
@pytest.mark.parametrize("name", ["learning_rate", "grad_clip", "min_learning_rate", "optim.power",
                                  "weight_decay", "model.dropout"])
def test_a_setting_that_is_no_number_is_refused(settings, name, value):
    with pytest.raises(ValueError, match=f"{name}=.* is not a finite number"):
        train_module.main([f"--{key}={value}" for key, value in (
            ("data", settings["data"]), ("out", settings["out"]), (name, value))])
    assert not Path(settings["out"]).exists()


@pytest.mark.parametrize("word", ["seed=-1", "seed=1e30", "keep_last=1e9", "epochs=inf", "out="])
def test_a_setting_out_of_its_range_is_refused_before_anything_is_done(settings, word):
    with pytest.raises(ValueError, match=f"^{word.partition('=')[0]}"):
        train_module.main([f"--data={settings['data']}", f"--out={settings['out']}", f"--{word}"])


def test_another_optimizer_does_not_go_on_with_the_state_of_the_first(settings):
    run(settings, max_steps=2)
    with pytest.raises(ValueError, match="holds a run with optim.optimizer=adamw, this one has"):
        run(settings, max_steps=4, **{"optim.optimizer": "muon"})


def test_a_setting_that_is_no_number_is_refused_in_a_notebook():
    with pytest.raises(ValueError, match="learning_rate=nan is not a finite number"):
        TrainConfig(max_steps=1, learning_rate=math.nan)


def test_no_checkpoint_is_written_of_weights_that_are_not_finite(settings, monkeypatch):
    run(settings, max_steps=4, save_every=2)
    before = {path.name: path.read_bytes() for path in Path(settings["out"]).glob("*.pt")}
    real = train_module.take_step

    def damaging(optimizer, *arguments):
        real(optimizer, *arguments)
        optimizer.param_groups[0]["params"][0].data[0, 0] = math.inf
    monkeypatch.setattr(train_module, "take_step", damaging)
    with pytest.raises(FloatingPointError, match=r"transformer.wte.weight\), so no checkpoint"):
        run(settings, max_steps=8, save_every=1, eval_every=0)
    assert before == {path.name: path.read_bytes() for path in Path(settings["out"]).glob("*.pt")}


# ---- what is there to go on from

def test_where_only_milestones_are_left_the_newest_is_offered(settings):
    run(settings, save_every=2, milestone_every=4)
    out, logged = Path(settings["out"]), (Path(settings["out"]) / "log.jsonl").read_bytes()
    for path in out.glob("last*.pt"):
        path.unlink()
    with pytest.raises(ValueError, match=r"cp .*step_0000008.pt .*last.pt; to start anew"):
        run(settings, max_steps=10)
    assert (out / "log.jsonl").read_bytes() == logged
    shutil.copy(out / "step_0000004.pt", out / "last.pt")
    assert run(settings)["step"] == 8


def test_a_best_model_in_the_place_of_a_checkpoint_is_refused(settings):
    run(settings)
    out = Path(settings["out"])
    shutil.copy(out / "best.pt", out / "last.pt")
    with pytest.raises(ValueError, match="is a copy of a best.pt.*--init_from="):
        run(settings, max_steps=10)


def test_what_a_checkpoint_says_of_its_settings_stays_in_its_line(settings, capsys):
    run(settings)
    path = Path(settings["out"]) / "last.pt"
    state = checkpoint.load(path)
    state["config"]["log_every"] = "a\n\x1b[2J" * 999
    checkpoint.save(path, state)
    run(settings)
    shown = capsys.readouterr().out
    assert r"log_every a\n\x1b[2Ja\n" in shown and "\x1b" not in shown
    state["config"]["max_steps"] = "a\n\x1b[2J"
    checkpoint.save(path, state)
    with pytest.raises(ValueError, match=r"max_steps=a\\n\\x1b\[2J, this one has max_steps=8;"):
        run(settings)


def test_other_threads_are_said_where_they_change_bits(settings, capsys):
    run(settings, max_steps=4)
    torch.set_num_threads(2)
    run(settings, max_steps=6)
    assert "was trained with 1 threads, now there are 2" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [
    lambda out: (out / "run.json").write_text(""), lambda out: (out / "log.jsonl").unlink(),
    lambda out: (out / "log.jsonl").write_text("")])
def test_a_finished_run_without_its_last_figures_is_one_line(settings, damage):
    run(settings)
    out = Path(settings["out"])
    (out / "run.json").write_text("{}")
    damage(out)
    with pytest.raises(ValueError, match="move .* away to start anew"):
        run(settings)


def test_last_figures_that_were_damaged_come_from_the_log(settings):
    expected = run(settings)
    path = Path(settings["out"], "run.json")
    damaged = json.loads(path.read_text())
    damaged["final"]["stap"] = damaged["final"].pop("step")
    path.write_text(json.dumps(damaged))
    found = run(settings)
    assert {key: found[key] for key in ("step", "tokens", "val_loss")} == \
        {key: expected[key] for key in ("step", "tokens", "val_loss")}
    assert json.loads(path.read_text())["final"]["step"] == expected["step"]


# ---- signals and the screen

def command(settings, *words):
    return [sys.executable, "train.py", *(f"--{key}={value}" for key, value in settings.items()
                                          if key != "model"),
            *(f"--model.{key}={value}" for key, value in MODEL.items()), *words]


def test_a_signal_is_heard_within_seconds_however_long_the_steps_are(settings, monkeypatch):
    """Steps of 10 s by the clock of the log, log_every=1000: the step with the signal is the last.
    torchrun ends a rank 30 s after its signal."""
    clock, count, real = itertools.count(), itertools.count(1), train_module.take_step
    monkeypatch.setattr(log.time, "perf_counter", lambda: 10.0 * next(clock))

    def signalled(*arguments):
        real(*arguments)
        if next(count) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(train_module, "take_step", signalled)
    summary = run(settings, log_every=1000, eval_every=0, max_steps=50)
    assert (summary["step"], summary["stopped_by"]) == (3, signal.SIGTERM)
    assert checkpoint.load_last(settings["out"])["step"] == 3


def test_two_signals_to_end_a_run_still_save_it(settings):
    """As SLURM and torchrun send them; only a second Ctrl-C interrupts at once."""
    with processes.stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT if stop.number == 0 else signal.SIGTERM)
        assert stop.is_set() and stop.number == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("errors", [subprocess.STDOUT,
                                    pytest.param(subprocess.PIPE, marks=pytest.mark.slow)])
def test_a_run_whose_screen_goes_away_goes_on_to_its_end(settings, errors):
    process = subprocess.Popen(command(settings, "--log_every=1", "--max_steps=40",
                                       "--eval_every=20"),
                               cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=errors)
    process.stdout.readline()
    process.stdout.close()                              # train.py | head -1, or 2>&1 | head -1
    assert process.wait(timeout=120) == 0, process.stderr and process.stderr.read()
    assert checkpoint.load_last(settings["out"])["step"] == 40


def test_a_disk_that_is_full_for_a_while_costs_no_line_of_the_log(settings, monkeypatch, capsys):
    class Full:
        """The log's file; the disk has no room from the third call to the fifth, and half a line
        in the second."""
        def __init__(self, file):
            self.file, self.calls = file, 0

        def write(self, data):
            self.calls += 1
            if 3 <= self.calls < 6:
                raise OSError(28, "No space left on device")
            return self.file.write(data[:len(data) // 2] if self.calls == 2 else data)

        def __getattr__(self, name):
            return getattr(self.file, name)
    real = log.RunLog.__init__

    def opened(self, *arguments):
        real(self, *arguments)
        self.file = Full(self.file)
    monkeypatch.setattr(log.RunLog, "__init__", opened)
    run(settings)
    assert capsys.readouterr().err.count("log.jsonl cannot be written: [Errno 28]") == 1
    lines = log.read_log(Path(settings["out"]) / "log.jsonl")
    assert [line["step"] for line in lines if "lr" in line] == list(range(1, 9))
    assert [line["step"] for line in lines if "val_loss" in line] == [2, 4, 6, 8]


def test_a_log_that_cannot_be_forced_to_the_disk_is_said_once_and_the_run_goes_on(
        settings, monkeypatch, capsys):
    """And it is forced there before each checkpoint, which must not be ahead of its log."""
    fsync, order = os.fsync, []

    def failing(handle):
        order.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name.partition(".new")[0])
        if order[-1] == "log.jsonl":
            raise OSError(5, "Input/output error")
        fsync(handle)
    monkeypatch.setattr(log.os, "fsync", failing)
    run(settings, save_every=2, eval_every=0)
    assert [name for name in order if name in ("log.jsonl", "last")] == ["log.jsonl", "last"] * 4
    assert "run.json" in [name.rpartition(".")[0].rpartition(".")[0] for name in order]
    said = capsys.readouterr().err
    assert said.count("log.jsonl cannot be forced to the disk: [Errno 5] Input/output error") == 1
    assert len(log.read_log(Path(settings["out"]) / "log.jsonl")) == 9


def test_a_board_that_cannot_be_written_does_not_end_the_run(settings, monkeypatch, capsys):
    class Board:
        def __init__(self, folder):
            pass

        def add_scalar(self, name, number, step):
            if step > 2:
                raise OSError(28, "No space left on device")
    monkeypatch.setattr(log, "summary_writer", lambda: Board)
    monkeypatch.setattr(resume, "summary_writer", lambda: Board)
    assert run(settings, report_to="tensorboard")["step"] == 8
    assert capsys.readouterr().err.count("tensorboard cannot be written: [Errno 28]") == 1


@pytest.mark.parametrize("name", ["config.json", "run.json", "tokenizer.json"])
def test_a_run_that_starts_on_a_full_disk_is_one_line_and_starts_when_there_is_room(
        settings, monkeypatch, name):
    def full(path, data):
        write(path, data[:len(data) // 2])
        if path.name.startswith(name):
            raise OSError(28, "No space left on device")
        write(path, data)
    write = Path.write_bytes
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(PermissionError) as error:
            train_module.main(command(settings)[2:])
    assert str(error.value) == (f"out={settings['out']} cannot be written: No space left on "
                                f"device; choose another --out")
    assert not list(Path(settings["out"]).glob("*.tmp"))
    assert run(settings)["step"] == 8


@pytest.mark.parametrize("word", ["top_k=-1", "top_p=0", "top_p=-1", "top_p=nan", "temperature=nan",
                                  "temperature=1e-320", "max_new_tokens=-1", "samples=-1"])
def test_sampling_that_cannot_be_is_refused_in_one_line(word):
    name = word.partition("=")[0]
    with pytest.raises(ValueError, match=f"^{name}="):
        sample.main(["out/demo", f"--{word}"])


def test_what_a_model_writes_cannot_steer_the_terminal(settings, monkeypatch, capsys):
    monkeypatch.setattr(sample, "continue_text", lambda *a, **named: "a\x1b[31mred\x07\n\tb")
    run(settings, sample_tokens=4, max_steps=2)
    sample.main([settings["out"], "--device=cpu"])
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and shown.count("a\\x1b[31mred\\x07\n\tb") == 2


# ---- what cannot be, in one line

@pytest.mark.parametrize("files,expected", [
    ({}, 12 << 30),                                     # no limit: memory and swap
    ({"sys/fs/cgroup/a/b/memory.max": "max"}, 12 << 30),
    ({"sys/fs/cgroup/a/b/memory.max": str(3 << 30)}, 7 << 30),
    ({"sys/fs/cgroup/memory.max": str(3 << 30)}, 7 << 30),              # inside of a container
    ({"sys/fs/cgroup/memory/c/memory.limit_in_bytes": str(1 << 30)}, 5 << 30),
    ({"sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096)}, 12 << 30)])
def test_memory_is_what_machine_and_control_group_allow(tmp_path, files, expected):
    """By hand: 8 GiB and 4 GiB of swap."""
    for name, text in {"proc/meminfo": f"MemTotal: {8 << 20} kB\nSwapTotal:  {4 << 20} kB\n",
                       "proc/self/cgroup": "4:memory:/c\n0::/a/b\n", **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert host_memory(tmp_path) == expected


def test_a_model_whose_weights_alone_fit_is_not_refused(settings, monkeypatch):
    """Gradients and moments may be on a GPU, or split over ranks."""
    weights = 4 * sum(p.numel() for p in model_for(settings).parameters())
    for room, fits in ((weights, True), (weights - 1, False)):
        monkeypatch.setattr(load, "host_memory", lambda: room)
        with contextlib.nullcontext() if fits else pytest.raises(ValueError, match="weights alone"):
            model_for(settings)


def model_for(settings):
    config = build(TrainConfig, settings)
    return load.model_for(TokenSet(Path(settings["data"])), None, config)


@pytest.mark.parametrize("error", [
    lambda: torch.empty(2**50), lambda: [0] * 2**60,
    lambda: fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU"))])
def test_memory_that_is_not_there_is_one_line(monkeypatch, capsys, error):
    monkeypatch.setattr(sys, "argv", ["a"])
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda words: error())
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and len(said.splitlines()) == 1
    assert said.startswith("error: out of memory (") and "--micro_batch" in said


def fail(error):
    raise error


def test_scores_that_are_not_finite_are_one_line(settings, monkeypatch, capsys):
    run(settings, max_steps=1)
    monkeypatch.setattr(GPT, "next_logits", lambda self, idx, cache: torch.full((1, 256), math.nan))
    monkeypatch.setattr(sys, "argv", ["sample.py", settings["out"], "--device=cpu"])
    with pytest.raises(SystemExit):
        run_command(sample.main)
    assert capsys.readouterr().err.startswith("error: the model's scores are not finite")


@pytest.fixture
def interruptible():
    """What a test starts can be interrupted: the jobs that a shell runs behind itself cannot, nor
    what they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("words", [["train.py"], ["sample.py", "gpt2"], ["-m", "eval", "gpt2"],
                                   ["-m", "eval.loss"], ["-m", "eval.hellaswag"]])
def test_an_interrupt_while_pytorch_is_imported_is_one_line(words, interruptible):
    process = subprocess.Popen([sys.executable, *words], cwd=REPOSITORY, stderr=subprocess.PIPE,
                               text=True)
    interrupt_once_there(process, "libtorch_cpu")
    assert process.communicate(timeout=60)[1] == "\ninterrupted\n" and process.returncode == 130


def test_an_interrupt_while_the_tokenizer_is_imported_is_one_line(interruptible):
    process = subprocess.Popen([sys.executable, "bpe.py", "encode"], cwd=REPOSITORY, text=True,
                               stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    interrupt_once_there(process, "_multiarray")        # numpy's
    said = process.communicate(timeout=60)[1]
    assert said.startswith("bpe.py: interrupted") and len(said.splitlines()) == 1
    assert process.returncode == 130


def interrupt_once_there(process, library):
    """Send SIGINT as soon as the process has mapped a file of this name."""
    while library not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)


@pytest.mark.parametrize("word,message", [
    ("model.n_embd=1200000", "n_embd=1200000.* needs [0-9,]+ GiB"),
    ("model.n_layer=10000000", "n_layer=10000000.* needs [0-9,]+ GiB"),
    ("model.block_size=1000000000000", "block_size=1000000000000.* needs [0-9,]+ GiB"),
    ("batch_tokens=1000000000000", "batch_tokens=1000000000000 must be at most 4294967296")])
def test_sizes_beyond_memory_are_refused_before_anything_is_made(settings, word, message):
    with pytest.raises(ValueError, match=message):
        train_module.main([f"--data={settings['data']}", f"--out={settings['out']}",
                           "--device=cpu", f"--{word}"])
    assert not Path(settings["out"]).exists()


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(settings, tmp_path):
    for name in ("tok.json", "last.pt", "texts/a.txt", "train_0000.npy", "model.safetensors"):
        path = tmp_path / "pipes" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(path)
    folder = tmp_path / "pipes"
    for read in (lambda: Tokenizer.load(folder / "tok.json"),
                 lambda: checkpoint.load(folder / "last.pt"),
                 lambda: find_files(folder / "texts"),
                 lambda: shards.open_shard(folder / "train_0000.npy", {}),
                 lambda: load_tensors(folder / "model.safetensors")):
        with pytest.raises(FileNotFoundError):
            read()


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_a_folder_or_a_pipe_in_the_place_of_a_file_of_texts_is_refused(tmp_path, kind):
    names = ("talks.jsonl", "prompts.txt", "items.jsonl", "a.txt")
    paths = {name: tmp_path / name for name in names}
    for path in paths.values():
        path.mkdir() if kind == "folder" else os.mkfifo(path)
    for read, name in ((lambda path: chat.main(["prepare", str(path)]), "talks.jsonl"),
                       (lambda path: chat.main(["inspect", str(path)]), "talks.jsonl"),
                       (sample.read_prompts, "prompts.txt"), (load_items, "items.jsonl"),
                       (lambda path: bpe.main(["train", str(path), "--vocab-size=300",
                                               f"--out={tmp_path / 'tok.json'}"]) == 2 and
                        find_files(path), "a.txt")):
        with pytest.raises((FileNotFoundError, ValueError), match=name):
            read(paths[name])


@pytest.mark.parametrize("kind", ['"a"', "[]", "null", "1", "{}"])
def test_a_data_set_of_an_unknown_kind_is_refused(settings, tmp_path, kind):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "meta.json").write_text(f'{{"version": 1, "kind": {kind}, "splits": {{}}}}')
    with pytest.raises(ValueError, match="meta.json says kind=.*, which is none of tokens, chat"):
        run(settings, data=str(tmp_path / "odd"))


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbftext")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "text"}\n')
    assert list(read_documents(find_files(tmp_path))) == ["text", "text"]


def test_a_foreign_tokenizer_in_a_run_is_refused(settings):
    run(settings, max_steps=1)
    Tokenizer([], special_tokens=("a", "b")).save(Path(settings["out"]) / "tokenizer.json")
    with pytest.raises(ValueError, match="has 258 tokens, the model 256: it is another model's"):
        load_model(settings["out"])


@pytest.mark.parametrize("content", ["[]", '{"template": 3}', '{"model": []}'])
def test_settings_of_a_run_that_are_none_are_one_line(settings, content):
    run(settings, max_steps=1)
    (Path(settings["out"]) / "config.json").write_text(content)
    with pytest.raises(ValueError, match="config.json (holds a list|is damaged)"):
        sample.main([settings["out"], "--device=cpu"])


def test_a_vocabulary_beyond_any_tokenizer_is_refused_before_the_text_is_read(capsys):
    assert bpe.main(["train", "no file", "--vocab-size=99999999999", "--out=tok.json"]) == 2
    assert capsys.readouterr().err.startswith("bpe.py: vocab_size=99999999999 is above 4194304")


def test_two_preparations_of_one_folder_are_refused(tmp_path):
    first = ShardWriter(tmp_path, Tokenizer([], special_tokens=()), "first")
    with pytest.raises(ValueError, match="is in use by process .*; wait for its end"):
        ShardWriter(tmp_path, Tokenizer([], special_tokens=()), "second")
    with pytest.raises(ValueError, match="is in use by process"):
        write_dataset(tmp_path, "chat", {"train": []}, "third")
    first.add("train", [1, 2, 3])
    first.finish()
    assert write_dataset(tmp_path, "chat", {"train": []}, "fourth")["source"] == "fourth"


def test_a_missing_tensorboard_is_said_before_anything_is_written(settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match='needs the extra "tensorboard"'):
        run(settings, report_to="tensorboard")
    assert not Path(settings["out"]).exists()


def test_a_screen_without_a_character_gets_its_spelling(monkeypatch):
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO()))
    run_command(lambda words: print("█"))
    screen.flush()
    assert screen.buffer.getvalue() == b"\\u2588\n"


def test_a_name_that_looks_like_mathematics_is_drawn_as_it_is():
    pytest.importorskip("matplotlib")
    assert picture(lambda figure: figure.suptitle(r"a$\bad$"), (2, 1), 50)
