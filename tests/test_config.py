"""Settings: dataclass, dict and command line say the same thing; mistakes are named."""
import dataclasses
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from run.config import build, flatten, parse
from run.presets import PRESETS, follow
from train import TrainConfig

REPOSITORY = Path(__file__).parent.parent


@dataclass(frozen=True)
class Inner:
    n_layer: int = 12  # blocks
    names: tuple[str, ...] = ("c_attn",)  # some names


@dataclass(frozen=True)
class Outer:
    rate: float = 6e-4  # a rate of 50%
    limit: int | None = None  # a limit
    fast: bool = False  # a switch
    kind: Literal["cosine", "linear"] = "cosine"  # a choice
    model: Inner = Inner()  # nested


@pytest.mark.parametrize("words,expected", [
    (["--rate=1e-3"], dict(rate=1e-3)),
    (["--rate", "1e-3", "--fast"], dict(rate=1e-3, fast=True)),
    (["--fast=no", "--limit=2e3"], dict(fast=False, limit=2000)),
    (["--limit=none"], dict(limit=None)),
    (["--model.n-layer=3", "--model.names=a,b-c"], {"model": dict(n_layer=3, names=("a", "b-c"))}),
    (["--kind=linear"], dict(kind="linear")),
])
def test_words_and_dicts_build_the_same_config(words, expected):
    assert parse(Outer, words, "prog") == build(Outer, expected)


def test_a_config_survives_a_dict():
    config = build(Outer, {"model.n_layer": 3, "limit": 7})
    assert build(Outer, dataclasses.asdict(config)) == config
    assert flatten(dataclasses.asdict(config))["model.n_layer"] == 3


def test_words_override_the_preset_they_start_from():
    config = parse(Outer, ["--rate=2"], "prog", {"rate": 1.0, "model": {"n_layer": 2}})
    assert (config.rate, config.model.n_layer) == (2.0, 2)


@pytest.mark.parametrize("preset,words,expected", [
    ("gpt2-124m-gpt3", ["--learning_rate=1e-4"], dict(
        learning_rate=1e-4, min_learning_rate=1e-5, warmup_steps=715)),     # 6e-5 of 6e-4
    ("gpt2-124m-gpt3", ["--learning_rate=6e-4"], dict(min_learning_rate=6e-5)),
    ("gpt2-124m-gpt3", ["--learning_rate=1e-2", "--min_learning_rate=0"],
     dict(min_learning_rate=0.0)),
    ("demo", ["--learning_rate=1e-4"], dict(learning_rate=1e-4, min_learning_rate=0.0)),
    ("demo", ["--warmup_ratio=0.1"], dict(warmup_ratio=0.1, warmup_steps=0)),
    ("sft-demo", ["--warmup_steps=9"], dict(warmup_steps=9, warmup_ratio=0.0)),
    ("sft-demo", ["--max_steps=9"], dict(max_steps=9, epochs=0.0)),
    ("demo", ["--epochs=1"], dict(epochs=1.0)),
    ("demo", ["--max_steps=9"], dict(max_steps=9, warmup_steps=20, min_learning_rate=0.0)),
])
def test_what_a_preset_says_in_another_way_follows_what_is_given(preset, words, expected):
    config = parse(TrainConfig, words, "train.py", PRESETS[preset].settings, follow=follow)
    assert {name: getattr(config, name) for name in expected} == expected


@dataclass(frozen=True)
class Source:
    from_: str = ""  # a file
    from_the_start: bool = False  # a setting whose name begins like the flag


@dataclass(frozen=True)
class Sources:
    data: Source = Source()  # nested


def test_a_setting_named_like_a_keyword_has_a_flag_without_its_underscore(capsys):
    for words in (["--from=a-b"], ["--from", "a-b"]):
        assert parse(Source, words, "prog") == Source(from_="a-b")
    assert parse(Source, ["--from-the-start"], "prog") == Source(from_the_start=True)
    assert parse(Sources, ["--data.from=x"], "prog") == Sources(Source("x"))
    with pytest.raises(ValueError, match="unknown setting --from"):     # of the command line only
        build(Source, {"from": "x"})
    with pytest.raises(SystemExit):
        parse(Source, ["--help"], "prog")
    assert "--from str " in capsys.readouterr().out


@pytest.mark.parametrize("words,message", [
    (["--rte=1"], "unknown setting --rte; did you mean --rate?"),
    (["--n_layer=3"], "did you mean --model.n_layer?"),
    (["--zzz=1"], "--help lists them all"),
    (["--kind=cos"], "argument --kind: 'cos' is not allowed; give cosine|linear"),
    (["--model.n_layer=1.5"], "'1.5' is not allowed; give int"),
    (["--fast=maybe"], "'maybe' is not allowed; give true|false"),
    (["--rate"], "argument --rate: expected one argument"),
    (["demo"], "unexpected argument 'demo': settings are written --key=value"),
])
def test_a_wrong_word_is_named_with_what_is_allowed(words, message):
    with pytest.raises(ValueError) as error:
        parse(Outer, words, "prog")
    assert message in str(error.value)


def test_help_shows_type_default_and_meaning_of_every_setting(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Outer, ["--help"], "prog", {"rate": 0.5})
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for part in ("--rate float", "a rate of 50% [0.5]", "--kind cosine|linear",
                 "--model.n_layer int", "blocks [12]", "--fast [true|false]"):
        assert part in text


@pytest.mark.parametrize("words,message", [
    (["train.py", "dmo"], "there is no preset 'dmo'; did you mean demo?"),
    (["train.py", "--learningrate=1"], "did you mean --learning_rate?"),
    (["train.py", "--model.n_embd=770", "--model.n_head=12"], "try 768"),
    (["train.py", "--batch_tokens=3000"], "try batch_tokens=2048 or 4096"),
    (["train.py", "--data=nowhere"], "there is no prepared data set"),
    (["train.py", "--dtype=float16", "--device=cpu"], "not for training on a CPU"),
    (["train.py", "--device=cuda:99"], "device=cuda:99 is not available"),
    (["train.py", "--max_steps=0"], "give one of them"),
    (["sample.py", "out/nothing-here"], "there is no run"),
    (["-m", "data.corpus", "--from=/no/such/file"], "there is no file or folder /no/such/file"),
    (["-m", "eval.loss", "--model=nothing/here/at/all"], "neither a folder here nor a model"),
])
def test_a_command_line_mistake_is_one_line_and_exit_code_2(words, message, dataset, tmp_path,
                                                            monkeypatch, capsys):
    """The file runs as __main__ here; one runs in an interpreter of its own, as a user's does."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if words[0] == "train.py":
        words = [*words, f"--out={tmp_path}/run"]
        words += [] if any("--data" in word for word in words) else [f"--data={dataset}"]
    if "dmo" in words:
        run = subprocess.run([sys.executable, *words], cwd=REPOSITORY, capture_output=True,
                             text=True, timeout=120)
        code, shown = run.returncode, run.stderr
    else:
        monkeypatch.chdir(REPOSITORY)
        if words[0] == "-m":
            words = [words[1].replace(".", "/") + ".py", *words[2:]]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(words[0], run_name="__main__")
        code, shown = stop.value.code, capsys.readouterr().err
    assert code == 2, shown
    assert message in shown and "Traceback" not in shown
    assert len(shown.strip().splitlines()) == 1, shown
