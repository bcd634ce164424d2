"""Advice on chat data, tested: each piece of it by training runs that differ in one thing.

    python -m experiments.chat_data --init_from=out/demo --seeds=3 --out=out/chat_data

Questions about functions of Python's library and their answers (data/pydocs.py) are drawn by the
seed; most studies change something about the same conversations. Every run makes the same number of
steps, where a study does not say otherwise. A run is judged by conversations that nothing was
trained on, nor any with the same answer. The same command goes on where it was killed.

    rates       learning rates of all weights, and of an adapter of rank 8 on all linear layers
    labels      a loss on the answers only, or on the questions too
    turns       conversations of two turns: both answers are learned, or the last
    repeats     fewer conversations, more often
    same        a share of the questions gets one and the same answer
    wording     each function asked about in one way, or in one of four
    lengths     short answers only, long ones only, or both
    system      a system prompt never, always, or in half of the conversations
    topics      questions alone, or a second one about something else behind the first

Out: results.json, a row for each study, arm, seed and test: loss (nats a labelled token), exact
(the share of conversations answered word for word by greedy decoding), samples.
"""
import contextlib
import dataclasses
import json
import random
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterator

import numpy as np

from bpe import END_OF_TEXT
from data import chat, conversations, pydocs
from data.samples import Samples
from data.templates import TEMPLATES, Template
from eval.fit import answer_figures
from formats.files import write_json
from run import load
from run.config import build, parse, run_command
from run.presets import SFT_DEMO
from train import TrainConfig, train

BATCH, FITS = 16, 60            # conversations of a step; tokens of one, so that two fit a context
SAME = "I do not know."
SYSTEM = "You are an assistant who knows the Python library."
OTHER_SYSTEM = "Answer in one sentence."
UNSEEN = "Tell me about `{head}`."
ADAPTER = dict(r=8, alpha=16.0, target_modules=("all-linear",))
# A conversation as one text with labels everywhere; spelled as `plain` spells it.
WHOLE = Template(start=END_OF_TEXT, user="User:", opening="", end=END_OF_TEXT)
STUDIES = ("rates", "labels", "turns", "repeats", "same", "wording", "lengths", "system", "topics")
Talk = list[dict[str, str]]


@dataclass(frozen=True)
class DataConfig:
    study: tuple[str, ...] = ("all",)  # which of rates, labels, turns, repeats, same, wording,
        # lengths, system, topics; or all
    init_from: str = "out/demo"  # the run to start from
    seeds: int = 3  # runs of each arm, with seeds 0, 1, ...
    steps: int = 100  # of each run, 16 conversations a step
    out: str = "out/chat_data"  # folder of the runs; what is there is not done again

    def __post_init__(self):
        for name in self.study:
            if name not in (*STUDIES, "all"):
                raise ValueError(f"study={name} is unknown; choose {', '.join(STUDIES)} or all")
        for name, least in (("seeds", 1), ("steps", 4)):        # 64 conversations, which one
            if getattr(self, name) < least:                     # study repeats 64 times
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")


@dataclass(frozen=True)
class Arm:
    """What one run is trained on; runs with the same name are the same run."""
    name: str
    talks: list[Talk]
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    talks: list[Talk]
    labels: str = "all"


# ------------------------------------------------------------------------------------------------
# Conversations

def functions(talks: list[dict[str, Any]], tokenizer: Any, block_size: int
              ) -> list[tuple[str, str]]:
    """("json.dumps(obj)", answer) of each function whose question and answer are short enough."""
    found = {}
    for talk in talks:
        question, answer = talk["messages"][:2]
        match = re.search(r"`([^`]+\([^`]*\))`", question["content"])
        head = question.get("input") or match and match[1]
        if head and len(chat.encode(pair(head, answer["content"]), tokenizer, "plain")[0]) \
                <= min(FITS, block_size // 2):
            found[head] = answer["content"]
    return list(found.items())


def pair(head: str, answer: str, way: str = "") -> Talk:
    """A question about a function in one way, by default in one of four, and the answer."""
    way = way or pydocs.FUNCTION[sum(head.encode()) % len(pydocs.FUNCTION)]
    return [{"role": "user", "content": way.format(head=head, name=head.partition("(")[0])},
            {"role": "assistant", "content": answer}]


def whole(talk: Talk) -> Talk:
    """The same text as one answer, for WHOLE."""
    return [{"role": "user", "content": "-"},
            {"role": "assistant", "content": f" {talk[0]['content']}\n\nAssistant: "
                                             f"{talk[1]['content']}"}]


def told(talk: Talk, system: str) -> Talk:
    return [{"role": "system", "content": system}, *talk]


def joined(talks: list[Talk]) -> list[Talk]:
    """Every two conversations behind each other: the second is about something else."""
    return [a + b for a, b in zip(talks[::2], talks[1::2])]


# ------------------------------------------------------------------------------------------------
# Studies

def studies(seen: list[tuple[str, str]], unseen: list[tuple[str, str]], count: int,
            ) -> Iterator[tuple[str, list[Arm], dict[str, Asked]]]:
    """(name, arms, tests): seen and unseen are functions with answers, count those of a run."""
    if len(seen) < count:
        raise ValueError(f"there are {len(seen):,} questions to train on, and a run asks "
                         f"{count:,}; give fewer steps")
    talks, checks = [pair(*f) for f in seen[:count]], [pair(*f) for f in unseen]
    base, val = Arm("base", talks), Asked(checks)

    rates = [Arm(f"all_{lr:g}", talks, rate(lr)) for lr in (1e-4, 5e-4, 8e-3)]
    adapters = [Arm(f"lora_{lr:g}", talks, {**rate(lr), "lora": ADAPTER})
                for lr in (1e-3, 4e-3, 1.6e-2)]
    yield "rates", [*rates[:2], base, rates[2], *adapters], {"answers": val}

    yield "labels", [base, Arm("whole", list(map(whole, talks)), {"template": "whole"})], \
        {"answers": val}

    twice, both = joined(talks), joined(checks)
    yield "turns", [Arm("all", twice), Arm("last", twice, {"labels": "last"})], \
        {"both answers": Asked(both), "second answers": Asked(both, "last")}

    repeats = [Arm(f"repeats_{times}", talks[:count // times]) for times in (4, 16, 64)]
    yield "repeats", [base, *repeats], {"answers": val, "trained on": Asked([])}

    same = [Arm(f"same_{share:g}", [pair(head, SAME if i % round(1 / share) == 0 else answer)
                                    for i, (head, answer) in enumerate(seen[:count])])
            for share in (0.1, 0.5)]
    yield "same", [base, *same], {"answers": val, "says it": Asked([pair(h, SAME)
                                                                  for h, _ in unseen])}

    first = pydocs.FUNCTION[0]
    yield "wording", [base, Arm("one_way", [pair(*f, first) for f in seen[:count]])], \
        {"this wording": Asked([pair(*f, first) for f in unseen]), "four wordings": val,
         "an unseen one": Asked([pair(*f, UNSEEN) for f in unseen])}

    middle = statistics.median(len(answer) for _, answer in seen)
    short, long = ([f for f in seen if (len(f[1]) > middle) == longer] for longer in (False, True))
    size = min(len(short), len(long), count)
    yield "lengths", [Arm("both", [pair(*f) for f in seen[:size]]),
                      Arm("short", [pair(*f) for f in short[:size]]),
                      Arm("long", [pair(*f) for f in long[:size]])], \
        {"short answers": Asked([pair(*f) for f in unseen if len(f[1]) <= middle]),
         "long answers": Asked([pair(*f) for f in unseen if len(f[1]) > middle])}

    yield "system", [base, Arm("always", [told(t, SYSTEM) for t in talks]),
                     Arm("half", [told(t, SYSTEM) if i % 2 else t for i, t in enumerate(talks)])], \
        {"without": val, "with it": Asked([told(t, SYSTEM) for t in checks]),
         "with another": Asked([told(t, OTHER_SYSTEM) for t in checks])}

    yield "topics", [base, Arm("switch", twice, {"batch_tokens": 0.5})], \
        {"alone": Asked([t for a, t in zip(checks[::2], checks[1::2])]),
         "after another topic": Asked(both, "last")}


def rate(lr: float) -> dict[str, float]:
    return {"learning_rate": lr, "min_learning_rate": lr / 10}


# ------------------------------------------------------------------------------------------------
# Runs

def perform(arm: Arm, seed: int, checks: list[Talk], config: DataConfig) -> Path:
    """Train one run, if it is not finished; what it prints goes into screen.txt of its folder."""
    folder = Path(config.out) / arm.name / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "screen.txt", "a") as screen, contextlib.redirect_stdout(screen):
        if arm.settings.get("template") == "whole":
            checks = list(map(whole, checks))
        conversations.write_conversations(
            folder / "data", [{"messages": talk} for talk in arm.talks], "data/pydocs.py",
            val=[{"messages": talk} for talk in checks])
        share = arm.settings.get("batch_tokens", 1)
        summary = train(build(TrainConfig, {
            **SFT_DEMO, "init_from": config.init_from, "out": str(folder), "seed": seed,
            "data": str(folder / "data"), "epochs": 0, "max_steps": config.steps, "eval_every": 0,
            "save_every": 0, "sample_tokens": 0, **arm.settings, "compile": "off",
            "batch_tokens": int(share * SFT_DEMO["batch_tokens"])}))
    if summary["step"] < config.steps:              # stopped by a signal, which train() obeys
        raise KeyboardInterrupt
    return folder


def as_samples(test: Asked, tokenizer: Any, block_size: int) -> Samples:
    ids, marks, offsets = [], [], [0]
    for talk in test.talks:
        row, labels = chat.render(talk, tokenizer, "plain", test.labels)
        ids, marks = ids + row, marks + [label >= 0 for label in labels]
        offsets.append(len(ids))
    return Samples(np.array(ids, np.int32), np.array(marks), np.array(offsets, np.int64),
                   block_size)


def measure(arm: Arm, folder: Path, tests: dict[str, Asked]) -> dict[str, dict[str, float]]:
    """The figures of each test; one without conversations is of those that were trained on."""
    model, tokenizer = load.load_base(folder)
    return {name: answer_figures(model, as_samples(
        test if test.talks else Asked(arm.talks[:300]), tokenizer,
        model.config.block_size).evaluation_batches(32)) for name, test in tests.items()}


def all_rows(config: DataConfig) -> Iterator[dict[str, Any]]:
    """Train and measure everything, seed by seed."""
    TEMPLATES["whole"] = WHOLE
    model, tokenizer = load.load_base(config.init_from)
    parts = conversations.split(pydocs.questions(), 0.1)
    seen, unseen = (functions(part, tokenizer, model.config.block_size) for part in parts)
    trained_on = {answer for _, answer in seen}
    unseen = [f for f in unseen if f[1] not in trained_on]
    checks = [pair(*f) for f in unseen[:2 * BATCH]]         # that the runs themselves look at
    for seed in range(config.seeds):
        drawn = random.Random(seed).sample(seen, len(seen))
        for study, arms, tests in studies(drawn, unseen, config.steps * BATCH):
            for arm in arms if study in config.study or "all" in config.study else ():
                folder = perform(arm, seed, checks, config)
                for test, figures in measure(arm, folder, tests).items():
                    yield {"study": study, "arm": arm.name, "seed": seed, "test": test,
                           **{key: round(value, 5) for key, value in figures.items()}}


def table(rows: list[dict[str, Any]], study: str) -> str:
    """Loss of each arm in each test: the mean over seeds, and the deviation; for "says it" and
    "trained on" the share that is said word for word too."""
    here = [row for row in rows if row["study"] == study]
    tests = list(dict.fromkeys(row["test"] for row in here))
    lines = [f"| {study} | {' | '.join(tests)} |", "|---" * (len(tests) + 1) + "|"]
    for arm in dict.fromkeys(row["arm"] for row in here):
        cells = []
        for test in tests:
            found = [row for row in here if (row["arm"], row["test"]) == (arm, test)]
            cell = f"{statistics.mean(row['loss'] for row in found):.3f}"
            if len(found) > 1:
                cell += f" ± {statistics.stdev(row['loss'] for row in found):.3f}"
            if test in ("says it", "trained on"):
                cell += f", {statistics.mean(row['exact'] for row in found):.1%}"
            cells.append(cell)
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(words: list[str]) -> None:
    config = parse(DataConfig, words, "python -m experiments.chat_data", about=__doc__)
    rows: list[dict[str, Any]] = []
    for row in all_rows(config):
        rows.append(row)
        print(json.dumps(row), flush=True)
        write_json(Path(config.out) / "results.json",
                   {"config": dataclasses.asdict(config), "rows": rows})
    for study in dict.fromkeys(row["study"] for row in rows):
        print("\n" + table(rows, study))


if __name__ == "__main__":
    run_command(main)
