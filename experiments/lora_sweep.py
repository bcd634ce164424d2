"""A LoRA study by one command: rank, alpha and dropout, and what such studies leave out.

    python -m experiments.lora_sweep --init_from=out/base --imdb=FILE --alpaca=FILE
    python -m experiments.lora_sweep --study=original --init_from=gpt2-medium --seeds=5
    python -m experiments.lora_sweep --study=grid,budget --processes=8

Each setting x data set x seed is a run of train.py in its own folder, out/sweep/DATA/SETTING/SEED.
The same command again goes on where it was killed; a run that several studies share is done once.
Out: runs.csv (a row for each run and study), sweep.json (how it was made), tables and pictures
(experiments/lora_pictures.py, extra "plots"). Seeds change the adapter's start, dropout and the
order of batches, and are the same for all settings, so that settings compare seed by seed. The
studies are in experiments/lora_studies.py.

The training loss is the mean over the last tenth of a run's steps, its time that of its steps.
"""
import contextlib
import csv
import dataclasses
import io
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import random
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator

import numpy as np
import torch

import lora
from bpe import Tokenizer
from data import alpaca, conversations, corpus, imdb, shards
from data.texts import RECORDS, find_files
from experiments import lora_pictures
from experiments.lora_studies import STUDIES, VARIANTS, Setting
from experiments.runs import load_run
from formats import peft
from formats.files import write_json, write_text
from model import GPT
from run import load
from run.config import build, parse, run_command
from run.device import pick_device
from run.log import provenance
from train import TrainConfig, train

DATA_SETS = ("imdb", "alpaca")
LAST = 0.1                              # the share of the steps that the training loss is of


@dataclass(frozen=True)
class SweepConfig:
    study: tuple[str, ...] = ("all",)  # which of base, original, grid, variants, ranks, targets,
        # budget; or all
    init_from: str = "out/base"  # the model: a run, a Hugging Face folder, gpt2-medium, ...
    imdb: str = ""  # IMDB reviews, as data/imdb.py reads them; empty: download them
    alpaca: str = ""  # Alpaca's records, as data/alpaca.py reads them; empty: download them
    reviews: int = 60  # reviews to train on, drawn at random; 0: all
    records: int = 192  # Alpaca records to train on, likewise
    seeds: int = 3  # runs of each setting, with seeds 0, 1, ...
    out: str = "out/sweep"  # folder of the runs; a sweep that is there goes on
    results: str = ""  # folder for table and pictures; empty: the one of the runs
    processes: int = 1  # runs at the same time
    learning_rate: float = 1e-3  # peak of the studies that do not vary it; cosine to a tenth, no
        # weight decay
    epochs: float = 1.0  # passes over the training data, likewise
    batch: int = 4  # sequences of a step, likewise
    block_size: int = 128  # tokens of a sequence
    warmup_ratio: float = 0.05  # share of the steps with linear warmup
    eval_tokens: int = 8192  # tokens of the validation split that are evaluated, at the end
    template: str = "plain"  # how Alpaca is written
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: str = "auto"  # of matrix products

    def __post_init__(self):
        for name in ("seeds", "processes", "batch", "block_size", "eval_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("reviews", "records"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative; 0 is all")
        for name in ("learning_rate", "epochs"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        for name in self.study:
            if name not in (*STUDIES, "all"):
                raise ValueError(f"study={name} is unknown; choose {', '.join(STUDIES)} or all")

    @property
    def base(self) -> Setting:
        return Setting("", self.learning_rate, self.batch, self.batch, self.epochs)


@dataclass(frozen=True)
class Job:
    """One run."""
    data: str
    setting: Setting
    seed: int

    def folder(self, config: SweepConfig) -> Path:
        return Path(config.out) / self.data / self.setting.name / f"seed{self.seed}"


def plan(config: SweepConfig) -> list[Job]:
    """All runs, seed by seed, so that a sweep that is stopped has whole studies of fewer seeds.

    What studies share is in it for each of them.
    """
    names = STUDIES if "all" in config.study else dict.fromkeys(("base", *config.study))
    return [Job(data, dataclasses.replace(setting, study=name), seed)
            for seed in range(config.seeds) for name in names
            for setting in STUDIES[name](config.base) for data in DATA_SETS]


def train_config(job: Job, config: SweepConfig) -> TrainConfig:
    s = job.setting
    adapter = {} if s.variant == "full" else {
        "lora.r": s.r, "lora.alpha": s.alpha, "lora.dropout": s.dropout, "lora.bias": s.bias,
        "lora.target_modules": tuple(s.targets.split("+"))}
    return build(TrainConfig, {
        "out": str(job.folder(config)), "data": str(Path(config.out) / "data" / job.data),
        "init_from": config.init_from, "seed": job.seed, "template": config.template,
        "epochs": s.epochs, "batch_tokens": s.batch * config.block_size,
        "micro_batch": s.micro_batch, "learning_rate": s.learning_rate,
        "min_learning_rate": s.learning_rate / 10, "warmup_ratio": config.warmup_ratio,
        "weight_decay": 0.0, "eval_every": 0, "eval_tokens": config.eval_tokens, "save_every": 0,
        "keep_last": 1, "sample_tokens": 0, "log_every": 1, "compile": "off",
        "max_bad_steps": 10**9,                 # none of them is applied: the run ends, diverged
        "device": config.device, "dtype": config.dtype, "model.block_size": config.block_size,
        **adapter, **VARIANTS[s.variant]})


# ------------------------------------------------------------------------------------------------
# Data, and what must not change while a sweep goes on

def prepare(config: SweepConfig, tokenizer: Tokenizer) -> None:
    """Both data sets in out/data; the training part of each is as large as asked."""
    folder = Path(config.out) / "data"
    if not (folder / "imdb" / "meta.json").exists():
        found = imdb.read_reviews(config.imdb, shards.DATA / "imdb")
        texts = {half: [text for part, text, _ in found if part == half] for half in
                 ("train", "test")}
        if not texts["train"] or not texts["test"]:
            texts["train"], texts["test"] = corpus.split_documents([text for _, text, _ in found],
                                                                   0.1)
        corpus.write_shards(folder / "imdb", drawn(texts["train"], config.reviews, "reviews"),
                            texts["test"], tokenizer, config.imdb or imdb.URL)
    if not (folder / "alpaca" / "meta.json").exists():
        files = find_files(config.alpaca, RECORDS) if config.alpaca else [
            alpaca.download(shards.DATA / "alpaca" / "alpaca_data.json")]
        talks, dropped = conversations.read(files, "alpaca")
        train_part, val = conversations.split(talks, 0.05)
        conversations.write_conversations(
            folder / "alpaca", drawn(train_part, config.records, "records"),
            config.alpaca or alpaca.URL, dropped=dropped, val=val)


def drawn(items: list[Any], count: int, name: str) -> list[Any]:
    """`count` of the items at random, the same each time; 0: all."""
    if count > len(items):
        raise ValueError(f"{name}={count}, but there are {len(items):,} to train on; give at most "
                         f"that, or 0 for all")
    return random.Random(0).sample(items, count) if count else items


def claim(config: SweepConfig, base: str) -> None:
    """Note in out/sweep.json what all runs share; ValueError where a sweep with other is there."""
    varied = ("study", "seeds", "out", "results", "processes", "learning_rate", "epochs", "batch",
              "init_from")                      # in the runs' names, or without effect on them
    facts = {**{name: value for name, value in dataclasses.asdict(config).items()
                if name not in varied}, "base": base}
    agree(Path(config.out), facts, {"init_from": config.init_from,
                                    **provenance(pick_device(config.device), 1, "")})


def agree(out: Path, facts: dict[str, Any], more: dict[str, Any]) -> None:
    """Note facts, which all runs of a folder share, in its sweep.json, and more beside them;
    ValueError where runs with other facts are there."""
    path = out / "sweep.json"
    facts = json.loads(json.dumps(facts))       # as they are read back: tuples are lists
    if path.exists():
        there = json.loads(path.read_text())["shared"]
        for name in facts:
            if there.get(name) != facts[name]:
                raise ValueError(f"{out} holds a sweep with {name}={there.get(name)}, this one has "
                                 f"{name}={facts[name]}; choose another --out, or delete {out}")
        return
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, {"shared": facts, **more})


# ------------------------------------------------------------------------------------------------
# Runs

def done(folder: Path) -> bool:
    """Whether the run reached its last step."""
    try:
        final = json.loads((folder / "run.json").read_text())["final"]
        return final["step"] >= json.loads((folder / "config.json").read_text())["max_steps"]
    except (FileNotFoundError, KeyError):       # not begun, or killed before its last word
        return False


def perform(task: tuple[SweepConfig, Job]) -> Job:
    """Train one run."""
    config, job = task
    train_apart(train_config(job, config))
    return job


def train_apart(config: TrainConfig) -> None:
    """Train; what is printed goes into screen.txt of the run's folder."""
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "screen.txt", "a") as screen, contextlib.redirect_stdout(screen):
        train(config)
    if not done(folder):                        # stopped by a signal, which train() obeys quietly
        raise KeyboardInterrupt


def end_with_parent(threads: int) -> None:
    """A worker must not outlive a sweep that was killed: the next one trains the same runs."""
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process().sentinel

    def watch() -> None:
        multiprocessing.connection.wait([parent])
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def workers(config: SweepConfig) -> Iterator[Callable]:
    """map() over runs, in this process or in several."""
    if config.processes == 1:
        yield map
        return
    threads = max(1, (os.cpu_count() or 1) // config.processes)
    context = multiprocessing.get_context("forkserver")         # PyTorch is loaded once for all
    context.set_forkserver_preload(["train"])
    with context.Pool(config.processes, end_with_parent, (threads,)) as pool:
        yield pool.imap_unordered


def measure(job: Job, config: SweepConfig) -> dict[str, Any]:
    """A row of the CSV from a finished run's folder; a run that diverged has infinite losses."""
    folder = job.folder(config)
    run = load_run(folder, "")
    losses, val = run.steps["loss"], run.measured("val_loss", "steps")[1]
    last = losses[-max(1, round(LAST * len(losses))):]
    diverged = not (np.isfinite(last).all() and np.isfinite(val[-1]))
    return {"data": job.data, **dataclasses.asdict(job.setting), "seed": job.seed,
            "steps": len(losses),
            "train_loss": math.inf if diverged else round(float(np.mean(last)), 5),
            "val_loss": math.inf if diverged else round(float(val[-1]), 5),
            "seconds": round(float(run.steps["seconds"][-1]), 3)}


def count_trainable(folder: Path) -> int:
    """How many numbers a run trains, from its settings; nothing is allocated."""
    config = build(TrainConfig, json.loads((folder / "config.json").read_text()))
    with torch.device("meta"):                  # has no values, which some variants start from
        model = GPT(config.model)
        if config.lora:
            plain = dataclasses.replace(config.lora, init="kaiming", use_dora=False)
            lora.add_lora(model, plain, quiet=True)
    dora = config.lora and config.lora.use_dora         # has a length for each row of B
    return sum(p.numel() + (len(p) if dora and name.endswith("lora_B") else 0)
               for name, p in model.named_parameters() if p.requires_grad)


def collect(jobs: list[Job], config: SweepConfig) -> list[dict[str, Any]]:
    """A row for each finished run, in the order of the plan."""
    rows, counts, known = [], {}, {}
    for job in jobs:
        folder = job.folder(config)
        if folder not in known and done(folder):
            key = job.data, job.setting.name
            if key not in counts:
                counts[key] = count_trainable(folder)
            known[folder] = {**measure(job, config), "trainable": counts[key]}
        if folder in known:
            rows.append({**known[folder], "study": job.setting.study})
    return rows


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text.getvalue())


def sweep(config: SweepConfig) -> list[dict[str, Any]]:
    """Train what is missing; the rows of the CSV, which is written in any case."""
    model, tokenizer = load.load_base(config.init_from)
    if tokenizer is None:
        raise ValueError(f"init_from={config.init_from} has no tokenizer to read reviews with; put "
                         f"its tokenizer.json there")
    if model.config.block_size < config.block_size:
        raise ValueError(f"block_size={config.block_size} is above the {model.config.block_size} "
                         f"positions of {config.init_from}; choose at most that")
    claim(config, peft.base_hash(model.named_parameters()))
    prepare(config, tokenizer)
    del model
    jobs = plan(config)
    missing = list({job.folder(config): job for job in jobs
                    if not done(job.folder(config))}.values())
    print(f"{len({job.folder(config) for job in jobs}):,} runs, {len(missing):,} to do", flush=True)
    began = time.monotonic()
    try:
        with workers(config) as each:
            for number, job in enumerate(each(perform, [(config, job) for job in missing]), 1):
                row, spent = measure(job, config), time.monotonic() - began
                print(f"{number}/{len(missing)}  {job.data} {job.setting.name} seed {job.seed}  "
                      f"loss {row['train_loss']:.4f}  validation {row['val_loss']:.4f}  "
                      f"{spent / number * (len(missing) - number) / 60:.1f} min left", flush=True)
    finally:
        rows = collect(jobs, config)
        if rows:
            write_csv(Path(config.results or config.out) / "lora_runs.csv", rows)
    return rows


def main(words: list[str]) -> None:
    config = parse(SweepConfig, words, "python -m experiments.lora_sweep", about=__doc__)
    sweep(config)
    table = Path(config.results or config.out) / "lora_runs.csv"
    lora_pictures.main([str(table)])


if __name__ == "__main__":
    run_command(main)
