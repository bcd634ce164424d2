"""Pictures and tables of a LoRA study, from the CSV that experiments/lora_sweep.py writes.

    python -m experiments.lora_pictures experiments/results/lora_runs.csv [--out=FOLDER]

Out: markdown tables on the screen; lora_summary.json; and, for the studies that the CSV has,
lora_imdb.png and lora_alpaca.png (the original's four panels), lora_compare.png (both data sets,
with a radar chart), lora_grid.png, lora_variants.png and lora_budget.png. Needs the extra "plots".
Error bars are spreads over seeds, each seed's own level taken out (experiments/lora_results.py).
"""
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import numpy as np

from experiments import plots
from experiments.lora_results import (DATA_NAMES, Point, base_loss, best, data_sets, gains,
                                      grid_facts, knob, of, points_of, read_rows, reference,
                                      spell_slope, summary, tables)
from experiments.plots import GREY, LINES, MARKERS
from experiments.runs import PALETTE
from formats.files import write_bytes, write_json
from run.config import parse, run_command

KNOBS = {"r": "rank", "alpha": "alpha", "dropout": "dropout", "learning_rate": "learning rate",
         "epochs": "epochs", "batch": "batch", "micro_batch": "accumulation"}


@dataclass(frozen=True)
class PicturesConfig:
    out: str = ""  # folder of the pictures; empty: that of the CSV


def save(path: Path, size: tuple[float, float], draw: Callable[[Any], None]) -> None:
    """Draw a figure into a .png, which is replaced whole."""
    content = plots.picture(draw, size, dpi=130)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, content)


def style(i: int) -> dict[str, Any]:
    return {"color": PALETTE[i % len(PALETTE)], "linestyle": LINES[i % len(LINES)],
            "marker": MARKERS[i % len(MARKERS)], "markersize": 5, "markerfacecolor": "white",
            "capsize": 2, "linewidth": 1.5}


def title(ax: Any, text: str, x: str = "", y: str = "") -> None:
    ax.set_title(text, loc="left", fontweight="bold")
    ax.set_xlabel(x)
    ax.set_ylabel(y)


def log_axis(ax: Any, values: list[float], base: int = 2) -> None:
    """A logarithmic x axis with a tick at each value."""
    ax.set_xscale("log", base=base)
    ax.set_xticks(sorted(set(values)), [f"{value:g}" for value in sorted(set(values))])
    ax.minorticks_off()


def curve(ax: Any, i: int, points: list[Point], name: str, label: str, loss: bool = False,
          less: float = 0.0) -> None:
    """Loss against one setting, with error bars: of validation, or training; without `less`."""
    values = [(p.mean_loss if loss else p.mean_val) - less for p in points]
    spreads = [p.loss_spread if loss else p.val_spread for p in points]
    shown = [(p[name], v, s) for p, v, s in zip(points, values, spreads) if np.isfinite(v)]
    ax.errorbar(*np.array(shown).reshape(-1, 3).T[:2], yerr=[s for *_, s in shown], label=label,
                **style(i))


# ------------------------------------------------------------------------------------------------
# The original study

def labels(points: list[Point], start: Point) -> list[str]:
    """What each setting changes of the first."""
    changed = [[f"{'α' if name == 'alpha' else name}={p[name]:g}" for name in
                ("r", "alpha", "dropout") if p[name] != start[name]] for p in points]
    return [", ".join(parts) or f"r={start['r']}, α={start['alpha']:g}, "
            f"dropout={start['dropout']:g}" for parts in changed]


def draw_original(figure: Any, points: list[Point], data: str) -> None:
    found, start = of(points, "original", data), reference(points, "original", data)
    places, names = range(len(found)), labels(found, start)
    axes = figure.subplots(2, 2, height_ratios=(3, 2))
    ax, parameters, by_alpha, by_rank = axes.ravel()
    least = min(found, key=lambda p: p.mean_loss)
    for i, p in zip(places, found):
        ax.errorbar(p.mean_loss, i, xerr=p.loss_spread, **style(1 if p is least else 0))
    title(ax, "final training loss (lowest in orange)", "nats per token")
    parameters.barh(places, [p.trainable for p in found], color=PALETTE[0])
    for i, p in zip(places, found):
        parameters.annotate(f"{p.trainable:,}", (p.trainable, i), (3, 0),
                            textcoords="offset points", va="center", fontsize=8)
    title(parameters, "trainable parameters")
    parameters.set_xlim(right=1.2 * max(p.trainable for p in found))
    parameters.xaxis.set_major_locator(_ticks(4))
    for panel in (ax, parameters):
        panel.set_yticks(places, names if panel is ax else [""] * len(names))
        panel.invert_yaxis()
    for panel, name, text in ((by_alpha, "alpha", f"alpha, r={start['r']}"),
                              (by_rank, "r", f"rank, α={start['alpha']:g}")):
        line = knob(points, "original", data, name)
        curve(panel, 0, line, name, "training, last steps", loss=True)
        curve(panel, 1, line, name, "validation")
        log_axis(panel, [p[name] for p in line])
        title(panel, f"loss against {text}, dropout {start['dropout']:g}",
              {"r": "r", "alpha": "α"}[name], "nats per token")
    low = min(by_alpha.get_ylim()[0], by_rank.get_ylim()[0])
    high = max(by_alpha.get_ylim()[1], by_rank.get_ylim()[1])
    by_alpha.set_ylim(low, high)                        # one scale: what matters shows
    by_rank.set_ylim(low, high)
    by_alpha.legend()
    seeds = len(start.loss)
    figure.suptitle(f"{DATA_NAMES.get(data, data)}: 17 settings, {seeds} seeds, learning rate "
                    f"{start['learning_rate']:g}", x=0.01, ha="left", color=GREY)


def draw_compare(figure: Any, points: list[Point]) -> None:
    """Both data sets: what each setting gains over the base, and which knob brings how much."""
    left = figure.add_subplot(1, 2, 1)
    names = data_sets(points)
    for i, data in enumerate(names):
        found, base = of(points, "original", data), base_loss(points, data)
        places = np.arange(len(found)) + 0.2 * (i - 0.5)
        shape = {**style(i), "linestyle": "none"}
        left.errorbar([base - p.mean_val for p in found], places,
                      xerr=[p.val_spread for p in found], label=DATA_NAMES.get(data, data), **shape)
    left.set_yticks(range(len(found)), labels(found, reference(points, "original", names[-1])))
    left.invert_yaxis()
    left.set_xlim(left=0)
    left.legend()
    title(left, "validation loss below the base's", "nats per token")
    shares = {data: gains(points, data) for data in names}
    knobs = list(shares[names[0]])
    angles = np.linspace(0, 2 * np.pi, len(knobs), endpoint=False)
    radar = figure.add_subplot(1, 2, 2, projection="polar")
    radar.set_theta_offset(np.pi / 2)
    radar.set_theta_direction(-1)
    for i, data in enumerate(names):
        values = [shares[data][name] for name in knobs]
        shape = {key: value for key, value in style(i).items() if key != "capsize"}
        radar.plot([*angles, angles[0]], [*values, values[0]], **shape,
                   label=DATA_NAMES.get(data, data))
        radar.fill(angles, values, color=PALETTE[i], alpha=0.12)
    radar.set_xticks(angles, [f"{KNOBS[name]}\n" + " / ".join(
        f"{shares[data][name]:.0%}" for data in names) for name in knobs])
    radar.tick_params(axis="x", pad=14)
    radar.set_ylim(0, max(0.01, *(v for data in names for v in shares[data].values())) * 1.05)
    radar.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    radar.yaxis.set_major_locator(_ticks(4))
    radar.set_rlabel_position(180 / len(knobs))
    radar.tick_params(axis="y", labelsize=7, labelcolor=GREY)
    radar.set_title("share of the largest gain of an adapter\nthat turning one setting brings ("
                    + " / ".join(DATA_NAMES.get(data, data) for data in names) + ")",
                    fontweight="bold", pad=18)


def _ticks(number: int) -> Any:
    from matplotlib.ticker import MaxNLocator
    return MaxNLocator(number)


# ------------------------------------------------------------------------------------------------
# Beyond it

def draw_grid(figure: Any, points: list[Point]) -> None:
    """alpha x learning rate: a map of the loss, and the loss against two products of them."""
    names = data_sets(points)
    axes = figure.subplots(len(names), 3, squeeze=False, width_ratios=(1.4, 1, 1))
    for data, (ax, *panels) in zip(names, axes):
        facts, base = grid_facts(points, data), base_loss(points, data)
        losses = np.array(facts["val"])
        draw_map(ax, facts, base)
        title(ax, f"{DATA_NAMES.get(data, data)}: validation loss; dots: half of the\ngain is "
                  f"there, slope {spell_slope(facts, 'half')} (dashed: −1)", "learning rate", "α")
        for panel, power, name in zip(panels, (1, 0.5), ("α", "√α")):
            for i, (alpha, row) in enumerate(zip(facts["alphas"], losses)):
                shape = {key: value for key, value in style(i).items() if key != "capsize"}
                panel.plot(alpha ** power * np.array(facts["rates"]), row, label=f"α = {alpha:g}",
                           **shape)
            panel.axhline(base, color=GREY, linewidth=1)
            panel.annotate("base", (0, base), (3, 3), ("axes fraction", "data"),
                           "offset points", color=GREY)
            panel.set_xscale("log")
            panel.set_ylim(losses.min() - 0.02, base + 0.15 * (base - losses.min()))
            title(panel, f"against {name} x learning rate", f"{name} x learning rate")
        panels[0].legend(loc="lower left")


def draw_map(ax: Any, facts: dict[str, Any], base: float) -> None:
    """The loss of each pair as a coloured cell; where half the gain is there, per alpha; and
    through the middle of those, the line on which alpha x rate is constant."""
    losses, rates, alphas = np.array(facts["val"]), facts["rates"], facts["alphas"]
    low, high = losses.min(), base + 0.1 * (base - losses.min())
    ax.imshow(np.minimum(losses, high), cmap="viridis_r", aspect="auto", vmin=low, vmax=high)
    for (row, column), loss in np.ndenumerate(losses):
        ax.text(column, row, f"{loss:.3f}" if np.isfinite(loss) else "−", ha="center",
                va="center", fontsize=8, color="black" if loss < (low + high) / 2 else "white",
                fontweight="bold" if loss == losses[row].min() else "normal")
    step = np.log(rates[1] / rates[0])
    found = [(np.log(statistics.geometric_mean(inside) / rates[0]) / step, row)
             for row, seeds in enumerate(facts["half"]) if (inside := [lr for lr in seeds if lr])]
    if found:
        x, y = np.array(found).T
        ax.plot(x, y - 0.3, "o-", color=PALETTE[1], markeredgecolor="white", linewidth=1.5)
        rows = np.array([-0.5, len(alphas) - 0.5])
        ax.plot(x.mean() - np.log(alphas[1] / alphas[0]) / step * (rows - y.mean() + 0.3), rows,
                "--", color=PALETTE[1], linewidth=1.5)
    ax.set_xlim(-0.5, len(rates) - 0.5)
    ax.set_ylim(len(alphas) - 0.5, -0.5)
    ax.set_xticks(range(len(rates)), [f"{lr:g}" for lr in rates])
    ax.set_yticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas])
    ax.grid(False)


def draw_variants(figure: Any, points: list[Point]) -> None:
    """Variants and targets against the learning rate, LoRA and rsLoRA against the rank."""
    names = data_sets(points)
    for data, panels in zip(names, figure.subplots(len(names), 3, squeeze=False)):
        for ax, study, column, x in ((panels[0], "variants", "variant", "learning_rate"),
                                     (panels[1], "targets", "targets", "learning_rate"),
                                     (panels[2], "ranks", "variant", "r")):
            found = of(points, study, data)
            full = [p for p in found if p["variant"] == "full"]
            found = [p for p in found if p not in full]
            ax.set_visible(bool(found))
            if found:
                title(ax, f"{DATA_NAMES.get(data, data)}: {study}" + (
                    f" (full training: {best(full).mean_val:.3f})" if full else ""),
                    KNOBS[x], "validation loss")
                draw_lines(ax, found, column, x, base_loss(points, data))


def draw_lines(ax: Any, points: list[Point], column: str, x: str, base: float) -> None:
    """A line for each value of a column, with the time of a run where the points differ in it."""
    for i, value in enumerate(dict.fromkeys(p[column] for p in points)):
        line = sorted((p for p in points if p[column] == value), key=lambda p: p[x])
        time = f", {min(p.seconds for p in line):.1f} s" if x == "learning_rate" else ""
        curve(ax, i, line, x, value + time)
    ax.axhline(base, color=GREY, linewidth=1, label="base")
    log_axis(ax, [p[x] for p in points], 4)
    lowest = min(p.mean_val for p in points)
    ax.set_ylim(lowest - 0.05 * (base - lowest), base + 0.1 * (base - lowest))
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.14), ncols=2)


def draw_budget(figure: Any, points: list[Point]) -> None:
    """Learning rate, epochs, batch and accumulation, against the untrained model."""
    for ax, name in zip(figure.subplots(2, 2).ravel(), ("learning_rate", "epochs", "batch",
                                                        "micro_batch")):
        for i, data in enumerate(data_sets(points)):
            line = knob(points, "budget", data, name)
            curve(ax, i, line, name, DATA_NAMES.get(data, data),
                  less=base_loss(points, data))
        log_axis(ax, [p[name] for p in line])
        ax.axhline(0, color=GREY, linewidth=1)
        top = ax.get_ylim()[1]
        ax.set_ylim(top=min(top, 0.1))
        title(ax, {"micro_batch": f"sequences at once, of {line[0]['batch']} in a step",
                   "batch": "sequences of a step"}.get(name, KNOBS[name]), "",
              "validation loss − the base's")
        if name == "learning_rate":
            ax.legend()


def draw_all(points: list[Point], folder: Path) -> list[Path]:
    """The pictures that the studies of the points allow."""
    drawn = []

    def picture(name: str, size: tuple[float, float], draw: Callable[[Any], None]) -> None:
        save(folder / f"lora_{name}.png", size, draw)
        drawn.append(folder / f"lora_{name}.png")

    if of(points, "original"):
        for data in data_sets(points):
            picture(data, (11, 8.5), lambda figure: draw_original(figure, points, data))
        picture("compare", (12.5, 6), lambda figure: draw_compare(figure, points))
    if of(points, "grid"):
        picture("grid", (14.5, 7.5), lambda figure: draw_grid(figure, points))
    if any(of(points, study) for study in ("variants", "targets", "ranks")):
        picture("variants", (14, 9.5), lambda figure: draw_variants(figure, points))
    if of(points, "budget"):
        picture("budget", (10, 7), lambda figure: draw_budget(figure, points))
    return drawn


def main(words: list[str]) -> None:
    if not words or words[0].startswith("-") and words[0] not in ("--help", "-h"):
        raise ValueError("give the table of a sweep: python -m experiments.lora_pictures "
                         "out/sweep/lora_runs.csv")
    named = words[:1] if not words[0].startswith("-") else []
    config = parse(PicturesConfig, words[len(named):], "python -m experiments.lora_pictures CSV",
                   about=__doc__)
    path = Path(words[0])
    folder, points = Path(config.out or path.parent), points_of(read_rows(path))
    print(tables(points))
    drawn = draw_all(points, folder)
    write_json(folder / "lora_summary.json", summary(points))
    print("drawn: " + ", ".join(map(str, drawn)))


if __name__ == "__main__":
    run_command(main)
