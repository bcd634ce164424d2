"""Whether a change helps, by one command: paired seeds, the noise they show, and a verdict.

    python -m experiments.compare demo --set=optim.optimizer=adamw --seeds=5
    python -m experiments.compare lora-demo --set=lora.r=1,2,4 --set=lora.alpha=4,16 --seeds=3
    python -m experiments.compare demo --set=optim.optimizer=adamw --tune=learning_rate=2e-3,5e-3
    python -m experiments.compare demo --patch=FILE --equal=minutes
    python -m experiments.compare demo --max_steps=100 --seeds=8     how large the noise is

The base is a preset of train.py, with any of its settings behind it. Each --set, --variant and
--patch is a side of a grid, every point of which is compared with the base. Values are parted by
commas, several names within a value by + (lora.target_modules=c_attn+c_fc). A --variant is several
settings at once: --variant="lora.init=loftq lora.quantize=nf4", --variant=lora=none for no adapter.
A --patch is a Python file that runs before the model is built, in the process of that run only, and
may replace whatever it imports; --patch=none,FILE makes it a side of a larger grid.

Paired: seed i gives every variant the same batches, the same dropout where shapes agree, and the
same starting value to every parameter of the same name, shape and spread. For the last, weights are
drawn by name, so a run here is not to the bit that of train.py. Where a learning rate varies and
its floor does not, the floor keeps its share of it.

Equal: tokens, unless --equal asks for something else; steps and warmup follow from it, but for
variants that set max_steps or epochs themselves, and the schedule ends with the run. Tokens are
without padding, FLOP what GPT.flops_per_token says of those, minutes those of short runs beforehand
(compiled where --compile=on), each for every variant with every value of --tune. A run's loss is
that of its end, on the whole validation split, or --eval_tokens of it: nats per token, or bits per
byte where data have different tokenizers; of a mixture by the base's weights.
--tune tries values for every variant and the base alike, with seeds that are used nowhere else.

Out: a JSON file, a table for docs/LOG.md and a picture (extra "plots"), named by --name, in --out.
Runs are in --out/runs, named by a hash of settings, patch, code and data: the same command goes on
after a kill, and what several comparisons share is trained once. The test: experiments/ttest.py.
"""
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import math
import multiprocessing.connection
import os
import shlex
import shutil
import statistics
import threading
import time
import traceback
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, Literal
from unittest import mock

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from data import shards
from data.prepared import hash_facts
from data.sets import mixture_of
from experiments import plots
from experiments.runs import PALETTE, duration, load_run
from experiments.ttest import Paired, holm, paired, seeds_needed
from formats.files import read_json, write_bytes, write_json, write_text
from model import GPT
from run.config import build, flatten, given, parse, run_command, settings_of
from run.device import pick_device
from run.log import provenance
from run.presets import chosen_preset, follow
from run.watch import code_hash, locked
from train import TrainConfig, train

PROG = "python -m experiments.compare [PRESET]"
TUNE_SEED, PACE_SEED = 1000, 2000               # of runs that are in no comparison
PACE_STEPS, PACE_RUNS = 40, 2                   # by which --equal=minutes knows a step's time
# A run is judged at its end and by nothing else; one that diverges comes to its end too.
FIXED = dict(eval_every=0, eval_tokens=0, patience=0, hellaswag_every=0, sample_every=0,
             sample_tokens=0, milestone_every=0, keep_last=1, max_bad_steps=10**9)
SETTINGS = settings_of(TrainConfig)
RESULT = 3                                      # what result.json holds; a new number is a new run


@dataclass(frozen=True)
class CompareConfig:
    set_: tuple[str, ...] = ()  # NAME=VALUE,VALUE: a setting of train.py; again for another one
    variant: tuple[str, ...] = ()  # "NAME=VALUE NAME=VALUE": settings that go together; again for
        # another variant
    patch: tuple[str, ...] = ()  # FILE,FILE: Python that runs before the model is built
    tune: tuple[str, ...] = ()  # NAME=VALUE,VALUE: tried for each variant, the best is taken; again
        # for another setting
    tune_seeds: int = 2  # seeds that each of those values is tried with
    seeds: int = 5  # seeds of each variant, 0, 1, ...
    equal: Literal["tokens", "minutes", "flops"] = "tokens"  # what every run has as much of
    jobs: int = 1  # runs at once, one thread each; times are then worthless
    out: str = "out/compare"  # folder of the runs and the report
    name: str = "compare"  # of the report's three files

    def __post_init__(self):
        for name in ("tune_seeds", "seeds", "jobs"):
            if not 1 <= getattr(self, name) <= TUNE_SEED:
                raise ValueError(f"{name}={getattr(self, name)} is not in 1 to {TUNE_SEED}")
        if self.equal == "minutes" and self.jobs > 1:
            raise ValueError(f"jobs={self.jobs} makes times worthless, and equal=minutes goes by "
                             f"them; take --jobs=1")


@dataclass(frozen=True)
class Variant:
    """What differs from the base: settings as they are typed, and the source of a patch."""
    name: str
    changes: dict[str, str]
    patch: str = ""


@dataclass(frozen=True)
class Plan:
    """A comparison as it was asked for, all of it checked. variants: the base first."""
    config: CompareConfig
    base: dict[str, Any]                            # flat settings of train.py
    variants: list[Variant]
    tuned: list[dict[str, str]]                     # what is tried; [{}] where nothing is
    command: str


# ------------------------------------------------------------------------------------------------
# What is asked

def read(words: list[str]) -> Plan:
    """The plan of a command line; ValueError for anything that train.py would refuse."""
    command = shlex.join(["python", "-m", "experiments.compare", *words])
    _, preset, words = chosen_preset(words)
    known = {name.removesuffix("_"): name for name in settings_of(CompareConfig)}
    lists: dict[str, list[str]] = {"set_": [], "variant": [], "patch": [], "tune": []}
    own, others = [], []
    for word in words:
        flag, separator, value = word.partition("=")
        name = known.get(flag.removeprefix("--").replace("-", "_"), "")
        if flag == "--help":
            own.append(flag)
        elif not flag.startswith("--") or not separator:
            raise ValueError(f"unexpected argument {word!r}: settings are written --key=value")
        elif name in lists:
            lists[name].append(value)
        else:
            (own if name else others).append(word)
    config = dataclasses.replace(parse(CompareConfig, own, PROG, about=__doc__), **{
        name: tuple(values) for name, values in lists.items()})
    base = flat(parse(TrainConfig, others, PROG, {**preset.settings, **FIXED}, follow=follow))
    if config.equal == "minutes" and base["compile"] == "auto":
        base["compile"] = "off"                     # or runs would be, and their short ones not
    if base["seed"] or base["dry_run"]:
        raise ValueError("seed and dry_run cannot be set here; --seeds=N says how many seeds")
    tuned = grid([values_of(text, "tune") for text in config.tune])
    sides = [values_of(text, "set") for text in config.set_]
    if config.variant:
        if wrong := [word for text in config.variant for word in text.split() if "=" not in word]:
            raise ValueError(f"variant: {wrong[0]!r} is no NAME=VALUE")
        sides.append([dict(word.split("=", 1) for word in text.split()) for text in config.variant])
    patches = [path for text in config.patch for path in text.split(",")]
    names = [text.partition("=")[0] for text in config.set_]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"set={twice[0]} is given twice; write NAME=VALUE,VALUE")

    def point(settings: dict[str, Any]) -> Any:     # what base and variants may have in common
        config = build(TrainConfig, settings)
        return settings if config.init_from != "scratch" else config
    found, seen = [Variant("base", {})], [(point(base), set())]
    for changes, path in itertools.product(grid(sides), patches or ["none"]) \
            if sides or patches else ():
        if both := sorted(changes.keys() & tuned[0].keys()):
            raise ValueError(f"{both[0]} is both compared and tuned; leave it out of one")
        named = [f"{name}={value}" for name, value in changes.items()]
        patch = "" if path == "none" else source_of(path)
        settings = changed(base, changes)           # of a point of the grid, which may be the base
        same, own = point(settings), {"max_steps", "epochs"} & changes.keys()
        this = same, own if same != point(base) else set()      # given steps follow from no others
        if patch or this not in seen:
            name = " ".join(named + [Path(path).name] * bool(patch))
            if name in [variant.name for variant in found]:
                raise ValueError(f"two variants are called {name!r}; rename one of the files")
            found.append(Variant(name, changes, patch))
            seen.append(({}, set()) if patch else this)
    for variant, values in itertools.product(found, tuned):
        changed(base, {**variant.changes, **values})            # ValueError before a run, not after
    return Plan(config, base, found, tuned, command)


def values_of(text: str, flag: str) -> list[dict[str, str]]:
    """"lora.r=1,2" as [{"lora.r": "1"}, {"lora.r": "2"}]: a side of a grid."""
    name, _, values = text.partition("=")
    if not values or flag == "tune" and name in ("max_steps", "epochs"):
        raise ValueError(f"{flag}={text} cannot be done; write NAME=VALUE,VALUE, and compare "
                         f"max_steps and epochs, but do not tune them")
    return [{name: value} for value in values.split(",")]


def grid(sides: list[list[dict[str, str]]]) -> list[dict[str, str]]:
    """All points of a grid."""
    return [{name: value for part in point for name, value in part.items()}
            for point in itertools.product(*sides)]


def source_of(path: str) -> str:
    """The text of a patch, which must be Python."""
    try:
        source = Path(path).read_text(encoding="utf-8")
        compile(source, path, "exec")
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"patch={path} cannot be run: {error}") from None
    return source


def changed(base: dict[str, Any], changes: dict[str, str]) -> dict[str, Any]:
    """Flat settings with changes as they are typed. ValueError for what TrainConfig refuses."""
    base, changes = dict(base), dict(changes)
    for name, value in list(changes.items()):
        if name in ("seed", "out", "dry_run"):
            raise ValueError(f"{name} cannot be compared; --seeds=N says how many seeds there are")
        if name not in SETTINGS and value == "none":            # lora=none
            del changes[name]
            base = {key: old for key, old in base.items() if key.partition(".")[0] != name}
        elif name in SETTINGS and typing.get_origin(SETTINGS[name][0]) in (tuple, dict):
            changes[name] = value.replace("+", ",")
    words = [f"--{name}={value}" for name, value in changes.items()]
    return flat(parse(TrainConfig, words, PROG, base, follow=follow))


def flat(config: TrainConfig) -> dict[str, Any]:
    """Its settings by dotted names; of the network's those that are given, for init_from brings the
    others, all but dropout."""
    kept = {"model.dropout", *(f"model.{name}" for name in given(config, "model"))}
    return {name: value for name, value in flatten(dataclasses.asdict(config)).items()
            if name in kept or not name.startswith("model.")}


# ------------------------------------------------------------------------------------------------
# Runs

@dataclass(frozen=True)
class Trial:
    """One run: its flat settings of train.py, and the source of a patch."""
    about: str
    settings: dict[str, Any]
    patch: str

    @functools.cached_property
    def identity(self) -> str:
        """A hash of all that its result depends on."""
        data, start = self.settings["data"], Path(self.settings["init_from"])
        weights = [start, start / "best.pt", *sorted(start.glob("*.safetensors"))]
        metas = [shards.find(name) / "meta.json" for name in mixture_of(data) or [data]]
        return hash_facts(
            {**self.settings, "out": ""}, self.patch, code(), torch.__version__, RESULT,
            [meta.read_text() if meta.exists() else shards.fingerprint(meta.parent)
             for meta in metas],
            [path.stat().st_mtime_ns for path in weights if path.is_file()])    # trained again?


code = functools.cache(code_hash)


def train_all(trials: list[Trial], config: CompareConfig) -> list[dict[str, Any]]:
    """The results of runs, of which those that are not there yet are trained."""
    folder, missing = Path(config.out).resolve() / "runs", {}
    for trial in trials:
        if not (folder / trial.identity / "result.json").exists():
            missing[trial.identity] = trial
    began, todo = time.monotonic(), list(missing.values())
    for number, (i, result) in enumerate(in_processes(
            perform, [(trial, folder / trial.identity, config.jobs) for trial in todo],
            config.jobs), 1):
        left = (time.monotonic() - began) / number * (len(todo) - number)
        print(f"{number}/{len(todo)}  {todo[i].about}  loss {spell(result['loss'])}  "
              f"{duration(left)} left", flush=True)
    return [read_json(folder / trial.identity / "result.json", f"delete {folder / trial.identity}")
            for trial in trials]


def in_processes(function: Callable, tasks: list[tuple], jobs: int
                 ) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of the task, function(*task)), each in a process of its own, so that its memory is
    its own and a patch ends with it; `jobs` at once. A task begins with its trial. The first error
    ends all: the others save, and can go on later."""
    # PyTorch is loaded once for all, also what its optimizers import late: 0.5 s a run, not 6.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "experiments.plots", "torch._dynamo"])
    waiting, running = list(enumerate(tasks)), {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                number, task = waiting.pop(0)
                here, there = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(function, task, jobs, there))
                process.start()
                there.close()
                running[here] = process, number
            for here in multiprocessing.connection.wait(list(running)):
                process, number = running.pop(here)
                try:
                    result = here.recv()
                except EOFError:
                    result = "its process was killed; memory may have been short"
                process.join()
                if isinstance(result, str):
                    raise ValueError(f"{tasks[number][0].about}: {result}")
                yield number, result
    finally:
        for process, _ in running.values():
            process.terminate()                                 # train() saves, and stops
        for process, _ in running.values():
            process.join()


def _child(function: Callable, task: tuple, jobs: int, answer: Any) -> None:
    """Do one task, and answer with its result, or with what was wrong in one line."""
    parent = multiprocessing.parent_process().sentinel

    def end_with_parent() -> None:          # or the same command, again, would train beside this
        multiprocessing.connection.wait([parent])
        os._exit(1)
    threading.Thread(target=end_with_parent, daemon=True).start()
    tqdm.set_lock(threading.RLock())        # its own would outlive a killed process
    if jobs > 1:
        torch.set_num_threads(1)
    try:
        answer.send(function(*task))
    except Exception as error:
        kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        answer.send(f"{kind}{error}")


def perform(trial: Trial, folder: Path, jobs: int = 1) -> dict[str, Any]:
    """Train a run in its folder, or go on with it; writes and returns its result."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "screen.txt", "a") as screen, contextlib.redirect_stdout(screen), \
            contextlib.redirect_stderr(screen), drawn_by_name(trial.settings["seed"]):
        run_patch(trial.patch)
        summary = train(build(TrainConfig, {**trial.settings, "out": str(folder)}))
    if summary["step"] < trial.settings["max_steps"]:
        raise ValueError("stopped before its end; the same command goes on")
    if "val_tokens" not in summary:     # killed between its last checkpoint and its last word
        shutil.rmtree(folder)
        return perform(trial, folder, jobs)
    seconds = load_run(folder, "").steps["seconds"]
    tokenizer = folder / "tokenizer.json"
    finite = all(math.isfinite(summary[key] or math.nan) for key in ("train_loss", "val_loss"))
    result = {"loss": summary["val_loss"] if finite else None,
              "bits_per_byte": summary.get("val_bits_per_byte") if finite else None,
              "sources": {key.removeprefix("val_loss/"): loss for key, loss in summary.items()
                          if key.startswith("val_loss/")}, "judged_by": summary.get("val_tokens"),
              "tokenizer": hashlib.sha256(tokenizer.read_bytes()).hexdigest()[:16]
              if tokenizer.exists() else "",
              "steps": summary["step"], "tokens": summary["tokens"], "seconds": float(seconds[-1]),
              "step_seconds": float(np.median(np.diff(seconds, prepend=0))),
              "memory_mib": summary["peak_memory_mib"], "jobs": jobs, "settings": trial.settings,
              "patch": trial.patch}
    write_json(folder / "result.json", result)
    (folder / "last.pt").unlink(missing_ok=True)    # has the optimizer's state; best.pt stays
    return result


def look(trial: Trial) -> dict[str, Any]:
    """What a run would do, by train.py's --dry_run: its steps, parameters and FLOP. Finds out
    whether settings, data, model and patch fit each other, and makes the data."""
    with open(os.devnull, "w") as screen, contextlib.redirect_stdout(screen):
        run_patch(trial.patch)
        return train(build(TrainConfig, {**trial.settings, "dry_run": True}))


def run_patch(source: str) -> None:
    """Run a patch; what goes wrong in it is one line that says so."""
    try:
        exec(compile(source, "patch", "exec"), {"__name__": "patch"})
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1].lineno
        raise ValueError(f"the patch fails, line {line}: {type(error).__name__}: {error}"
                         ) from error


@contextlib.contextmanager
def drawn_by_name(seed: int) -> Iterator[None]:
    """Inside, a new GPT draws each parameter that torch.nn.init.normal_ starts by (seed, its name),
    not in the order of construction: a variant with one more layer, or none of its biases, starts
    all others with the same values. What a patch has changed since then stays."""
    init, normal = GPT.__init__, nn.init.normal_

    def by_name(self: GPT, *arguments: Any, **named: Any) -> None:
        drawn: dict[int, tuple[float, float, torch.Tensor]] = {}    # mean, spread, sum

        def noted(tensor: torch.Tensor, mean: float = 0.0, std: float = 1.0, generator: Any = None):
            drawn[id(tensor)] = mean, std, normal(tensor, mean, std, generator).detach().sum()
            return tensor
        with mock.patch.object(nn.init, "normal_", noted):
            init(self, *arguments, **named)
        for name, p in self.named_parameters():
            *spread, total = drawn.get(id(p), (None,))
            if p.device.type == "cpu" and spread and p.sum() == total:
                digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
                normal(p, *spread, torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")))
        torch.manual_seed(seed)                     # adapters and heads draw after the model
    with mock.patch.object(GPT, "__init__", by_name):
        yield


# ------------------------------------------------------------------------------------------------
# The comparison

def compare(plan: Plan) -> dict[str, Any]:
    """Train what is missing; the report."""
    config, variants = plan.config, plan.variants
    points = {(v.name, *values.values()): (v, values) for v, values in
              [(variants[0], {}), *itertools.product(variants, plan.tuned)]}
    looks = [(Trial(" ".join(point), changed(plan.base, {**v.changes, **values}), v.patch),)
             for point, (v, values) in points.items()]
    found = dict(in_processes(look, looks, config.jobs))
    facts = {point: found[i] for i, point in enumerate(points)}
    usual, flops = facts["base",]["max_steps"], config.equal == "flops"
    cost = {point: found["tokens_per_step"] * (found["flops_per_token"] if flops else 1)
            for point, found in facts.items()}      # of a step, in what all have as much of

    def trials(runs: list[tuple[Variant, dict[str, str], int]], length: int = 0) -> list[Trial]:
        """Runs of (variant, tuned values, seed), each as long as it may be."""
        found = []
        for variant, tuned, seed in runs:
            changes = {**variant.changes, **tuned}
            settings, point = changed(plan.base, changes), (variant.name, *tuned.values())
            steps = facts[point]["max_steps"]
            if not {"max_steps", "epochs"} & changes.keys():
                steps = max(1, round(usual * cost["base",] / cost[point]))
            steps = length or steps
            settings.update(seed=seed, max_steps=steps, epochs=0.0)
            if "warmup_steps" not in changes:       # the same share of the run
                settings["warmup_steps"] = round(settings["warmup_steps"] * steps / usual)
            words = [variant.name, *(f"{name}={value}" for name, value in tuned.items())]
            found.append(Trial(" ".join([*words, f"seed {seed}"]), settings, variant.patch))
        return found

    if config.equal == "minutes":                   # short runs in turn; the faster of each two
        found = train_all(trials([(*one, PACE_SEED + i) for i in range(PACE_RUNS)
                                  for one in points.values()], min(PACE_STEPS, usual)), config)
        cost = {point: min(result["step_seconds"] for result in found[i::len(points)])
                for i, point in enumerate(points)}
    tuning = {}
    if plan.tuned != [{}]:
        tried = [(v, values, TUNE_SEED + i) for v in variants for values in plan.tuned
                 for i in range(config.tune_seeds)]
        results = train_all(trials(tried), config)
        tuning = choose(variants, plan.tuned, judged(results, plan.base["data"])[0])
    best = {name: next(row["values"] for row in rows if row["best"])
            for name, rows in tuning.items()}
    found = train_all(trials([(v, best.get(v.name, {}), seed) for seed in range(config.seeds)
                              for v in variants]), config)          # whole seeds, if it is stopped
    trained = {v.name: facts[(v.name, *best.get(v.name, {}).values())]["trained"] for v in variants}
    return report(plan, trained, tuning, {v.name: found[i::len(variants)]
                                          for i, v in enumerate(variants)})


def judged(results: list[dict[str, Any]], data: str) -> tuple[list[float | None], str]:
    """The figures that results are compared by, and their unit: nats per token, unless their tokens
    differ. data: the base's, by whose weights mixtures of the same sources are judged."""
    if len({result["tokenizer"] for result in results}) > 1:
        return [result["bits_per_byte"] for result in results], "bits per byte"
    weights = mixture_of(data)
    if weights and all(result["sources"].keys() == weights.keys() for result in results):
        whole = sum(weights.values())
        return [None if result["loss"] is None else sum(
            float(weight / whole) * result["sources"][name] for name, weight in weights.items())
            for result in results], "nats per token"
    return [result["loss"] for result in results], "nats per token"


def choose(variants: list[Variant], tuned: list[dict[str, str]], losses: list[float | None]
           ) -> dict[str, list[dict[str, Any]]]:
    """For each variant a row for each point that was tried, the best one marked, and where it is
    the least or largest number of those tried. losses: of each variant, point and seed, in turn."""
    table, rest, seeds = {}, iter(losses), len(losses) // len(variants) // len(tuned)
    for variant in variants:
        rows = [{"values": values, "losses": list(itertools.islice(rest, seeds)), "best": False}
                for values in tuned]
        best = min(rows, key=lambda row: math.inf if None in row["losses"] else
                   statistics.fmean(row["losses"]))
        if None in best["losses"]:
            raise ValueError(f"{variant.name} diverges with every value of --tune; try others")
        best["best"], best["at_the_edge"] = True, []
        for name, value in best["values"].items():
            with contextlib.suppress(ValueError):   # words have no edge
                numbers = sorted({float(point[name]) for point in tuned})
                if numbers[1:] and float(value) in (numbers[0], numbers[-1]):
                    best["at_the_edge"].append(name)
        table[variant.name] = rows
    return table


# ------------------------------------------------------------------------------------------------
# What it says

def report(plan: Plan, trained: dict[str, int], tuning: dict[str, Any],
           runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """All figures and sentences of a comparison, as JSON holds them."""
    figures, unit = judged(list(itertools.chain(*runs.values())), plan.base["data"])
    rest = iter(figures)
    losses = {name: list(itertools.islice(rest, len(found))) for name, found in runs.items()}
    tokens = {name: found[0]["judged_by"] for name, found in runs.items()}
    # Windows of another length leave another rest of the split out; more is another validation.
    other = {name: f"{name}: no test, as its validation has {count:,} labelled tokens and the "
                   f"base's {tokens['base']:,}" for name, count in tokens.items()
             if unit == "nats per token" and abs(count - tokens["base"]) > 0.05 * tokens["base"]}
    lost = {name for name, values in losses.items() if None in values}
    tests = {name: paired([a - b for a, b in zip(values, losses["base"])]) for name, values in
             losses.items() if name != "base" and name not in other
             and not lost & {name, "base"} and values[1:]}
    corrected = dict(zip(tests, holm([test.p for test in tests.values()])))
    spreads = {name: statistics.stdev(values) for name, values in losses.items()
               if name not in lost and values[1:]}
    floor = math.sqrt(2) * spreads.get("base", 0.0) or None
    rows, timed = {}, all(result["jobs"] == 1 for found in runs.values() for result in found)
    for variant in plan.variants:
        name, found, test = variant.name, runs[variant.name], tests.get(variant.name)
        needed = seeds_needed(test.spread, floor / 2) if test and floor else None
        rows[name] = {
            "changes": variant.changes, "patch": variant.patch,
            "tuned": next((row for row in tuning.get(name, ()) if row["best"]), None),
            "losses": losses[name], "spread": spreads.get(name),
            "mean": None if name in lost else statistics.fmean(losses[name]),
            "difference": dataclasses.asdict(test) if test else None,
            "p_corrected": corrected.get(name), "seeds_for_half_the_floor": needed,
            "steps": found[0]["steps"], "tokens": found[0]["tokens"],
            "seconds": statistics.median(run["seconds"] for run in found) if timed else None,
            "memory_mib": max(run["memory_mib"] for run in found),
            "trained_parameters": trained[name],
            "verdict": "" if name == "base" else other.get(name) or verdict(
                name, losses[name], losses["base"], test, corrected.get(name), needed)}
    return {"command": plan.command, "config": dataclasses.asdict(plan.config), "base": plan.base,
            "made": {**provenance(pick_device(plan.base["device"]), 1, ""), "code": code()},
            "unit": unit, "noise_floor": floor, "comparisons": len(rows) - 1,
            "variants": rows, "tuning": tuning}


def verdict(name: str, losses: list[float | None], base: list[float | None], test: Paired | None,
            p: float | None, needed: int | None) -> str:
    """What a comparison found, in words."""
    for who, values in ((name, losses), ("the base", base)):
        if lost := values.count(None):
            return f"{name}: no test, as {who} diverged in {lost} of {len(values)} seeds"
    if test is None:
        return (f"{name}: {losses[0] - base[0]:+.4f} with one seed, which says nothing of noise; "
                f"give --seeds=5")
    if losses == base:
        return f"{name}: no difference found, the losses are equal to the last bit"
    found = "no difference found" if p >= 0.05 else \
        f"{'lower' if test.mean < 0 else 'higher'} loss than the base"
    more = f"; half the noise floor would take about {needed} seeds" if needed and p >= 0.05 else ""
    return (f"{name}: {found}, {test.mean:+.4f} (95% {test.low:+.4f} to {test.high:+.4f}), "
            f"p {p:.2g}, {test.n} seeds{more}")


def spell(loss: float | None) -> str:
    return "diverged" if loss is None else f"{loss:.4f}"


def markdown(found: dict[str, Any]) -> str:
    """The report for docs/LOG.md: command, table, sentences."""
    config, rows, floor = found["config"], found["variants"], found["noise_floor"]
    columns = ["variant", *["tuned"] * bool(found["tuning"]), f"validation loss, {found['unit']}",
               "difference, 95%", "p", "seeds for half the floor", "steps", "time", "memory"]
    lines = [f"`{found['command']}`: equal {config['equal']}, {config['seeds']} paired "
             f"seeds.", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for name, row in rows.items():
        test, tuned = row["difference"], row["tuned"]
        lines.append("| " + " | ".join([
            name, *([" ".join(f"{key}={value}" for key, value in tuned["values"].items())]
                    if tuned else []),
            spell(row["mean"]) + (f" ± {row['spread']:.4f}" if row["spread"] is not None else ""),
            f"{test['mean']:+.4f}, {test['low']:+.4f} to {test['high']:+.4f}" if test else "",
            f"{row['p_corrected']:.2g}" if test else "", str(row["seeds_for_half_the_floor"] or ""),
            f"{row['steps']:,}", "" if row["seconds"] is None else f"{row['seconds']:.1f} s",
            f"{row['memory_mib']:,} MiB"]) + " |")
    lines += ["", *(f"- {row['verdict']}" for row in rows.values() if row["verdict"])]
    if floor:
        lines.append(f"- noise floor {floor:.2g}: the deviation of the difference between two runs "
                     f"of the base that differ in the seed alone")
    if found["comparisons"] > 1:
        lines.append(f"- {found['comparisons']} comparisons with the base: p is corrected for that "
                     f"(Holm), the intervals are not")
    edges = [f"{name} ({', '.join(row['tuned']['at_the_edge'])})" for name, row in rows.items()
             if row["tuned"] and row["tuned"]["at_the_edge"]]
    if edges:
        lines.append(f"- best at the edge of what was tried, a better one may lie beyond: "
                     f"{'; '.join(edges)}")
    if any(row["seconds"] is None for row in rows.values()):
        lines.append("- runs shared the processor (--jobs): times are worthless and left out")
    return "\n".join(lines)


def draw(figure: Any, found: dict[str, Any]) -> None:
    """Loss of each variant, a dot a seed, and differences to the base with their intervals."""
    rows = found["variants"]
    left, right = figure.subplots(1, 2)
    for i, row in enumerate(rows.values()):
        seen = [loss for loss in row["losses"] if loss is not None]
        style = {"color": PALETTE[i % len(PALETTE)], "capsize": 4}
        left.plot(seen, [i] * len(seen), "o", color=style["color"], markerfacecolor="white")
        if row["mean"] is not None:
            left.errorbar(row["mean"], i, xerr=row["spread"] or 0, fmt="|", markersize=14, **style)
        if test := row["difference"]:
            right.errorbar(test["mean"], i, xerr=test["high"] - test["mean"], fmt="o", **style)
    right.axvline(0, color=plots.GREY, linewidth=1)
    if floor := found["noise_floor"]:
        right.axvspan(-floor, floor, color=plots.GREY, alpha=0.12, linewidth=0)
    for ax, names, title in ((left, list(rows), "validation loss: seeds, mean, deviation"),
                             (right, [""] * len(rows), "difference, 95%; grey: noise floor")):
        ax.set(ylim=(len(rows) - 0.5, -0.5), xlabel=found["unit"])
        ax.set_yticks(range(len(rows)), names)
        ax.set_title(title, loc="left", fontweight="bold")


def main(words: list[str]) -> None:
    plan = read(words)
    out, name = Path(plan.config.out), plan.config.name
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        found = compare(plan)
        write_json(out / f"{name}.json", found)
        write_text(out / f"{name}.md", markdown(found) + "\n")
        print(f"\n{markdown(found)}\n", flush=True)
        write_bytes(out / f"{name}.png", plots.picture(
            lambda figure: draw(figure, found),
            (11, max(3, 1.5 + 0.35 * len(found["variants"]))), dpi=130))
        print(f"written: {out / name}.json, .md, .png")


if __name__ == "__main__":
    run_command(main)
