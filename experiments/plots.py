"""Curves of runs: loss against tokens and time, learning rate, gradient norm, HellaSwag.

    python -m experiments.plots out/demo                            draws out/demo/curve.png
    python -m experiments.plots out/a out/b --out=both.svg          several; .png, .svg or .html
    python -m experiments.plots out --where=data=corpus,model.n_layer=4     all with these settings
    python -m experiments.plots out/demo --sample                   the loss beside what it writes
    python -m experiments.plots out/demo --layers                   each block, of --watch_every
    python -m experiments.plots out/demo --follow                   in the terminal while it trains
    python -m experiments.plots out/demo --follow --out=live.html   a page that reloads itself

In: the folders of runs. Out: a picture, which needs the extra "plots"; the terminal view does not.
Runs differ by colour, line style and marker, so that print and the colour-blind keep them apart.
Those that differ in their seeds only are drawn as one, their mean, with a band from the lowest to
the highest; of two or more the legend says whether they differ from the first by more than seeds.

References: palette, Okabe and Ito 2008. GPT-2 124M: HellaSwag acc_norm and FineWeb-Edu validation
loss as build-nanogpt measured them, OpenWebText validation loss from nanoGPT's README.
"""
import html
import io
import itertools
import shutil
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Literal, Sequence

import numpy as np

from data import shards
from experiments.runs import (PALETTE, Run, differences, duration, find_runs, limits, load_runs,
                              moving_average, seeds_together, status, text_plot, window_of)
from formats.files import write_bytes
from run.config import parse, run_command
from run.log import short

LINES = ("-", "--", "-.", ":")      # 4 and 7 colours have no common divisor: 28 different curves
MARKERS = "osD^vPX"
GREY, DOTTED = "#555555", (0, (1, 1.5))
GPT2_LOSS = {"fineweb": 3.2924, "openwebtext": 3.12}
GPT2_HELLASWAG, CHANCE = 0.2955, 0.25
BLOCK_FIGURES = {"activation": "activations, RMS", "added": "added / input",
                 "gradient": "gradients, RMS", "update": "update / weights",
                 "logit": "largest attention score", "saturated": "tokens on one token",
                 "dead": "units never above 0"}
COLUMNS, ROWS = 64, 22               # of a sample that is drawn
ENDINGS = (".png", ".svg", ".html")
STYLE = {"text.parse_math": False,         # names of runs may have a $
         "path.simplify_threshold": 0.3, "svg.fonttype": "none", "svg.hashsalt": "oneloop",
         "font.size": 9, "axes.titlesize": 10,
         "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
         "grid.color": "#DDDDDD", "grid.linewidth": 0.6, "axes.axisbelow": True,
         "legend.frameon": False, "legend.handlelength": 3.2}


@dataclass(frozen=True)
class PlotConfig:
    out: str = ""  # picture: .png, .svg or .html; empty: RUN/curve.png, or the terminal with
        # --follow
    x: Literal["tokens", "time", "steps"] = "tokens"  # what the curves are drawn against
    smooth: int = 0  # steps that a curve is averaged over; 1: none; 0: a fiftieth of the longest
        # run
    where: tuple[str, ...] = ()  # NAME=VALUE: only runs with this setting, of those in the folders
        # named, or in out
    sample: bool = False  # of one run: its loss and the unigram entropy of the data, beside its
        # last text
    layers: bool = False  # of one run: the figures of each block (train.py --watch_every)
    follow: bool = False  # draw again whenever a log has grown, until the runs are finished
    every: float = 5.0  # seconds between two looks at the logs, with --follow

    def __post_init__(self):
        if self.smooth < 0 or self.every <= 0:
            raise ValueError(f"smooth={self.smooth} must be at least 0, every={self.every} above 0")
        if self.out and Path(self.out).suffix not in ENDINGS:
            raise ValueError(f"out={self.out} must end in {', '.join(ENDINGS)}")


def picture(draw: Callable[[Any], None], size: tuple[float, float], dpi: int,
            kind: Literal["png", "svg"] = "png") -> bytes:
    """The content of a picture file; draw(figure) fills its figure, of `size` inches."""
    try:
        import matplotlib
        from matplotlib.figure import Figure  # pyplot would open windows
    except ModuleNotFoundError:
        raise ModuleNotFoundError('pictures need the extra "plots": pip install -c constraints.txt '
                                  '-e ".[plots]"; --follow without --out does without') from None
    file = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, dpi=dpi, layout="constrained")
        draw(figure)
        figure.savefig(file, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return file.getvalue()


def draw_panels(figure: Any, runs: list[Run], config: PlotConfig) -> None:
    """All panels: loss above, twice; learning rate, gradient norm and HellaSwag, if any, below."""
    scored = any(len(run.measured("acc_norm", "steps")[0]) for run in runs)
    grid, width = figure.add_gridspec(2, 6, height_ratios=(3, 2)), 2 if scored else 3
    draw_loss(figure.add_subplot(grid[0, :3]), runs, config.x, config.smooth, legend=True)
    draw_loss(figure.add_subplot(grid[0, 3:]), runs, "tokens" if config.x == "time" else "time",
              config.smooth, legend=False)
    lower = [figure.add_subplot(grid[1, i:i + width]) for i in range(0, 6, width)]
    draw_rate(lower[0], runs, config.x)
    draw_norm(lower[1], runs, config.x, config.smooth)
    if scored:
        draw_hellaswag(lower[2], runs, config.x)
    figure.suptitle(caption(runs), x=0.01, ha="left", fontsize=9, color=GREY)


def draw_with_sample(figure: Any, runs: list[Run], config: PlotConfig) -> None:
    """The loss of one run, and the last text that it wrote."""
    left, right = figure.subplots(1, 2)
    draw_loss(left, runs, config.x, config.smooth, legend=True)
    if entropy := unigram_entropy(runs[0]):
        left.axhline(entropy, color=GREY, linewidth=1.2, linestyle=DOTTED)
        left.annotate(f"unigram entropy {entropy:.3f}", (0.98, entropy), (0, -3),
                      ("axes fraction", "data"), "offset points", ha="right", va="top", color=GREY)
        bottom, top = left.get_ylim()
        left.set_ylim(min(bottom, entropy - 0.3), max(top, entropy + 0.3))
    samples = [line for line in runs[0].evaluations if isinstance(line.get("sample"), str)]
    last = samples[-1] if samples else {"step": 0, "sample": "(none so far)"}
    right.set_axis_off()
    right.set_title(f"what it writes at step {last['step']}", loc="left", fontweight="bold")
    lines = [part for line in last["sample"].splitlines()
             for part in textwrap.wrap(line, COLUMNS) or [""]]
    right.text(0, 1, "\n".join(lines[:ROWS] + ["..."] * (len(lines) > ROWS)), va="top", fontsize=8,
               family="monospace", transform=right.transAxes, parse_math=False)


def draw_layers(figure: Any, runs: list[Run], config: PlotConfig) -> None:
    """The figures of run/inside.py of one run: a line for each block, the deeper the darker."""
    looks = [line for line in runs[0].evaluations if "block_update" in line]
    if not looks:
        raise ValueError(f"{runs[0].name} was not looked into; train it with --watch_every=N")
    axes = figure.subplots(2, 4).flat
    for (key, title), ax in zip(BLOCK_FIGURES.items(), axes):
        values = np.array([line[f"block_{key}"] for line in looks])             # (looks, blocks)
        for i, column in enumerate(values.T):
            ax.plot([line["step"] for line in looks], column, linewidth=1.2,
                    color=str(0.8 * (1 - (i + 1) / len(values.T))))
        for i in sorted({0, len(values.T) - 1}):
            ax.annotate(str(i), (looks[-1]["step"], values[-1, i]), (3, 0),
                        textcoords="offset points", va="center", fontsize=8)
        ax.set_title(title, loc="left", fontsize=9)
        if (values > 0).all() and values.max() > 10 * values.min():
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_formatter("")
        else:
            ax.set_ylim(bottom=min(0, values.min()), top=1.1 * values.max() or 1)
    for ax in axes:                                                 # what is left of the grid
        ax.set_axis_off()
    figure.supxlabel("optimizer steps; the first and the last block have their number")


def unigram_entropy(run: Run) -> float | None:
    """In nats a token, of the data that a run trained on; None where they are not here."""
    try:
        return shards.read_meta(shards.find(run.config.get("data", ""))).get("unigram_entropy")
    except (FileNotFoundError, ValueError):
        return None


def draw_loss(ax: Any, runs: list[Run], axis: str, smooth: int, legend: bool) -> None:
    """Training loss, each step faintly and averaged, and validation loss as markers."""
    window, size, shown, lines, markers = window_of(runs, smooth), unit(runs, axis)[0], [], [], []
    verdicts = differences(runs)
    for i, run in enumerate(runs):
        mean, line = draw_curve(ax, i, run.x(axis) / size, run.steps["loss"], window,
                                [one.steps["loss"][:len(run)] for one in run.seeds])
        at, val = run.measured("val_loss", axis)
        points, = ax.plot(at / size, val, **marks(i, len(val)), linestyle="none")
        line.set_label(run.name)
        points.set_label((f"validation {val[-1]:.3f}" if len(val) else "no validation yet")
                         + (f", {verdicts[i]}" if verdicts[i] else ""))
        lines.append(line)
        markers.append(points)
        shown += [mean, val[len(val) // 4:]]
    if published := published_loss(runs):
        lines.append(ax.axhline(published, color=GREY, linewidth=1.2, linestyle=DOTTED,
                                label=f"GPT-2 124M {published:.3f}"))
        shown.append(np.array([published]))
    bottom, top = limits(shown)
    ax.set_ylim(bottom, top)
    label(ax, runs, axis, f"loss against {axis}", "nats per token")
    if legend:
        averaged = f", mean of {window} steps" if window > 1 else ""
        title = f"line: training{averaged}; marker: validation"
        if any(run.seeds for run in runs):
            title += "\nband: from the lowest seed to the highest"
        if len(runs) > 1:
            title += ("\ndifference: to the first, paired by seed" if any(verdicts) else
                      "\nwithout seeds in common: a difference may be chance")
        ax.legend(handles=lines + markers, loc="upper right", ncols=2, alignment="right",
                  title=title, title_fontsize=8)


def draw_curve(ax: Any, i: int, x: np.ndarray, y: np.ndarray, window: int,
               seeds: Sequence[np.ndarray] = ()) -> tuple[Any, Any]:
    """Every step faintly, and its average, or of several seeds a band; returns the average and its
    line."""
    mean = moving_average(y, window)
    faint = (255 * 2 + np.array([*bytes.fromhex(style(i)["color"][1:])])) / (255 * 3)
    if seeds:
        each = [moving_average(values, window) for values in seeds]
        ax.fill_between(x, np.min(each, axis=0), np.max(each, axis=0), color=faint, linewidth=0,
                        zorder=1)
    elif window > 1:
        ax.plot(x, y, color=faint, linewidth=0.5, zorder=1)         # two thirds white, no alpha:
    line, = ax.plot(x, mean, **style(i), linewidth=1.6)             # renderers differ in adding it
    return mean, line


def draw_rate(ax: Any, runs: list[Run], axis: str) -> None:
    for i, run in enumerate(runs):
        ax.plot(run.x(axis) / unit(runs, axis)[0], run.steps["lr"], **style(i), linewidth=1.4)
    label(ax, runs, axis, "learning rate")
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter("{x:g}")


def draw_norm(ax: Any, runs: list[Run], axis: str, smooth: int) -> None:
    """The gradient's norm as it was before clipping, on a log scale where it spans a decade."""
    for i, run in enumerate(runs):
        draw_curve(ax, i, run.x(axis) / unit(runs, axis)[0], run.steps["grad_norm"],
                   window_of(runs, smooth))
    label(ax, runs, axis, "gradient norm before clipping")
    norms = np.concatenate([run.steps["grad_norm"] for run in runs])
    norms = norms[norms > 0]
    if len(norms) and norms.max() > 10 * norms.min():   # else too few of the labels below are there
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(                               # labels at 1, 2, 5, 10, ...
            lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")


def draw_hellaswag(ax: Any, runs: list[Run], axis: str) -> None:
    for i, run in enumerate(runs):
        x, score = run.measured("acc_norm", axis)
        ax.plot(x / unit(runs, axis)[0], score, **{**marks(i, len(score)), **style(i)})
    for name, value, side in (("GPT-2 124M", GPT2_HELLASWAG, "left"), ("chance", CHANCE, "right")):
        ax.axhline(value, color=GREY, linewidth=1.2, linestyle=DOTTED)
        ax.annotate(f"{name} {value:.4g}", (0.02 if side == "left" else 0.98, value), (0, 2),
                    ("axes fraction", "data"), "offset points", ha=side, color=GREY)
    label(ax, runs, axis, "HellaSwag", "acc_norm")


def label(ax: Any, runs: list[Run], axis: str, title: str, y: str = "") -> None:
    ax.set_title(title, loc="left", fontweight="bold")
    ax.set_xlabel(unit(runs, axis)[1])
    ax.set_ylabel(y)
    ax.set_xlim(left=0)
    if axis == "tokens":
        ax.xaxis.set_major_formatter(lambda value, _: short(value))


def style(i: int) -> dict[str, Any]:
    return {"color": PALETTE[i % len(PALETTE)], "linestyle": LINES[i % len(LINES)]}


def marks(i: int, number: int) -> dict[str, Any]:
    """Markers of `number` evaluations: 20 of them at most, the last one always."""
    every = max(1, -(-number // 20))
    return {"color": PALETTE[i % len(PALETTE)], "marker": MARKERS[i % len(MARKERS)], "zorder": 3,
            "markerfacecolor": "white", "markersize": 5,
            "markevery": slice((number - 1) % every, None, every)}


def unit(runs: list[Run], axis: str) -> tuple[float, str]:
    """(divisor, label) of an x axis; time in the unit that suits the longest run."""
    if axis != "time":
        return 1, {"tokens": "tokens", "steps": "optimizer steps"}[axis]
    longest = max(run.steps["seconds"][-1] for run in runs)
    size, name = ((3600, "hours") if longest >= 3 * 3600 else (60, "minutes") if longest >= 180
                  else (1, "seconds"))
    return size, f"{name} of training, without evaluations"


def published_loss(runs: list[Run]) -> float | None:
    """GPT-2's validation loss on the data of these runs, if they share them and its tokenizer."""
    data = {Path(run.config.get("data", "")).name for run in runs}
    vocabularies = {run.config.get("model", {}).get("vocab_size") for run in runs}
    if len(data) > 1 or vocabularies != {shards.GPT2_VOCAB}:
        return None
    return GPT2_LOSS.get(data.pop())


def caption(runs: list[Run]) -> str:
    """One line on a single run: what it saw, how long, on what."""
    if len(runs) > 1:
        return ""
    run, device = runs[0], runs[0].summary.get("device")
    steps, tokens, seconds = (run.steps[key][-1] for key in ("step", "tokens", "seconds"))
    data = ",".join(Path(part).name for part in run.config.get("data", "?").split(","))
    return (f"{run.name}: {steps:.0f} steps, {short(tokens)} tokens of {data}, "
            f"{duration(seconds)} of training" + (f" on {device}" if device else ""))


def save(runs: list[Run], config: PlotConfig, path: Path) -> None:
    """Draw into a file. It is replaced whole, so that no viewer sees half of it."""
    started, content = seeds_together([run for run in runs if len(run)]), b""
    if started:
        draw, height, dpi = ((draw_with_sample, 3.4, 80) if config.sample else
                             (draw_layers, 4.4, 120) if config.layers else
                             (draw_panels, 6.6, 150))
        content = picture(lambda figure: draw(figure, started, config), (10, height), dpi,
                          "png" if path.suffix == ".png" else "svg")
    if path.suffix == ".html":
        content = page(runs, content.decode(), config).encode()
    if content:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content)


def page(runs: list[Run], svg: str, config: PlotConfig) -> str:
    """An HTML page with the picture inside; it reloads itself while a followed run goes on."""
    going_on = config.follow and not all(run.finished for run in runs)
    lines = [html.escape(status(run)) for run in runs]
    seconds = max(1, round(config.every))
    reload = f'<meta http-equiv="refresh" content="{seconds}">\n' if going_on else ""
    return (f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n{reload}'
            f"<title>{lines[0]}</title>\n<style>body {{ font: 14px sans-serif; margin: 1em auto; "
            f"max-width: 75em }} svg {{ width: 100%; height: auto }}</style>\n"
            + "".join(f"<p>{line}</p>\n" for line in lines)
            + svg[svg.find("<svg"):] + "</html>\n")


def show(runs: list[Run], config: PlotConfig) -> None:
    """Draw in the terminal; a line for each run where the output is none."""
    text = "\n".join(status(run) for run in runs)
    if sys.stdout.isatty():
        width, height = shutil.get_terminal_size()
        plot = text_plot(runs, config.x, config.smooth, width, max(4, height - len(runs) - 5),
                         color=len(runs) > 1)
        text = f"\033[H\033[2J{text}\n\n{plot}\n"                   # home, clear
    print(text, flush=True)


def follow(folders: list[str], config: PlotConfig) -> None:
    """Draw, and draw again when a log has grown, until all runs are finished."""
    drawn = None
    while True:
        runs = load_runs(folders)
        state = [(len(run), len(run.evaluations), run.finished) for run in runs]
        if state != drawn and config.out:
            save(runs, config, Path(config.out))
        elif state != drawn:
            show(runs, config)
        drawn = state
        if all(run.finished for run in runs):
            return
        time.sleep(config.every)


def main(words: list[str]) -> None:
    named = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    config = parse(PlotConfig, words[len(named):], "python -m experiments.plots RUN [RUN ...]",
                   about=__doc__)
    folders = find_runs(named or ["out"], config.where) if config.where else named or ["out/demo"]
    if (config.sample or config.layers) and len(folders) > 1:
        raise ValueError(f"--{'sample' if config.sample else 'layers'} draws one run, not "
                         f"{len(folders)}; name one")
    if config.follow:
        try:
            return follow(folders, config)
        except KeyboardInterrupt:
            return print()
    path = Path(config.out or Path(folders[0]) / "curve.png")
    runs = load_runs(folders)
    for run, folder in zip(runs, folders):
        if not len(run):
            raise ValueError(f"{folder}/log.jsonl has no training step yet; wait for one, or "
                             f"--follow the run")
    save(runs, config, path)
    print("\n".join(status(run) for run in runs) + f"\ndrawn: {path}")


if __name__ == "__main__":
    run_command(main)
