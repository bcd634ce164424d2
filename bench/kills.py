"""Kill a run with SIGKILL at random moments, start it again, and compare with one left in peace.

    python -m bench.kills [--kills=1000] [--kind=all] [--ranks=0] [--save]

All ranks of a run are killed at once, again and again until it comes to its end. Then its last.pt
and best.pt (parameters and optimizer state) and its log must equal those of a run left in peace,
bit for bit and line for line. After each kill the newest checkpoint must be readable, and no older
than the newest one before. Dropout is on; the disk is made slow, so that saves last. A third of the
kills are aimed at a random moment of a save, the others at one of the start or of the next steps.

With --save, bench/results/kills.json has the kills so far, and the same command goes on with them.

    python -m bench.kills --every=60 [--minutes=6] [--save]

What surviving costs: torchrun with 2 ranks, both killed every so many seconds and started again by
it; useful steps as a share of those of a run that is left in peace, and where the others went.
"""
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
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
SHARES = {"pretraining": (20, 16), "sft": (17, 13), "lora": (25, 6), "compiled": (2, 1)}
PRELOADED = ["train", "torch._dynamo"]


@dataclass(frozen=True)
class KillsConfig:
    kills: int = 1000  # how often to kill, at least
    kind: Literal[("all", *SHARES)] = "all"  # what is trained; all shares the kills out
    ranks: int = 0  # processes of the run; 0: 1 and 2
    seed: int = 0  # of the moments; 0: the clock
    every: float = 0.0  # seconds between kills, to see what they cost; 0: count what they lose
    minutes: float = 6.0  # how long, with every
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
        self.step, self.phase, self.saves, self.saving = (context.RawValue("i", number)
                                                          for number in (-1, 0, 0, 0))


def run(settings: dict[str, Any], told: Told | None = None) -> None:
    """A rank of the run, with a slow disk; what is `told` goes to the killer."""
    sys.stdout = sys.stderr = open(Path(settings["out"]).with_suffix(".txt"), "a")
    fsync, at, write = os.fsync, Watch.at, checkpoint.Saver._write
    told = told or Told()

    def slow(handle):
        time.sleep(SLOW_DISK)
        fsync(handle)

    def noted(self, step, name):
        told.step.value, told.phase.value = step, PHASES.index(name)
        at(self, step, name)

    def written(self, *arguments):
        told.saves.value, told.saving.value = told.saves.value + 1, 1
        write(self, *arguments)
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
    began = time.monotonic()
    processes = start(run, ranks, {**settings, "out": str(reference)}, told)
    while processes[0].is_alive() and told.step.value < 0:
        time.sleep(0.001)
    starts = time.monotonic() - began
    for process in processes:
        process.join()
        if process.exitcode:
            raise RuntimeError(f"the undisturbed run failed:\n"
                               f"{reference.with_suffix('.txt').read_text()[-2000:]}")
    while counts["kills"] < kills:
        out = folder / f"run{counts['runs']}"
        killed = newest = 0
        while True:
            told = Told()
            processes = start(run, ranks, {**settings, "out": str(out)}, told)
            if counts["kills"] + killed < kills:
                wait_for_a_moment(processes[0], told, rng, starts)
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


# ---------------------------------------------------------------------- what surviving costs

LARGER = {**SETTINGS, "model": dict(block_size=128, n_layer=4, n_head=4, n_embd=128),
          "batch_tokens": 4096, "micro_batch": 16, "max_steps": 1_000_000, "eval_every": 0,
          "save_every": 5, "milestone_every": 0, "sample_tokens": 0, "schedule": "constant",
          "log_every": 10, "timeout_minutes": 10.0}
SCRIPT = """import json, os, sys, time
sys.path.insert(0, {repository!r})
events, rank = open({events!r}, "a", buffering=1), os.environ["RANK"]
def note(what, number):
    events.write(f"{{time.time()}} {{what}} {{number}}\\n")
note("pid", os.getpid())
import torch
import train
from run.config import build
from run.watch import Watch
torch.set_num_threads(1)
at = Watch.at
def noted(self, step, phase):
    if rank == "0":
        note(phase, step)
    at(self, step, phase)
if rank == "0":
    note("imported", 0)
Watch.at = noted
train.train(build(train.TrainConfig, json.loads({settings!r})))
"""
Event = tuple[float, str, int]          # when (time.time()), what, a process or a step


def disturbed(folder: Path, settings: dict[str, Any], every: float, minutes: float
              ) -> tuple[list[Event], list[float]]:
    """Run 2 ranks under torchrun, and kill both every so many seconds: what they noted, and when
    they were started and killed."""
    file, script = folder / "events", folder / "run.py"
    script.write_text(SCRIPT.format(repository=str(machine.REPOSITORY), events=str(file),
                                    settings=json.dumps({**settings, "out": str(folder / "run")})))
    times = [time.time()]
    with open(folder / "printed.txt", "w") as printed:
        agent = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
             "--max-restarts=1000", str(script)], stdout=printed, stderr=printed,
            env={**os.environ, "OMP_NUM_THREADS": "1"})
    while len(times) <= 60 * minutes / every:
        time.sleep(max(0.0, times[0] + len(times) * every - time.time()))
        if agent.poll() is not None:
            raise RuntimeError((folder / "printed.txt").read_text()[-2000:])
        now = time.time()
        for when, what, number in read_events(file):
            if what == "pid" and when > times[-1]:
                os.kill(number, signal.SIGKILL)
        times.append(now)
    agent.kill()
    agent.wait()
    return [event for event in read_events(file) if event[0] < times[-1]], times


def read_events(file: Path) -> list[Event]:
    """What the ranks noted; the last line may be half written."""
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [(float(when), what, int(number)) for when, what, number in map(str.split, lines)]


def costs(events: list[Event], times: list[float]) -> dict[str, Any]:
    """Where the time between the kills went, in seconds. A step that had to be taken again is a
    loss; a run in peace starts once, and takes its steps and saves as fast as this one did."""
    parts = [[event for event in events if begin < event[0] <= end and event[1] != "pid"]
             for begin, end in zip(times, times[1:])]
    row = {"ranks": 2, "kills": len(times) - 2, "seconds": times[-1] - times[0], "steps": 0,
           "imports": 0.0, "start": 0.0, "saves": 0.0}
    loops, taken, kept, first_start = 0.0, 0, 0, 0.0
    for begin, end, part in zip(times, times[1:], parts):
        imported = next((when for when, what, _ in part if what == "imported"), end)
        loop = [event for event in part if event[1] in PHASES]
        started = loop[0][0] if loop else end
        row["imports"] += imported - begin
        row["start"] += started - imported
        loops, first_start = loops + end - started, first_start or started - begin
        row["saves"] += sum(after[0] - event[0] for event, after in zip(loop, [*loop[1:], (end,)])
                            if event[1] == "saving")
        if loop:
            taken += loop[-1][2] - loop[0][2]
            kept = loop[-1][2]                          # since step 0: what was lost is not in it
    second = loops / max(taken, 1)                      # of a step, its saves included
    row.update(steps=kept, replay=(taken - kept) * second, seconds_a_step=second, share=kept /
               max((row["seconds"] - first_start) / second, 1e-9))
    return {key: round(value, 3) for key, value in row.items()}


def report_costs(found: dict[str, Any]) -> str:
    """What surviving costs, as markdown."""
    return (f"`python -m bench.kills --every=60`, {where(found)}"
            f"{', beside other work' if found.get('crowded') else ''}: both ranks of a run killed "
            f"every {found['every']:g} s and started again by torchrun. share: useful steps over "
            f"those of a run in peace in the same time (at least 0.90: "
            f"{machine.held(found['rows'][0]['share'] >= 0.9)}). In seconds, of all: imports (of "
            f"PyTorch above all, and torchrun's), the rest of the start, waiting for saves, and "
            f"steps that were taken again:\n\n" + table(
                "ranks | kills | seconds=seconds:.0f | useful steps=steps | share=share:.3f | "
                "imports=imports:.1f | start=start:.1f | saves=saves:.1f | replay=replay:.1f | "
                "s a step=seconds_a_step:.3f", found["rows"]))


def report(found: dict[str, Any]) -> str:
    """Results as markdown: the sum, and a row for each kind of run."""
    total = total_of(found["rows"])
    return (f"`python -m bench.kills`, {where(found)}: SIGKILL at random moments of short runs, "
            f"**{total['kills']:,} kills, {total['exact']:,} exact, {total['lost']:,} lost**. "
            f"exact: the run ended as one left in peace; lost: a checkpoint that had been there "
            f"was not, or could not be read; behind them where the loop was when it was killed, "
            f"and how often a checkpoint was being written:\n\n" + table(
                " | ".join(("kind", "ranks", "runs", "kills", "exact", "lost", *PHASES,
                            "in a save")), found["rows"]))


def total_of(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Kills of all kinds: how many, how many exact, how many that lost a checkpoint."""
    return {key: sum(row[key] for row in rows) for key in ("kills", "exact", "lost")}


def main(words: list[str]) -> None:
    config = parse(KillsConfig, words, "python -m bench.kills", about=__doc__)
    torch.set_num_threads(1)                            # as the ranks do, for the report
    if config.every:
        with tempfile.TemporaryDirectory() as folder:
            data = settings_of("pretraining", Path(folder))["data"]
            row = costs(*disturbed(Path(folder), {**LARGER, "data": data}, config.every,
                                   config.minutes))
        busy = os.getloadavg()[0] > (os.cpu_count() or 1) + 3
        publish(report_costs, "survival", config.save, CPU, [row], [], every=config.every,
                crowded=busy)
        return
    kinds = [(kind, ranks, share) for kind, shares in SHARES.items() if config.kind in ("all", kind)
             for ranks, share in enumerate(shares, 1) if config.ranks in (0, ranks)]
    if not kinds:
        raise ValueError(f"ranks={config.ranks} is not allowed; give 1, 2, or 0 for both")
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
            done = [row for row in rows if "kills" in row]
            publish(report, "kills", config.save, CPU, done, [], total=total_of(done))
    if any(row["exact"] != row["kills"] or row["lost"] for row in rows):
        raise ValueError("not every kill was survived; see above")


if __name__ == "__main__":
    run_command(main)
