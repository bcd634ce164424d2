"""Advice on chat data, tested: each piece of it by data sets that differ in one thing.

    python -m experiments.studies.chat --init_from=out/demo --seeds=3

Writes out/chat/data/STUDY-ARM.TEST, an arm's conversations about Python's library with the
validation split of a test, and has experiments.compare train on them for equal steps; its settings
may follow. No arm is judged by anything that one was trained on, nor by the same answer. The
question is that of docs/LOG.md, "chat data: which advice shows in the loss?".
"""
import re
import statistics
from pathlib import Path
from typing import Any, Iterator

from data import conversations, pydocs
from experiments import compare
from run.config import run_command

OUT, STEPS, BATCH, LONGEST = Path("out/chat"), 100, 16, 180     # LONGEST: characters, to fit twice
SAME, SYSTEM = "I do not know.", "You are an assistant who knows the Python library."
UNSEEN = "Tell me about `{head}`."
Talk = list[dict[str, str]]


def pair(head: str, answer: str, way: str = "") -> Talk:
    """A question about a function in one way, by default in one of four, and the answer."""
    way = way or pydocs.FUNCTION[sum(head.encode()) % len(pydocs.FUNCTION)]
    return [{"role": "user", "content": way.format(head=head, name=head.partition("(")[0])},
            {"role": "assistant", "content": answer}]


def functions(talks: list[dict[str, Any]]) -> dict[str, str]:
    """{"json.dumps(obj)": answer} of each function whose question and answer are short."""
    found = {}
    for question, answer in (talk["messages"][:2] for talk in talks):
        head = re.search(r"`([^`]+\([^`]*\))`", question["content"])
        if head and len(head[1] + answer["content"]) <= LONGEST:
            found[head[1]] = answer["content"]
    return found


def studies(seen: list[tuple[str, str]], unseen: list[tuple[str, str]], count: int
            ) -> Iterator[tuple[str, dict[str, list[Talk]], dict[str, list[Talk]]]]:
    """(name, arms, tests): functions with answers to train on, and others to validate on. The first
    arm is the base."""
    first = pydocs.FUNCTION[0]
    talks, checks = [pair(*f) for f in seen[:count]], [pair(*f) for f in unseen]
    told, asked = ([[{"role": "system", "content": SYSTEM}, *talk] for talk in part]
                   for part in (talks, checks))
    yield "repeats", {"once": talks, **{f"times{n}": talks[:count // n] for n in (4, 16, 64)}}, \
        {"answers": checks}
    yield "same", {"none": talks, **{f"one-in-{n}": [
        pair(head, answer if i % n else SAME) for i, (head, answer) in enumerate(seen[:count])]
        for n in (10, 2)}}, {"answers": checks, "says-it": [pair(head, SAME) for head, _ in unseen]}
    yield "wording", {"four": talks, "one": [pair(*f, first) for f in seen[:count]]}, \
        {"one": [pair(*f, first) for f in unseen], "four": checks,
         "unseen": [pair(*f, UNSEEN) for f in unseen]}
    middle = statistics.median(len(answer) for _, answer in seen)
    short, long = ([f for f in seen if (len(f[1]) > middle) == longer] for longer in (False, True))
    size = min(len(short), len(long), count)
    yield "lengths", {name: [pair(*f) for f in found[:size]] for name, found in (
        ("both", seen), ("short", short), ("long", long))}, \
        {"short": [pair(*f) for f in unseen if len(f[1]) <= middle],
         "long": [pair(*f) for f in unseen if len(f[1]) > middle]}
    yield "system", {"never": talks, "always": told, "half": [
        both[i % 2] for i, both in enumerate(zip(talks, told))]}, \
        {"without": checks, "with": asked}
    yield "topics", {"single": talks, "pairs": [a + b for a, b in zip(talks[::2], talks[1::2])]}, \
        {"alone": checks, "after": [a + b for a, b in zip(checks[::2], checks[1::2])]}


def main(words: list[str]) -> None:
    parts = [functions(part) for part in conversations.split(pydocs.questions(), 0.1)]
    unseen = [f for f in parts[1].items() if f[1] not in parts[0].values()]
    common = ["sft-demo", f"--out={OUT}", "--epochs=0", f"--max_steps={STEPS}"]
    for study, arms, tests in studies(list(parts[0].items()), unseen, STEPS * BATCH):
        for test, val in tests.items():
            folders = [OUT / "data" / f"{study}-{arm}.{test}" for arm in arms]
            for folder, talks in zip(folders, arms.values()):
                if not (folder / "meta.json").exists():
                    conversations.write_conversations(
                        folder, [{"messages": talk} for talk in talks], "data/pydocs.py",
                        val=[{"messages": talk} for talk in val])
            compare.main([*common, f"--name={study}-{test}", f"--data={folders[0]}",
                          f"--set=data={','.join(map(str, folders[1:]))}", *words])
    common.append(f"--data={OUT / 'data' / 'repeats-once.answers'}")
    compare.main([*common, "--name=labels",
                  f"--patch={Path(__file__).parent / 'all_labels.py'}", *words])
    compare.main([*common, "--name=rates", "--variant=lora.r=8 lora.target_modules=all-linear",
                  "--tune=learning_rate=1e-4,5e-4,1e-3,2e-3,4e-3,8e-3,1.6e-2", *words])


if __name__ == "__main__":
    run_command(main)
