"""A run's folder: taken for this process, and the run in it gone on with, or left alone.

The same command goes on where it stopped. Another run in the same folder is refused: one that
differs in what SAME names. Other settings may change (more steps, another schedule), and are said.
"""
import contextlib
import dataclasses
import math
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterator

import torch

from formats.files import read_json, write_json
from optim import READ_BY, OptimConfig
from run import checkpoint
from run.config import flatten, warn
from run.device import peak_memory
from run.log import (RunLog, in_digits, in_words, provenance, read_log, summary_writer,
                     this_command, this_python)
from run.processes import Processes
from run.watch import locked

# What makes it another run; a name with a dot at its end stands for all settings that begin so.
SAME = ("data", "seed", "batch_tokens", "init_from", "base", "packing", "pooling", "model.",
        "lora.", "optim.optimizer")
# What moves the figures that a run ends with, so that a finished one with others is not this one.
FIGURES = ("max_steps", "learning_rate", "min_learning_rate", "schedule", "warmup_steps",
           "weight_decay", "grad_clip", "dtype", "eval_every", "eval_tokens", "patience",
           "skip_spikes", "optim.")
# Of passes over the same data those after 4 gain little and those after 40 nothing (Muennighoff et
# al. 2023, 2305.16264); up to so many they may be meant.
MANY_PASSES = 100


@dataclass
class Progress:
    """How far a run has come, as its checkpoints hold it."""
    step: int = 0
    best_loss: float = math.inf                 # of best.pt
    stale: int = 0                              # evaluations since then
    recent: list[float] = field(default_factory=list)       # the last losses, to know a spike by

    def finished(self, config: Any) -> bool:
        """Whether all steps are taken, or the loss has not fallen for `patience` evaluations."""
        return self.step >= config.max_steps or 0 < config.patience <= self.stale


def with_shape(config: Any, model: Any, data: Any, rank: int) -> Any:
    """The config of train.py with the shape that the network has and the template of the data. A
    classifier writes nothing; its head is new, so it trains in full beside an adapter."""
    if config.report_to == "tensorboard":
        summary_writer()                                # said before anything is written
    unread = (["pooling"] if data.template else ["template", "labels"] if data.classes else
              ["template", "labels", "packing", "pooling"])
    if rank == 0 and (names := [f"{name}={getattr(config, name)}" for name in unread
                                if getattr(config, name) != getattr(type(config), name)]):
        what = "conversations" if data.template else "classes" if data.classes else "plain text"
        warn(f"warning: {config.data} holds {what} and makes no use of {', '.join(names)}")
    config = dataclasses.replace(config, model=model.config, template=data.template)
    if not data.classes:
        return config
    if config.hellaswag_every:
        raise ValueError(f"hellaswag_every={config.hellaswag_every} asks for a model that writes, "
                         f"and {config.data} makes a classifier; leave it out")
    adapter = config.lora
    if adapter and "head" not in adapter.modules_to_save:
        adapter = dataclasses.replace(adapter, modules_to_save=(*adapter.modules_to_save, "head"))
    return dataclasses.replace(config, lora=adapter, sample_tokens=0)


def with_step_counts(config: Any, batches: Any) -> Any:
    """The config of train.py with epochs and warmup_ratio turned into steps."""
    steps = config.epochs * batches.rows_per_epoch / batches.rows_per_step
    steps = math.ceil(steps) or config.max_steps
    passes = steps * batches.rows_per_step / batches.rows_per_epoch
    if passes > MANY_PASSES and batches.rank == 0:
        warn(f"warning: {passes:,.0f} passes over the {batches.rows_per_epoch:,} rows of "
             f"{config.data}, which will be learned by heart; lower max_steps or epochs, or "
             f"prepare more data")
    warmup = config.warmup_steps or round(config.warmup_ratio * steps)
    if warmup > steps and batches.rank == 0:
        warn(f"warning: warmup_steps={warmup} are more than the {steps} steps of the run, whose "
             f"learning rate will not come to its peak; lower warmup_steps")
    if config.lora and config.optim.optimizer != "adamw" and batches.rank == 0:
        warn(f"warning: optim.optimizer={config.optim.optimizer} is for the matrices of linear "
             f"layers, which lora freezes; A and B of its adapter are trained by adamw")
    readers = config.optim.optimizer, config.schedule, "lora" if config.lora else ""
    for name, reader in READ_BY.items() if batches.rank == 0 else ():
        value = getattr(config.optim, name)
        if value != getattr(OptimConfig, name) and reader not in readers:
            warn(f"warning: optim.{name}={value} changes nothing: only {reader} reads it, and this "
                 f"run has {', '.join(filter(None, readers))}")
    return dataclasses.replace(config, max_steps=steps, epochs=0.0, warmup_steps=warmup,
                               warmup_ratio=0.0)


def hold_folder(out: Path, keep_last: int, world: Processes, held: contextlib.ExitStack) -> None:
    """Make the run's folder, hold it against other runs for as long as `held` lasts, and clear up
    what a killed run left half done."""
    if world.rank == 0:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
            (out / "log.jsonl").open("a").close()
            held.enter_context(locked(out))
            for left in out.glob("*.tmp"):
                left.unlink()
            checkpoint.complete_renames(out, keep_last)
    world.wait()


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """What the disk refuses before the first step, as an error of the setting that asked for it."""
    try:
        yield
    except OSError as error:
        raise PermissionError(f"out={out} cannot be written: {error.strerror}; choose another "
                              f"--out") from None


def find_checkpoint(out: Path, config: Any, data: Any, base: str, world: Processes
                    ) -> tuple[dict[str, Any] | None, Progress]:
    """The checkpoint of the same run, if there is one in the folder, and how far that has come.
    ValueError for another run's.

    data: the data set, base: hash of the weights that an adapter is trained on, else "".
    """
    state = checkpoint.load_last(out)
    if state is None:
        return None, Progress()
    if "data" not in state:
        raise ValueError(f"last.pt in {out} is a copy of a best.pt, which holds a model and no "
                         f"optimizer to go on with; start from it with --init_from={out} and "
                         f"another --out")
    there = {**flatten(state["config"]), "data": state["data"], "base": state["base"]}
    here = {**flatten(dataclasses.asdict(config)), "data": data.fingerprint, "base": base}
    changed = {name: [repr(str(values.get(name)))[1:-1][:200] for values in (there, here)]
               for name in {**there, **here} if there.get(name) != here.get(name)}
    progress = Progress(*(state[field.name] for field in dataclasses.fields(Progress)))
    finished = progress.finished(config)
    more = "max_steps" if progress.step >= config.max_steps else "patience"
    made_of = ()
    if "data" in changed:               # a hash, of which these are a part that has a name
        made_of, paths = ("template", "labels"), (state["config"].get("data"), config.data)
        changed["data"] = [f"{path} ({digest})" for path, digest in zip(paths, changed["data"])]
    for name, (before, now) in sorted(changed.items(), key=lambda one: one[0] not in made_of):
        differs = f"{name:.80}={before}, this one has {name:.80}={now}; choose another"
        if _is_one_of((*SAME, *made_of), name):
            raise ValueError(f"{out} holds a run with {differs} --out, or delete {out}")
        if finished and name in there and _is_one_of(FIGURES, name):
            raise ValueError(f"{out} holds a finished run with {differs} --out, or train on with a "
                             f"larger --{more}")
    said = [f"{name} {before} -> {now}" for name, (before, now) in changed.items()
            if name in here and name in there and name != "out"]
    if world.rank == 0 and said:
        print(f"settings changed since the checkpoint: {', '.join(said)}")
    if "eval_tokens" in changed:                        # losses of other tokens do not compare
        progress.best_loss, progress.stale = math.inf, 0
        if world.rank == 0:
            print("another part of the validation split is evaluated from here on, so best.pt will "
                  "be the best from here on")
    if world.rank == 0 and not finished:
        threads = state.get("threads", torch.get_num_threads())
        if world.device.type == "cpu" and threads != torch.get_num_threads():
            warn(f"warning: {out} was trained with {threads} threads, now there are "
                 f"{torch.get_num_threads()}: sums are added in another order, so losses may "
                 f"differ in their last digits; OMP_NUM_THREADS={threads} would go on exactly")
    return state, progress


def _is_one_of(names: tuple[str, ...], name: str) -> bool:
    return name in names or name.startswith(tuple(part for part in names if part.endswith(".")))


def write_start(out: Path, config: Any, data: Any, world: Processes) -> None:
    """The files that say what a run is, before its first step."""
    if world.rank == 0:
        with writing(out):
            write_json(out / "config.json", dataclasses.asdict(config))
            write_json(out / "run.json", provenance(world.device, world.size, data.fingerprint))
            if data.tokenizer:
                data.tokenizer.save(out / "tokenizer.json")


def finish(out: Path, log: RunLog, data: Any, progress: Progress, figures: dict[str, Any],
           ended: str, signal_number: int) -> dict[str, Any]:
    """Put the last figures into run.json, and say them; returns the run's summary.

    figures: of the last evaluation. ended: what ended the run before its last step: "patience",
    "max_minutes" or "signal" (its number; another rank may have had it), else "".
    """
    # Of the whole run, in however many parts it was trained; time without evaluations and saves.
    final = {"step": progress.step, "tokens": log.tokens, "train_loss": log.last_loss,
             **{key if key == "fit" else f"val_{key}": value for key, value in figures.items()},
             "best_val_loss": progress.best_loss, "train_seconds": round(log.busy, 2),
             "tokens_per_s": round((log.tokens - log.unseen) / max(log.busy, 1e-9), 1),
             "peak_memory_mib": peak_memory(log.device) >> 20}
    run = read_json(out / "run.json") if log.active else {}
    if log.active:
        write_json(out / "run.json", {**run, "final": final})
    if figures:
        log.say(in_words(figures, data.unigram_entropy))
    if ended == "patience":
        log.say(f"ended at step {progress.step}: {progress.stale} evaluations without a lower "
                f"loss; best.pt has validation loss {progress.best_loss:.4f}")
    if ended in ("signal", "max_minutes"):
        log.say(f"stopped and saved at step {progress.step}; to go on: {this_command()}")
    else:
        log.say(f"draw its curve: {this_python()} -m experiments.plots {out} "
                f"--out={out}/curve.png")
    stopped = {"stopped_by": int(signal_number or signal.SIGTERM)} if ended == "signal" else {}
    return {"out": str(out), **run, **final, **stopped}


def finished_summary(out: Path, rank: int) -> dict[str, Any]:
    """The summary of a run that has nothing left to do, and a word about it."""
    run = read_json(out / "run.json", f"move {out} away to start anew")
    final = run.pop("final", None)
    whole = isinstance(final, dict) and isinstance(final.get("step"), int)
    figures = final if whole else _figures_of_log(out)
    if rank == 0:
        write_json(out / "run.json", {**run, "final": figures})
        print(f"{out} is finished: " + ", ".join(
            f"{key} {in_digits(value)}" for key, value in figures.items()))
        print("a larger --max_steps trains on; another --out starts anew")
    return {"out": str(out), **run, **figures}


def about_bad_steps(out: Path, count: int, step: int, batches: Any) -> str:
    """What to say when a run stops over losses that are not finite."""
    saved = [path.name for path in sorted(out.glob("last*.pt"))]
    return (f"loss or gradient was not finite in the {count} steps up to {step}; none was applied, "
            f"{', '.join(saved) or 'nothing'} in {out} is of before; step {step} read "
            f"{batches.where(step - 1)}; try a lower learning_rate, dtype=float32, or look at that "
            f"text")


def _figures_of_log(out: Path) -> dict[str, Any]:
    """Of a run that was killed between its last checkpoint and its last word."""
    lines = read_log(out / "log.jsonl") if (out / "log.jsonl").exists() else []
    if not lines:
        raise ValueError(f"{out} is finished, and its log.jsonl is empty or missing; move {out} "
                         f"away to start anew")
    last = {}
    for line in lines:
        last.update({key: value for key, value in line.items() if value is not None})
    return {name: last.get(key) for name, key in (
        ("step", "step"), ("tokens", "tokens"), ("train_loss", "loss"), ("val_loss", "val_loss"),
        ("val_bits_per_byte", "bits_per_byte"))}
