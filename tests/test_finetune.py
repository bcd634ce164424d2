"""Fine-tuning in the loop: conversations, adapters, early ends."""
import json
import math
from pathlib import Path

import pytest
import torch

import lora
import ranks
from data.conversations import write_conversations
from model import GPT, SIZES, GPTConfig
from run import checkpoint, export
from run import log as report
from run.config import build, parse
from run.load import load_model
from run.presets import PRESETS
from sample import chat_reply
from train import TrainConfig, train

MODEL = dict(block_size=48, n_layer=2, n_head=2, n_embd=32)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A pretrained run, by bytes."""
    from data.corpus import CorpusConfig, prepare
    folder = tmp_path_factory.mktemp("base")
    (folder / "text.txt").write_text("".join(f"{i} and {i * i % 97}\n" for i in range(600)))
    data = prepare(CorpusConfig(from_=str(folder / "text.txt"), tokenizer="bytes",
                                out=str(folder / "data")))
    train(build(TrainConfig, dict(
        data=str(data), out=str(folder / "run"), max_steps=30, batch_tokens=16 * 48, micro_batch=16,
        learning_rate=1e-2, min_learning_rate=1e-3, eval_every=0, save_every=0, dtype="float32",
        device="cpu", compile="off", sample_tokens=0, model=MODEL)))
    return folder / "run"


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Conversations of one and two turns, of different lengths."""
    folder = tmp_path_factory.mktemp("chats")
    write_conversations(folder / "data", [{"messages": [
        {"role": "user", "content": "+".join(map(str, range(1 + i % 5))) + "?" * (i // 5)},
        {"role": "assistant", "content": str(sum(range(1 + i % 5)))},
        {"role": "user", "content": "sure?"}, {"role": "assistant", "content": "yes" * (i % 3)},
    ][:4 if i % 3 else 2]} for i in range(60)], "sums", validation=0.2)
    return folder / "data"


def settings(base, data, out, **changes):
    return {**dict(init_from=str(base), data=str(data), out=str(out), max_steps=8,
                   batch_tokens=8 * 48, micro_batch=4, learning_rate=5e-3, min_learning_rate=5e-4,
                   eval_every=4, save_every=4, log_every=2, dtype="float32", device="cpu",
                   compile="off", sample_tokens=8), **changes}


def losses(out):
    return [line["loss"] for line in report.read_log(Path(out) / "log.jsonl") if "lr" in line]


@pytest.mark.parametrize("packing", [False, True])
def test_the_loss_of_a_step_is_the_same_for_any_ranks_and_accumulation(base, chats, tmp_path,
                                                                       packing):
    words = settings(base, chats, tmp_path / "one", micro_batch=8, packing=packing)
    train(build(TrainConfig, words))
    for number, micro_batch in ((1, 2), (2, 2)):
        out = tmp_path / f"{number}x{micro_batch}"
        other = {**words, "out": str(out), "micro_batch": micro_batch}
        assert ranks.exit_codes(ranks.plain, number, other) == [0] * number
        # float32 sums in another order, which Adam makes a little larger with each step
        assert losses(out) == pytest.approx(losses(tmp_path / "one"), rel=2e-5)


def test_padding_and_packing_of_everything_at_once_give_one_loss(base, chats, tmp_path):
    """With all samples in each step, what is one row or several makes no difference."""
    count = json.loads((chats / "meta.json").read_text())["splits"]["train"]["records"]
    train(build(TrainConfig, settings(base, chats, tmp_path / "padded", max_steps=2,
                                      batch_tokens=count * 48, micro_batch=count)))
    from data.samples import SampleLoader
    rows = SampleLoader(_samples(base, chats), 48, 48, 1, packing=True).rows_per_epoch
    assert rows < count
    train(build(TrainConfig, settings(base, chats, tmp_path / "packed", max_steps=2, packing=True,
                                      batch_tokens=rows * 48, micro_batch=rows)))
    assert losses(tmp_path / "packed") == pytest.approx(losses(tmp_path / "padded"), rel=1e-5)
    for name in ("packed", "padded"):                   # and no padding counts as read
        lines = report.read_log(tmp_path / name / "log.jsonl")
        assert [line["tokens"] for line in lines if "lr" in line] == [
            step * _samples(base, chats).lengths.sum() for step in (1, 2)]


def _samples(base, chats, template="plain"):
    from data import chat
    tokenizer = chat.extend_tokenizer(load_model(base)[1], template)
    return chat.load_samples(chats, "train", tokenizer, template, 48)


def test_a_chat_run_answers_with_its_own_template_and_new_tokens(base, chats, tmp_path, capsys):
    summary = train(build(TrainConfig, settings(base, chats, tmp_path / "run", template="chatml",
                                                max_steps=60)))
    model, tokenizer = load_model(tmp_path / "run")
    old, old_tokenizer = load_model(base)
    assert tokenizer.special_tokens.keys() - old_tokenizer.special_tokens.keys() == {
        "<|im_start|>", "<|im_end|>"}
    assert model.config.vocab_size == old.config.vocab_size + 2
    assert model.lm_head.weight is model.transformer.wte.weight
    assert json.loads((tmp_path / "run" / "config.json").read_text())["template"] == "chatml"
    assert chat_reply(model, tokenizer, [{"role": "user", "content": "sure?"}], "chatml",
                      temperature=0) != ""
    shown = capsys.readouterr().out
    assert "sample at step 60" in shown and "\n> " in shown             # validation prompts
    fit = summary["fit"]
    assert f"the model {fit['verdict']}" in shown and 0 <= fit["exact_match"] <= 1


def test_checkpoints_of_an_adapter_run_hold_the_adapter_only(base, chats, tmp_path, capsys):
    words = settings(base, chats, tmp_path / "run", lora=dict(r=2, target_modules=("all-linear",)))
    train(build(TrainConfig, words))
    state = checkpoint.load(tmp_path / "run" / "last.pt")
    assert state["model"] and all(".lora_adapters." in name for name in state["model"])
    full = (base / "best.pt").stat().st_size
    assert (tmp_path / "run" / "best.pt").stat().st_size < 0.5 * full
    model, _ = load_model(tmp_path / "run", which="last.pt")
    assert lora.describe(model).startswith("adapter default: ")
    for name, tensor in checkpoint.trainable_state(model).items():
        assert torch.equal(tensor, state["model"][name]), name
    assert "1 tokens of" in capsys.readouterr().out     # the base's text had no end, chats have
    train(build(TrainConfig, {**words, "max_steps": 10}))               # and it goes on
    with pytest.raises(ValueError, match="holds a run with lora.r=2, this one has lora.r=4"):
        train(build(TrainConfig, {**words, "lora": {**words["lora"], "r": 4}, "max_steps": 12}))
    with pytest.raises(ValueError, match="holds a run with labels=all, this one has labels=last"):
        train(build(TrainConfig, {**words, "labels": "last", "max_steps": 12}))


def test_tokens_that_the_base_has_not_are_learned_with_the_embedding(base, chats, tmp_path, capsys):
    """That of an answer's end: the likeliest after most answers, and never without."""
    from eval.scoring import evaluating
    found = {}
    for name, modules in (("without", ()), ("with", ("wte",))):
        words = settings(base, chats, tmp_path / name, template="chatml", max_steps=60,
                         learning_rate=2e-2, lora=dict(r=4, modules_to_save=modules))
        train(build(TrainConfig, words))
        assert ("--lora.modules_to_save=wte" in capsys.readouterr().out) == (name == "without")
        model, tokenizer = load_model(tmp_path / name, which="last.pt")
        end, right = tokenizer.special_tokens["<|im_end|>"], []
        assert model.lm_head.weight is model.transformer.wte.weight
        with evaluating(model):
            for x, y in _samples(base, chats, "chatml").evaluation_batches(8):
                right += (model(x)[0].argmax(-1) == y)[y == end].tolist()
        found[name] = sum(right) / len(right)
        export.main([str(tmp_path / name), f"--out={tmp_path / name / 'out'}"])
        idx = torch.randint(tokenizer.vocab_size, (2, 20))
        torch.testing.assert_close(GPT.from_pretrained(tmp_path / name / "out")(idx)[0],
                                   load_model(tmp_path / name)[0](idx)[0], rtol=0, atol=1e-4)
    assert found["without"] == 0 and found["with"] > 0.5, found


def test_an_adapter_whose_base_has_changed_is_refused(base, chats, tmp_path):
    import shutil
    shutil.copytree(base, tmp_path / "base")
    words = settings(tmp_path / "base", chats, tmp_path / "run", lora=dict(r=2))
    train(build(TrainConfig, words))
    state = checkpoint.load(tmp_path / "base" / "best.pt")
    state["model"]["transformer.ln_f.bias"] += 1
    checkpoint.save(tmp_path / "base" / "best.pt", state)
    with pytest.raises(ValueError, match="which has changed since"):
        load_model(tmp_path / "run")
    with pytest.raises(ValueError, match="holds a run with base="):
        train(build(TrainConfig, {**words, "max_steps": 12}))


def test_a_run_that_starts_from_an_adapter_starts_from_the_merged_model(base, chats, tmp_path):
    train(build(TrainConfig, settings(base, chats, tmp_path / "a", lora=dict(r=2))))
    train(build(TrainConfig, settings(tmp_path / "a", chats, tmp_path / "b", max_steps=1,
                                      learning_rate=0.0, min_learning_rate=0.0)))
    idx = torch.randint(256, (2, 20))
    one, two = (load_model(tmp_path / name)[0](idx)[0] for name in "ab")
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)             # float32, merged


def test_patience_ends_a_run_and_the_same_command_leaves_it_ended(base, chats, tmp_path, capsys):
    words = settings(base, chats, tmp_path / "run", learning_rate=0.0, min_learning_rate=0.0,
                     weight_decay=0.0, eval_every=2, patience=2, max_steps=40, sample_tokens=0)
    first = train(build(TrainConfig, words))                            # it cannot get better
    assert first["step"] == 6
    assert "ended at step 6: 2 evaluations without a lower loss" in capsys.readouterr().out
    assert train(build(TrainConfig, words)) == first
    assert "is finished" in capsys.readouterr().out


def test_a_shorter_context_is_cropped_from_the_base(base, chats, tmp_path):
    train(build(TrainConfig, settings(base, chats, tmp_path / "run", max_steps=1, learning_rate=0.0,
                                      min_learning_rate=0.0, batch_tokens=8 * 40,
                                      model=dict(block_size=40))))
    model, old = load_model(tmp_path / "run")[0], load_model(base)[0]
    assert model.config.block_size == 40
    idx = torch.randint(256, (2, 40))
    torch.testing.assert_close(model(idx)[0][..., :256], old(idx)[0])   # "plain" has added a token


@pytest.mark.parametrize("changes,message", [
    (dict(init_from="scratch"), "init_from=scratch has no words yet"),
    (dict(init_from="scratch", lora=dict(r=2)), "lora on init_from=scratch would adapt random"),
    (dict(template="vicuna"), "template='vicuna' is unknown; choose alpaca"),
    (dict(model=dict(block_size=64)), "model.block_size=64, but .* has 48"),
    (dict(lora=dict(r=2, target_modules=("c_atn",))), "c_attn"),
])
def test_what_does_not_fit_is_refused_before_anything_is_written(base, chats, tmp_path, changes,
                                                                 message):
    with pytest.raises(ValueError, match=message):
        train(build(TrainConfig, settings(base, chats, tmp_path / "run", **changes)))
    assert not (tmp_path / "run").exists()


def test_a_group_of_settings_that_may_be_absent_is_there_when_one_is_given():
    assert build(TrainConfig, dict(max_steps=1)).lora is None
    config = parse(TrainConfig, ["--max_steps=1", "--init_from=gpt2", "--lora.r=4",
                                 "--lora.rank_pattern=c_fc:2"], "train.py")
    assert config.lora == lora.LoRAConfig(r=4, rank_pattern={"c_fc": 2})
    import dataclasses
    for one in (config, build(TrainConfig, dict(max_steps=1))):
        assert build(TrainConfig, dataclasses.asdict(one)) == one


def test_a_dry_run_of_a_chat_preset_shows_what_has_labels(base, chats, tmp_path, capsys):
    train(build(TrainConfig, settings(base, chats, tmp_path / "run", dry_run=True,
                                      lora=dict(r=2))))
    shown = capsys.readouterr().out
    assert "[<|endoftext|>User: " in shown and "lora_A" in shown and not (tmp_path / "run").exists()


def test_how_a_classifier_reads_is_no_setting_of_conversations(base, chats, tmp_path, capsys):
    train(build(TrainConfig, settings(base, chats, tmp_path / "run", dry_run=True, pooling="mean",
                                      labels="last")))
    assert capsys.readouterr().err == (f"warning: {chats} holds conversations and makes no use "
                                       f"of pooling=mean\n")


def test_presets_of_fine_tuning_say_what_they_start_from():
    for name in ("sft-demo", "lora-demo", "gpt2-alpaca", "gpt2-alpaca-lora", "gpt2-imdb-lora"):
        config = build(TrainConfig, PRESETS[name].settings)
        assert config.init_from != "scratch" and (config.lora is not None) == ("lora" in name)
        assert math.isfinite(config.learning_rate)
    settings = PRESETS["gpt2-imdb-lora"].settings           # whose study counted what trains
    for r, counted in ((1, 172_032), (4, 466_944), (16, 1_646_592)):
        with torch.device("meta"):
            model = GPT(GPTConfig(**SIZES[settings["init_from"]]))
        lora.add_lora(model, lora.LoRAConfig(**settings["lora"] | {"r": r}), quiet=True)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == counted
    study = Path(__file__).parents[1] / "experiments/results/lora-variants-small-all.json"
    best = json.loads(study.read_text())["variants"]["base"]["tuned"]["values"]["learning_rate"]
    assert PRESETS["lora-demo"].settings["learning_rate"] == float(best)
