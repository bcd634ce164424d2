"""Kill a run with SIGKILL at random moments, start it again, and compare with one left in peace.

    python -m bench.kills [--kills=1000] [--kind=all] [--ranks=0] [--save]

All ranks of a run are killed at once, again and again until it comes to its end. Then its last.pt
and best.pt (parameters and optimizer state) and its log must equal those of a run left in peace,
bit for bit and line for line. After each kill the newest checkpoint must be readable, and no older
than the newest one before. Dropout is on; the disk is made slow, so that saves last. A third of the
kills are aimed at a random moment of a save, the others at one of the start or of the next steps.

With --save, bench/results/kills.json has the kills so far, and the same command goes on with them.
"""
import json
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
from bench import machine
from bench.machine import CPU, publish, table, where
from data.conversations import write_conversations
from run import checkpoint
from run.config import build, parse, run_command
from run.log import read_log
from run.watch import PHASES, Watch

SLOW_DISK = 0.02            # seconds that each flush to the disk takes longer
MODEL = dict(block_size=32, n_layer=2, n_head=2, n_embd=32, dropout=0.1)
SETTINGS = dict(device="cpu", dtype="float32", compile="off", batch_tokens=256, micro_batch=4,
                max_steps=40, eval_every=8, save_every=3, milestone_every=12, log_every=2,
                learning_rate=1e-2, min_learning_rate=1e-3, warmup_steps=2, sample_every=20,
                sample_tokens=8, timeout_minutes=2.0)
# Of 100 kills, with 1 rank and with 2. A start that compiles takes as long as ten others.
SHARES = {"pretraining": (20, 16), "sft": (17, 13), "lora": (18, 13), "compiled": (2, 1)}


PRELOADED = ["train", "torch._dynamo"]


@dataclass(frozen=True)
class KillsConfig:
    kills: int = 1000  # how often to kill, at least
    kind: Literal[("all", *SHARES)] = "all"  # what is trained; all shares the kills out
    ranks: int = 0  # processes of the run; 0: 1 and 2
    seed: int = 0  # of the moments; 0: the clock
    save: bool = False  # keep the kills in bench/results/kills.json, and go on with those there


def start(function: Callable, ranks: int, *arguments: Any) -> list[Any]:
    """Run function(*arguments) as so many ranks, each in a process of its own that has PyTorch
    loaded already, also what its optimizers import late: half a second a process, not five."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")     # no processes of its own
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
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


class Told:
    """What a run tells its killer while it lives: where its loop is, and its saves."""

    def __init__(self):
        context = multiprocessing.get_context("forkserver")
        self.step, self.phase, self.saves, self.saving = (context.RawValue("i", 0)
                                                          for _ in range(4))

    def reset(self) -> None:
        self.step.value, self.phase.value, self.saves.value, self.saving.value = -1, 0, 0, 0


def run(settings: dict[str, Any], told: Told | None = None) -> None:
    """A rank of the run, with a slow disk; what is `told` goes to the killer."""
    sys.stdout = sys.stderr = open(Path(settings["out"]).with_suffix(".txt"), "a")
    fsync, at, write = os.fsync, Watch.at, checkpoint.Saver._write

    def slow(handle):
        time.sleep(SLOW_DISK)
        fsync(handle)

    def noted(self, step, name):
        if told:
            told.step.value, told.phase.value = step, PHASES.index(name)
        at(self, step, name)

    def written(self, *arguments):
        if told:
            told.saves.value, told.saving.value = told.saves.value + 1, 1
        write(self, *arguments)
        if told:
            told.saving.value = 0
    checkpoint.os.fsync, Watch.at, checkpoint.Saver._write = slow, noted, written
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


def wait_for_a_moment(process: Any, told: Told, rng: random.Random, starts: float) -> None:
    """Until the moment to kill, or the end of the run. starts: seconds that a start takes."""
    def wait(ready: Callable[[], bool]) -> None:
        while process.is_alive() and not ready():
            time.sleep(0.001)

    if rng.random() < 1 / 3:                            # of a save: 2 to 5 flushes
        number = rng.randint(1, 3)
        wait(lambda: told.saves.value >= number)
        time.sleep(rng.uniform(0, 4 * SLOW_DISK))
    elif steps := rng.randrange(8):                     # of one of the next steps
        wait(lambda: told.step.value >= 0)
        first = told.step.value
        wait(lambda: told.step.value >= first + steps - 1)
        time.sleep(rng.uniform(0, 2 * SLOW_DISK))
    else:
        process.join(rng.uniform(0, starts))


def campaign(folder: Path, settings: dict[str, Any], ranks: int, kills: int,
             rng: random.Random) -> dict[str, Any]:
    """Run in peace once, then kill so often, at least: how many kills, how many of them in runs
    that ended exactly as the one in peace, how many lost a checkpoint."""
    told = Told()
    counts = {"kills": 0, "exact": 0, "lost": 0, "runs": 0, "in a save": 0,
              **{name: 0 for name in PHASES}}
    reference = folder / "peace"
    told.reset()
    began = starts = time.monotonic()
    for process in (processes := start(run, ranks, {**settings, "out": str(reference)}, told)):
        while process.is_alive() and told.step.value < 0:
            time.sleep(0.001)
        starts = max(starts, time.monotonic())
    for process in processes:
        process.join()
        if process.exitcode:
            raise RuntimeError(f"the undisturbed run failed:\n"
                               f"{reference.with_suffix('.txt').read_text()[-2000:]}")
    while counts["kills"] < kills:
        out = folder / f"run{counts['runs']}"
        killed = newest = 0
        while True:
            told.reset()
            processes = start(run, ranks, {**settings, "out": str(out)}, told)
            if counts["kills"] + killed < kills:
                wait_for_a_moment(processes[0], told, rng, starts - began)
            else:
                processes[0].join()
            done = not processes[0].is_alive()
            for process in [] if done else rng.sample(processes, ranks):
                process.kill()
            for process in processes:
                process.join()
            if done:
                break
            killed += 1
            counts[PHASES[told.phase.value]] += 1
            counts["in a save"] += told.saving.value
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
    if kind in ("pretraining", "compiled"):
        return {**pretraining, "compile": "on" if kind == "compiled" else "off"}
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
    """Results as markdown: the sum, and a row for each kind of run."""
    total = {key: sum(row[key] for row in found["rows"]) for key in ("kills", "exact", "lost")}
    return (f"`python -m bench.kills`, {where(found)}: SIGKILL at random moments of short runs, "
            f"**{total['kills']:,} kills, {total['exact']:,} exact, {total['lost']:,} lost**. "
            f"exact: the run ended as one left in peace; lost: a checkpoint that had been there "
            f"was not, or could not be read; behind them where the loop was when it was killed, "
            f"and how often a checkpoint was being written:\n\n" + table(
                " | ".join(("kind", "ranks", "runs", "kills", "exact", "lost", *PHASES,
                            "in a save")), found["rows"]))


def main(words: list[str]) -> None:
    config = parse(KillsConfig, words, "python -m bench.kills", about=__doc__)
    kinds = [(kind, ranks, share) for kind, shares in SHARES.items() if config.kind in ("all", kind)
             for ranks, share in enumerate(shares, 1) if config.ranks in (0, ranks)]
    if not kinds:
        raise ValueError(f"ranks={config.ranks} is not allowed; give 1, 2, or 0 for both")
    torch.set_num_threads(1)                            # as the ranks do, for the report
    PRELOADED.append("torch._inductor.compile_fx")      # seconds of each start that compiles
    rng, file = random.Random(config.seed or time.time_ns()), machine.RESULTS / "kills.json"
    rows = json.loads(file.read_text())["rows"] if config.save and file.exists() else []
    at_once = 40                                        # kills between two looks at the file
    for kind, ranks, share in kinds:
        row = next((row for row in rows if (row["kind"], row["ranks"]) == (kind, ranks)), None)
        if not row:
            rows.append(row := {"kind": kind, "ranks": ranks})
        most = -(-config.kills * share // sum(share for *_, share in kinds))
        while (missing := most - row.get("kills", 0)) > 0:
            with tempfile.TemporaryDirectory() as folder:
                counts = campaign(Path(folder), settings_of(kind, Path(folder)), ranks,
                                  min(missing, at_once), rng)
            row.update({key: row.get(key, 0) + count for key, count in counts.items()})
            publish(report, "kills", config.save, CPU, [row for row in rows if "kills" in row], [])
    if any(row["exact"] != row["kills"] or row["lost"] for row in rows):
        raise ValueError("not every kill was survived; see above")


if __name__ == "__main__":
    run_command(main)
