"""Looking into a run, --watch_every, and telling where its time goes, --profile."""
import gzip
import itertools
import json
import math
from types import SimpleNamespace

import pytest
import ranks
import torch
from torch.nn import functional as F

from model import GPT, GPTConfig
from run.config import build
from run.inside import Inside
from run.log import read_log
from run.processes import Processes
from run.profile import PARTS
from train import TrainConfig, train

TINY = {"max_steps": 6, "batch_tokens": 128, "micro_batch": 2, "warmup_steps": 2, "eval_every": 0,
        "save_every": 0, "sample_tokens": 0, "log_every": 1, "learning_rate": 1e-2,
        "min_learning_rate": 1e-2,
        "model": {"block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32, "dropout": 0.1}}
WORLD = Processes(0, 1, torch.device("cpu"))


class Notes:
    """A log that keeps what it is given."""
    def __init__(self):
        self.lines, self.texts = [], []
        self.write, self.say = self.lines.append, self.texts.append

    def lap(self, training=True):
        pass


def settings(dataset, out, **more):
    return {**TINY, "data": str(dataset), "out": str(out), **more}


def run(dataset, out, **more):
    train(build(TrainConfig, settings(dataset, out, **more)))
    return read_log(out / "log.jsonl")


def losses(lines):
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


def looks(lines):
    return [line for line in lines if "block_update" in line]


def looked(model, change, batch, lr=1.0, peak=1.0):
    """One look around a change of the model: its line, and the sentences."""
    log, config = Notes(), type("Config", (), {"watch_every": 1, "learning_rate": peak})
    inside = Inside(model, config, WORLD, torch.float32, log)
    with inside.look(1, lr, batch):
        change()
    return log.lines[0], log.texts[1:]


def small(**more):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=3, n_head=2, n_embd=32, **more))
    idx = torch.randint(50, (2, 16))
    model(idx, idx)[1].backward()
    return model, (idx, idx)


def test_a_look_gives_the_figures_of_a_plain_computation():
    model, batch = small()
    x = model.transformer.wte(batch[0]) + model.transformer.wpe(torch.arange(16))
    block, wanted = model.transformer.h[0], {}
    out = block(x)
    q, k, _ = (part.view(2, 16, 2, 16).transpose(1, 2)
               for part in block.attn.c_attn(block.ln_1(x)).split(32, dim=2))
    scores = (q @ k.mT / 4)[0].masked_fill(~torch.ones(16, 16, dtype=torch.bool).tril(), -math.inf)
    hidden = F.gelu(block.mlp.c_fc(block.ln_2(x + block.attn(block.ln_1(x)))), approximate="tanh")
    parameters = list(block.parameters())
    wanted["activation"] = out.square().mean().sqrt()
    wanted["added"] = ((out - x).square().mean() / x.square().mean()).sqrt()
    wanted["logit"] = scores.max()
    wanted["saturated"] = (scores.softmax(-1).amax(-1) > 0.99)[:, 7:].float().mean()
    wanted["dead"] = (hidden.flatten(0, 1).amax(0) <= 0).float().mean()
    wanted["gradient"] = torch.cat([p.grad.flatten() for p in parameters]).square().mean().sqrt()
    wanted["update"] = torch.tensor(0.01)           # every weight becomes 1% larger

    def grow():
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.01)

    line, _ = looked(model, grow, batch)
    for key, value in wanted.items():               # float32, sums in another order; 9 digits kept
        assert line[f"block_{key}"][0] == pytest.approx(value.item(), rel=1e-4, abs=2e-9), key
        assert len(line[f"block_{key}"]) == 3


def test_what_is_unusual_is_said_once_and_what_is_usual_is_not():
    model, batch = small()
    assert looked(model, lambda: None, batch)[1] == []

    def break_it():
        with torch.no_grad():
            first, second, third = model.transformer.h
            for layer in (first.attn.c_proj, first.mlp.c_proj):
                layer.weight.mul_(1e-5)
            second.mlp.c_fc.bias.fill_(-50.0)
            third.attn.c_attn.weight.mul_(3000)

    break_it()
    line, texts = looked(model, lambda: model.transformer.h[1].ln_1.weight.data.mul_(9), batch)
    assert [text.removeprefix("step 1: ").split(" of ")[:2] for text in texts] == [
        [f"block 0 adds {line['block_added'][0]:.2g}", "its input: it hardly takes part"],
        [f"block 1 changes by {line['block_update'][1]:.2g}", texts[1].split(" of ")[1]],
        ["block 2 attends to a single token for a share",
         f"{line['block_saturated'][2]:.2g}"],
        ["block 1 has a share", "1"]]
    log, config = Notes(), type("Config", (), {"watch_every": 1, "learning_rate": 1.0})
    inside = Inside(model, config, WORLD, torch.float32, log)
    for factor in (1, 3):                           # scores that grow: against the first look
        with torch.no_grad():
            model.transformer.h[2].attn.c_attn.weight.mul_(factor)
        with inside.look(1, 1.0, batch):
            pass
    assert sum("attention scores up to" in text for text in log.texts) == 1
    assert sum("of its units never" in text for text in log.texts) == 1


@pytest.mark.parametrize("more", [{}, {"recompute_activations": True}, {"micro_batch": 8}],
                         ids=["plain", "recomputed", "one-micro-batch"])
def test_a_run_that_is_looked_at_computes_the_same_bits(dataset, tmp_path, more):
    plain = run(dataset, tmp_path / "plain", **more)
    watched = run(dataset, tmp_path / "watched", watch_every=2, **more)
    assert losses(watched) == losses(plain)
    assert [line["step"] for line in looks(watched)] == [2, 4, 6]
    assert not looks(plain)


@pytest.mark.slow
def test_a_compiled_run_that_is_looked_at_computes_the_same_bits(dataset, tmp_path):
    plain = run(dataset, tmp_path / "plain", compile="on")
    watched = run(dataset, tmp_path / "watched", compile="on", watch_every=2)
    assert losses(watched) == losses(plain) and len(looks(watched)) == 3


@pytest.mark.parametrize("shard", ["none", "zero2",
                                   pytest.param("fsdp", marks=pytest.mark.slow)])
def test_ranks_compute_the_same_bits_and_see_what_one_process_sees(dataset, tmp_path, shard):
    same = dict(max_steps=3, dtype="float32", model={**TINY["model"], "dropout": 0.0})
    alone = looks(run(dataset, tmp_path / "alone", watch_every=3, **same))[0]
    for name, every in (("plain", 0), ("watched", 3)):
        words = settings(dataset, tmp_path / name, shard=shard, watch_every=every, **same)
        assert ranks.exit_codes(ranks.plain, 2, words) == [0, 0]
    plain, watched = (read_log(tmp_path / name / "log.jsonl") for name in ("plain", "watched"))
    assert losses(watched) == losses(plain)
    for key in ("block_gradient", "block_update"):  # reduced over the ranks in another order
        assert looks(watched)[0][key] == pytest.approx(alone[key], rel=1e-3)


def test_the_profile_adds_up_to_the_step_and_its_trace_can_be_read(dataset, tmp_path, capsys):
    run(dataset, tmp_path / "run", profile=2)
    text = capsys.readouterr().out
    rows = [line.split() for line in text.split("profile of 2 steps")[1].splitlines()[1:]][:10]
    rows = {row[0]: float(row[1]) for row in rows if len(row) == 3 and row[2].endswith("%")}
    whole = rows.pop("step")
    assert sum(rows.values()) == pytest.approx(whole, abs=0.005 * len(rows) + 0.005)    # rounded
    assert {"products", "head", "attention", "optimizer", "data", "waiting"} <= rows.keys()
    assert rows.keys() <= {*PARTS, "head", "elementwise", "waiting"}
    assert min(rows.values()) >= 0
    trace = json.loads(gzip.decompress((tmp_path / "run" / "trace.json.gz").read_bytes()))
    assert any("addmm" in event.get("name", "") for event in trace["traceEvents"])


def test_a_head_whose_size_others_have_is_not_told_apart(dataset, tmp_path, capsys):
    """256 bytes are the vocabulary, and 16 rows of 16 tokens are as many."""
    run(dataset, tmp_path / "run", profile=2, batch_tokens=256, micro_batch=16)
    text = capsys.readouterr().out.split("profile of 2 steps")[1]
    assert "\n  head " not in text and "products" in text
    assert "the head's products are among the others: its 256 rows are also" in text


def test_what_is_done_beside_the_steps_of_a_profile_is_said(dataset, tmp_path, capsys):
    """A profile of 2 steps is of the 4th and the 5th, and of what comes between the 3rd and 5th."""
    for every, said in ((3, True), (2, True), (5, False)):
        run(dataset, tmp_path / f"run{every}", profile=2, eval_every=every, save_every=7)
        text = capsys.readouterr().out
        assert (f"with what eval_every={every} do in these steps" in text) == said


def test_looks_and_profiles_are_not_counted_as_training(dataset, tmp_path, monkeypatch):
    """By a clock that moves in them and a little when it is read; each line has its own speed."""
    now, late = itertools.count(step=1e-3), [0.0]
    monkeypatch.setattr("run.log.time", SimpleNamespace(
        perf_counter=lambda: next(now) + late[0]))

    def slowly(function):
        def slow(*arguments):
            late[0] += 100
            return function(*arguments)
        return slow
    monkeypatch.setattr(Inside, "_computed", slowly(Inside._computed))
    for name in ("start", "export_chrome_trace"):
        monkeypatch.setattr(torch.profiler.profile, name,
                            slowly(getattr(torch.profiler.profile, name)))
    lines = run(dataset, tmp_path / "run", profile=2, watch_every=3, log_every=2)
    assert late[0] == 400
    speeds = [line["tokens_per_s"] for line in lines if "loss" in line]
    seconds = sum(128 / speed for speed in speeds)
    final = json.loads((tmp_path / "run" / "run.json").read_text())["final"]
    assert final["train_seconds"] == pytest.approx(seconds, abs=0.01) and seconds < 1


def test_a_run_whose_trace_has_no_room_goes_on_to_its_end(dataset, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "trace.json.gz").symlink_to("/dev/full")
    run(dataset, tmp_path / "run", profile=2)
    said = capsys.readouterr()
    assert "step 6/6" in said.out and "warning: no trace in" in said.err


def test_a_profile_longer_than_the_run_is_refused(dataset, tmp_path):
    with pytest.raises(ValueError, match="profile=4 begins after 3 steps, and max_steps=6"):
        build(TrainConfig, settings(dataset, tmp_path, profile=4))
