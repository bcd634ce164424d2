"""The classifier against pooling by hand, transformers, its own rows alone; then in the loop."""
import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import ranks
import sample
from data import labels
from eval import __main__ as every_eval
from eval import loss
from model import GPT, IGNORE, GPTConfig
from run import checkpoint
from run import log as report
from run.classifier import Classifier
from run.config import build
from run.export import export
from run.load import load_model
from train import TrainConfig, train

LENGTHS = (5, 16, 1, 9)


def small(pooling="last", classes=3):
    torch.manual_seed(0)
    model = Classifier(GPT(GPTConfig(16, 50, 2, 2, 16)), classes, pooling).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 if p.dim() == 1 else 15)
        model.head.weight.normal_(std=0.3)              # a new one is zero
    return model


def batch(pad=0):
    """Rows of several lengths, padded behind, each with its class at its last token."""
    idx, targets = torch.full((4, 16), pad), torch.full((4, 16), IGNORE)
    generator = torch.Generator().manual_seed(1)
    for row, length in enumerate(LENGTHS):
        idx[row, :length] = torch.randint(50, (length,), generator=generator)
        targets[row, length - 1] = row % 3
    return idx, targets


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_logits_are_the_head_on_the_last_or_the_mean_hidden_state_of_the_real_tokens(pooling):
    model, (idx, targets) = small(pooling), batch()
    logits, loss = model(idx, targets)
    for row, length in enumerate(LENGTHS):
        x = model.gpt.features(idx[row:row + 1, :length])[0]        # (length, C)
        vector = x[-1] if pooling == "last" else x.sum(0) / length
        torch.testing.assert_close(logits[row], model.head.weight @ vector, rtol=0, atol=1e-5)
        torch.testing.assert_close(model(idx[row:row + 1, :length])[0][0], logits[row],
                                   rtol=0, atol=1e-5)
    expected = F.cross_entropy(logits, torch.tensor([0, 1, 2, 0]))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(model(idx, targets, reduction="sum")[1], 4 * expected)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_padding_does_not_change_the_logits(pooling):
    model = small(pooling)
    assert torch.equal(model(*batch(pad=0))[0], model(*batch(pad=49))[0])


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_samples_in_one_row_are_classified_as_if_each_were_alone(pooling):
    model, (idx, targets) = small(pooling), batch()
    alone, _ = model(idx, targets)
    rows = [0, 2, 3]                                                # 5 + 1 + 9 tokens, one padded
    packed = torch.cat([idx[row, :LENGTHS[row]] for row in rows] + [torch.tensor([7])])[None]
    marks = torch.cat([targets[row, :LENGTHS[row]] for row in rows] + [torch.tensor([IGNORE])])
    positions = torch.cat([torch.arange(n) for n in (5, 1, 9, 1)])[None]
    found, loss = model(packed, marks[None], positions, reduction="sum")
    torch.testing.assert_close(found, alone[rows], rtol=0, atol=1e-5)
    torch.testing.assert_close(loss, F.cross_entropy(alone[rows], torch.tensor([0, 2, 0]),
                                                     reduction="sum"))


def test_the_last_token_gives_the_logits_of_transformers():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2ForSequenceClassification(transformers.GPT2Config(
        n_positions=16, vocab_size=50, n_layer=2, n_head=2, n_embd=16, num_labels=3,
        pad_token_id=49)).eval()
    model, (idx, targets) = small(), batch(pad=49)
    idx[idx == 49] = 48
    for row, length in enumerate(LENGTHS):
        idx[row, length:] = 49                          # they find the end by the padding
    state = {name: p.t() if name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight")) else p
             for name, p in model.gpt.transformer.state_dict().items()}
    theirs.transformer.load_state_dict(state)
    theirs.score.weight.data.copy_(model.head.weight)
    with torch.no_grad():
        torch.testing.assert_close(model(idx, targets)[0], theirs(idx).logits, rtol=0, atol=1e-5)


def test_a_new_classifier_finds_every_class_equally_likely():
    model, (idx, targets) = Classifier(GPT(GPTConfig(16, 50, 2, 2, 16)), 3), batch()
    assert not model(idx)[0].any()
    assert model(idx, targets)[1].item() == pytest.approx(math.log(3), rel=1e-6)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_eight_samples_are_learned_by_heart(pooling):
    torch.manual_seed(0)
    model = Classifier(GPT(GPTConfig(16, 50, 2, 2, 16)), 2, pooling)
    idx, targets = torch.randint(50, (8, 16)), torch.full((8, 16), IGNORE)
    targets[:, -1] = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        _, loss = model(idx, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.05
    assert torch.equal(model(idx)[0].argmax(1), targets[:, -1])


def test_a_batch_without_labels_has_loss_zero_and_gradients_of_zero():
    model = small()
    logits, loss = model(batch()[0], torch.full((4, 16), IGNORE))
    loss.backward()
    assert logits.shape == (0, 3) and loss == 0
    assert not any(p.grad.any() for p in model.parameters())


def test_its_state_goes_out_and_in():
    model, other = small(), Classifier(GPT(GPTConfig(16, 50, 2, 2, 16)), 3)
    idx, targets = batch()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(idx, targets)[0], model(idx, targets)[0])
    assert other.gpt.lm_head.weight is other.gpt.transformer.wte.weight
    assert model.num_params() == model.gpt.num_params() + 3 * 16
    model.recompute_activations = True
    assert model.gpt.recompute_activations


@pytest.mark.parametrize("settings,message", [
    (dict(classes=1), "classes=1 must be at least 2"),
    (dict(pooling="first"), "pooling='first' is unknown; choose last or mean")])
def test_a_wrong_setting_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Classifier(GPT(GPTConfig(16, 50, 1, 1, 8)), **settings)


# ---- in the loop

SHAPE = dict(block_size=48, n_layer=2, n_head=2, n_embd=32)
LORA = dict(r=2, target_modules=("all-linear",))


def run_settings(out, data, **changes):
    return {**dict(out=str(out), data=str(data), max_steps=8, batch_tokens=8 * 48, micro_batch=4,
                   learning_rate=5e-3, min_learning_rate=5e-3, schedule="constant", eval_every=4,
                   save_every=4, log_every=2, dtype="float32", device="cpu", compile="off"),
            **changes}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A pretrained run, by bytes."""
    from data.corpus import CorpusConfig, prepare
    folder = tmp_path_factory.mktemp("base")
    (folder / "text.txt").write_text("".join(f"{i} plus {i * i % 97}\n" for i in range(600)))
    data = prepare(CorpusConfig(from_=str(folder / "text.txt"), tokenizer="bytes",
                                out=str(folder / "data")))
    train(build(TrainConfig, run_settings(folder / "run", data, max_steps=20, sample_tokens=0,
                                          model=SHAPE)))
    return folder / "run"


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    """Reviews of many lengths, as a file and as a data set; the longest does not fit."""
    folder = tmp_path_factory.mktemp("reviews")
    words = ("bad", "dull", "awful"), ("good", "fine", "great")
    texts = [(f"{i} " + " ".join(words[i % 2][(i + j) % 3] for j in range(1 + i % 7)) +
              (" film" * 12 if i == 8 else ""), i % 2) for i in range(80)]
    lines = [json.dumps({"text": text, "label": label}) + "\n" for text, label in texts]
    (folder / "all.jsonl").write_text("".join(lines[:60]))
    (folder / "test.jsonl").write_text("".join(lines[60:]))
    labels.prepare(labels.LabelsConfig(from_=str(folder), out=str(folder / "data")))
    return folder


@pytest.fixture(scope="module")
def run(base, reviews, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    train(build(TrainConfig, run_settings(out, reviews / "data", init_from=str(base),
                                          max_steps=40, pooling="mean", eval_every=20)))
    return out


def log_lines(out):
    """Without what the clock decides."""
    return [{key: value for key, value in line.items() if key != "tokens_per_s"}
            for line in report.read_log(Path(out) / "log.jsonl")]


def losses(out):
    return [line["loss"] for line in log_lines(out) if "lr" in line]


def test_a_run_starts_at_the_loss_of_a_guess_and_learns(run):
    found = losses(run)
    assert found[0] == pytest.approx(math.log(2), rel=1e-6) and found[-1] < 0.2
    final = json.loads((run / "run.json").read_text())["final"]
    assert final["val_accuracy"] > 0.9
    assert [line["val_accuracy"] for line in log_lines(run) if "val_loss" in line][-1] == \
        final["val_accuracy"]
    assert not any("sample" in line for line in log_lines(run))         # it writes nothing


def test_a_run_gives_back_the_classifier_that_its_figures_are_of(run, reviews):
    model, tokenizer = load_model(run, which="last.pt")
    assert isinstance(model, Classifier) and model.pooling == "mean" and not model.training
    rows = [json.loads(line) for line in (reviews / "test.jsonl").read_text().splitlines()]
    logits = torch.cat([model(torch.tensor([tokenizer.encode(row["text"])[-48:]]))[0]
                        for row in rows])
    answers = torch.tensor([row["label"] for row in rows])
    final = json.loads((run / "run.json").read_text())["final"]
    assert final["val_loss"] == pytest.approx(F.cross_entropy(logits, answers).item(), rel=1e-4)
    assert final["val_accuracy"] == (logits.argmax(1) == answers).float().mean().item()


@pytest.mark.parametrize("changes", [dict(), dict(packing=True), dict(lora=LORA)])
def test_a_resumed_run_equals_an_uninterrupted_one(base, reviews, tmp_path, changes):
    words = run_settings(tmp_path / "whole", reviews / "data", init_from=str(base),
                         **changes)
    train(build(TrainConfig, words))
    for steps in (4, 8):
        train(build(TrainConfig, {**words, "out": str(tmp_path / "parts"), "max_steps": steps}))
    whole, parts = (checkpoint.load(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    assert log_lines(tmp_path / "whole") == log_lines(tmp_path / "parts")
    assert whole["model"].keys() == parts["model"].keys()
    for name, tensor in whole["model"].items():
        assert torch.equal(tensor, parts["model"][name]), name


# While B is near zero, A's gradients are as small as rounding; Adam would make whole steps of it.
@pytest.mark.parametrize("changes", [dict(), dict(packing=True, pooling="mean"),
                                     {"lora": LORA, "optim.eps": 1e-5}])
def test_the_loss_of_a_step_is_the_same_for_any_ranks_and_accumulation(base, reviews, tmp_path,
                                                                       changes):
    words = run_settings(tmp_path / "one", reviews / "data", init_from=str(base),
                         micro_batch=8, **changes)
    train(build(TrainConfig, words))
    two = {**words, "out": str(tmp_path / "two"), "micro_batch": 2}
    assert ranks.exit_codes(ranks.plain, 2, two) == [0, 0]
    # float32 sums in another order, which Adam makes a little larger with each step
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-5)
    for one, two in zip(*(log_lines(tmp_path / name) for name in ("one", "two"))):
        if "val_loss" in one:
            assert two["val_loss"] == pytest.approx(one["val_loss"], rel=1e-4)
            assert two["val_accuracy"] == one["val_accuracy"]


@pytest.mark.slow
def test_a_sharded_classifier_trains_as_one_on_each_rank_does(base, reviews, tmp_path):
    words = run_settings(tmp_path / "none", reviews / "data", init_from=str(base))
    for shard in ("none", "fsdp"):
        parts = {**words, "out": str(tmp_path / shard), "shard": shard}
        assert ranks.exit_codes(ranks.plain, 2, parts) == [0, 0]
    assert losses(tmp_path / "fsdp") == pytest.approx(losses(tmp_path / "none"), rel=2e-5)
    model, _ = load_model(tmp_path / "fsdp")
    assert isinstance(model, Classifier) and model.head.weight.any()


def test_beside_an_adapter_the_head_trains_in_full_and_nothing_else(base, reviews, tmp_path):
    words = run_settings(tmp_path / "run", reviews / "data", init_from=str(base), lora=LORA,
                         max_steps=40, learning_rate=1e-2, min_learning_rate=1e-2)
    summary = train(build(TrainConfig, words))
    assert summary["val_accuracy"] > 0.8
    state = checkpoint.load(tmp_path / "run" / "last.pt")["model"]
    assert [name for name in state if ".lora_adapters." not in name] == ["head.weight"]
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert settings["lora"]["modules_to_save"] == ["head"]
    model, _ = load_model(tmp_path / "run", which="last.pt")
    assert torch.equal(model.head.weight, state["head.weight"])
    found = checkpoint.trainable_state(model)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    body, old = load_model(tmp_path / "run")[0].gpt, load_model(base)[0]
    for name, tensor in old.state_dict().items():
        near = name.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias")
        held = body.state_dict()
        assert torch.equal(held.get(near, held.get(name)), tensor), name


def test_what_evaluates_asks_the_head(run, reviews, capsys):
    file, data = reviews / "test.jsonl", reviews / "data"
    capsys.readouterr()
    every_eval.main([str(run), f"--imdb_file={file}", "--device=cpu", "--dtype=float32"])
    shown = capsys.readouterr().out
    kept = json.loads((run / "eval.json").read_text())
    found = kept["loss"]
    assert f"{found['accuracy']:.4f}" in shown and found["accuracy"] > 0.9
    assert kept.keys() == {"parameters", "block_size", "loss"}      # it has no words
    loss.main([f"--model={run}", f"--data={data}", "--device=cpu", "--dtype=float32"])
    assert (f"loss {found['loss']:.4f}  accuracy {found['accuracy']:.4f}"
            in capsys.readouterr().out)


def test_what_needs_a_model_that_writes_refuses_a_classifier(run, reviews, tmp_path):
    with pytest.raises(ValueError, match="is a classifier, and this needs a model that writes"):
        sample.main([str(run), "--prompt=A", "--device=cpu"])
    with pytest.raises(ValueError, match="is a classifier, and this needs a model that writes"):
        export(run, tmp_path / "out")
    with pytest.raises(ValueError, match="is a classifier, and this needs a model that writes"):
        train(build(TrainConfig, run_settings(tmp_path / "run", reviews / "data",
                                              init_from=str(run))))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("changes,message", [
    (dict(init_from="scratch"), "holds texts with classes, and init_from=scratch has no words"),
    (dict(hellaswag_every=2), "hellaswag_every=2 asks for a model that writes"),
    (dict(pooling="first"), r"pooling='first' is not allowed; give last.mean")])
def test_a_setting_that_does_not_fit_is_refused_before_anything_is_written(base, reviews, tmp_path,
                                                                           changes, message):
    with pytest.raises(ValueError, match=message):
        train(build(TrainConfig, run_settings(tmp_path / "run", reviews / "data",
                                              **{"init_from": str(base), **changes})))
    assert not (tmp_path / "run").exists()


def test_a_run_keeps_its_pooling(base, reviews, tmp_path):
    words = run_settings(tmp_path, reviews / "data", init_from=str(base), max_steps=1)
    train(build(TrainConfig, words))
    with pytest.raises(ValueError, match="holds a run with pooling=last, this one has pooling=mea"):
        train(build(TrainConfig, {**words, "max_steps": 2, "pooling": "mean"}))


def test_a_dry_run_shows_the_end_of_a_text_and_its_class(base, reviews, tmp_path, capsys):
    train(build(TrainConfig, run_settings(tmp_path / "run", reviews / "data", init_from=str(base),
                                          dry_run=True)))
    lines = capsys.readouterr().out.rstrip().splitlines()
    text, _, answer = lines[-1].strip().removeprefix("[").rpartition("] ")
    rows = [json.loads(line) for line in (reviews / "all.jsonl").read_text().splitlines()]
    assert any(row["text"].endswith(text) and str(row["label"]) == answer for row in rows)
