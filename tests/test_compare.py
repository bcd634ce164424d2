"""experiments/compare.py: its test of differences, its runs, and that it knows its noise."""
import json
import math
import os
import random
import re
import runpy
import shlex
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import ranks
from bench.kills import start
from bpe import Tokenizer
from data import pydocs
from data.conversations import write_conversations
from data.corpus import CorpusConfig, prepare
from experiments import compare
from experiments.compare import changed, drawn_by_name, perform, read
from experiments.studies import chat as chat_study
from experiments.ttest import holm, paired, seeds_needed, t_quantile, two_sided_p
from model import GPT, GPTConfig
from run.config import build
from train import TrainConfig, train

REPOSITORY = Path(__file__).parent.parent
STUDIES = REPOSITORY / "experiments" / "studies"
ADAMW = ("--optim.optimizer=adamw", "--schedule=cosine", "--learning_rate=5e-3",
         "--min_learning_rate=3e-4")


@pytest.fixture
def words(dataset, tmp_path):
    """A base that trains in a tenth of a second."""
    return ["demo", f"--data={dataset}", f"--out={tmp_path / 'compare'}", "--max_steps=6",
            "--batch_tokens=64", "--micro_batch=4", "--warmup_steps=2", *ADAMW, "--dtype=float32",
            "--compile=off", "--device=cpu", "--eval_tokens=256", "--model.block_size=16",
            "--model.n_layer=1", "--model.n_head=2", "--model.n_embd=16"]


@pytest.fixture
def here(monkeypatch):
    """Runs in this process: their memory and patches are not their own, which such tests leave."""
    monkeypatch.setattr(compare, "in_processes", lambda function, tasks, jobs: (
        (i, function(*task)) for i, task in enumerate(tasks)))


def found(words, *more):
    return compare.compare(read([*words, *more]))


# ----------------------------------------------------------------------------- statistics

@pytest.mark.parametrize("df,quantile", [(1, 12.7062), (2, 4.3027), (4, 2.7764), (9, 2.2622),
                                         (30, 2.0423), (1000, 1.9623)])
def test_t_quantiles_are_those_of_the_tables(df, quantile):
    assert t_quantile(0.975, df) == pytest.approx(quantile, abs=1e-4)
    assert two_sided_p(quantile, df) == pytest.approx(0.05, abs=2e-5)


def test_p_values_equal_their_closed_forms():
    for t in (0.0, 0.3, 1.0, 4.0, 50.0):                        # 1 and 2 degrees of freedom
        assert two_sided_p(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), abs=1e-12)
        assert two_sided_p(t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-12)


def test_the_paired_test_equals_scipy():
    stats = pytest.importorskip("scipy.stats")
    for n in (2, 5, 40):
        values = [random.Random(n).gauss(0.3, 1) for _ in range(n)]
        theirs, ours = stats.ttest_1samp(values, 0), paired(values)
        assert ours.p == pytest.approx(theirs.pvalue, rel=1e-9)
        assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)))


def test_a_paired_test_is_by_hand():
    """Differences 1, 2, 3: mean 2, error 1/sqrt(3), t = 3.464; p = 1 - t / sqrt(2 + t²)."""
    test, t = paired([1.0, 2.0, 3.0]), 2 * math.sqrt(3)
    assert (test.n, test.mean, test.spread) == (3, 2.0, 1.0)
    assert test.p == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert (test.low, test.high) == pytest.approx((2 - 4.30265 / math.sqrt(3),
                                                   2 + 4.30265 / math.sqrt(3)), abs=1e-4)
    assert paired([0.0, 0.0]).p == 1 and paired([0.5, 0.5]).p == 0


def test_holm_is_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


def simulated(rng, n, shift=0.0):
    """The p of n pairs of normal losses whose means differ by `shift` deviations of one loss."""
    return paired([rng.gauss(shift, 1) - rng.gauss(0, 1) for _ in range(n)]).p


def test_normal_noise_is_called_a_difference_in_5_percent_and_two_floors_in_most():
    """1,000 comparisons have a deviation of 0.7%, so 3 to 7% leaves nearly three on either side."""
    rng, floor = random.Random(0), math.sqrt(2)
    assert 30 <= sum(simulated(rng, 5) < 0.05 for _ in range(1000)) <= 70
    assert sum(simulated(rng, 5, 2 * floor) < 0.05 for _ in range(1000)) >= 800


def test_so_many_seeds_find_an_effect_in_80_percent():
    """Within 5%: the deviation over 400 comparisons is 2%, and the formula is an approximation."""
    rng, n = random.Random(0), seeds_needed(spread=math.sqrt(2), effect=1.0)
    assert n == 18
    assert 0.75 <= sum(simulated(rng, n, 1.0) < 0.05 for _ in range(400)) / 400 <= 0.87
    assert seeds_needed(0.0, 1.0) == 2 and seeds_needed(1.0, 1e-9) == 10_000


# ----------------------------------------------------------------------------- what is asked

def test_a_grid_has_every_point_but_the_base():
    plan = read(["lora-demo", "--set=lora.r=2,8", "--set=lora.alpha=4,16"])
    assert [v.name for v in plan.variants] == ["base", "lora.r=2 lora.alpha=4",
                                               "lora.r=2 lora.alpha=16", "lora.r=8 lora.alpha=4"]
    plan = read(["lora-demo", "--variant=lora.init=loftq lora.quantize=nf4", "--variant=lora=none"])
    quantized, full = (changed(plan.base, v.changes) for v in plan.variants[1:])
    assert (quantized["lora.init"], quantized["lora.quantize"]) == ("loftq", "nf4")
    assert full["lora"] is None and not any(name.startswith("lora.") for name in full)
    assert [v.name for v in read(["demo"]).variants] == ["base"]
    steps = read(["demo", "--max_steps=9", *(f"--variant={text}" for text in (
        "max_steps=9", "batch_tokens=4096", "batch_tokens=4096 max_steps=9"))])
    assert [v.name for v in steps.variants[1:]] == ["batch_tokens=4096",        # half the steps
                                                    "batch_tokens=4096 max_steps=9"]


def test_a_default_of_the_network_is_the_base_where_no_model_brings_its_own():
    def names(preset, setting):
        return [v.name for v in read([preset, f"--set={setting}"]).variants[1:]]
    assert names("demo", "model.bias=true,false") == ["model.bias=false"]
    assert names("sft-demo", "model.bias=true") == ["model.bias=true"]
    assert names("sft-demo", "model.dropout=0.0") == []


def test_equal_minutes_compile_all_runs_or_none():
    assert read(["demo", "--equal=minutes"]).base["compile"] == "off"
    assert read(["demo", "--equal=minutes", "--compile=on"]).base["compile"] == "on"
    assert read(["demo"]).base["compile"] == "auto"


def test_values_are_those_of_the_command_line_and_the_floor_follows_the_rate():
    base = read(["lora-demo"]).base
    wider = changed(base, {"lora.target_modules": "c_attn+c_fc", "learning_rate": "4e-3"})
    assert wider["lora.target_modules"] == ("c_attn", "c_fc")
    assert wider["learning_rate"] == 4e-3 and wider["min_learning_rate"] == pytest.approx(4e-4)
    assert base["epochs"] == 2 and changed(base, {"max_steps": "9"})["epochs"] == 0


@pytest.mark.parametrize("flags, message", [
    ("--set=lora.r=1", "lora on init_from=scratch"),
    ("--set=optim.optimiser=muon", "unknown setting --optim.optimiser; did you mean"),
    ("--set=learning_rate", "set=learning_rate cannot be done; write NAME=VALUE,VALUE"),
    ("--tune=max_steps=1,2", "do not tune them"), ("--set=seed=1,2", "seed cannot be compared"),
    ("--seed=3", "seed and dry_run cannot be set here"), ("--seeds=0", "seeds=0 is not in 1"),
    ("--set learning_rate=1", "settings are written --key=value"),
    ("--set=lora.r=1 --set=lora.r=2", "set=lora.r is given twice"),
    ("--variant=muon", "variant: 'muon' is no NAME=VALUE"),
    ("--patch=nowhere.py", "patch=nowhere.py cannot be run: "),
    ("--equal=minutes --jobs=2", "jobs=2 makes times worthless"),
    ("--set=learning_rate=1e-3 --tune=learning_rate=1e-2", "both compared and tuned"),
    ("--tune=learning_rate=fast", "'fast' is not allowed")])
def test_bad_input_is_told_in_one_line(flags, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read(["demo", *flags.split()])
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="there is no preset 'domo'"):
        read(["domo"])


def test_the_commands_of_the_studies_are_right():
    """A study's functions hand their words on; what is left are words of experiments.compare."""
    count = 0
    for path in STUDIES.glob("*.sh"):
        text = path.read_text().replace("\\\n", " ")
        for name, value in re.findall(r'^(\w+)=("[^"$]*"|[^\s$"]+)$', text, re.M):
            text = text.replace(f"${name}", value.strip('"'))
        bodies = dict(re.findall(r"^(\w+)\(\) \{\s*(.*?)\s*\}", text, re.M | re.S))
        starts = "|".join([*bodies, "python -m experiments.compare"])
        text = re.sub(r"^\w+\(\) \{.*?\}", "", text, flags=re.M | re.S)
        for line in re.findall(rf"^ *((?:{starts}) .*?)(?: ;;)?$", text, re.M):
            while (name := line.split()[0]) in bodies:
                line = bodies[name].replace('"$@"', line.removeprefix(name))
            given = shlex.split(line.replace('"$@"', ""))
            assert given[:3] == ["python", "-m", "experiments.compare"]
            assert len(read(given[3:]).variants) > 1
            count += 1
    assert count == 16


def test_arms_of_the_data_study_differ_in_one_thing_and_are_tested_on_nothing_they_saw():
    seen = [(f"a.f{i}(x)", "Do it." if i % 2 else f"Return the number {i} of them all.")
            for i in range(128)]
    unseen = [(f"b.g{i}(y)", f"Give {i} of {'many ' * (i % 2) * 9}things.") for i in range(8)]
    studies = {name: (arms, tests) for name, arms, tests in chat_study.studies(seen, unseen, 64)}
    for arms, tests in studies.values():
        trained, asked = ({message["content"] for talks in part.values() for talk in talks
                           for message in talk if message["role"] == "user"}
                          for part in (arms, tests))
        assert trained and asked and not trained & asked
    sizes = {name: [len(talks) for talks in arms.values()] for name, (arms, _) in studies.items()}
    assert sizes == {"repeats": [64, 16, 4, 1], "same": [64] * 3, "wording": [64] * 2,
                     "lengths": [64] * 3, "system": [64] * 3, "topics": [64, 32]}
    answers = [[talk[-1]["content"] for talk in talks] for talks in studies["same"][0].values()]
    assert [found.count(chat_study.SAME) for found in answers] == [0, 7, 32]
    one_way = studies["wording"][0]["one"]
    assert len({talk[0]["content"].split("`")[0] for talk in one_way}) == 1 < len(pydocs.FUNCTION)
    assert [sum(talk[0]["role"] == "system" for talk in talks)
            for talks in studies["system"][0].values()] == [0, 64, 32]


# ----------------------------------------------------------------------------- runs

def test_parameters_of_one_name_start_alike_and_differ_by_seed():
    def start(seed, **more):
        with drawn_by_name(seed):
            return dict(GPT(GPTConfig(block_size=8, vocab_size=50, n_head=2, n_embd=8, **more))
                        .named_parameters())
    small, deep, bare = start(0, n_layer=1), start(0, n_layer=3), start(0, n_layer=1, bias=False)
    for name, p in small.items():
        if name in bare:
            assert torch.equal(p, bare[name]), name
        if "c_proj" not in name:
            assert torch.equal(p, deep[name]), name
    name = "transformer.h.0.mlp.c_proj.weight"      # 1/sqrt(2 n_layer), on the same draws
    torch.testing.assert_close(small[name], deep[name] * math.sqrt(3))
    other = start(1, n_layer=1)["transformer.wte.weight"]
    assert not torch.equal(other, small["transformer.wte.weight"])
    assert other.std().item() == pytest.approx(0.02, rel=0.2)
    plain = GPT.__init__
    with drawn_by_name(0):
        assert GPT.__init__ is not plain
    assert GPT.__init__ is plain


def test_a_comparison_trains_each_run_once_and_says_what_it_found(words, tmp_path, capsys):
    more = ["--set=learning_rate=1e-9,5e-3", "--seeds=3"]       # 5e-3 is the base
    compare.main([*words, *more])
    out = tmp_path / "compare"
    report, text = json.loads((out / "compare.json").read_text()), (out / "compare.md").read_text()
    assert list(report["variants"]) == ["base", "learning_rate=1e-9"]
    base, slow = report["variants"].values()
    assert all(b < s for b, s in zip(base["losses"], slow["losses"])) and slow["p_corrected"] < 0.05
    assert slow["verdict"].startswith("learning_rate=1e-9: higher loss than the base, +")
    assert report["noise_floor"] == pytest.approx(math.sqrt(2) * base["spread"])
    assert slow["verdict"] in text and text.strip() in capsys.readouterr().out
    assert base["seconds"] > 0 and base["memory_mib"] > 50 and base["tokens"] == 6 * 64
    assert "`python -m experiments.compare demo" in text and "3 paired seeds" in text
    results = {path: path.stat().st_ino for path in out.glob("runs/*/result.json")}
    assert len(results) == 6 and not list(out.glob("runs/*/last.pt"))

    compare.main([*words, "--set=learning_rate=1e-9", "--seeds=4", "--name=four"])
    after = {path: path.stat().st_ino for path in out.glob("runs/*/result.json")}
    assert len(after) == 8 and results.items() <= after.items()     # write_json makes a new file
    four = json.loads((out / "four.json").read_text())["variants"]
    assert four["base"]["losses"][:3] == base["losses"]
    if (out / "compare.png").exists():
        assert (out / "compare.png").read_bytes()[:4] == b"\x89PNG"


def test_one_seed_is_no_finding_and_equal_losses_are_none(words, here):
    report = found(words, "--set=learning_rate=1e-3", "--seeds=1")
    assert "with one seed, which says nothing of noise" in compare.markdown(report)
    report = found(words, "--set=log_every=5", "--seeds=2")
    assert report["variants"]["log_every=5"]["verdict"] == (
        "log_every=5: no difference found, the losses are equal to the last bit")


def test_several_comparisons_are_corrected_for_and_a_divergence_is_no_number(words, here):
    report = found(words, "--set=learning_rate=1e-3,2e-3,1e30", "--seeds=2")
    one, two, lost = list(report["variants"].values())[1:]
    assert sorted([one["p_corrected"], two["p_corrected"]]) == pytest.approx(
        sorted(holm([one["difference"]["p"], two["difference"]["p"]])))
    assert lost["mean"] is None and lost["losses"] == [None, None]
    assert lost["verdict"] == ("learning_rate=1e30: no test, as learning_rate=1e30 diverged in 2 "
                               "of 2 seeds")
    text = compare.markdown(report)
    assert "3 comparisons with the base" in text and "Holm" in text and "diverged" in text
    assert json.loads(json.dumps(report, allow_nan=False))


def test_tuning_takes_the_best_of_each_on_other_seeds_and_says_where_it_is_at_the_edge(words, here):
    report = found(words, "--set=optim.optimizer=muon", "--tune=learning_rate=1e-4,1e-3,2e-2",
                   "--tune_seeds=2", "--seeds=2")
    for name, row in report["variants"].items():
        sums = {r["values"]["learning_rate"]: sum(r["losses"]) for r in report["tuning"][name]}
        assert row["tuned"]["values"]["learning_rate"] == min(sums, key=sums.get)
        assert all(len(r["losses"]) == 2 for r in report["tuning"][name])
    assert report["variants"]["base"]["tuned"]["at_the_edge"] == ["learning_rate"]
    assert "best at the edge of what was tried, a better one may lie beyond: base (learning_rate)" \
        in compare.markdown(report)
    assert not {tuple(row["losses"]) for row in report["variants"].values()} & {
        tuple(r["losses"]) for rows in report["tuning"].values() for r in rows}


def test_the_best_of_a_tuning_is_by_hand():
    base = compare.Variant("base", {})
    tuned = [{"a": "1"}, {"a": "2"}, {"a": "3"}]
    rows = compare.choose([base], tuned, [3.0, 3.0, 2.0, 2.5, None, 0.0])["base"]
    assert [row["best"] for row in rows] == [False, True, False]
    assert rows[1]["at_the_edge"] == []
    words = compare.choose([base], [{"a": "x"}, {"a": "y"}], [1.0, 2.0])["base"]
    assert words[0]["at_the_edge"] == []
    with pytest.raises(ValueError, match="base diverges with every value of --tune"):
        compare.choose([base], tuned, [None] * 3)


@pytest.mark.parametrize("equal", ["tokens", "flops", "minutes"])
def test_runs_have_an_equal_share(words, here, equal):
    report = found(words, "--set=model.n_layer=3", "--set=batch_tokens=32", f"--equal={equal}",
                   "--seeds=2", "--max_steps=12")
    base, deep = report["variants"].values()
    if equal == "tokens":
        assert (base["steps"], deep["steps"], deep["tokens"]) == (12, 24, base["tokens"])
    elif equal == "flops":      # 3,280 weights and biases a block, 4,096 of the head, 32 of ln_f
        flops = [6 * (4096 + 32 + 3280 * layers) + 12 * 16 * 16 * layers for layers in (1, 3)]
        assert deep["steps"] == round(24 * flops[0] / flops[1])
    assert base["steps"] == 12 and deep["steps"] >= 1


def test_what_is_tuned_has_an_equal_share_too(words, here, tmp_path):
    """A block more costs more FLOP, in tuning and in what is compared."""
    report = found(words, "--tune=model.n_layer=1,3", "--equal=flops", "--seeds=1",
                   "--tune_seeds=1", "--max_steps=12")
    runs = [json.loads(path.read_text()) for path in tmp_path.rglob("result.json")]
    flops = [6 * (4096 + 32 + 3280 * layers) + 12 * 16 * 16 * layers for layers in (1, 3)]
    steps = {1: 12, 3: round(12 * flops[0] / flops[1])}
    assert len(runs) == 3 and all(run["steps"] == steps[run["settings"]["model.n_layer"]]
                                  for run in runs)
    assert report["variants"]["base"]["steps"] in steps.values()


def test_padding_is_no_token(here, dataset, tmp_path):
    """Packed rows have more of them, so fewer steps; to half a step of either equal."""
    shape = dict(block_size=128, n_layer=1, n_head=2, n_embd=16)
    train(TrainConfig(data=str(dataset), out=str(tmp_path / "base"), max_steps=1, sample_tokens=0,
                      batch_tokens=256, micro_batch=2, device="cpu", model=GPTConfig(**shape)))
    write_conversations(tmp_path / "chats", [{"messages": [
        {"role": "user", "content": "?" * (i % 7) + str(i)},
        {"role": "assistant", "content": "yes"}]} for i in range(64)], "made", validation=0.2)
    report = found(["sft-demo", f"--data={tmp_path / 'chats'}", f"--init_from={tmp_path / 'base'}",
                    f"--out={tmp_path / 'compare'}", "--device=cpu", "--compile=off",
                    "--batch_tokens=1024", "--max_steps=12"],
                   "--set=packing=true", "--seeds=1")
    padded, packed = report["variants"].values()
    assert packed["steps"] < padded["steps"] == 12
    assert packed["tokens"] == pytest.approx(padded["tokens"],
                                             abs=packed["tokens"] / packed["steps"])


def test_data_of_another_tokenizer_are_compared_per_byte(words, here, dataset, tmp_path):
    """Twice as many bytes a token are twice the nats: only per byte is one the better."""
    text = dataset.parent / "text.txt"
    Tokenizer.train(text.read_text(), 300, special_tokens=()).save(tmp_path / "tok.json")
    other = prepare(CorpusConfig(from_=str(text), tokenizer=str(tmp_path / "tok.json"),
                                 validation=1 / 6, out=str(tmp_path / "other")))
    report = found(words, f"--set=data={other}", "--seeds=2")
    assert report["unit"] == "bits per byte"
    assert "validation loss, bits per byte" in compare.markdown(report)
    runs = [json.loads(path.read_text()) for path in tmp_path.rglob("result.json")]
    for name, row in zip((dataset, other), report["variants"].values()):
        own = [run for run in runs if run["settings"]["data"] == str(name)]
        assert sorted(row["losses"]) == sorted(run["bits_per_byte"] for run in own)
    assert all(run["bits_per_byte"] == pytest.approx(run["loss"] / math.log(2)) for run in runs
               if run["settings"]["data"] == str(dataset))           # there a token is a byte
    assert found(words, "--set=learning_rate=1e-3", "--seeds=1")["unit"] == "nats per token"


def test_mixtures_are_compared_by_the_weights_of_the_base(words, here, tmp_path):
    """Weights that stay as they started lose the same by any mixture."""
    folders = []
    for name, text in (("easy", "a" * 4000), ("hard", "".join(map(str, range(1500))))):
        (tmp_path / f"{name}.txt").write_text("\n".join(re.findall(".{1,50}", text)))
        folders.append(prepare(CorpusConfig(from_=str(tmp_path / f"{name}.txt"), tokenizer="bytes",
                                            validation=0.2, out=str(tmp_path / name))))
    base, more = (f"{folders[0]}:{share},{folders[1]}:{1 - share}" for share in (0.5, 0.75))
    words = [f"--data={base}" if word.startswith("--data=") else word for word in words]
    still = ["--learning_rate=0", "--min_learning_rate=0"]
    report = found([*words, *still], f"--variant=data={more}", "--seeds=2")
    a, b = (row["losses"] for row in report["variants"].values())
    assert report["unit"] == "nats per token" and a == pytest.approx(b, abs=1e-9) and a[0] != a[1]
    report = found(words, f"--variant=data={more}", "--seeds=2")
    a, b = (row["losses"] for row in report["variants"].values())
    assert len({*a, *b}) == 4


def test_losses_of_other_validation_tokens_are_not_tested(words, here, dataset):
    report = found(words, "--set=eval_tokens=128", "--seeds=2")
    row = report["variants"]["eval_tokens=128"]
    assert row["difference"] is None and "no test, as its validation has 128" in row["verdict"]


def test_shards_without_bytes_are_compared(words, here, dataset, tmp_path):
    (tmp_path / "bin").mkdir()
    for split in ("train", "val"):                      # llm.c's shards: no tokenizer, no bytes
        ids = np.load(dataset / f"{split}_0000.npy")
        header = np.zeros(256, np.int32)
        header[:3] = 20240520, 1, len(ids)
        (tmp_path / "bin" / f"x_{split}_0.bin").write_bytes(
            header.tobytes() + ids.astype(np.uint16).tobytes())
    words = [f"--data={tmp_path / 'bin'}" if word.startswith("--data=") else word for word in words]
    report = found(words, "--set=learning_rate=1e-3", "--seeds=2")
    assert report["unit"] == "nats per token" and all(report["variants"]["base"]["losses"])


def test_a_setting_that_is_the_length_itself_is_compared_as_it_is(words, here):
    report = found(words, "--set=max_steps=3", "--seeds=1")
    assert [row["steps"] for row in report["variants"].values()] == [6, 3]


def test_a_patch_is_in_its_variant_alone_and_its_source_in_the_result(words, tmp_path):
    patch = tmp_path / "worse.py"
    patch.write_text("import model\n\n"
                     "model.MLP.forward = lambda self, x: self.c_proj(0 * self.c_fc(x))\n")
    report = found(words, f"--patch={patch}", "--seeds=2")
    base, worse = report["variants"].values()
    assert list(report["variants"])[1] == "worse.py" and worse["patch"] == patch.read_text()
    assert all(a != b for a, b in zip(base["losses"], worse["losses"]))
    assert base["losses"] == found(words, "--seeds=2")["variants"]["base"]["losses"]

    patch.write_text("\nimport nothing_like_it\n")
    with pytest.raises(ValueError, match="the patch fails, line 2: ModuleNotFoundError"):
        found(words, f"--patch={patch}", "--seeds=2")


def test_what_a_patch_changes_at_the_start_stays(monkeypatch):
    init = GPT.__init__

    def patched(self, config):
        init(self, config)
        torch.nn.init.zeros_(self.transformer.wpe.weight)
        self.transformer.h[0].mlp.c_fc.weight.data.mul_(2)
    monkeypatch.setattr(GPT, "__init__", patched)
    config = GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=8)
    with drawn_by_name(0):
        patched_one = GPT(config)
    monkeypatch.setattr(GPT, "__init__", init)
    with drawn_by_name(0):
        plain = GPT(config)
    assert not patched_one.transformer.wpe.weight.any()
    for name, p in plain.named_parameters():
        if "wpe" not in name:
            same = torch.equal(p, patched_one.get_parameter(name))
            assert same == (name != "transformer.h.0.mlp.c_fc.weight"), name


def test_the_rotary_example_sees_distances_only(monkeypatch):
    monkeypatch.setattr(GPT, "__init__", GPT.__init__)                  # to be put back
    monkeypatch.setattr(F, "scaled_dot_product_attention", F.scaled_dot_product_attention)
    patch = runpy.run_path(str(STUDIES / "rotary.py"))
    q, k = torch.randn(2, 1, 1, 1, 16)
    for distance in (0, 3, 50):                     # wherever the two are; lengths stay
        products = [(patch["rotated"](q, start + distance) * patch["rotated"](k, start)).sum()
                    for start in (0, 1, 70)]
        torch.testing.assert_close(products, 3 * products[:1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(patch["rotated"](q, 9).norm(), q.norm())
    # by hand, at position 1: channels 0 and 8 are turned by one radian
    turned, one = patch["rotated"](q, 1).flatten().tolist(), q.flatten().tolist()
    assert turned[0] == pytest.approx(one[0] * math.cos(1) - one[8] * math.sin(1), abs=1e-6)

    model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32)).eval()
    idx = torch.randint(50, (1, 16))
    with torch.no_grad():                           # large, so that what it attends to matters
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3 if p.dim() > 1 and p.requires_grad else p)
        whole, _ = model(idx)
        cache = model.new_cache(1, 16)
        parts = torch.cat([model(part, cache=cache)[0] for part in idx.split([7, 1, 8], dim=1)], 1)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
    assert not torch.equal(whole[0, 1:], model(idx.flip(1))[0][0, 1:])      # order is seen


def test_several_at_once_find_the_same_and_no_times(words, tmp_path):
    one, two = (found(words, "--set=optim.optimizer=muon", "--seeds=2", f"--jobs={jobs}",
                      f"--out={tmp_path / str(jobs)}") for jobs in (1, 2))
    for name, row in one["variants"].items():       # other sums where there are more threads
        assert two["variants"][name]["losses"] == pytest.approx(row["losses"], rel=1e-4)
        assert two["variants"][name]["seconds"] is None and row["seconds"] > 0
    assert "times are worthless" in compare.markdown(two)


def test_a_killed_comparison_goes_on_and_nothing_is_trained_twice(words, here, tmp_path):
    whole = found(words, "--seeds=3", "--max_steps=40", f"--out={tmp_path / 'whole'}")
    command = [*words, "--seeds=3", "--max_steps=40"]
    child, = start(ranks.comparing, 1, tmp_path / "child", command)
    out, end = tmp_path / "compare", time.monotonic() + 120
    while not (done := list(out.glob("runs/*/result.json"))):
        assert child.is_alive() and time.monotonic() < end
        time.sleep(0.01)
    child.kill()
    child.join()
    time.sleep(0.5)                                     # its runs end with it
    inodes = {path: path.stat().st_ino for path in done}
    report = found(command)
    assert {path: path.stat().st_ino for path in done} == inodes
    assert report["variants"]["base"]["losses"] == whole["variants"]["base"]["losses"]


def test_a_run_killed_before_its_last_word_is_trained_again(words, tmp_path):
    trial = compare.Trial("", read(words).base, "")
    times = ("seconds", "step_seconds", "memory_mib")
    whole = perform(trial, tmp_path / "run")
    train(build(TrainConfig, {**trial.settings, "out": str(tmp_path / "killed")}))
    run = json.loads((tmp_path / "killed" / "run.json").read_text())
    (tmp_path / "killed" / "run.json").write_text(json.dumps({**run, "final": None}))
    found = perform(trial, tmp_path / "killed")
    assert {**found, **dict.fromkeys(times)} == {**whole, **dict.fromkeys(times)}


@pytest.mark.parametrize("name", ["run/best.pt", "folder/model.safetensors", "gpt2_124M.bin"])
def test_another_start_under_the_same_name_is_another_run(words, tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    start = path if path.suffix == ".bin" else path.parent
    settings = {**read(words).base, "init_from": str(start)}

    def identity(time):
        path.write_bytes(b"weights")
        os.utime(path, (time, time))
        (path.parent / "eval.json").write_text(str(time))       # which an evaluation writes
        return compare.Trial("", settings, "").identity
    assert identity(1) == identity(1) != identity(2)


def test_other_data_settings_or_patches_are_other_runs(words, dataset):
    plan = read(words)

    def identity(settings=plan.base, patch=""):
        return compare.Trial("", settings, patch).identity
    before = identity()
    assert identity({**plan.base, "out": "elsewhere"}) == before
    assert before not in (identity(patch="pass"), identity({**plan.base, "seed": 1}))
    meta = dataset / "meta.json"
    meta.write_text(meta.read_text() + "\n")
    assert identity() != before


# ----------------------------------------------------------------------------- it knows itself

@pytest.mark.slow
def test_real_runs_that_differ_in_nothing_are_called_different_in_5_percent(words, tmp_path):
    """200 pairs of 5 seeds against 5 others of one tiny setting: 3 to 7% are called different. An
    effect of two noise floors is found in at least 80% of them."""
    plan = read(words)
    losses = []
    for seed in range(2000):
        trial = compare.Trial("", {**plan.base, "seed": seed}, "")
        losses.append(perform(trial, tmp_path / "run")["loss"])
        for path in (tmp_path / "run").iterdir():
            path.unlink()
    pairs = [(losses[i:i + 5], losses[i + 5:i + 10]) for i in range(0, 2000, 10)]
    mean = sum(losses) / len(losses)
    floor = math.sqrt(2 * sum((loss - mean) ** 2 for loss in losses) / (len(losses) - 1))

    def called(shift):
        return sum(paired([a - b + shift for a, b in zip(*pair)]).p < 0.05 for pair in pairs) / 200
    print(f"called different: nothing {called(0):.1%}, two noise floors {called(2 * floor):.1%}")
    assert 0.03 <= called(0) <= 0.07
    assert called(2 * floor) >= 0.8
