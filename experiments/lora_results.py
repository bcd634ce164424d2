"""What a LoRA study found: means, spreads and tables, from experiments/lora_sweep.py's CSV.

    points = points_of(read_rows(Path("experiments/results/lora_runs.csv")))
    print(tables(points));  facts = grid_facts(points, "imdb");  shares = gains(points, "imdb")

Seeds change the order of batches, which moves the loss far more than most settings do, but equally
for all of them. So a spread in brackets, and every error bar, is the standard deviation over seeds
of loss minus the seed's mean over the study; the one before it, in tables, is that of the loss.
"""
import csv
import dataclasses
import functools
import math
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable

import numpy as np

TYPES = {"study": str, "data": str, "variant": str, "targets": str, "bias": str, "r": int,
         "alpha": float, "dropout": float, "learning_rate": float, "epochs": float, "batch": int,
         "micro_batch": int, "seed": int, "steps": int, "train_loss": float, "val_loss": float,
         "seconds": float, "trainable": int}
SETTING = ("variant", "r", "alpha", "dropout", "targets", "bias", "learning_rate", "epochs",
           "batch", "micro_batch")
DATA_NAMES = {"imdb": "IMDB reviews", "alpaca": "Alpaca"}


@dataclass(frozen=True)
class Point:
    """A setting of a study on one data set, over its seeds. loss: of training, at the end."""
    study: str
    data: str
    setting: dict[str, Any]
    loss: tuple[float, ...]             # a value for each seed
    val: tuple[float, ...]
    loss_spread: float                  # over seeds, each seed's mean over the study taken out
    val_spread: float
    seconds: float                      # the least of the seeds: other work only adds to it
    trainable: int

    def __getitem__(self, name: str) -> Any:
        return self.setting[name]

    @property
    def mean_loss(self) -> float:
        return statistics.fmean(self.loss)

    @property
    def mean_val(self) -> float:
        return statistics.fmean(self.val)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of the CSV with their types; ValueError names the column or line that is wrong."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no table {path}; experiments.lora_sweep writes it")
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [name for name in TYPES if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path} has no column {', '.join(missing)}; it is no table of "
                             f"experiments.lora_sweep")
        rows = []
        for line, row in enumerate(reader, 2):
            try:
                rows.append({name: kind(row[name]) for name, kind in TYPES.items()})
            except (TypeError, ValueError):
                raise ValueError(f"{path}, line {line}, is damaged: {row}") from None
    if not rows:
        raise ValueError(f"{path} has no rows yet; wait for the first run of the sweep")
    return rows


def points_of(rows: list[dict[str, Any]]) -> list[Point]:
    """Settings over their seeds. A seed that a study has not finished yet is left out of it."""
    found = defaultdict(lambda: defaultdict(dict))          # (study, data) -> setting -> seed: row
    for row in rows:
        found[row["study"], row["data"]][tuple(row[name] for name in SETTING)][row["seed"]] = row
    points = []
    for (study, data), settings in found.items():
        per_seed = settings.values()
        most = max(sum(seed in runs for runs in per_seed) for seed in set().union(*per_seed))
        seeds = sorted(seed for seed in set().union(*per_seed)
                       if sum(seed in runs for runs in per_seed) == most)
        whole = {key: runs for key, runs in settings.items() if all(s in runs for s in seeds)}
        levels = {name: [_mean(runs[seed][name] for runs in whole.values()) for seed in seeds]
                  for name in ("train_loss", "val_loss")}
        for key, runs in whole.items():
            values = {name: [runs[seed][name] for seed in seeds] for name in levels}
            spreads = [_spread(np.subtract(values[name], levels[name])) for name in levels]
            points.append(Point(
                study, data, dict(zip(SETTING, key)), *map(tuple, values.values()), *spreads,
                min(runs[seed]["seconds"] for seed in seeds), runs[seeds[0]]["trainable"]))
    return points


def _mean(values: Iterable[float]) -> float:
    """Of the finite values: a run that diverged says nothing of its seed."""
    return statistics.fmean(value for value in values if math.isfinite(value))


def _spread(values: Iterable[float]) -> float:
    values = list(values)
    return statistics.stdev(values) if len(values) > 1 and np.isfinite(values).all() else 0.0


def of(points: list[Point], study: str, data: str = "", **settings: Any) -> list[Point]:
    """The points of a study, on one data set, that have these settings."""
    return [p for p in points if p.study == study and data in ("", p.data)
            and all(p[name] == value for name, value in settings.items())]


def data_sets(points: list[Point]) -> list[str]:
    return list(dict.fromkeys(p.data for p in points))


def reference(points: list[Point], study: str, data: str) -> Point:
    """The setting that a study's others differ from: in each column, what most of it have."""
    found = of(points, study, data)
    usual = {name: statistics.mode(p[name] for p in found) for name in SETTING}
    return max(found, key=lambda p: sum(p[name] == usual[name] for name in SETTING))


def knob(points: list[Point], study: str, data: str, name: str) -> list[Point]:
    """The reference, and what differs from it in this one column, in order of it.

    Of the batch, what is computed at once goes along with it.
    """
    start, along = reference(points, study, data), {"micro_batch"} if name == "batch" else set()
    found = [p for p in of(points, study, data) if all(
        p[key] == value for key, value in start.setting.items()
        if key not in {name} | along) and (not along or p["micro_batch"] == p["batch"])]
    return sorted(found, key=lambda p: p[name])


def best(points: list[Point]) -> Point:
    return min(points, key=lambda p: p.mean_val)


def base_loss(points: list[Point], data: str) -> float:
    """Validation loss of the model before any training."""
    found = of(points, "base", data)
    if not found:
        raise ValueError(f"the table has no run of the study base on {data}; the same sweep with "
                         f"--study=base adds it")
    return found[0].mean_val


# ------------------------------------------------------------------------------------------------
# alpha x learning rate

def best_rate(rates: list[float], losses: list[float]) -> float | None:
    """The learning rate of the lowest loss, between those tried: the lowest point of the parabola
    through the lowest loss and its neighbours over log(rate). None at the edge of what was tried.

        best_rate([1, 10, 100], [2, 1, 2]) is 10
    """
    i = int(np.argmin(losses))
    if not 0 < i < len(losses) - 1 or not np.isfinite(losses[i - 1:i + 2]).all():
        return None
    x, (a, b, c) = np.log(rates[i - 1:i + 2]), losses[i - 1:i + 2]
    left, right = (b - a) / (x[1] - x[0]), (c - b) / (x[2] - x[1])
    at_left, at_right = (x[0] + x[1]) / 2, (x[1] + x[2]) / 2        # the slope is exact there
    return math.exp(at_left - left * (at_right - at_left) / (right - left))


def rate_of(level: float, rates: list[float], losses: list[float]) -> float | None:
    """The least learning rate at which the loss is down to a level, between those tried.

        rate_of(3, [1, 100], [4, 2]) is 10
    """
    for x, a, y, b in zip(rates, losses, rates[1:], losses[1:]):
        if a >= level > b:
            return math.exp(math.log(x) + (a - level) / (a - b) * math.log(y / x))
    return None


def slope(alphas: list[float], rates: list[float | None]) -> float | None:
    """Of log(rate) over log(alpha), by least squares."""
    inside = [(math.log(a), math.log(lr)) for a, lr in zip(alphas, rates) if lr]
    return float(np.polyfit(*zip(*inside), 1)[0]) if len(inside) > 2 else None


def grid_facts(points: list[Point], data: str) -> dict[str, Any]:
    """How the learning rates that do the same move with alpha, seed by seed.

    best: the rates of the lowest loss. half: the rates at which half of the largest gain over the
    base is there. Each with its slope: -1 where alpha x rate decides, -1/2 where alpha x rate^2
    does. at_one_rate, at_own_rate: range over alpha of the validation loss.
    """
    base = base_loss(points, data)
    alphas = sorted({p["alpha"] for p in of(points, "grid", data)})
    rates = sorted({p["learning_rate"] for p in of(points, "grid", data)})
    cells = {(p["alpha"], p["learning_rate"]): p.val for p in of(points, "grid", data)}
    seeds = len(next(iter(cells.values())))
    losses = np.array([[cells.get((a, lr), (math.inf,) * seeds) for lr in rates] for a in alphas])
    facts: dict[str, Any] = {}
    capped = np.minimum(losses, base)                   # above the base, how far is no matter
    half = (base + capped.min(axis=(0, 1))) / 2         # of each seed
    for name, find in (("best", lambda seed: best_rate),
                       ("half", lambda seed: functools.partial(rate_of, half[seed]))):
        found = [[find(seed)(rates, line.tolist()) for line in capped[:, :, seed]]
                 for seed in range(seeds)]
        slopes = [k for line in found if (k := slope(alphas, line)) is not None]
        facts[name] = [[line[i] for line in found] for i in range(len(alphas))]
        facts[f"{name}_slope"] = _mean(slopes) if slopes else None
        facts[f"{name}_spread"] = _spread(slopes)
    means = losses.mean(axis=2)
    ranges = means.max(axis=0) - means.min(axis=0)
    return {"alphas": alphas, "rates": rates, "val": means.tolist(), **facts,
            "at_own_rate": float(means.min(axis=1).max() - means.min()),
            "at_one_rate": {f"{lr:g}": float(r) for lr, r in zip(rates, ranges)}}


def gains(points: list[Point], data: str) -> dict[str, float]:
    """What turning each knob alone gains, as a share of the largest gain of an adapter."""
    adapters = [p for p in points if p.data == data and p["variant"] != "full"]
    most = base_loss(points, data) - best(adapters).mean_val
    shares = {}
    for study, names in (("original", ("r", "alpha", "dropout")),
                         ("budget", ("learning_rate", "epochs", "batch", "micro_batch"))):
        for name in names if of(points, study, data) else ():
            turned = knob(points, study, data, name)
            shares[name] = (reference(points, study, data).mean_val - best(turned).mean_val) / most
    return shares


# ------------------------------------------------------------------------------------------------
# Tables

def plus(values: tuple[float, ...], spread: float) -> str:
    """5.5393 ± 0.0240 (0.0003), or 5.5393 of a single seed."""
    if not np.isfinite(values).all():
        return "diverged"
    if len(values) < 2:
        return f"{values[0]:.4f}"
    return f"{statistics.fmean(values):.4f} ± {_spread(values):.4f} ({spread:.4f})"


def rows_of(points: list[Point], names: tuple[str, ...]) -> list[str]:
    least = best(points)
    heads = (*names, "seeds", "final loss", "validation", "trainable", "time")
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for p in points:
        mark = "**" if p is least else ""
        lines.append("| " + " | ".join((
            *(_spell(p[name]) for name in names), str(len(p.val)), plus(p.loss, p.loss_spread),
            f"{mark}{plus(p.val, p.val_spread)}{mark}", f"{p.trainable:,}", f"{p.seconds:.1f} s"))
            + " |")
    return lines


def _spell(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def tables(points: list[Point]) -> str:
    """All tables, in markdown."""
    lines = []
    for data in data_sets(points):
        name = DATA_NAMES.get(data, data)
        lines += [f"{name}: validation loss of the base {base_loss(points, data):.4f}", ""]
        for study, names in (("original", ("r", "alpha", "dropout")), ("ranks", ("variant", "r")),
                             ("budget", ("learning_rate", "epochs", "batch", "micro_batch"))):
            if found := of(points, study, data):
                lines += [f"{name}, {study}", "", *rows_of(found, names), ""]
        for study, column in (("variants", "variant"), ("targets", "targets")):
            values = dict.fromkeys(p[column] for p in of(points, study, data))
            if values:
                found = [best(of(points, study, data, **{column: value})) for value in values]
                lines += [f"{name}, {study}, each at its best learning rate", "",
                          *rows_of(found, (column, "learning_rate")), ""]
        if of(points, "grid", data):
            lines += [f"{name}, grid: validation loss, alpha down, learning rate across", "",
                      *grid_table(grid_facts(points, data)), ""]
    return "\n".join(lines)


def grid_table(facts: dict[str, Any]) -> list[str]:
    lines = ["| alpha | " + " | ".join(f"{lr:g}" for lr in facts["rates"])
             + " | best rate | half-way rate |", "|" + "---|" * (len(facts["rates"]) + 3)]
    for alpha, losses, *found in zip(*(facts[name] for name in ("alphas", "val", "best", "half"))):
        cells = [f"**{v:.4f}**" if v == min(losses) else f"{v:.4f}" for v in losses]
        cells += [f"{_mean(inside):.2g}" if (inside := [lr for lr in rates if lr]) else "outside"
                  for rates in found]
        lines.append(f"| {alpha:g} | " + " | ".join(cells) + " |")
    one = ", ".join(f"{r:.4f} at {lr}" for lr, r in facts["at_one_rate"].items())
    return lines + ["", f"slope of log(rate) over log(alpha): best {spell_slope(facts, 'best')}, "
                        f"half-way {spell_slope(facts, 'half')}; range of the loss over alpha: "
                        f"{one}; {facts['at_own_rate']:.4f} at each alpha's best rate"]


def spell_slope(facts: dict[str, Any], name: str) -> str:
    value = facts[f"{name}_slope"]
    if value is None:
        return "unknown"
    one = len(facts[name][0]) < 2
    return f"{value:.2f}" + ("" if one else f" ± {facts[f'{name}_spread']:.2f}")


def summary(points: list[Point]) -> dict[str, Any]:
    return {"points": [dataclasses.asdict(p) for p in points],
            "grid": {data: grid_facts(points, data) for data in data_sets(points)
                     if of(points, "grid", data)},
            "gains": {data: gains(points, data) for data in data_sets(points)}}
