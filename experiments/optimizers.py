"""Muon against AdamW at equal tokens, by one command: the best rate of each, then several seeds.

    python -m experiments.optimizers --data=novels
    python -m experiments.optimizers --data=fineweb --model.n_layer=12 --steps=5000 --seeds=2

First every optimizer is tuned alike: each of --rates for --tune_steps, with a seed that is used
nowhere else. Then each trains --steps with its best rate and seeds 0, 1, ...; of one seed, all
start from the same weights and see the same batches. The same command again goes on where it was
killed. Optimizers: optim.py; the first named is the one that others are measured by.

Out: optimizers.csv (a row for each evaluation of each run), optimizers.json (rates, losses, and the
steps to the first one's final loss) and optimizers.png, which needs the extra "plots".
"""
import dataclasses
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data import sets, shards
from experiments.lora_pictures import log_axis, save, style, title
from experiments.lora_sweep import agree, done, train_apart, write_csv
from experiments.plots import GREY
from experiments.runs import load_run, short
from formats.files import write_json
from model import GPTConfig
from optim import OptimConfig
from run.config import build, parse, run_command
from run.device import pick_device
from run.log import provenance
from train import TrainConfig

TUNING_SEED = 1000


@dataclass(frozen=True)
class OptimizersConfig:
    data: str = "corpus"  # data set: a name under data/, or a folder of token shards
    optimizers: tuple[str, ...] = ("adamw", "muon")  # what is compared; the first is the one that
        # others are measured by
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3)  # peak learning rates that are tried, the
        # same for all
    tune_steps: int = 250  # steps of each such trial, with a whole schedule
    steps: int = 1000  # steps of the runs that are compared
    seeds: int = 3  # of them, with seeds 0, 1, ...
    batch: int = 16  # sequences of a step
    warmup_steps: int = 50  # of linear warmup, also in the tuning: rates that a shorter one cannot
        # bear would not be chosen; then cosine to a tenth
    weight_decay: float = 0.1  # of matrices and embeddings
    eval_every: int = 50  # steps between evaluations
    eval_tokens: int = 32768  # tokens of an evaluation, the same for all; 0: all
    out: str = "out/optimizers"  # folder of the runs; what is there goes on
    results: str = ""  # folder for table, figures and picture; empty: the one of the runs
    compile: str = "off"  # torch.compile: auto, on or off
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: str = "auto"  # of matrix products
    model: GPTConfig = GPTConfig(block_size=128, n_layer=4, n_head=6, n_embd=192)  # the network

    def __post_init__(self):
        for name in ("tune_steps", "steps", "seeds", "batch", "eval_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.rates or min(self.rates) <= 0:
            raise ValueError(f"rates={self.rates} must be one or more numbers above 0")
        if len(set(self.optimizers)) < 2:
            raise ValueError(f"optimizers={','.join(self.optimizers)} leaves nothing to compare; "
                             f"give two or more")
        for name in self.optimizers:
            OptimConfig(optimizer=name)         # says which there are


@dataclass(frozen=True)
class Trial:
    """One run. phase: "tune" or "compare"."""
    phase: str
    optimizer: str
    learning_rate: float
    seed: int

    def folder(self, config: OptimizersConfig) -> Path:
        steps = config.tune_steps if self.phase == "tune" else config.steps
        return Path(config.out) / (f"{self.optimizer}_lr{self.learning_rate:g}_s{steps}_"
                                   f"seed{self.seed}")


def train_config(trial: Trial, config: OptimizersConfig) -> TrainConfig:
    tuning = trial.phase == "tune"
    return build(TrainConfig, {
        "out": str(trial.folder(config)), "data": config.data, "seed": trial.seed,
        "max_steps": config.tune_steps if tuning else config.steps,
        "batch_tokens": config.batch * config.model.block_size, "micro_batch": config.batch,
        "learning_rate": trial.learning_rate, "min_learning_rate": trial.learning_rate / 10,
        "warmup_steps": config.warmup_steps, "weight_decay": config.weight_decay,
        "eval_every": 0 if tuning else config.eval_every, "eval_tokens": config.eval_tokens,
        "save_every": 0 if tuning else config.eval_every, "keep_last": 1, "sample_tokens": 0,
        "max_bad_steps": 10**9,                 # none of them is applied: the run ends, diverged
        "compile": config.compile, "device": config.device, "dtype": config.dtype,
        "optim.optimizer": trial.optimizer,
        **{f"model.{name}": value for name, value in dataclasses.asdict(config.model).items()}})


# ------------------------------------------------------------------------------------------------
# Runs

def trials(config: OptimizersConfig) -> list[Trial]:
    """The runs of the tuning; with the best rates of that, once it is done, also the others."""
    tuning = [Trial("tune", name, rate, TUNING_SEED) for rate in config.rates
              for name in config.optimizers]
    if not all(done(trial.folder(config)) for trial in tuning):
        return tuning
    rates = best_rates(rows_of(tuning, config), config)
    return tuning + [Trial("compare", name, rates[name], seed) for seed in range(config.seeds)
                     for name in config.optimizers]


def rows_of(found: list[Trial], config: OptimizersConfig) -> list[dict[str, Any]]:
    """A row for each evaluation of the runs that are done; a loss that is none is infinite."""
    rows = []
    for trial in found:
        if not done(trial.folder(config)):
            continue
        run = load_run(trial.folder(config), "")
        seconds = round(float(run.steps["seconds"][-1]), 1)
        for step, loss in zip(*run.measured("val_loss", "steps")):
            rows.append({**dataclasses.asdict(trial), "step": int(step),
                         "tokens": int(step) * config.batch * config.model.block_size,
                         "val_loss": round(float(loss), 5) if math.isfinite(loss) else math.inf,
                         "seconds_of_run": seconds})
    return rows


def compare(config: OptimizersConfig) -> list[dict[str, Any]]:
    """Train what is missing; the rows of the CSV, which is written after each run."""
    data = sets.TokenSet(shards.find(config.data))
    varied = ("optimizers", "rates", "tune_steps", "steps", "seeds", "out", "results")
    agree(Path(config.out), {**{name: value for name, value in dataclasses.asdict(config).items()
                                if name not in varied}, "fingerprint": data.fingerprint},
          provenance(pick_device(config.device), 1, data.fingerprint))
    table, rows = Path(config.results or config.out) / "optimizers.csv", []
    while True:
        plan = trials(config)
        if rows := rows_of(plan, config):
            write_csv(table, rows)
        missing = [trial for trial in plan if not done(trial.folder(config))]
        if not missing and any(trial.phase == "compare" for trial in plan):
            return rows
        if missing:
            train_apart(train_config(missing[0], config))
            last = rows_of(missing[:1], config)[-1]
            print(f"{last['phase']}  {last['optimizer']}  rate {last['learning_rate']:g}  seed "
                  f"{last['seed']}  {last['step']} steps  validation {last['val_loss']:.4f}  "
                  f"{last['seconds_of_run']:.0f} s", flush=True)


# ------------------------------------------------------------------------------------------------
# What they say

def best_rates(rows: list[dict[str, Any]], config: OptimizersConfig) -> dict[str, float]:
    """The rate with the lowest loss in the tuning, of each optimizer."""
    return {name: min((row for row in rows if row["phase"] == "tune" and row["optimizer"] == name
                       and row["learning_rate"] in config.rates),
                      key=lambda row: row["val_loss"])["learning_rate"]
            for name in config.optimizers}


def curves(rows: list[dict[str, Any]], optimizer: str) -> dict[int, list[tuple[int, float]]]:
    """{seed: [(step, validation loss), ...]} of the runs that are compared."""
    found: dict[int, list[tuple[int, float]]] = {}
    for row in rows:
        if row["phase"] == "compare" and row["optimizer"] == optimizer:
            found.setdefault(row["seed"], []).append((row["step"], row["val_loss"]))
    return found


def steps_to(level: float, curve: list[tuple[int, float]]) -> float | None:
    """The step at which the loss is first down to a level, on straight lines between evaluations.

        steps_to(3.5, [(100, 5.0), (200, 4.0), (300, 3.0)]) is 250
    """
    if curve[0][1] <= level:
        return float(curve[0][0])
    for (x, a), (y, b) in zip(curve, curve[1:]):
        if a > level >= b:
            return y if math.isinf(a) else x + (a - level) / (a - b) * (y - x)
    return None


def summary(rows: list[dict[str, Any]], config: OptimizersConfig) -> dict[str, Any]:
    """Rates, final losses, and steps to the first optimizer's final loss, seed by seed."""
    first, rates = config.optimizers[0], best_rates(rows, config)
    goals = {seed: curve[-1][1] for seed, curve in curves(rows, first).items()}
    facts: dict[str, Any] = {"measured_by": first, "steps": config.steps, "optimizers": {},
                             "batch_tokens": config.batch * config.model.block_size}
    for name in config.optimizers:
        found = curves(rows, name)
        final = [curve[-1][1] for curve in found.values()]
        steps = [steps_to(goals[seed], curve) for seed, curve in found.items()]
        reached = [step for step in steps if step is not None]
        tuning = {row["learning_rate"]: row["val_loss"] for row in rows
                  if row["phase"] == "tune" and row["optimizer"] == name}
        facts["optimizers"][name] = {
            "tuning": tuning, "learning_rate": rates[name],
            "at_the_edge": len(config.rates) > 1 and rates[name] in (min(config.rates),
                                                                    max(config.rates)),
            "final_loss": final, "mean": statistics.fmean(final), "spread": _spread(final),
            "below_first": [goals[seed] - curve[-1][1] for seed, curve in found.items()],
            "steps_to_firsts_loss": steps,
            "share_of_steps": statistics.fmean(reached) / config.steps if reached else None,
            "seconds": sorted({row["seconds_of_run"] for row in rows if row["phase"] == "compare"
                               and row["optimizer"] == name})}
    return facts


def _spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else 0.0


def table(facts: dict[str, Any]) -> str:
    """The summary in markdown."""
    lines = [f"| | rate | final validation loss | steps to {facts['measured_by']}'s |",
             "|---|---|---|---|"]
    for name, found in facts["optimizers"].items():
        steps = [f"{step:.0f}" if step is not None else "never"
                 for step in found["steps_to_firsts_loss"]]
        edge = " (at the edge of those tried)" if found["at_the_edge"] else ""
        lines.append(f"| {name} | {found['learning_rate']:g}{edge} | {found['mean']:.4f} ± "
                     f"{found['spread']:.4f} | {', '.join(steps)} of {facts['steps']} |")
    return "\n".join(lines)


def draw(figure: Any, rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Loss against steps, a line a seed, with the steps to the first one's final loss; tuning."""
    ax, tuning = figure.subplots(1, 2, width_ratios=(2.2, 1))
    first = facts["optimizers"][facts["measured_by"]]
    ax.axhline(first["mean"], color=GREY, linewidth=1)
    ax.annotate(f"{facts['measured_by']} at the end, mean {first['mean']:.3f}",
                (0.01, first["mean"]), (0, -4), ("axes fraction", "data"), "offset points",
                color=GREY, va="top")
    for i, (name, found) in enumerate(facts["optimizers"].items()):
        shape = {**style(i), "linewidth": 1.2, "markersize": 4}
        del shape["capsize"]
        for number, curve in enumerate(curves(rows, name).values()):
            ax.plot(*zip(*curve), **{**shape, "marker": ""},
                    label="" if number else f"{name}, rate {found['learning_rate']:g}, "
                                            f"{len(found['final_loss'])} seeds")
        goals = zip(found["steps_to_firsts_loss"], first["final_loss"])
        reached = [(step, goal) for step, goal in goals if step is not None]
        ax.plot(*zip(*reached), **{**shape, "linestyle": "none", "markersize": 6}) if reached else 0
        rates = sorted(found["tuning"])
        tuning.plot(rates, [found["tuning"][rate] for rate in rates], **shape, label=name)
    finite = [loss for name in facts["optimizers"] for curve in curves(rows, name).values()
              for _, loss in curve[len(curve) // 5:] if math.isfinite(loss)]
    margin = 0.08 * (max(finite) - min(finite))
    ax.set_ylim(min(finite) - margin, max(finite) + margin)     # the fall from ln V may leave
    ax.legend()
    title(ax, "validation loss; marks: as low as "
              f"{facts['measured_by']} of the same seed at the end",
          f"steps of {short(facts['batch_tokens'])} tokens", "nats per token")
    log_axis(tuning, [rate for found in facts["optimizers"].values() for rate in found["tuning"]])
    tuning.legend()
    title(tuning, "tuning: short runs", "peak learning rate", "validation loss")


def main(words: list[str]) -> None:
    config = parse(OptimizersConfig, words, "python -m experiments.optimizers",
                   {"model": dataclasses.asdict(OptimizersConfig.model)}, about=__doc__)
    rows = compare(config)
    folder, facts = Path(config.results or config.out), summary(rows, config)
    write_json(folder / "optimizers.json", facts)
    print(table(facts))
    save(folder / "optimizers.png", (11, 5), lambda figure: draw(figure, rows, facts))
    print(f"drawn: {folder / 'optimizers.png'}")


if __name__ == "__main__":
    run_command(main)
