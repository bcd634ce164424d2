"""experiments/optimizers.py: tuning, equal runs, resuming after a kill, steps to a loss."""
import csv
import dataclasses
import json
import math
import signal

import pytest

import ranks
from bench.kills import start
from data.corpus import CorpusConfig, prepare
from experiments import optimizers
from experiments.optimizers import (OptimizersConfig, Trial, best_rates, compare, steps_to, summary,
                                    table, train_config)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text("\n".join(
        f"line {i} says that {i * i % 97} is {'odd' if i % 2 else 'even'}" for i in range(300)))
    prepare(CorpusConfig(from_=str(folder / "text.txt"), vocab_size=300, validation=0.2,
                         out=str(folder / "data")))
    return folder / "data"


def words(data, out, *more):
    return [f"--data={data}", f"--out={out}", "--rates=1e-3,4e-3", "--tune_steps=2", "--steps=4",
            "--eval_every=2", "--seeds=2", "--warmup_steps=1", "--batch=2", "--eval_tokens=64",
            "--dtype=float32", "--model.block_size=16", "--model.n_layer=1", "--model.n_head=2",
            "--model.n_embd=16", *more]


def config_of(words):
    return optimizers.parse(OptimizersConfig, words, "optimizers")


def without_time(rows):
    return [{name: value for name, value in row.items() if name != "seconds_of_run"}
            for row in rows]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The rows of a comparison that nobody interrupted."""
    return compare(config_of(words(data, tmp_path_factory.mktemp("whole"))))


# ----------------------------------------------------------------------------- the runs

def test_runs_of_one_seed_differ_in_the_optimizer_and_its_rate_only():
    config = OptimizersConfig()
    one, other = (dataclasses.asdict(train_config(Trial("compare", name, rate, 1), config))
                  for name, rate in (("adamw", 1e-3), ("muon", 4e-3)))
    assert one["optim"].pop("optimizer") == "adamw" and other["optim"].pop("optimizer") == "muon"
    differ = {name for name in one if one[name] != other[name]}
    assert differ == {"out", "learning_rate", "min_learning_rate"}


def test_each_rate_is_tried_for_each_optimizer_before_any_run_is_compared(data, whole, tmp_path):
    config = config_of(words(data, tmp_path))
    plan = optimizers.trials(config)
    assert {(t.phase, t.optimizer, t.learning_rate) for t in plan} == {
        ("tune", name, rate) for name in ("adamw", "muon") for rate in (1e-3, 4e-3)}
    assert len(plan) == 4 and {t.seed for t in plan} == {optimizers.TUNING_SEED}
    rates = best_rates(whole, config)
    assert {(row["optimizer"], row["learning_rate"], row["seed"], row["step"]) for row in whole
            if row["phase"] == "compare"} == {(name, rate, seed, step) for name, rate in
                                              rates.items() for seed in (0, 1) for step in (2, 4)}
    assert all(row["tokens"] == row["step"] * 2 * 16 for row in whole)


def test_a_killed_comparison_goes_on_without_redoing_finished_runs(data, whole, tmp_path,
                                                                   monkeypatch):
    out = tmp_path / "killed"
    # 4 trials of 2 steps, a run of 4, and the third step of the next one, after its save
    child, = start(ranks.dying_in_step, 1, 15, optimizers.main, words(data, out))
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    finished = {path.parent: path.stat().st_ino for path in out.rglob("run.json")
                if optimizers.done(path.parent)}
    assert len(finished) == 5
    rows = compare(config_of(words(data, out)))
    assert without_time(rows) == without_time(whole)
    assert len(without_time(rows)) == 4 + 4 * 2
    for folder, inode in finished.items():                      # write_json makes a new file
        assert (folder / "run.json").stat().st_ino == inode

    monkeypatch.setattr(optimizers, "train_apart", None)        # once more: nothing is left to do
    assert compare(config_of(words(data, out))) == rows


def test_a_rate_that_diverges_is_in_the_table_and_not_chosen(data, tmp_path):
    config = config_of(words(data, tmp_path, "--rates=1e30,1e-3", "--seeds=1"))
    rows = compare(config)
    lost = [row["val_loss"] for row in rows if row["learning_rate"] == 1e30]
    assert lost == [math.inf] * 2
    assert best_rates(rows, config) == {"adamw": 1e-3, "muon": 1e-3}


def test_a_folder_with_other_settings_is_not_mixed_in(data, tmp_path):
    compare(config_of(words(data, tmp_path, "--seeds=1", "--rates=1e-3")))
    with pytest.raises(ValueError, match="holds a sweep with batch=2, this one has batch=4"):
        compare(config_of(words(data, tmp_path, "--batch=4")))
    again = compare(config_of(words(data, tmp_path, "--seeds=2", "--rates=1e-3")))
    assert {row["seed"] for row in again} == {0, 1, optimizers.TUNING_SEED}


# ----------------------------------------------------------------------------- what they say

def test_steps_to_a_loss_are_by_hand():
    curve = [(100, 5.0), (200, 4.0), (300, 3.0), (400, 3.5)]
    assert steps_to(3.5, curve) == 250 and steps_to(5.0, curve) == 100
    assert steps_to(3.0, curve) == 300 and steps_to(2.9, curve) is None
    assert steps_to(6.0, curve) == 100                          # it is there at the first look
    assert steps_to(3.0, [(100, math.inf), (200, 2.0)]) == 200


def rows_by_hand():
    """AdamW ends at 4.0 and 4.2; Muon is there at steps 150 and 175 of 200, and ends 0.2 below."""
    tuning = {"adamw": (5.0, 4.5, 4.8), "muon": (4.9, 4.6, 4.4)}
    for name, losses in tuning.items():
        for rate, loss in zip((1e-3, 2e-3, 4e-3), losses):
            yield {"phase": "tune", "optimizer": name, "learning_rate": rate, "seed": 1000,
                   "step": 50, "tokens": 100, "val_loss": loss, "seconds_of_run": 1.0}
    ends = {("adamw", 0): (4.4, 4.0), ("adamw", 1): (4.4, 4.2), ("muon", 0): (4.2, 3.8),
            ("muon", 1): (4.8, 4.0)}
    for (name, seed), losses in ends.items():
        for step, loss in zip((100, 200), losses):
            yield {"phase": "compare", "optimizer": name, "seed": seed, "step": step,
                   "learning_rate": 2e-3 if name == "adamw" else 4e-3, "tokens": 2 * step,
                   "val_loss": loss, "seconds_of_run": 10.0}


BY_HAND = OptimizersConfig(rates=(1e-3, 2e-3, 4e-3), steps=200, seeds=2)


def test_the_summary_is_by_hand():
    facts = summary(list(rows_by_hand()), BY_HAND)
    adamw, muon = facts["optimizers"]["adamw"], facts["optimizers"]["muon"]
    assert (adamw["learning_rate"], muon["learning_rate"]) == (2e-3, 4e-3)
    assert (adamw["at_the_edge"], muon["at_the_edge"]) == (False, True)
    assert adamw["steps_to_firsts_loss"] == [200, 200]
    assert muon["steps_to_firsts_loss"] == pytest.approx([150, 175])
    assert muon["share_of_steps"] == pytest.approx(162.5 / 200)
    assert muon["below_first"] == pytest.approx([0.2, 0.2])
    assert adamw["mean"] == pytest.approx(4.1)
    assert adamw["spread"] == pytest.approx(0.2 / math.sqrt(2))
    assert "| muon | 0.004 (at the edge of those tried) | 3.9000 ± 0.1414 | 150, 175 of 200 |" \
        in table(facts).splitlines()


def test_an_optimizer_that_never_gets_there_is_said_so():
    rows = [{**row, "val_loss": row["val_loss"] + 0.5 * (row["optimizer"] == "muon")}
            for row in rows_by_hand()]
    facts = summary(rows, BY_HAND)
    assert facts["optimizers"]["muon"]["steps_to_firsts_loss"] == [None, None]
    assert facts["optimizers"]["muon"]["share_of_steps"] is None
    assert "never, never of 200" in table(facts)


def test_the_picture_shows_every_run_and_where_it_gets_there(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure
    rows = list(rows_by_hand())
    figure = Figure(figsize=(11, 5), layout="constrained")
    optimizers.draw(figure, rows, summary(rows, BY_HAND))
    figure.draw_without_rendering()
    ax, tuning = figure.axes
    drawn = [list(map(tuple, line.get_xydata())) for line in ax.lines]
    for curve in ([(100, 4.4), (200, 4.0)], [(100, 4.4), (200, 4.2)], [(100, 4.2), (200, 3.8)],
                  [(100, 4.8), (200, 4.0)]):
        assert curve in drawn
    marks = next(line for line in ax.lines if list(line.get_xdata()) == pytest.approx([150, 175]))
    assert list(marks.get_ydata()) == pytest.approx([4.0, 4.2])
    assert [len(line.get_xdata()) for line in tuning.lines] == [3, 3]
    assert matplotlib.__name__                                  # the extra is there


def test_the_command_writes_table_figures_and_picture(data, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    optimizers.main(words(data, tmp_path / "runs", "--seeds=1", f"--results={tmp_path / 'there'}"))
    with open(tmp_path / "there" / "optimizers.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 + 2 * 2
    facts = json.loads((tmp_path / "there" / "optimizers.json").read_text())
    assert 0 < facts["optimizers"]["adamw"]["steps_to_firsts_loss"][0] <= 4
    assert (tmp_path / "there" / "optimizers.png").read_bytes()[:4] == b"\x89PNG"
    assert "final validation loss" in capsys.readouterr().out


# ----------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("setting, message", [
    ("seeds=0", "seeds=0 must be at least 1"),
    ("rates=0", "must be one or more numbers above 0"),
    ("optimizers=adamw", "optimizers=adamw leaves nothing to compare"),
    ("optimizers=adamw,sgd", "optim.optimizer='sgd' is unknown; choose adamw, galore or muon"),
    ("data=nothing", "there is no prepared data set in")])
def test_bad_input_is_told_in_one_line(setting, message, data, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as found:
        optimizers.main(words(data, tmp_path, f"--{setting}"))
    assert "\n" not in str(found.value)
