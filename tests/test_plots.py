"""experiments/plots.py: pictures, pages and the terminal view of runs."""
import json
import math
import re
import runpy
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from experiments import plots
from experiments.plots import PlotConfig, main, published_loss, save
from experiments.runs import (differences, duration, find_runs, limits, load_run, load_runs,
                              moving_average, seeds_together, short, status, text_plot)
from experiments.ttest import holm, paired
from tests.browser import open_page


def lines(steps, start=1, tokens=100, speed=50.0, hellaswag=False):
    """Lines of a log.jsonl: training steps, and an evaluation every ten."""
    for step in range(start, start + steps):
        loss = 3 + 5 * math.exp(-step / 30) + 0.1 * (-1) ** step
        yield {"step": step, "loss": loss, "lr": 1e-3 * step, "grad_norm": 1 / step,
               "tokens": tokens * step, "tokens_per_s": speed}
        if step % 10 == 0:
            yield {"step": step, "val_loss": loss + 0.05, "val_perplexity": 1.0}
            yield {"step": step, "sample": "text"}
            if hellaswag:
                yield {"step": step, "acc": 0.27, "acc_norm": 0.25 + step / 1000, "n": 1000}


def write_run(folder, steps=100, finished=True, data="data/corpus", vocab_size=4096, **settings):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n"
                                              for line in lines(steps, **settings)))
    (folder / "config.json").write_text(json.dumps(
        {"data": data, "max_steps": 100, "model": {"vocab_size": vocab_size}}))
    (folder / "run.json").write_text(json.dumps(
        {"device": "cpu (2 threads)", **({"final": {}} if finished else {})}))
    return folder


def svg_texts(text):
    """All words in an SVG picture, in order of appearance."""
    root = ElementTree.fromstring(text[text.index("<svg"):text.index("</svg>") + 6])
    return [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "demo")


# ----------------------------------------------------------------------------- arithmetic

def test_the_average_is_centred_and_shrinks_at_the_start():
    # by hand: 8 alone; (8+4+2)/3; (4+2+2)/3; (2+2+6)/3; at the end the half that is there, (2+6)/2
    assert moving_average([8, 4, 2, 2, 6], 3).tolist() == pytest.approx(
        [8, 14 / 3, 8 / 3, 10 / 3, 4])
    # a window of five: one neighbour at the second place, two from the third on
    assert moving_average([8, 4, 2, 2, 6], 5).tolist() == pytest.approx(
        [8, 14 / 3, 22 / 5, 14 / 4, 10 / 3])
    assert moving_average([8, 4, 2], 1).tolist() == [8, 4, 2]


def test_the_average_of_a_falling_line_does_not_lag():
    line = np.arange(50.0)[::-1]
    assert moving_average(line, 9)[:46] == pytest.approx(line[:46])


def test_the_average_leaves_out_what_is_not_finite():
    assert moving_average([1, math.nan, 3, math.inf, 5], 3).tolist() == [1, 2, 3, 4, 5]
    assert np.isnan(moving_average([math.nan, math.nan], 3)).all()


def test_time_adds_up_training_and_evaluations_stand_at_their_step(tmp_path):
    folder = write_run(tmp_path / "a", steps=20, tokens=100, speed=50.0)
    run = load_run(folder, "a")
    assert run.x("time").tolist() == pytest.approx([2.0 * (i + 1) for i in range(20)])
    assert run.x("tokens")[-1] == 2000 and run.x("steps")[-1] == 20
    for axis, expected in (("tokens", [1000, 2000]), ("time", [20, 40]), ("steps", [10, 20])):
        assert run.measured("val_loss", axis)[0].tolist() == pytest.approx(expected)


def test_a_caption_names_every_source_of_a_mixture(tmp_path):
    folder = write_run(tmp_path / "a", steps=5, data="out/a:0.7,out/b:0.3")
    assert plots.caption([load_run(folder, "a")]).startswith("a: 5 steps, 500 tokens of a:0.7,b:0.3")


def test_an_evaluation_before_the_first_step_stands_at_zero(tmp_path):
    folder = write_run(tmp_path / "a", steps=5)
    with open(folder / "log.jsonl", "a") as file:
        file.write('{"step": 0, "val_loss": 9.0}\n')
    x, y = load_run(folder, "a").measured("val_loss", "tokens")
    assert (x.tolist(), y.tolist()) == ([0], [9])


def test_numbers_are_short():
    assert [short(n) for n in (5, 1500, 524288, 1e10, 0)] == ["5", "1.5k", "524k", "10B", "0"]
    assert [short(n) for n in (999.7, 999_600, 123_450)] == ["1k", "1M", "123k"]    # not 1e+03k
    assert [duration(n) for n in (59, 600, 9000)] == ["59 s", "10 min", "2.5 h"]


def test_the_fall_from_the_start_may_leave_the_picture():
    curve = np.array([100.0] * 5 + [4.0] * 500 + [3.0] * 495)
    bottom, top = limits([curve])
    assert 2.9 < bottom < 3 and 4 < top < 4.2
    assert limits([np.array([2.0, 2.0])]) == (1.9, 2.1)


# ---------------------------------------------------------------------------------- seeds

def write_seed(folder, seed, losses, more=None, **settings):
    """A run of three steps, its validation loss that of the last step."""
    write_run(folder, steps=0)
    with open(folder / "log.jsonl", "w") as file:
        for step, loss in enumerate(losses, 1):
            file.write(json.dumps({"step": step, "loss": loss, "lr": 1e-3, "grad_norm": 1.0 + loss,
                                   "tokens": 10 * step, "tokens_per_s": 5.0}) + "\n")
        file.write(json.dumps({"step": step, "val_loss": losses[-1], **(more or {})}) + "\n")
    (folder / "config.json").write_text(json.dumps(
        {"data": "data/corpus", "out": str(folder), "seed": seed, "max_steps": 3, **settings}))
    return str(folder)


@pytest.fixture
def two_settings(tmp_path):
    """Three seeds at each of two learning rates, and one of the second's at another seed."""
    rates = {1e-3: ([4, 3, 2.0], [5, 4, 2.1], [6, 5, 2.3]),
             2e-3: ([4, 3, 1.90], [5, 4, 2.01], [6, 5, 2.19])}
    return [write_seed(tmp_path / f"r{rate}-{seed}", seed, losses, learning_rate=rate,
                       lora={"target_modules": ["c_attn", "c_fc"]})
            for rate, several in rates.items() for seed, losses in enumerate(several)]


def test_runs_that_differ_in_their_seeds_only_are_their_mean(two_settings):
    a, b = seeds_together(load_runs(two_settings))
    assert (a.name, len(a.seeds)) == ("r0.001-0, 3 seeds", 3)
    assert a.steps["loss"].tolist() == pytest.approx([5, 4, 6.4 / 3])
    assert b.measured("val_loss", "steps")[1].tolist() == pytest.approx([6.1 / 3])
    alone = seeds_together(load_runs(two_settings[2:4]))
    assert [run.seeds for run in alone] == [(), ()]
    twice = seeds_together(load_runs([two_settings[0], two_settings[0]]))
    assert len(twice) == 2                              # the same seed again is no other


def test_the_legend_says_whether_runs_differ_by_more_than_their_seeds(two_settings, tmp_path):
    p = paired([-0.10, -0.09, -0.11]).p                 # by hand: t = -0.1 / (0.01 / sqrt 3)
    assert differences(seeds_together(load_runs(two_settings))) == ["", f"differs (p {p:.2g})"]
    main([*two_settings, f"--out={tmp_path / 'a.svg'}"])
    words = svg_texts((tmp_path / "a.svg").read_text())
    for expected in ("r0.001-0, 3 seeds", f"validation 2.033, differs (p {p:.2g})",
                     "band: from the lowest seed to the highest",
                     "difference: to the first, paired by seed"):
        assert expected in words, words
    main([two_settings[0], two_settings[3], f"--out={tmp_path / 'b.svg'}"])
    assert "without seeds in common: a difference may be chance" in svg_texts(
        (tmp_path / "b.svg").read_text())


def test_differences_of_noise_are_none_and_several_are_corrected_for(tmp_path):
    runs = [write_seed(tmp_path / f"{rate}-{seed}", seed, [3, loss], learning_rate=rate)
            for rate, losses in ((1, (2.0, 2.1, 2.3)), (2, (2.1, 2.0, 2.35)), (3, (1.9, 2.01, 2.2)))
            for seed, loss in enumerate(losses)]
    chances = holm([paired([0.1, -0.1, 0.05]).p, paired([-0.1, -0.09, -0.1]).p])
    assert differences(seeds_together(load_runs(runs))) == [
        "", f"no difference found (p {chances[0]:.2g})", f"differs (p {chances[1]:.2g})"]


def test_runs_of_other_tokens_differ_per_byte_or_not_at_all(tmp_path):
    """Nats per token of longer tokens are more; bits per byte say that nothing was found."""
    runs = [write_seed(tmp_path / f"{data}-{seed}", seed, [9, factor * loss], {
        "bits_per_byte": loss + other}, data=data)
        for data, factor, others in (("a", 1, (0, 0, 0)), ("b", 2, (0.1, -0.1, 0.05)))
        for seed, (loss, other) in enumerate(zip((2.0, 2.1, 2.3), others))]
    p = paired([0.1, -0.1, 0.05]).p
    assert differences(seeds_together(load_runs(runs))) == ["", f"no difference found (p {p:.2g})"]


def test_runs_are_judged_at_a_step_that_all_have_come_to_and_not_where_some_diverged(tmp_path):
    def curves(name, rate, *losses):
        runs = [write_seed(tmp_path / f"{name}-{seed}", seed, [9, 9, loss], learning_rate=rate)
                for seed, loss in enumerate(losses)]
        for run in runs:                                # and before that, in both the same
            log = Path(run) / "log.jsonl"
            log.write_text(json.dumps({"step": 1, "val_loss": 5.0}) + "\n" + log.read_text())
        return runs
    base = curves("a", 1, 2.0, 2.1, 2.3)
    lost = curves("b", 2, 2.0, math.nan, 2.2)
    slow = curves("c", 3, 1.0, 1.1, 1.3)
    log = Path(slow[2]) / "log.jsonl"                   # one seed is at its first evaluation
    log.write_text("".join(log.read_text().splitlines(True)[:3]))
    assert differences(seeds_together(load_runs(base + lost))) == [
        "", "no test, 1 of 3 seeds diverged"]
    assert differences(seeds_together(load_runs(base + slow))) == ["", "no difference found (p 1)"]


def test_runs_are_found_by_their_settings(two_settings, tmp_path, capsys):
    folder = [str(tmp_path)]
    assert find_runs(folder, ("learning_rate=2e-3", "seed=1")) == [two_settings[4]]
    assert len(find_runs(folder, ("lora.target_modules=c_attn+c_fc",))) == 6
    with pytest.raises(ValueError, match=r"where=seed=7 fits no run in .*: seed is 0, 1, 2"):
        find_runs(folder, ("seed=7",))
    main([str(tmp_path), "--where=learning_rate=0.001,seed=0", f"--out={tmp_path / 'a.png'}"])
    assert "r0.001-0: step 3/3" in capsys.readouterr().out


def test_the_norms_of_a_short_run_have_more_than_one_label(tmp_path):
    run = write_seed(tmp_path / "a", 0, [0.5, 0.3, 0.2])        # norms 1.2 to 1.5: within a decade
    main([run, f"--out={tmp_path / 'a.svg'}"])
    words = svg_texts((tmp_path / "a.svg").read_text())
    after = words[words.index("learning rate"):]                # the labels of the norm's panel
    assert sum(1.1 < float(word) < 1.6 for word in after
               if word and re.fullmatch(r"1\.\d+", word)) > 1, after


# ------------------------------------------------------------------------------- pictures

def test_png_is_the_default_and_goes_into_the_run(run, capsys):
    main([str(run)])
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "step 100/100" in said and str(run / "curve.png") in said
    assert not list(run.glob("*.tmp"))


def test_svg_names_runs_axes_and_panels(tmp_path, run):
    other = write_run(tmp_path / "wide", steps=50, hellaswag=True)
    main([str(run), str(other), f"--out={tmp_path / 'a.svg'}", "--smooth=5"])
    words = svg_texts((tmp_path / "a.svg").read_text())
    last = [load_run(folder, "").measured("val_loss", "steps")[1][-1] for folder in (run, other)]
    for expected in ["demo", "wide", f"validation {last[0]:.3f}", f"validation {last[1]:.3f}",
                     "loss against tokens", "loss against time", "learning rate", "tokens",
                     "gradient norm before clipping", "HellaSwag", "GPT-2 124M 0.2955",
                     "minutes of training, without evaluations",
                     "line: training, mean of 5 steps; marker: validation"]:
        assert expected in words, (expected, words)


def test_without_hellaswag_points_there_is_no_such_panel(tmp_path, run):
    main([str(run), f"--out={tmp_path / 'a.svg'}"])
    assert "HellaSwag" not in svg_texts((tmp_path / "a.svg").read_text())


def test_a_sample_stands_beside_the_loss_and_the_unigram_entropy(tmp_path, dataset):
    folder = write_run(tmp_path / "demo", data=str(dataset))
    with open(folder / "log.jsonl", "a") as file:
        file.write(json.dumps({"step": 100, "sample": "Return $x$ and $y\n" + "word " * 20}) + "\n")
    main([str(folder), "--sample", f"--out={tmp_path / 'a.svg'}"])
    entropy = json.loads((dataset / "meta.json").read_text())["unigram_entropy"]
    texts = svg_texts((tmp_path / "a.svg").read_text())
    for text in ("loss against tokens", f"unigram entropy {entropy:.3f}", "learning rate",
                 "what it writes at step 100", "Return $x$ and $y"):
        assert (text in texts) == (text != "learning rate"), text
    assert max(map(len, texts)) < 80 and sum("word word" in text for text in texts) == 2


def test_layers_are_a_line_for_each_block_of_a_run_that_was_looked_into(tmp_path, run):
    with pytest.raises(ValueError, match="demo was not looked into; train it with --watch_every"):
        main([str(run), "--layers", f"--out={tmp_path / 'no.svg'}"])
    with open(run / "log.jsonl", "a") as file:
        for step in (50, 100):
            file.write(json.dumps({"step": step, **{
                f"block_{key}": [step * i / 100 for i in (1, 2, 3)]
                for key in plots.BLOCK_FIGURES}}) + "\n")
    main([str(run), "--layers", f"--out={tmp_path / 'layers.svg'}"])
    svg = (tmp_path / "layers.svg").read_text()
    assert set(plots.BLOCK_FIGURES.values()) <= set(svg_texts(svg))
    for block in (1 / 3, 2 / 3, 1):                     # the deeper the darker
        grey = round(255 * 0.8 * (1 - block))
        assert svg.count(f"stroke: #{grey:02x}{grey:02x}{grey:02x}; stroke-width: 1.2") >= 7


def test_a_sample_of_data_that_are_gone_has_no_entropy_beside_it(tmp_path):
    folder = write_run(tmp_path / "demo", data=str(tmp_path / "gone"))
    main([str(folder), "--sample", f"--out={tmp_path / 'a.svg'}"])
    texts = svg_texts((tmp_path / "a.svg").read_text())
    assert "unigram" not in " ".join(texts) and {"what it writes at step 100", "text"} <= set(texts)


@pytest.mark.parametrize("axis, titles, below", [
    ("tokens", ["loss against tokens", "loss against time"], "tokens"),
    ("time", ["loss against time", "loss against tokens"], "minutes of training"),
    ("steps", ["loss against steps", "loss against time"], "optimizer steps")])
def test_x_chooses_the_axis(tmp_path, run, axis, titles, below):
    main([str(run), f"--out={tmp_path / 'a.svg'}", f"--x={axis}"])
    words = svg_texts((tmp_path / "a.svg").read_text())
    assert [word for word in words if word.startswith("loss against")] == titles
    assert sum(word.startswith(below) for word in words) >= 3       # left, learning rate, norm


def test_the_same_log_gives_the_same_svg(tmp_path, run):
    for name in ("a", "b"):
        main([str(run), f"--out={tmp_path / name}.svg"])
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_gpt2s_loss_is_drawn_only_where_it_compares(tmp_path):
    def published(*folders):
        return published_loss(load_runs([str(folder) for folder in folders]))
    gpt2 = write_run(tmp_path / "a", data="fineweb", vocab_size=50257)
    path = write_run(tmp_path / "b", data="/mnt/data/fineweb", vocab_size=50257)
    own_tokens = write_run(tmp_path / "c", data="fineweb", vocab_size=32000)
    owt = write_run(tmp_path / "d", data="openwebtext", vocab_size=50257)
    other = write_run(tmp_path / "e", data="corpus", vocab_size=50257)
    assert published(gpt2) == published(gpt2, path) == 3.2924 and published(owt) == 3.12
    assert published(own_tokens) is published(other) is published(gpt2, owt) is None
    assert published(gpt2, own_tokens) is None
    main([str(gpt2), f"--out={tmp_path / 'a.svg'}"])
    assert "GPT-2 124M 3.292" in svg_texts((tmp_path / "a.svg").read_text())


def test_many_runs_all_look_different(tmp_path):
    looks = [(plots.style(i)["color"], plots.style(i)["linestyle"]) for i in range(28)]
    assert len(set(looks)) == 28
    assert len({look[0] for look in looks[:7]}) == len({plots.MARKERS[i] for i in range(7)}) == 7
    assert len({look[1] for look in looks[:4]}) == 4


@pytest.mark.parametrize("number", [1, 2, 20, 21, 39, 76, 1000])
def test_the_last_evaluation_is_always_marked(number):
    marked = list(range(number))[plots.marks(0, number)["markevery"]]
    assert marked[-1] == number - 1 and len(marked) <= 20


def test_runs_of_the_same_name_are_told_apart_by_path(tmp_path):
    folders = [str(write_run(tmp_path / where / "demo")) for where in ("a", "b")]
    assert [run.name for run in load_runs(folders)] == folders


def test_diverged_runs_are_drawn_without_complaint(tmp_path, run):
    text = (run / "log.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in text]
    for line in steps:
        for key in ("loss", "grad_norm", "val_loss"):
            if key in line and line["step"] > 40:
                line[key] = math.nan
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    main([str(run), f"--out={tmp_path / 'a.svg'}"])
    assert svg_texts((tmp_path / "a.svg").read_text())
    assert text_plot([load_run(run, "demo")], "tokens", 0, 60, 8)


# ------------------------------------------------------------------------------ bad input

def test_a_torn_last_line_is_left_out(run):
    with open(run / "log.jsonl", "a") as file:
        file.write('{"step": 101, "loss": 3.')
    assert load_run(run, "demo").steps["step"][-1] == 100
    main([str(run)])


@pytest.mark.parametrize("words, said", [
    (["{tmp}/nowhere"], "no run in"),
    (["{tmp}/empty"], "no training step yet"),
    (["{tmp}/demo", "--out=a.pdf"], r"\.png, \.svg, \.html"),
    (["{tmp}/demo", "--x=epochs"], "tokens|time|steps"),
    (["{tmp}/demo", "--smoth=3"], "--smooth"),
    (["{tmp}/demo", "--smooth=-3"], "smooth=-3"),
    (["{tmp}/demo", "--every=0"], "every=0"),
])
def test_bad_input_is_one_clear_line(tmp_path, run, words, said):
    write_run(tmp_path / "empty", steps=0)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        main([word.format(tmp=tmp_path) for word in words])
    assert re.search(said, str(error.value)) and "\n" not in str(error.value)


def test_on_the_command_line_an_error_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "experiments.plots")
    monkeypatch.setattr(sys, "argv", ["plots.py", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("experiments.plots", run_name="__main__", alter_sys=True)
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and said.startswith("error: there is no run in")


def test_without_matplotlib_the_error_names_the_extra(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r'\.\[plots\]'):
        main([str(run)])
    main([str(run), "--follow"])                                    # the terminal does without


# --------------------------------------------------------------------------------- following

def grow(folder, monkeypatch, moments):
    """Let `moments` happen one by one whenever a follower sleeps; the last one ends the run."""
    moments = iter(moments)

    def sleep(seconds):
        for line in next(moments):
            with open(folder / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
            if line == {"final": True}:
                (folder / "run.json").write_text('{"final": {}}')
    monkeypatch.setattr(plots.time, "sleep", sleep)


def test_follow_says_what_is_new_until_the_run_is_finished(tmp_path, monkeypatch, capsys):
    folder = write_run(tmp_path / "demo", steps=0, finished=False)
    grow(folder, monkeypatch, [lines(5), [], lines(20, start=6), [{"final": True}]])
    main([str(folder), "--follow"])
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 4                                           # nothing new: nothing said
    assert "no training step" in said[0]
    assert "step 5/100" in said[1]
    assert "step 25/100" in said[2] and "validation" in said[2] and "2 min left" in said[2]
    assert "finished" in said[3] and "left" not in said[3]


def test_follow_redraws_a_picture_only_when_a_log_has_grown(tmp_path, monkeypatch):
    folder, drawn = write_run(tmp_path / "demo", steps=5, finished=False), []
    grow(folder, monkeypatch, [[], lines(1, start=6), [], [{"final": True}]])
    monkeypatch.setattr(plots, "save", lambda runs, config, path: drawn.append(len(runs[0])))
    main([str(folder), "--follow", f"--out={tmp_path / 'a.png'}"])
    assert drawn == [5, 6, 6]                                       # the last one: finished


def test_follow_draws_in_a_terminal(run, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    main([str(run), "--follow"])
    said = capsys.readouterr().out
    assert "step 100/100" in said and "10k tokens" in said
    assert sum(0x2800 < ord(char) < 0x2900 for char in said) > 50


def test_the_text_plot_falls_from_the_upper_left_to_the_lower_right(tmp_path):
    folder = write_run(tmp_path / "a", steps=100)
    rows = text_plot([load_run(folder, "a")], "tokens", 9, 60, 10).splitlines()
    assert len(rows) == 11 and all(len(row) <= 60 for row in rows)
    first = [next(i for i, char in enumerate(row) if 0x2800 < ord(char) < 0x2900)
             for row in rows[:10]]
    assert first == sorted(first) and first[0] < 12 and first[-1] > 30
    top, bottom = float(rows[0].split()[0]), float(rows[9].split()[0])
    loss = load_run(folder, "a").steps["loss"]
    assert top > loss[1] > loss[-1] > bottom


def test_a_second_run_has_its_own_colour_in_the_terminal(tmp_path):
    runs = load_runs([str(write_run(tmp_path / name)) for name in "ab"])
    runs[1].steps["loss"][:] += 1
    colours = set(re.findall(r"\033\[38;2;([\d;]+)m", text_plot(runs, "tokens", 0, 60, 10, True)))
    assert colours == {"0;114;178", "213;94;0"}


def test_a_followed_page_reloads_itself_until_the_run_is_finished(tmp_path):
    path = tmp_path / "a.html"
    config = PlotConfig(out=str(path), follow=True, every=2)
    folder = write_run(tmp_path / "a<b>", steps=0, finished=False)
    save(load_runs([str(folder)]), config, path)                    # before there is a step
    assert 'http-equiv="refresh" content="2"' in path.read_text()
    write_run(tmp_path / "a<b>", steps=50, finished=False)
    save(load_runs([str(folder)]), config, path)
    assert 'http-equiv="refresh"' in path.read_text() and "<b>" not in path.read_text()
    assert "loss against tokens" in svg_texts(path.read_text())
    write_run(tmp_path / "a<b>", steps=100)
    save(load_runs([str(folder)]), config, path)
    assert "refresh" not in path.read_text() and "finished" in path.read_text()


def test_a_browser_reloads_the_page_and_draws_it(tmp_path):
    config, path = PlotConfig(out="live.html", follow=True, every=1), tmp_path / "live.html"
    folder = write_run(tmp_path / "demo", steps=20, finished=False)
    save(load_runs([str(folder)]), config, path)
    with open_page(path) as page:
        assert "step 20/100" in page.text("p")
        write_run(folder, steps=100)
        save(load_runs([str(folder)]), config, path)
        while not page.run("document.title").startswith("demo: step 100/100"):
            page.loaded = False
            while not page.loaded:                                  # it comes back by itself
                page.read()
        assert "loss against tokens" in svg_texts(page.run("document.documentElement.outerHTML"))


def test_status_of_a_run_that_ended_before_its_last_step_says_so(tmp_path):
    folder = write_run(tmp_path / "a", steps=3)
    (folder / "config.json").write_text('{"max_steps": 9}')
    assert status(load_run(folder, "a")).endswith(", finished early")
    (folder / "config.json").write_text('{"max_steps": 3}')
    assert status(load_run(folder, "a")).endswith(", finished")


def test_status_of_a_run_that_epochs_limit_has_no_end(tmp_path):
    folder = write_run(tmp_path / "a", steps=3, finished=False)
    (folder / "config.json").write_text('{"max_steps": 0}')
    said = status(load_run(folder, "a"))
    assert "step 3," in said and "left" not in said
