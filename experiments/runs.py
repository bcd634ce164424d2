"""What runs have logged, as arrays, as a line of text, and as a plot for the terminal.

    run = load_run(Path("out/demo"), "demo")
    run.steps["loss"]; run.x("time"); run.measured("val_loss", "tokens")
    print(status(run)); print(text_plot([run], "tokens", smooth=20, width=80, height=16))

In: a run's log.jsonl, config.json and run.json (run/log.py). experiments/plots.py draws from this.
"""
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.ttest import holm, paired
from formats.files import read_json
from run.config import flatten
from run.log import as_number, read_log, seconds_at, short

STEP_KEYS = ("step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s")
AXES = {"tokens": "tokens", "time": "seconds", "steps": "step"}     # name on the command line: key
# Okabe and Ito 2008, but for yellow, which white paper swallows; in an order of strong contrasts.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
BRAILLE = np.array([[1, 8], [2, 16], [4, 32], [64, 128]])           # bits of a character's 8 dots


@dataclass(frozen=True)
class Run:
    """What a run has logged. steps: STEP_KEYS and "seconds", a value for each training step."""
    name: str
    steps: dict[str, np.ndarray]
    evaluations: list[dict[str, Any]]
    config: dict[str, Any]
    summary: dict[str, Any]                                         # run.json
    seeds: tuple["Run", ...] = ()           # those that this one is the mean of

    def __len__(self) -> int:
        return len(self.steps["step"])

    @property
    def finished(self) -> bool:
        return "final" in self.summary

    def x(self, axis: str) -> np.ndarray:
        return self.steps[AXES[axis]]

    def measured(self, key: str, axis: str) -> tuple[np.ndarray, np.ndarray]:
        """(x, values) of the evaluations that measured `key`."""
        lines = [line for line in self.evaluations if isinstance(line.get(key), (int, float))]
        x = np.interp([line["step"] for line in lines], [0, *self.steps["step"]],
                      [0, *self.x(axis)])
        return x, np.array([line[key] for line in lines], float)


def load_run(folder: Path, name: str) -> Run:
    """Read a run's folder; one without a training step so far has empty arrays.

    "seconds" is time of training: evaluations, saves and pauses are not in it.
    """
    path = folder / "log.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"there is no run in {folder}: {path} is missing; a run is a "
                                f"folder that train.py wrote, such as out/demo")
    summary = _json(folder / "run.json")        # first: with "final" in it, the log is whole
    lines = read_log(path)
    training = [line for line in lines if "loss" in line]
    steps = {key: np.array([as_number(line.get(key)) for line in training], float)
             for key in STEP_KEYS}
    steps["seconds"] = np.array(seconds_at(training))
    return Run(name, steps, [line for line in lines if "loss" not in line],
               _json(folder / "config.json"), summary)


def load_runs(folders: list[str]) -> list[Run]:
    """Runs under the names of their folders, or their paths where two names are the same."""
    names = [Path(folder).resolve().name for folder in folders]
    return [load_run(Path(folder), name if names.count(name) == 1 else folder)
            for folder, name in zip(folders, names)]


def find_runs(folders: list[str], where: tuple[str, ...]) -> list[str]:
    """The folders of runs, these or below them, whose settings are as `where` says: NAME=VALUE
    each, several values of a setting joined by "+". ValueError where there is none."""
    wanted = dict(text.split("=", 1) if "=" in text else (text, "") for text in where)
    found, seen = [], {name: set() for name in wanted}
    for path in sorted({path for folder in folders for path in Path(folder).rglob("config.json")}):
        settings = flatten(_json(path))
        for name in wanted:
            seen[name].add(_spelled(settings.get(name)))
        if all(_spelled(settings.get(name)) == _spelled(value) for name, value in wanted.items()):
            found.append(str(path.parent))
    if not found:
        there = "; ".join(f"{name} is {', '.join(sorted(values)) or 'nowhere'}"
                          for name, values in seen.items())
        raise ValueError(f"where={','.join(where)} fits no run in {', '.join(folders)}: {there}")
    return found


def _spelled(value: Any) -> str:
    """A setting, of a config.json or as typed, so that equal ones are alike: 1e-3 is 0.001."""
    if isinstance(value, list):
        return "+".join(map(_spelled, value))
    try:
        return f"{float(value):g}" if not isinstance(value, bool) else str(value).lower()
    except (TypeError, ValueError):
        return str(value).lower()


def seeds_together(runs: list[Run]) -> list[Run]:
    """Runs that differ in nothing but their seeds as one, their mean; others as they are."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        settings = {name: value for name, value in flatten(run.config).items()
                    if name not in ("seed", "out")}
        groups.setdefault(repr(sorted(settings.items())), []).append(run)
    return [together for group in groups.values() for together in (
        [mean_run(group)] if len({run.config.get("seed") for run in group}) == len(group) > 1
        else group)]


def mean_run(runs: list[Run]) -> Run:
    """The mean of runs, as far as the shortest has come; evaluations that all of them have."""
    end = min(map(len, runs))
    evaluations = []
    for lines in zip(*(run.evaluations for run in runs)):
        keys = [key for key in lines[0] if all(isinstance(line.get(key), (int, float))
                                               for line in lines)]
        if len({line["step"] for line in lines}) == 1:
            evaluations.append({key: float(np.mean([line[key] for line in lines])) for key in keys})
    return Run(f"{runs[0].name}, {len(runs)} seeds",
               {key: np.mean([run.steps[key][:end] for run in runs], axis=0)
                for key in runs[0].steps}, evaluations, runs[0].config, runs[0].summary,
               tuple(runs))


def differences(runs: list[Run]) -> list[str]:
    """Whether each run's validation loss, per byte where all know that, for their tokens may
    differ, is another than the first's by more than seeds do, in words: the paired t-test,
    corrected for several (experiments/ttest.py), at the last step that all seeds of both
    evaluated. "" where fewer than two seeds are common."""
    per_byte = all(len(run.measured("bits_per_byte", "steps")[0]) for run in runs)
    key = "bits_per_byte" if per_byte else "val_loss"

    def evaluated(run: Run) -> dict[Any, dict[int, float]]:
        return {one.config.get("seed"): {line["step"]: as_number(line[key])
                                         for line in one.evaluations if key in line}
                for one in run.seeds or (run,)}
    words, found, base = [""] * len(runs), {}, evaluated(runs[0])
    for i, run in enumerate(runs[1:], 1):
        own = evaluated(run)
        seeds = sorted(base.keys() & own.keys(), key=str)
        steps = [set(part[seed]) for part in (base, own) for seed in seeds]
        if len(seeds) < 2 or not set.intersection(*steps):
            continue
        last = max(set.intersection(*steps))
        change = [own[seed][last] - base[seed][last] for seed in seeds]
        if lost := sum(not math.isfinite(value) for value in change):
            words[i] = f"no test, {lost} of {len(seeds)} seeds diverged"
        else:
            found[i] = paired(change).p
    for i, chance in zip(found, holm(list(found.values()))):
        words[i] = f"{'differs' if chance < 0.05 else 'no difference found'} (p {chance:.2g})"
    return words


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of each value and its neighbours, `window` together; what is not finite is left out.

    Centred: an exponential average lags, which draws training loss above validation loss while
    both fall. Near the start, where losses are steep, the window shrinks to stay centred; near the
    end, where they are flat, it keeps the half that is there.

        moving_average([8, 4, 2, 2, 6], 3) is [8, (8+4+2)/3, (4+2+2)/3, (2+2+6)/3, (2+6)/2]
    """
    values = np.asarray(values, float)
    index = np.arange(len(values))
    half = np.minimum(window // 2, index)
    start, stop = index - half, np.minimum(len(values), index + half + 1)
    finite = np.isfinite(values)
    total = np.cumsum([0.0, *np.where(finite, values, 0)])
    count = np.cumsum([0, *finite])
    number = count[stop] - count[start]
    return np.where(number > 0, (total[stop] - total[start]) / np.maximum(number, 1), np.nan)


def window_of(runs: list[Run], smooth: int) -> int:
    """Steps to average over: what was asked for, or a fiftieth of the longest run."""
    return smooth or max(1, max(map(len, runs)) // 50)


def status(run: Run) -> str:
    """The last figures of a run in a line."""
    if not len(run):
        return f"{run.name}: no training step so far"
    last = {key: values[-1] for key, values in run.steps.items()}
    most, val = run.config.get("max_steps"), run.measured("val_loss", "steps")[1]
    most = most if isinstance(most, int) else 0                     # of a damaged config.json
    speed = max(last["tokens_per_s"], 1e-9)
    left = duration((most - last["step"]) * last["tokens"] / last["step"] / speed)
    going = f", {left} left" if most > last["step"] else ""
    end = going if not run.finished else ", finished early" if going else ", finished"
    return (f"{run.name}: step {last['step']:.0f}" + (f"/{most}" if most else "")
            + f", loss {last['loss']:.4f}" + (f", validation {val[-1]:.4f}" if len(val) else "")
            + f", lr {last['lr']:.1e}, norm {last['grad_norm']:.2f}, {short(speed)} tok/s" + end)


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def text_plot(runs: list[Run], axis: str, smooth: int, width: int, height: int,
              color: bool = False) -> str:
    """Training loss in braille characters, 2 x 4 dots each; runs differ by colour, if at all."""
    runs = [run for run in runs if np.isfinite(run.steps["loss"]).any()]
    if not runs:
        return ""
    curves = [moving_average(run.steps["loss"], window_of(runs, smooth)) for run in runs]
    bottom, top = limits(curves)
    end = max(run.x(axis)[-1] for run in runs)
    width -= 8                                                      # for the labels
    dots = np.zeros((4 * height, 2 * width), int)                   # 0, or 1 + the run's number
    for number, (run, curve) in enumerate(zip(runs, curves), 1):
        x, seen = run.x(axis) / (end or 1) * (2 * width - 1), np.isfinite(curve)
        columns = np.arange(int(x[seen][0]), int(x[seen][-1]) + 1)
        share = (top - np.interp(columns, x[seen], curve[seen])) / (top - bottom)
        rows = np.clip(np.round(share * (4 * height - 1)), 0, 4 * height - 1).astype(int)
        for column, row, before in zip(columns, rows, [rows[0], *rows]):
            dots[min(row, before):max(row, before) + 1, column] = number
    labels = {0: f"{top:.3f}", height // 2: f"{(top + bottom) / 2:.3f}",
              height - 1: f"{bottom:.3f}"}
    lines = [f"{labels.get(r, ''):>6} ⎸" + "".join(
        _character(dots[4 * r:4 * r + 4, 2 * c:2 * c + 2], color) for c in range(width))
        for r in range(height)]
    right = duration(end) if axis == "time" else f"{short(end)} {axis}"
    return "\n".join([*lines, " " * 8 + "0" + right.rjust(width - 1)])


def limits(curves: list[np.ndarray]) -> tuple[float, float]:
    """(bottom, top) of an axis that shows the curves, but for the fall from ln V: the first 1%, or
    5% of a long one, may leave at the top."""
    shown = np.concatenate([curve[len(curve) // (20 if len(curve) > 2000 else 100):]
                            for curve in curves])
    shown = shown[np.isfinite(shown)]
    if not len(shown):
        return 0.0, 1.0
    margin = 0.04 * (shown.max() - shown.min()) or 0.1
    return shown.min() - margin, shown.max() + margin


def _character(cell: np.ndarray, color: bool) -> str:
    """The braille character of 4 x 2 dots, in the colour of its topmost run."""
    text = chr(0x2800 + int(BRAILLE[cell > 0].sum())) if cell.any() else " "
    if not (color and cell.any()):
        return text
    red, green, blue = bytes.fromhex(PALETTE[(cell.max() - 1) % len(PALETTE)][1:])
    return f"\033[38;2;{red};{green};{blue}m{text}\033[0m"


def _json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty where there is none, or one that is being written."""
    try:
        return read_json(path)
    except (FileNotFoundError, ValueError):
        return {}
