"""experiments/lora_sweep.py: settings, resuming after a kill, tables and pictures."""
import contextlib
import csv
import dataclasses
import io
import itertools
import json
import math
import signal
import runpy
import sys
from pathlib import Path

import pytest

import lora
import ranks
from bench.kills import start
from data.corpus import CorpusConfig, prepare
from experiments import lora_pictures, lora_sweep
from experiments.lora_results import (SETTING, best_rate, gains, grid_facts, knob, of, points_of,
                                      rate_of, read_rows, reference, tables)
from experiments.lora_studies import STUDIES, VARIANTS, Setting
from experiments.lora_sweep import SweepConfig, count_trainable, done, drawn, plan, train_config
from model import GPT, GPTConfig
from formats.files import write_json
from train import TrainConfig, train

BASE = Setting("", learning_rate=1e-3, batch=4, micro_batch=4, epochs=1.0)


# ----------------------------------------------------------------------------- the plan

def test_the_original_has_the_17_settings_of_the_study():
    found = [(s.r, s.alpha, s.dropout) for s in STUDIES["original"](BASE)]
    assert found == [
        (1, 1, .05), (2, 1, .05), (4, 1, .05), (8, 1, .05), (16, 1, .05),
        (4, .25, .05), (4, .5, .05), (4, 2, .05), (4, 4, .05), (4, 8, .05), (4, 16, .05),
        (4, 1, 0), (4, 1, .025), (4, 1, .1), (4, 1, .15), (4, 1, .2), (4, 1, .3)]
    assert len(set(found)) == 17
    rest = {(s.variant, s.targets, s.bias, s.learning_rate, s.epochs, s.batch)
            for s in STUDIES["original"](BASE)}
    assert rest == {("lora", "c_attn", "lora_only", 1e-3, 1.0, 4)}


def test_no_two_settings_share_a_folder_and_studies_share_runs():
    settings = [s for study in STUDIES.values() for s in study(BASE)]
    for study in STUDIES.values():
        names = [s.name for s in study(BASE)]
        assert len(set(names)) == len(names)
    assert len({s.name for s in settings}) == len(set(settings))
    of_variants = {s.name for s in STUDIES["variants"](BASE)}
    assert of_variants & {s.name for s in STUDIES["grid"](BASE)}


def test_budget_varies_one_thing_at_a_time():
    start = Setting("", 1e-3, 4, 4, 1.0, alpha=16.0, dropout=0.0, bias="none")
    for s in STUDIES["budget"](BASE):
        changed = {name for name in vars(s) if getattr(s, name) != getattr(start, name)}
        assert changed in (set(), {"learning_rate"}, {"epochs"}, {"batch", "micro_batch"},
                           {"micro_batch"})
        assert s.micro_batch == s.batch or s.batch % s.micro_batch == 0


def test_settings_reach_training():
    config = SweepConfig(study=("variants",), seeds=1, batch=8, block_size=64)
    jobs = {job.setting.variant: job for job in plan(config) if job.data == "imdb"}
    made = {name: train_config(job, config) for name, job in jobs.items()}
    assert made["rslora"].lora.use_rslora and made["dora"].lora.use_dora
    assert (made["pissa"].lora.init, made["olora"].lora.init) == ("pissa", "olora")
    assert made["lora+"].optim.lora_plus_ratio == 16 and made["full"].lora is None
    assert made["lora"].batch_tokens == 8 * 64 and made["lora"].lora.target_modules == ("c_attn",)
    assert {c.lora.alpha for name, c in made.items() if c.lora} == {16.0}


def test_what_is_drawn_is_the_same_each_time_and_no_more_than_there_is():
    assert drawn(list(range(100)), 5, "reviews") == drawn(list(range(100)), 5, "reviews")
    assert drawn([1, 2], 0, "reviews") == [1, 2]
    with pytest.raises(ValueError, match="reviews=3, but there are 2"):
        drawn([1, 2], 3, "reviews")


# ----------------------------------------------------------------------------- runs

TINY = GPTConfig(block_size=32, vocab_size=300, n_layer=1, n_head=2, n_embd=16)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A tiny base that was trained for two steps, reviews and instructions."""
    folder = tmp_path_factory.mktemp("sources")
    lines = [f"the film number {i} was {'good' if i % 2 else 'bad'} and long, said {i * i % 97}"
             for i in range(80)]
    (folder / "text.txt").write_text("\n".join(lines) + "\n")
    prepare(CorpusConfig(from_=str(folder / "text.txt"), vocab_size=300, validation=0.2,
                         out=str(folder / "corpus")))
    train(TrainConfig(out=str(folder / "base"), data=str(folder / "corpus"), max_steps=2,
                      batch_tokens=64, micro_batch=4, sample_tokens=0, compile="off",
                      dtype="float32", model=TINY))
    (folder / "reviews").mkdir()
    for half in ("train", "test"):
        (folder / "reviews" / f"{half}.jsonl").write_text("".join(
            json.dumps({"text": line, "label": i % 2}) + "\n" for i, line in enumerate(lines)))
    (folder / "alpaca.json").write_text(json.dumps(
        [{"instruction": f"Say {i}.", "input": "", "output": f"It is {i}."} for i in range(60)]))
    return folder


def words(sources, out, *more):
    return ["--study=ranks", f"--init_from={sources / 'base'}", f"--imdb={sources / 'reviews'}",
            f"--alpaca={sources / 'alpaca.json'}", "--reviews=12", "--records=12", "--seeds=1",
            f"--out={out}", "--block_size=32", "--eval_tokens=64", "--dtype=float32", *more]


def run(words):
    return lora_sweep.sweep(lora_sweep.parse(SweepConfig, words, "sweep"))


def without_time(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def run_three(words):
    """With three settings in the study "ranks", so that a sweep of it is 2 + 6 runs."""
    settings = list(STUDIES["ranks"](BASE))[:3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(STUDIES, "ranks", lambda base: settings)
        return run(words)


@pytest.fixture(scope="module")
def whole(sources, tmp_path_factory):
    """The rows of a sweep that nobody interrupted."""
    return run_three(words(sources, tmp_path_factory.mktemp("whole")))


def test_a_killed_sweep_resumes_without_redoing_finished_runs(sources, whole, tmp_path,
                                                              monkeypatch):
    assert len(whole) == 8 and all(math.isfinite(row["val_loss"]) for row in whole)

    out = tmp_path / "killed"
    steps = sum(row["steps"] for row in whole[:5]) + 1          # in the sixth run
    child, = start(ranks.dying_in_step, 1, steps, run_three, words(sources, out))
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    finished = {path.parent: path.stat().st_ino for path in out.rglob("run.json")
                if done(path.parent)}
    assert len(finished) == 5

    rows = run_three(words(sources, out))
    assert without_time(rows) == without_time(whole)
    for folder, inode in finished.items():                      # write_json makes a new file
        assert (folder / "run.json").stat().st_ino == inode
    table = (out / "lora_runs.csv").read_bytes()

    monkeypatch.setattr(lora_sweep, "train", None)              # once more: nothing is left to do
    assert run_three(words(sources, out)) == rows
    assert (out / "lora_runs.csv").read_bytes() == table


def test_two_processes_do_the_same_runs(sources, whole, tmp_path):
    rows = run_three(words(sources, tmp_path, "--processes=2"))
    assert without_time(rows) == without_time(whole)


def test_a_run_that_was_stopped_stops_the_sweep(sources, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(lora_sweep, "train", calls.append)      # returns, and nothing is finished
    with pytest.raises(KeyboardInterrupt):
        run_three(words(sources, tmp_path))
    assert len(calls) == 1


def test_a_run_that_diverges_is_in_the_table(sources, tmp_path, monkeypatch):
    settings = [dataclasses.replace(BASE, learning_rate=1e30)]
    monkeypatch.setitem(STUDIES, "ranks", lambda base: settings)
    rows = {(row["study"], row["data"]): row for row in run(words(sources, tmp_path))}
    for data in ("imdb", "alpaca"):
        assert rows["ranks", data]["train_loss"] == math.inf
        assert math.isfinite(rows["base", data]["val_loss"])


def test_a_sweep_with_other_data_or_base_is_not_mixed_in(sources, tmp_path):
    run(words(sources, tmp_path, "--study=base"))
    with pytest.raises(ValueError, match="holds a sweep with reviews=12, this one has reviews=3"):
        run(words(sources, tmp_path, "--study=base", "--reviews=3"))
    path = tmp_path / "sweep.json"
    facts = json.loads(path.read_text())
    facts["shared"]["base"] = "another"
    write_json(path, facts)
    with pytest.raises(ValueError, match="holds a sweep with base=another"):
        run(words(sources, tmp_path, "--study=base"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_trainable_parameters_are_those_that_train(variant, tmp_path):
    setting = dataclasses.replace(BASE, variant=variant, targets="c_attn.q+attn.c_proj")
    config = train_config(lora_sweep.Job("imdb", setting, 0), SweepConfig())
    write_json(tmp_path / "config.json", dataclasses.asdict(
        dataclasses.replace(config, model=TINY)))
    model = GPT(TINY)
    if config.lora:
        lora.add_lora(model, config.lora, quiet=True)
    assert count_trainable(tmp_path) == sum(p.numel() for p in model.parameters()
                                            if p.requires_grad)


# ----------------------------------------------------------------------------- tables

def rows_by_hand(seeds=2):
    """Every run of the plan. The loss has its minimum where sqrt(alpha) x rate = 0.03; a seed and a
    data set shift it, rank and dropout do nothing. All seeds evaluate the same base."""
    for job in plan(SweepConfig(seeds=seeds)):
        s = job.setting
        away = math.log(math.sqrt(s.alpha) * s.learning_rate / 0.03) if s.learning_rate else 4
        loss = 5 + 0.01 * away ** 2 + (job.data == "alpaca")
        loss += 0.05 * job.seed if s.study != "base" else 0
        yield {"data": job.data, **dataclasses.asdict(s), "seed": job.seed, "steps": 50,
               "train_loss": loss, "val_loss": loss + 0.1, "seconds": 3.0 - job.seed,
               "trainable": 1000 * s.r}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "runs.csv"
    lora_sweep.write_csv(path, list(rows_by_hand()))
    return path


@pytest.fixture(scope="module")
def points(table):
    return points_of(read_rows(table))


def test_the_table_is_by_hand(points):
    # seeds 0 and 1 differ by 0.05: mean + 0.025, deviation 0.05 / sqrt(2); without the seeds, none
    loss = 5 + 0.01 * math.log(2 * 1e-3 / 0.03) ** 2 + 0.025
    line = f"| 4 | 4 | 0.05 | 2 | {loss:.4f} ± 0.0354 (0.0000) | {loss + .1:.4f} ± 0.0354 " \
           "(0.0000) | 4,000 | 2.0 s |"
    text = tables(points)
    assert line in text.split("Alpaca")[0].splitlines()
    assert sum(row.startswith("| ") and " ± " in row for row in
               text.split("IMDB reviews, original")[1].split("IMDB reviews, ranks")[0].splitlines()
               ) == 17


def test_the_spread_in_brackets_is_what_the_seeds_do_not_share():
    rows = [dict(row) for row in rows_by_hand() if row["study"] in ("base", "original")]
    for row in rows:
        if row["alpha"] == 16 and row["seed"] == 1:
            row["train_loss"] += 0.17
    point = of(points_of(rows), "original", "imdb", alpha=16.0)[0]
    # the seed's mean over 17 settings moves by 0.01 too
    assert point.loss_spread == pytest.approx(0.16 / math.sqrt(2))


def test_a_seed_that_is_not_finished_is_left_out():
    rows = list(rows_by_hand())
    few = points_of(rows[:-30])
    assert {len(p.val) for p in few} == {1, 2} and len(few) == len(points_of(rows))


def test_the_best_rate_is_the_bottom_of_a_parabola():
    assert best_rate([1, 10, 100], [2, 1, 2]) == pytest.approx(10)
    rates = [1e-3, 4e-3, 16e-3, 64e-3]
    losses = [math.log(rate / 0.01) ** 2 for rate in rates]
    assert best_rate(rates, losses) == pytest.approx(0.01)
    assert best_rate([1, 10, 100], [1, 2, 3]) is None           # it may be outside
    assert rate_of(3, [1, 100], [4, 2]) == pytest.approx(10)
    assert rate_of(1, [1, 100], [4, 2]) is None


def test_the_grid_finds_the_line_on_which_the_loss_is_the_same(points):
    for data in ("imdb", "alpaca"):
        facts = grid_facts(points, data)
        assert facts["best_slope"] == pytest.approx(-0.5)       # sqrt(alpha) x rate is constant
        assert facts["half_slope"] == pytest.approx(-0.5, abs=0.05)     # straight between points
        assert facts["best"][0] == pytest.approx([0.03, 0.03])          # alpha 1, each seed
        assert facts["best"][-1] == pytest.approx([0.03 / 8] * 2)       # alpha 64


def test_the_gain_of_a_setting_is_by_hand(points):
    shares, loss = gains(points, "imdb"), lambda x: 0.01 * math.log(x / 0.03) ** 2
    most = 0.01 * 16 - 0.025 - min(loss(math.sqrt(p["alpha"]) * p["learning_rate"]) for p in points
                           if p["learning_rate"])
    assert shares["alpha"] == pytest.approx((loss(1e-3) - loss(4e-3)) / most)
    assert shares["r"] == shares["dropout"] == shares["epochs"] == pytest.approx(0)
    assert set(shares) == {"r", "alpha", "dropout", "learning_rate", "epochs", "batch",
                           "micro_batch"}


def test_a_knob_is_turned_with_the_rest_fixed(points):
    assert [p["r"] for p in knob(points, "original", "imdb", "r")] == [1, 2, 4, 8, 16]
    assert [p["batch"] for p in knob(points, "budget", "imdb", "batch")] == [2, 4, 8, 16]
    assert [p["micro_batch"] for p in knob(points, "budget", "imdb", "micro_batch")] == [1, 2, 4]
    start = reference(points, "original", "imdb")
    assert (start["r"], start["alpha"], start["dropout"]) == (4, 1, 0.05)


# ----------------------------------------------------------------------------- pictures

@pytest.fixture(scope="module")
def drawn_by_command(table, tmp_path_factory):
    """All figures of a study by name, the folder that the command wrote, and what it said."""
    pytest.importorskip("matplotlib")
    found, folder, said = {}, tmp_path_factory.mktemp("pictures") / "here", io.StringIO()
    save = lora_pictures.save

    def keep(path, size, draw):
        def draw_and_keep(figure):
            draw(figure)
            found[path.stem] = figure
        save(path, size, draw_and_keep)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(lora_pictures, "save", keep)
        lora_pictures.main([str(table), f"--out={folder}"])
    return found, folder, said.getvalue()


def texts(figure):
    """What can be read; ticks outside of their axis are there, but are not drawn."""
    import matplotlib.text
    hidden = set()
    for axis in (side for ax in figure.axes for side in (ax.xaxis, ax.yaxis)):
        low, high = sorted(axis.get_view_interval())
        hidden |= {label for tick in axis.get_major_ticks() + axis.get_minor_ticks()
                   if not low <= tick.get_loc() <= high for label in (tick.label1, tick.label2)}
    return [text for text in figure.findobj(matplotlib.text.Text)
            if text.get_text().strip() and text.get_visible() and text not in hidden]


def test_no_words_of_a_picture_lie_on_each_other(drawn_by_command):
    for name, figure in drawn_by_command[0].items():
        boxes = [(text.get_text(), text.get_window_extent()) for text in texts(figure)]
        assert len(boxes) > 20, name
        for (one, a), (other, b) in itertools.combinations(boxes, 2):
            width = min(a.x1, b.x1) - max(a.x0, b.x0)
            height = min(a.y1, b.y1) - max(a.y0, b.y0)
            assert width <= 1 or height <= 1, f"{name}: {one!r} and {other!r}"


def test_pictures_show_every_setting(drawn_by_command):
    shown = drawn_by_command[0]
    for data in ("lora_imdb", "lora_alpaca"):
        ax = shown[data].axes[0]
        assert [label.get_text() for label in ax.get_yticklabels()] == [
            "r=1", "r=2", "r=4, α=1, dropout=0.05", "r=8", "r=16", "α=0.25", "α=0.5", "α=2", "α=4",
            "α=8", "α=16", "dropout=0", "dropout=0.025", "dropout=0.1", "dropout=0.15",
            "dropout=0.2", "dropout=0.3"]
        assert len(shown[data].axes) == 4
    assert [ax.name for ax in shown["lora_compare"].axes] == ["rectilinear", "polar"]
    assert set(shown) == {"lora_imdb", "lora_alpaca", "lora_compare", "lora_grid", "lora_variants",
                          "lora_budget"}


def test_the_command_writes_pictures_and_figures(drawn_by_command):
    _, folder, said = drawn_by_command
    pictures = sorted(folder.glob("*.png"))
    assert len(pictures) == 6 and all(path.read_bytes()[:4] == b"\x89PNG" for path in pictures)
    assert "IMDB reviews, original" in said
    facts = json.loads((folder / "lora_summary.json").read_text())
    assert facts["grid"]["imdb"]["best_slope"] == pytest.approx(-0.5)


def test_a_study_alone_gives_its_pictures_only(table, monkeypatch):
    rows, drawn = [row for row in read_rows(table) if row["study"] in ("base", "original")], []
    monkeypatch.setattr(lora_pictures, "save", lambda path, size, draw: drawn.append(path.stem))
    lora_pictures.draw_all(points_of(rows), Path())
    assert set(drawn) == {"lora_imdb", "lora_alpaca", "lora_compare"}


# ----------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("setting, message", [
    ("study=orignal", "study=orignal is unknown; choose base, original"),
    ("seeds=0", "seeds=0 must be at least 1"), ("reviews=-1", "reviews=-1 must not be negative"),
    ("learning_rate=0", "learning_rate=0.0 must be above 0"),
    ("init_from=out/nothing", "there is no run in out/nothing"),
    ("block_size=64", "block_size=64 is above the 32 positions"),
    ("imdb=nothing.jsonl", "there is no file or folder nothing.jsonl")])
def test_bad_input_is_told_in_one_line(setting, message, sources, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as found:
        lora_sweep.main(words(sources, tmp_path, f"--{setting}"))
    assert "\n" not in str(found.value)


def test_the_command_line_ends_with_code_2(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "experiments.lora_sweep")
    monkeypatch.setattr(sys, "argv", ["lora_sweep.py", "--seeds=0"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("experiments.lora_sweep", run_name="__main__", alter_sys=True)
    assert capsys.readouterr().err == "error: seeds=0 must be at least 1\n"


def test_a_table_that_is_none_is_refused(table, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no table"):
        read_rows(tmp_path / "none.csv")
    (tmp_path / "a.csv").write_text("data,study\n")
    with pytest.raises(ValueError, match="has no column variant"):
        read_rows(tmp_path / "a.csv")
    lines = table.read_text().splitlines()
    (tmp_path / "b.csv").write_text("\n".join([*lines[:3], lines[3][:20]]))
    with pytest.raises(ValueError, match="line 4, is damaged"):
        read_rows(tmp_path / "b.csv")
    (tmp_path / "c.csv").write_text(lines[0] + "\n")
    with pytest.raises(ValueError, match="has no rows yet"):
        read_rows(tmp_path / "c.csv")
    without = [row for row in read_rows(table) if row["study"] != "base"]
    with pytest.raises(ValueError, match="no run of the study base on imdb"):
        tables(points_of(without))
    with pytest.raises(ValueError, match="give the table of a sweep"):
        lora_pictures.main([])
    assert set(SETTING) < set(next(csv.DictReader(open(table))))
