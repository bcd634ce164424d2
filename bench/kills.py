"""Kill a run with SIGKILL at random moments, start it again, and compare with one left in peace.

    python -m bench.kills [--kills=100] [--ranks=1] [--kind=pretraining] [--save]

A run is killed, all its ranks at once, after a random share of the time that the undisturbed run
takes, again and again until it comes to its end. Then its last.pt and best.pt (parameters and
optimizer state) and its log must equal the undisturbed run's, bit for bit and line for line. After
each kill the newest checkpoint must be readable, and no older than the newest one before. Dropout
is on; the disk is made slow, so that many kills fall into a save.
"""
import multiprocessing
import os
import random
import shutil
import socket
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Literal

import torch
from torch.utils._pytree import keystr, tree_flatten_with_path
from tqdm import tqdm

import train
from bench.machine import CPU, publish, table, where
from data.conversations import write_conversations
from run import checkpoint
from run.config import build, parse, run_command
from run.log import read_log
from run.watch import PHASES, Watch

SLOW_DISK = 0.02            # seconds that each flush to the disk takes longer
MODEL = dict(block_size=32, n_layer=2, n_head=2, n_embd=32, dropout=0.1)
SETTINGS = dict(device="cpu", dtype="float32", compile="off", batch_tokens=512, micro_batch=4,
                max_steps=40, eval_every=8, save_every=3, milestone_every=12, log_every=2,
                learning_rate=1e-2, min_learning_rate=1e-3, warmup_steps=2, sample_every=20,
                sample_tokens=8, timeout_minutes=1.0)


@dataclass(frozen=True)
class KillsConfig:
    kills: int = 100  # how often to kill, at least
    ranks: int = 1  # processes of the run
    kind: Literal["pretraining", "sft", "lora"] = "pretraining"  # what is trained
    seed: int = 0  # of the moments; 0: the clock
    save: bool = False  # add to bench/results/kills.json


def start(function: Callable, ranks: int, *arguments: Any) -> list[Any]:
    """Run function(*arguments) as so many ranks, each in a process of its own that has PyTorch
    loaded already, also what its optimizers import late: half a second a process, not five."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "torch._dynamo"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = [context.Process(target=_as_rank, args=(function, rank, ranks, port, arguments))
             for rank in range(ranks)]
    for process in found:
        process.start()
    return found


def _as_rank(function: Callable, rank: int, ranks: int, port: int, arguments: tuple) -> None:
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())                    # its own would outlive a killed process
    if ranks > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    function(*arguments)


def run(settings: dict[str, Any], phase: Any = None) -> None:
    """A rank of the run, with a slow disk; `phase` tells the killer where it is."""
    sys.stdout = sys.stderr = open(Path(settings["out"]).with_suffix(".txt"), "a")
    fsync, at = os.fsync, Watch.at

    def slow(handle):
        time.sleep(SLOW_DISK)
        fsync(handle)

    def noted(self, step, name):
        if phase is not None:
            phase.value = PHASES.index(name)
        at(self, step, name)
    checkpoint.os.fsync, Watch.at = slow, noted
    train.train(build(train.TrainConfig, settings))


def equal(a: Any, b: Any) -> bool:
    """Whether two values, tensors or not, are the same."""
    return type(a) is type(b) and (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b)


def differences(one: Path, two: Path) -> list[str]:
    """What two finished runs do not have in common: files, tensors, log lines."""
    found = []
    for name in ("last.pt", "best.pt"):
        a, b = ({keystr(path): value for path, value in tree_flatten_with_path(
            checkpoint.load(folder / name))[0]} for folder in (one, two))
        found += [f"{name}: {key}" for key in {**a, **b} if not key.endswith("['config']['out']")
                  and not equal(a.get(key), b.get(key))]
    logs = [[{key: value for key, value in line.items() if key != "tokens_per_s"}
             for line in read_log(folder / "log.jsonl")] for folder in (one, two)]
    found += ["log.jsonl"] if logs[0] != logs[1] else []
    names = [{path.name for path in checkpoint.milestones(folder)} for folder in (one, two)]
    return found + (["milestones"] if names[0] != names[1] else [])


def campaign(folder: Path, settings: dict[str, Any], ranks: int, kills: int,
             rng: random.Random) -> dict[str, Any]:
    """Run in peace once, then kill so often: how many kills, how many runs of them exact."""
    phase = multiprocessing.get_context("forkserver").RawValue("i", 0)
    counts = {"kills": 0, "exact": 0, "lost": 0, "runs": 0, "in a save": 0,
              **{name: 0 for name in PHASES}}
    reference = folder / "peace"
    began = time.monotonic()
    for process in start(run, ranks, {**settings, "out": str(reference)}, phase):
        process.join()
        if process.exitcode:
            raise RuntimeError(f"the undisturbed run failed:\n"
                               f"{reference.with_suffix('.txt').read_text()[-2000:]}")
    span = time.monotonic() - began
    while counts["kills"] < kills:
        out = folder / f"run{counts['runs']}"
        killed = newest = 0
        while True:
            phase.value = 0
            processes = start(run, ranks, {**settings, "out": str(out)}, phase)
            enough = counts["kills"] + killed >= kills
            processes[0].join(None if enough else rng.uniform(0, span))
            done = not processes[0].is_alive()
            for process in [] if done else rng.sample(processes, ranks):
                process.kill()
            for process in processes:
                process.join()
            if done:
                break
            killed += 1
            counts[PHASES[phase.value]] += 1
            counts["in a save"] += any(out.glob("*.tmp"))
            saved = (checkpoint.load_last(out) or {"step": 0})["step"] if out.exists() else 0
            counts["lost"] += saved < newest
            newest = max(newest, saved)
        wrong = differences(reference, out) if not any(p.exitcode for p in processes) else [
            out.with_suffix(".txt").read_text()[-1000:]]
        if wrong:
            print(f"{out.name}, killed {killed} times, differs: {wrong[:5]}", file=sys.stderr)
        counts["runs"] += 1
        counts["kills"] += killed
        counts["exact"] += 0 if wrong else killed
        shutil.rmtree(out)
    return counts


def settings_of(kind: str, folder: Path) -> dict[str, Any]:
    """The run to be killed: pretraining, or fine-tuning of a base that is made for it."""
    from data.corpus import CorpusConfig, prepare
    text = folder / "text.txt"
    text.write_text("".join(f"line {i * i % 97} of the text, {'odd' if i % 2 else 'even'}\n"
                            for i in range(240)))
    data = prepare(CorpusConfig(from_=str(text), tokenizer="bytes", validation=1 / 6,
                                out=str(folder / "data")))
    pretraining = {**SETTINGS, "data": str(data), "model": MODEL}
    if kind == "pretraining":
        return pretraining
    base = folder / "base"
    for process in start(run, 1, {**pretraining, "out": str(base), "max_steps": 4}):
        process.join()
    conversations = [{"messages": [
        {"role": "user", "content": f"{i} squared?"}, {"role": "assistant", "content": f"{i * i}"},
        {"role": "user", "content": "and so?"}, {"role": "assistant", "content": "so" * (i % 3)}
    ][:2 + 2 * (i % 3 > 0)]} for i in range(300)]
    write_conversations(folder / "chat", conversations, "made up")
    sft = {**SETTINGS, "init_from": str(base), "data": str(folder / "chat"), "eval_tokens": 200,
           "model": {"dropout": MODEL["dropout"]}}
    return sft if kind == "sft" else {**sft, "lora": dict(r=2, dropout=0.1)}


def report(found: dict[str, Any]) -> str:
    """Results as markdown, a row for each kind of run."""
    return (f"`python -m bench.kills`, {where(found)}: SIGKILL at random moments of a short run. "
            f"exact: the run ended as one left in peace; lost: a checkpoint that had been there "
            f"was not, or could not be read; behind them where the kills hit:\n\n" + table(
                " | ".join(("kind", "ranks", "runs", "kills", "exact", "lost", *PHASES,
                            "in a save")), found["rows"]))


def main(words: list[str]) -> None:
    config = parse(KillsConfig, words, "python -m bench.kills", about=__doc__)
    with tempfile.TemporaryDirectory() as folder:
        counts = campaign(Path(folder), settings_of(config.kind, Path(folder)), config.ranks,
                          config.kills, random.Random(config.seed or time.time_ns()))
    publish(report, f"kills-{config.kind}-{config.ranks}", config.save, CPU,
            [{"kind": config.kind, "ranks": config.ranks, **counts}], [])
    if counts["exact"] != counts["kills"] or counts["lost"]:
        raise ValueError("not every kill was survived; see above")


if __name__ == "__main__":
    run_command(main)
